#!/usr/bin/env bash
# Fetches the kernels that `make test-kernels` boots, and what emulates a machine for them. They are unpacked below target/,
# never installed. As root, Debian 12. Prints a folder for each kernel; with arguments, of those packages (files) alone. A kernel
# that cannot be had is named, the others are printed all the same, and the script fails at its end.
set -euo pipefail

say() { printf 'kernels: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
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

# Of `linux-image-R`, `linux-modules-R` and their kinds: Debian has a kernel in one package, Ubuntu in two.
release() { sed -E 's/^linux-(image|modules)(-unsigned|-extra)?-//' <<<"$1"; }

# Of one kernel, to its folder, which counts only when all is done.
unpack() {
    local folder=$1 deb
    shift
    rm -rf "${folder:?}"
    for deb in "$@"; do dpkg -x "$deb" "$folder" || return 1; done
    # Where modules are compressed, `insmod` of a small system cannot read them.
    find "$folder/lib/modules" -name '*.ko.xz' -exec xz -d {} + &&
        depmod -b "$folder" "$(ls "$folder/lib/modules")" &&
        touch "$folder/ready"
}

# The package of the newest kernel of a series.
newest() {
    apt-cache --names-only search "^linux-image-$1[.][0-9.]*[-+].*cloud-amd64\$" | awk '{print $1}' |
        sort -V | tail -n 1
}

debian() {
    local series=$1 package
    package=$(newest "$series")
    if [ -z "$package" ]; then
        say "no kernel $series in apt's lists: run apt-get update; Debian 12 with its security updates has it"
        return 1
    fi
    if [ ! -e "$root/$package/ready" ]; then
        rm -f "$root/$package"_*.deb
        if ! (cd "$root" && apt-get download -qq "$package" 2>/dev/null); then
            say "cannot download $package (kernel $series): is the mirror reachable, are the lists old (apt-get update)?"
            return 1
        fi
        unpack "$root/$package" "$root/$package"_*.deb || return 1
        rm -f "$root/$package"_*.deb
    fi
    printf '%s\n' "$root/$package"
}

# The floor: the first 5.15 of Ubuntu 22.04, whose packages never change. Debian has had no 5.15. The sums are those of the
# list of packages that Ubuntu's archive key (F6ECB3762474EDA9D21B7022871920D1991BC93C) signs.
floor_release=5.15.0-25-generic
floor_version=5.15.0-25.25
floor_from=${SLUICE_UBUNTU_MIRROR:-http://archive.ubuntu.com/ubuntu}
floor_packages="\
linux-signed/linux-image ad56f8c442a54d4f5ff2dff010d00321d53e32b543f3a92f3ba4e042d20a71da
linux/linux-modules d0ba4087d9e1d497925b3481d3531fba6c2a852855f8019d73b0b1385aa4da1f"

floor() {
    local folder=$root/linux-image-$floor_release path sum url deb debs=()
    if [ ! -e "$folder/ready" ]; then
        while read -r path sum; do
            url=$floor_from/pool/main/l/$path-${floor_release}_${floor_version}_amd64.deb
            deb=$root/${url##*/}
            debs+=("$deb")
            # apt's own: through the proxy that apt is told, and refusing what has another sum.
            if ! /usr/lib/apt/apt-helper download-file "$url" "$deb" "SHA256:$sum" >"$root/floor.log" 2>&1; then
                say "cannot download $url (kernel 5.15): $(grep -m 1 '^E:' "$root/floor.log");" \
                    "is it reachable? SLUICE_UBUNTU_MIRROR names another mirror"
                return 1
            fi
        done <<<"$floor_packages"
        unpack "$folder" "${debs[@]}" || return 1
        rm -f "${debs[@]}" "$root/floor.log"
    fi
    printf '%s\n' "$folder"
}

if [ $# -gt 0 ]; then
    declare -A given=()
    for deb in "$@"; do
        name=$(dpkg-deb -f "$deb" Package)
        given[$(release "$name")]+="$deb"$'\n'
    done
    for release in "${!given[@]}"; do
        mapfile -t debs < <(printf %s "${given[$release]}")
        unpack "$root/linux-image-$release" "${debs[@]}" || die "cannot unpack kernel $release: ${debs[*]}"
        printf '%s\n' "$root/linux-image-$release"
    done
    exit
fi
# 5.15 is the floor; 6.1 is Debian 12's own and knows no tcx, 6.12 knows tcx.
failed=0
floor || failed=1
debian 6.1 || failed=1
debian 6.12 || failed=1
exit $failed
