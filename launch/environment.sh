# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: make a virtual environment and install the project into it.
# make_environment FOLDER EXTRAS: FOLDER is created if it does not exist; EXTRAS is "" or, for example, "[test]".
make_environment() {
    local folder=$1 extras=$2 python=${PYTHON:-python3}
    "$python" - <<'PY' || return 2
import sys
if sys.version_info < (3, 10):
    sys.exit(f"Python {sys.version.split()[0]} is too old: set PYTHON to one of 3.10 or newer")
PY
    if [ ! -x "$folder/bin/python" ]; then
        "$python" -m venv "$folder"
    fi
    echo "installing into $folder (torch is large: the first time takes minutes)"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extras"
}
