#!/usr/bin/env bash
# Installs packages of Debian, and starts nothing of them. Does nothing if their programs are there.
#   infra/debian.sh "PROGRAM ..." PACKAGE ...
set -euo pipefail
read -ra programs <<<"$1"
packages=("${@:2}")

missing() {
    local program
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || return 0
    done
    return 1
}

refuse() {
    echo "infra/debian.sh: $1" >&2
    exit 3
}

missing || exit 0
command -v apt-get >/dev/null || refuse "apt-get is missing; install ${packages[*]} by other means."
[ "$(id -u)" -eq 0 ] || refuse "must be root to install ${packages[*]}; run it once with sudo."

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Packages of servers would start them where systemd runs; who needs one here starts its own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
missing && refuse "${packages[*]} are installed, but a program of ${programs[*]} is still missing."
"${programs[0]}" --version
