#!/usr/bin/env bash
# Build the documentation site: docs/_build/html/index.html. Any warning, such as a broken link, is an error.
# Needs the extra "docs": pip install ".[docs]"
set -euo pipefail
cd "$(dirname "$0")"
exec "${PYTHON:-python}" -m sphinx -W --keep-going -q -b html . "${1:-_build/html}"
