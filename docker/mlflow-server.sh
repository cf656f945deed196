#!/bin/sh
# The tracking server's command: in its container (compose.yaml) and in tests/deploy/tracking.py alike.
#   mlflow-server.sh            serves
#   mlflow-server.sh upgrade    brings both databases to this MLflow's version (back up first)
# From the environment: PGHOST, PGPORT, PGUSER (libpq's own), MLFLOW_S3_ENDPOINT_URL, and
#   SECRETS        folder of the files that make_secrets.sh makes (/run/secrets)
#   AUTH           who may do what (mlflow-auth.ini beside this file)
#   ARTIFACTS      where artifacts lie (s3://mlflow)
#   TRACKING_NAME  the name by which others reach the server through a TLS proxy, if they do
#   HOST, PORT     what it listens on (0.0.0.0, 5000)
set -eu
here=$(dirname "$(readlink -f "$0")")
secrets=${SECRETS:-/run/secrets}

# By the environment: an argument, such as a URI with a password in it, is shown to everybody by `ps`.
PGPASSWORD=$(cat "$secrets/postgres_password")
AWS_ACCESS_KEY_ID=$(sed -n 1p "$secrets/s3_key")
AWS_SECRET_ACCESS_KEY=$(sed -n 2p "$secrets/s3_key")
MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$secrets/mlflow_admin_password")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$secrets/mlflow_session_key")
export PGPASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_AUTH_CONFIG_PATH="${AUTH:-$here/mlflow-auth.ini}"
# boto3 wants one, and stores of one's own have none
export AWS_DEFAULT_REGION="${AWS_DEFAULT_REGION:-us-east-1}"
# processes for evaluating language models
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true

if [ "${1:-}" = upgrade ]; then
    python3 -m mlflow db upgrade postgresql+psycopg2:///mlflow
    exec python3 -m mlflow.server.auth db upgrade --url postgresql+psycopg2:///mlflow_auth
fi

if [ -n "${TRACKING_NAME:-}" ]; then
    # the second: a browser says which page it acts for, this server's own as well, and other names are refused
    set -- --allowed-hosts "$TRACKING_NAME,localhost,localhost:*,127.0.0.1,127.0.0.1:*" \
        --cors-allowed-origins "https://$TRACKING_NAME" "$@"
fi
# two workers: a training sends a batch of numbers a few times a minute
exec python3 -m mlflow server --app-name basic-auth --host "${HOST:-0.0.0.0}" --port "${PORT:-5000}" --workers 2 \
    --backend-store-uri postgresql+psycopg2:///mlflow --serve-artifacts --artifacts-destination "${ARTIFACTS:-s3://mlflow}" "$@"
