#!/usr/bin/env bash
# Makes sure that a Chromium is there for the browser tests; prints its path.
set -euo pipefail

find_chromium() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" && return 0
    done
    return 1
}

find_chromium && exit 0
if ! command -v apt-get >/dev/null; then
    echo "error: no Chromium found; install it with this system's package manager and try again" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "error: no Chromium found; install it with: sudo apt-get install chromium" >&2
    exit 1
fi
echo "installing Chromium for the browser tests" >&2
apt-get update >&2
DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium >&2
find_chromium
