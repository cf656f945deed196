#!/usr/bin/env bash
# Make an environment, install the project and run the whole pipeline on synthetic tissue: shards, pre-training, the
# registered encoder, a probe, a report. Needs Python >= 3.10, no GPU and, after the install, no network.
# Further arguments go to `ca2cl quickstart`: `bash launch/quickstart.sh my-folder --steps 600`.
# CA2CL_VENV is the environment's folder (default .venv), PYTHON the interpreter that makes it.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
venv=${CA2CL_VENV:-.venv}
make_environment "$venv" ""
exec "$venv/bin/ca2cl" quickstart "$@"
