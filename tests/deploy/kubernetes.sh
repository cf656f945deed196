#!/usr/bin/env bash
# Builds every overlay of launch/kubernetes and holds it, strictly, against Kubernetes' and JobSet's schemas; checks that
# misspelt fields are found; and runs the pods' very command as two processes of this machine: preempted, made again, ended.
# Needs `kubectl` or `kustomize`, and what run.sh needs; no cluster. CA2CL_VENV names the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/environment.sh
venv=${CA2CL_VENV:-.venv-deploy}
make_environment "$venv" "[test]"
# Kubernetes' schemas, and JobSet's types
"$venv/bin/pip" install --quiet --disable-pip-version-check kubernetes-validate==1.37.0 kubeflow-trainer-api==2.3.0
export OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1 PYTHONPATH=.
"$venv/bin/python" -m tests.deploy.kubernetes
exec "$venv/bin/python" -m tests.deploy.pods
