#!/usr/bin/env bash
# Make the site's pictures from a real run: bash docs/pictures/make.sh FOLDER
# FOLDER is where docs/notebooks/your_tiles.ipynb was run: it has ca2cl-runs, runs/first and shards. Needs Chromium.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$1"
ca2cl doctor --views shards/train views.png --recipe quickstart
ca2cl report runs/first report.html --test shards/test
python "$here/browser.py" --shrink views.png "$here/views.jpg" 600 640
python "$here/browser.py" report.html "$here/report.png" 1100 900
python "$here/mlflow_pages.py" ca2cl-runs mlflow
for name in runs run dataset version; do cp "mlflow/mlflow-$name.png" "$here"; done
