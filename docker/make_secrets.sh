#!/usr/bin/env bash
# Makes the passwords of docker/compose.yaml, at random, in docker/secrets/ (git ignores it), or in the folder that is
# named. Those that are there already stay: the databases know them. Keep a copy apart from the backups.
set -euo pipefail
folder=${1:-$(dirname "$(readlink -f "$0")")/secrets}

# The folder keeps others out. Its files may be read by all, because each container runs as a user of its own and sees
# them with the rights that they have here.
mkdir -p "$folder"
chmod 700 "$folder"
umask 022

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
keep_or_write() {
    if [ -s "$folder/$1" ]; then
        cat > /dev/null
        echo "$folder/$1: stays as it is"
    else
        cat > "$folder/$1"
        echo "$folder/$1: made"
    fi
}

random | keep_or_write postgres_password
random | keep_or_write mlflow_admin_password
random | keep_or_write mlflow_session_key
# the store's user and key, as MLflow reads them ...
printf 'mlflow\n%s\n' "$(random)" | keep_or_write s3_key
# ... and as SeaweedFS does: rights on this one bucket
keep_or_write s3_identities <<JSON
{"identities": [{"name": "mlflow", "actions": ["Read:mlflow", "Write:mlflow", "List:mlflow", "Tagging:mlflow"],
  "credentials": [{"accessKey": "$(sed -n 1p "$folder/s3_key")", "secretKey": "$(sed -n 2p "$folder/s3_key")"}]}]}
JSON
