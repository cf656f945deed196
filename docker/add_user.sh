#!/usr/bin/env bash
# Makes a user of the tracking server, and prints what the user's jobs need in their environment:
#   docker/add_user.sh anna > mlflow.env                                         # for jobs on this machine
#   PUBLIC_URI=https://mlflow.example.org docker/add_user.sh anna > mlflow.env   # for other machines, and for pods
#   set -a; . ./mlflow.env; set +a                                               # in a shell
#   kubectl create secret generic ca2cl-mlflow --from-env-file=mlflow.env        # for launch/kubernetes
# Run it where docker/secrets/ is. TRACKING_URI (http://127.0.0.1:5000) is the address that this script uses, and that
# it prints where PUBLIC_URI names no other. No other machine reaches the server by it, and a container on this one only
# with `docker run --network host`. SECRETS names another folder of secrets.
set -euo pipefail
umask 077
name=${1:?usage: docker/add_user.sh NAME > mlflow.env}
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || { echo "add_user: $name: use letters, digits, '.', '_' and '-'" >&2; exit 2; }
secrets=${SECRETS:-$(dirname "$(readlink -f "$0")")/secrets}
uri=${TRACKING_URI:-http://127.0.0.1:5000}
password=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')

# curl's settings by a pipe: arguments are shown to everybody by `ps`
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
