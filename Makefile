# `make up` and `make test` are the two commands; the rest are parts of them. Run as root (or through sudo).
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin:$(HOME)/.cargo/bin
BPF_RUSTC := $(wildcard target/bpf-toolchain/usr/bin/rustc)
ifneq ($(BPF_RUSTC),)
export SLUICE_BPF_RUSTC := $(abspath $(BPF_RUSTC))
endif
CARGO_FLAGS := --workspace --release
# Clean builds are faster and a third of the size without; `cargo` by hand stays incremental.
export CARGO_INCREMENTAL ?= 0

FUZZ_SECONDS ?= 60

.PHONY: up down test test-cni test-kernels fuzz setup build images lint bench bench-cni bench-lb bench-proxy bench-rss

up: setup build images
	target/release/sluice up

down:
	target/release/sluice down

# The programs and the tests in one build: what only tests depend on turns on features of shared crates, so that a build
# without them would be another one. Then the tests, which use those programs. One failure hides no other.
test: setup
	cargo build $(CARGO_FLAGS) --all-targets
	@target/release/xtask images
	@rm -f target/failed-*.log
	cargo test $(CARGO_FLAGS) --no-fail-fast || { cat target/failed-*.log 2>/dev/null; exit 1; }

# The plugin called at random 10,000 times, some of the calls killed, against a model (docs/cni.md).
test-cni:
	SLUICE_CNI_CALLS=10000 cargo test --release -p sluice-cni --test plugin -- random --nocapture

# The kernel's side on older kernels, each in a machine that QEMU emulates. KERNELS="a.deb b.deb" are booted instead of
# the three. Minutes: nothing there runs at the speed of this machine. One failure hides no other.
test-kernels: setup
	cargo build $(CARGO_FLAGS) --all-targets
	cargo test $(CARGO_FLAGS) --no-run --message-format=json >target/tests.json
	@failed=0; kernels=$$(./scripts/kernels.sh $(KERNELS)) || failed=1; \
	  for kernel in $$kernels; do target/release/xtask kernel $$kernel || failed=1; done; exit $$failed

# Each fuzz target for FUZZ_SECONDS, from its committed seeds, from what an hour's run has found (found.tar.xz: a set of inputs
# that covers as much) and from what earlier runs here have. Coverage without an address sanitizer, which the stable toolchain
# lacks; no unsafe code is fuzzed.
fuzz: export RUSTC_BOOTSTRAP := 1
fuzz: setup
	@cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked --version ^0.13
	cd tests/fuzz && cargo fuzz build --sanitizer none --fuzz-dir .
	@tar -C tests/fuzz -xJf tests/fuzz/found.tar.xz --skip-old-files
	@cd tests/fuzz && for target in $$(cargo fuzz list --fuzz-dir .); do \
	  mkdir -p corpus/$$target && cargo fuzz run --sanitizer none --fuzz-dir . $$target corpus/$$target seeds/$$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -max_len=20000 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 || exit 1; done

setup:
	@./scripts/setup.sh

build:
	cargo build $(CARGO_FLAGS)

images: build
	@target/release/xtask images

lint:
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

bench: bench-proxy bench-cni bench-lb bench-rss

# The plugin beside the reference plugins (apt package), from ADD until the link is gone after DEL. As root, and ahead of
# what else runs on the machine.
bench-cni:
	cargo build --release -p sluice-cni -p sluice-bench
	@chrt --rr 20 target/release/bench-cni

# The sidecar beside Envoy (PyPI), nginx and HAProxy (Debian): CPU time, latency, memory. ARGS="--only h1 --rounds 3".
bench-proxy:
	@./scripts/peers.sh
	cargo build --release -p sluice-proxy -p sluice-bench
	@target/release/bench-proxy $(ARGS)

# A service's address beside the pod's own and kube-proxy's nftables rules: CPU and time per connection; following changes.
bench-lb:
	cargo build --release -p sluice-bench
	@target/release/bench-lb

# Resident memory of the agents; SERVICES=10000 adds so many services.
bench-rss: build images
	@./scripts/rss.sh
