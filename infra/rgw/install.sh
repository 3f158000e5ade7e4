#!/usr/bin/env bash
# Installs Ceph's S3 gateway from Debian, for the tests marked rgw. Does nothing if it is there.
set -euo pipefail

# Packages and the programs of them that the tests start.
packages=(radosgw ceph-mon ceph-osd ceph-common)
programs=(radosgw radosgw-admin ceph-mon ceph-osd ceph monmaptool)

missing() {
    local program
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || return 0
    done
    return 1
}

refuse() {
    echo "infra/rgw/install.sh: $1" >&2
    exit 3
}

missing || exit 0
command -v apt-get >/dev/null || refuse "apt-get is missing; install Ceph's ${packages[*]} by other means."
[ "$(id -u)" -eq 0 ] || refuse "must be root to install ${packages[*]}; run it once with sudo."

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Ceph's packages would start their services where systemd runs; the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
missing && refuse "${packages[*]} are installed, but a program of ${programs[*]} is still missing."
radosgw --version
