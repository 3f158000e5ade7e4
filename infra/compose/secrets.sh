#!/usr/bin/env bash
# Makes the passwords and keys of compose.yaml, once, in .env beside it, which its owner alone can read.
set -euo pipefail
cd "$(dirname "$0")"

if [ -e .env ]; then
    echo "infra/compose/.env is there: its secrets are kept (remove it and the volumes for new ones)"
    exit 0
fi
secret() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }
umask 077
{
    echo "FLAM_RAY_TOKEN=$(secret 32)"
    echo "FLAM_MLFLOW_PASSWORD=$(secret 24)"
    echo "FLAM_MLFLOW_SESSION_KEY=$(secret 32)"
    echo "FLAM_POSTGRESQL_PASSWORD=$(secret 24)"
    echo "FLAM_S3_ACCESS_KEY=$(secret 10)"
    echo "FLAM_S3_SECRET_KEY=$(secret 20)"
    echo "FLAM_GRAFANA_PASSWORD=$(secret 24)"
} >.env.part
mv .env.part .env
echo "infra/compose/.env has new secrets"
