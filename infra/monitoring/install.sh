#!/usr/bin/env bash
# Installs Debian's Prometheus and its Pushgateway: promtool tests the alerts, `jobs/cluster.py up --metrics` starts both servers.
exec "$(dirname "$0")/../debian.sh" "prometheus promtool prometheus-pushgateway" prometheus prometheus-pushgateway
