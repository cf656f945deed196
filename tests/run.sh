#!/usr/bin/env bash
# Make an environment, install the project and run every check: style, types, tests.
# Further arguments go to pytest: `bash tests/run.sh -m slow`, `bash tests/run.sh tests/unit/data/test_lanes.py`.
# CA2CL_VENV is the environment's folder (default .venv-test).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
venv=${CA2CL_VENV:-.venv-test}
make_environment "$venv" "[test]"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# Types are checked beside the tests: without its cache mypy takes a minute of one core.
"$venv/bin/mypy" & types=$!
# One intra-op thread a process: the tests start processes of their own, and results must not depend on the machine.
export OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1
# Two files at a time: most tests wait for processes that they started.
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 "$@" && tests=0 || tests=$?
wait "$types"
exit "$tests"
