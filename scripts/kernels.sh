#!/usr/bin/env bash
# Fetches the kernels that `make test-kernels` boots, and what emulates a machine for them. They are unpacked below target/,
# never installed. As root, Debian 12. Prints a folder for each kernel; with arguments, of those packages (files) alone.
set -euo pipefail

die() { printf 'kernels: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
root=$(cd "$(dirname "$0")/.." && pwd)/target/kernels
mkdir -p "$root"

missing=()
have qemu-system-x86_64 || missing+=(qemu-system-x86)
have depmod || missing+=(kmod)
have xz || missing+=(xz-utils)
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || die "root is needed to install: ${missing[*]}; run this with sudo"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The package of the newest kernel of a series: 6.1 is Debian 12's own and knows no tcx, 6.12 knows tcx.
newest() {
    apt-cache --names-only search "^linux-image-$1[.][0-9.]*[-+].*cloud-amd64\$" | awk '{print $1}' |
        sort -V | tail -n 1
}

unpack() {
    local deb=$1 name
    name=$(dpkg-deb -f "$deb" Package)
    if [ ! -e "$root/$name/ready" ]; then
        rm -rf "${root:?}/$name"
        dpkg -x "$deb" "$root/$name"
        # Where modules are compressed, `insmod` of a small system cannot read them.
        find "$root/$name/lib/modules" -name '*.ko.xz' -exec xz -d {} +
        depmod -b "$root/$name" "$(ls "$root/$name/lib/modules")"
        touch "$root/$name/ready"
    fi
    printf '%s\n' "$root/$name"
}

if [ $# -gt 0 ]; then
    for deb in "$@"; do unpack "$deb"; done
    exit
fi
for series in 6.1 6.12; do
    package=$(newest "$series")
    [ -n "$package" ] || die "no kernel $series in apt's lists: run apt-get update; Debian 12 with its security updates has it"
    if [ ! -e "$root/$package/ready" ]; then
        (cd "$root" && rm -f "$package"_*.deb && apt-get download -qq "$package" 2>/dev/null) ||
            die "cannot download $package: is the mirror reachable, are the lists old (apt-get update)?"
        unpack "$root/$package"_*.deb >/dev/null
        rm -f "$root/$package"_*.deb
    fi
    printf '%s\n' "$root/$package"
done
