#!/usr/bin/env bash
# Create a user of the tracking server, and print the variables that the user's jobs need:
#   docker/add_user.sh anna > mlflow.env                                         # for jobs on this machine
#   PUBLIC_URI=https://mlflow.example.org docker/add_user.sh anna > mlflow.env   # for other machines, and for pods
#   set -a; . ./mlflow.env; set +a                                               # in a shell
#   kubectl create secret generic ca2cl-mlflow --from-env-file=mlflow.env        # for launch/kubernetes
# Run it on the machine that has docker/secrets/. The script connects to TRACKING_URI (http://127.0.0.1:5000) and prints
# it, unless PUBLIC_URI is set. Other machines cannot reach the server by the default address, and a container on this
# machine only with `docker run --network host`. SECRETS is another folder of secrets.
set -euo pipefail
umask 077
name=${1:?usage: docker/add_user.sh NAME > mlflow.env}
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || { echo "add_user: $name: use letters, digits, '.', '_' and '-'" >&2; exit 2; }
secrets=${SECRETS:-$(dirname "$(readlink -f "$0")")/secrets}
uri=${TRACKING_URI:-http://127.0.0.1:5000}
password=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')

# curl's settings come through a pipe, because `ps` shows arguments to every user
answer=$(curl --config - <<SETTINGS
silent
show-error
fail-with-body
url = "$uri/api/2.0/mlflow/users/create"
user = "admin:$(cat "$secrets/mlflow_admin_password")"
header = "Content-Type: application/json"
data = "{\"username\": \"$name\", \"password\": \"$password\"}"
SETTINGS
) || { echo "add_user: $uri did not make the user: $answer" >&2; exit 1; }

printf 'MLFLOW_TRACKING_URI=%s\nMLFLOW_TRACKING_USERNAME=%s\nMLFLOW_TRACKING_PASSWORD=%s\n' \
    "${PUBLIC_URI:-$uri}" "$name" "$password"
