#!/usr/bin/env bash
# Installs Ceph's S3 gateway from Debian, for the tests marked rgw.
exec "$(dirname "$0")/../debian.sh" "radosgw radosgw-admin ceph-mon ceph-osd ceph monmaptool" \
    radosgw ceph-mon ceph-osd ceph-common
