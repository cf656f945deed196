#!/bin/sh
# Command of the tracking server, in its container (compose.yaml) and in tests/deploy/tracking.py.
#   mlflow-server.sh            run the server
#   mlflow-server.sh upgrade    upgrade both databases to this version of MLflow (back up first)
# Environment: PGHOST, PGPORT, PGUSER (libpq's own), MLFLOW_S3_ENDPOINT_URL, and
#   SECRETS        folder of the files that make_secrets.sh writes (/run/secrets)
#   AUTH           permissions (mlflow-auth.ini beside this file)
#   ARTIFACTS      location of the artifacts (s3://mlflow)
#   TRACKING_NAME  name by which other machines reach the server through a TLS proxy, if any
#   HOST, PORT     address to listen on (0.0.0.0, 5000)
set -eu
here=$(dirname "$(readlink -f "$0")")
secrets=${SECRETS:-/run/secrets}

# In the environment, because `ps` shows arguments, such as a URI with a password, to every user.
PGPASSWORD=$(cat "$secrets/postgres_password")
AWS_ACCESS_KEY_ID=$(sed -n 1p "$secrets/s3_key")
AWS_SECRET_ACCESS_KEY=$(sed -n 2p "$secrets/s3_key")
MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$secrets/mlflow_admin_password")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$secrets/mlflow_session_key")
export PGPASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_AUTH_CONFIG_PATH="${AUTH:-$here/mlflow-auth.ini}"
# boto3 needs a region, and self-hosted stores have none
export AWS_DEFAULT_REGION="${AWS_DEFAULT_REGION:-us-east-1}"
# do not start processes that evaluate language models
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true

if [ "${1:-}" = upgrade ]; then
    python3 -m mlflow db upgrade postgresql+psycopg2:///mlflow
    exec python3 -m mlflow.server.auth db upgrade --url postgresql+psycopg2:///mlflow_auth
fi

if [ -n "${TRACKING_NAME:-}" ]; then
    # CORS: browsers send the origin of the page, also for this server's own pages, and MLflow refuses unknown origins
    set -- --allowed-hosts "$TRACKING_NAME,localhost,localhost:*,127.0.0.1,127.0.0.1:*" \
        --cors-allowed-origins "https://$TRACKING_NAME" "$@"
fi
# two workers are enough: a training sends a batch of metrics a few times a minute
exec python3 -m mlflow server --app-name basic-auth --host "${HOST:-0.0.0.0}" --port "${PORT:-5000}" --workers 2 \
    --backend-store-uri postgresql+psycopg2:///mlflow --serve-artifacts --artifacts-destination "${ARTIFACTS:-s3://mlflow}" "$@"
