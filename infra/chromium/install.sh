#!/usr/bin/env bash
# Installs Debian's Chromium, for the tests of pages. Does nothing if it is there.
set -euo pipefail

refuse() {
    echo "infra/chromium/install.sh: $1" >&2
    exit 3
}

command -v chromium >/dev/null && exit 0
command -v apt-get >/dev/null || refuse "apt-get is missing; install chromium by other means."
[ "$(id -u)" -eq 0 ] || refuse "must be root to install chromium; run it once with sudo."

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null
command -v chromium >/dev/null || refuse "the package chromium is installed, but its program is missing."
chromium --version
