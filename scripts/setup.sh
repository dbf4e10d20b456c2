#!/usr/bin/env bash
# Installs what building, testing and `sluice up` need and this machine lacks. Debian 12 or later, as root.
# Repeating it is quick and changes nothing.
set -euo pipefail

say() { printf '%s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

have cargo || die "cargo is not on PATH: install a Rust toolchain (1.95 or later) with rustup first"
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:${CARGO_HOME:-$HOME/.cargo}/bin"

root=$(cd "$(dirname "$0")/.." && pwd)
bpf_dir="$root/target/bpf-toolchain"

# Programs and the packages that bring them.
missing=()
need() { have "$1" || missing+=("$2"); }
need containerd containerd
need runc runc
need protoc protobuf-compiler
need unshare util-linux
need ldd libc-bin
need nginx nginx-light
need haproxy haproxy
need nft nftables   # what the service addresses are measured beside; no program of ours calls it
need cc gcc
need curl curl
need ip iproute2   # tests break routes with it; no program of ours calls it
need pgrep procps
[ -x /usr/lib/cni/bandwidth ] || missing+=(containernetworking-plugins)   # chained behind ours, and the bench's peers
[ -x /bin/busybox ] && ! ldd /bin/busybox >/dev/null 2>&1 || missing+=(busybox-static)

# The compiler for eBPF: a toolchain with rust-src needs none of it; Debian's packages conflict with Debian's own rustc.
bpf_packages=(rustc-web libstd-rust-web-dev-bpf)
sysroot=$(rustc --print sysroot)
unpack_bpf=no
if [ ! -f "$sysroot/lib/rustlib/src/rust/library/core/Cargo.toml" ]; then
    if dpkg -s rustc >/dev/null 2>&1 || dpkg -s rustup >/dev/null 2>&1; then
        unpack_bpf=yes
    elif ! dpkg -s "${bpf_packages[@]}" >/dev/null 2>&1; then
        missing+=("${bpf_packages[@]}")
    fi
fi

if [ ${#missing[@]} -gt 0 ] || [ "$unpack_bpf" = yes ]; then
    [ "$(id -u)" = 0 ] || die "root is needed to install: ${missing[*]}; run this with sudo"
    have apt-get || die "no apt-get here; install by hand: ${missing[*]}"
fi
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # Services of packages are not wanted: the local cluster starts its own containerd, the benches their own peers.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
if [ "$unpack_bpf" = yes ] && [ ! -x "$bpf_dir/usr/bin/rustc" ]; then
    say "unpacking ${bpf_packages[*]} into $bpf_dir"
    mkdir -p "$bpf_dir/deb"
    apt-get update -qq
    (cd "$bpf_dir/deb" && apt-get download "${bpf_packages[@]}" libstd-rust-web-1.* 2>/dev/null || apt-get download "${bpf_packages[@]}")
    for deb in "$bpf_dir"/deb/*.deb; do dpkg -x "$deb" "$bpf_dir"; done
fi

if ! have bpf-linker; then
    say "building bpf-linker"
    cargo install bpf-linker --version 0.10.3 --locked --quiet
fi

kubectl_minor() { kubectl version --client -o json 2>/dev/null | sed -n 's/.*"minor": *"\([0-9]*\).*/\1/p' | head -n 1; }
minor=$(kubectl_minor || true)
if [ -z "$minor" ] || [ "$minor" -lt 28 ]; then
    [ "$(id -u)" = 0 ] || die "kubectl 1.28 or later is needed; run this with sudo"
    say "installing kubectl from Debian 13 (this release has 1.${minor:-none})"
    tmp=$(mktemp -d)
    mkdir -p "$tmp/lists/partial" "$tmp/cache/archives/partial"
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | head -n 1)
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s trixie main\n' "$mirror" >"$tmp/sources.list"
    apt_trixie=(apt-get -qq -o "Dir::Etc::sourcelist=$tmp/sources.list" -o Dir::Etc::sourceparts=- \
        -o "Dir::State::lists=$tmp/lists" -o "Dir::Cache=$tmp/cache")
    "${apt_trixie[@]}" update 2>/dev/null
    (cd "$tmp" && "${apt_trixie[@]}" download kubectl/trixie 2>/dev/null)
    dpkg -x "$tmp"/kubectl_*.deb "$tmp/root"
    install -m 755 "$tmp/root/usr/bin/kubectl" /usr/local/bin/kubectl
    rm -rf "$tmp"
fi
say "everything needed is installed"
