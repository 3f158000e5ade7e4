#!/usr/bin/env bash
# Installs Debian's Prometheus, whose promtool tests the alerts. Does nothing if it is there.
set -euo pipefail

refuse() {
    echo "infra/monitoring/install.sh: $1" >&2
    exit 3
}

command -v promtool >/dev/null && exit 0
command -v apt-get >/dev/null || refuse "apt-get is missing; install prometheus by other means."
[ "$(id -u)" -eq 0 ] || refuse "must be root to install prometheus; run it once with sudo."

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Its package would start it where systemd runs; nothing here needs it running.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
apt-get install -qq -y --no-install-recommends prometheus >/dev/null
command -v promtool >/dev/null || refuse "the package prometheus is installed, but its program promtool is missing."
promtool --version
