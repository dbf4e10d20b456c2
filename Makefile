# The two commands are `make up` and `make test`; the others are parts of them.
.PHONY: up down test build setup lint bench-proxy

up: setup build
	target/release/sluice up

down:
	target/release/sluice down

test: setup build
	cargo test --workspace --release

build:
	cargo build --workspace --release

setup:
	./scripts/setup.sh

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --release -- -D warnings
