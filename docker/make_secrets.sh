#!/usr/bin/env bash
# Create random passwords for docker/compose.yaml in docker/secrets/ (ignored by git) or in the given folder. Existing
# passwords are kept, because the databases use them. Store a copy separately from the backups.
set -euo pipefail
folder=${1:-$(dirname "$(readlink -f "$0")")/secrets}

# Only the owner may enter the folder. Its files are readable by all, because each container runs as a different user
# and sees the files with these permissions.
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
# ... and as SeaweedFS reads them, with permissions for this bucket only
keep_or_write s3_identities <<JSON
{"identities": [{"name": "mlflow", "actions": ["Read:mlflow", "Write:mlflow", "List:mlflow", "Tagging:mlflow"],
  "credentials": [{"accessKey": "$(sed -n 1p "$folder/s3_key")", "secretKey": "$(sed -n 2p "$folder/s3_key")"}]}]}
JSON
