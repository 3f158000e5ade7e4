#!/usr/bin/env bash
# Installs Debian's PostgreSQL, on which a test starts the MLflow server of the manifests. The test makes its own database.
exec "$(dirname "$0")/../debian.sh" "psql pg_createcluster" postgresql
