#!/usr/bin/env bash
# Installs Debian's Prometheus: its promtool tests the alerts, and `jobs/cluster.py up --metrics` starts it.
exec "$(dirname "$0")/../debian.sh" "prometheus promtool" prometheus
