#!/usr/bin/env bash
# Backs up the tracking server of docker/compose.yaml, and puts a backup back.
#   docker/backup.sh save FOLDER       both databases and all artifacts, with SHA-256 sums; FOLDER must not exist yet
#   docker/backup.sh restore FOLDER    in place of what is there now; also on another machine, after make_secrets.sh
# The server is away meanwhile, for as long as copying the artifacts takes. Trainings go on, and send what they have
# afterwards. Passwords of users are in the databases (as hashes), those of docker/secrets/ are not in the backup.
# `save` leaves the containers as they are; `restore` makes them anew where settings differ (docker/.env: compose.yaml).
set -euo pipefail
umask 077 # hashes of passwords, and everybody's artifacts

compose() { docker compose --file "$(dirname "$(readlink -f "$0")")/compose.yaml" "$@"; }
# a program in the store's container, with its volume and without its server
in_store() { compose run --rm --no-deps -T --entrypoint "$1" seaweedfs "${@:2}"; }

save() {
    local folder=$1
    [ ! -e "$folder" ] || { echo "backup: $folder exists: name a new folder" >&2; exit 2; }
    mkdir -p "$folder.partial"
    # A cron job has another environment than the server was started in: made anew, it would forget its name and port.
    compose up --detach --wait --no-recreate postgres
    # Nothing may write: a run's record and its artifacts belong together, and SeaweedFS's files are copied as they lie.
    trap 'compose up --detach --wait --no-recreate' EXIT
    compose stop mlflow seaweedfs
    for database in mlflow mlflow_auth; do
        compose exec -T postgres pg_dump --username=mlflow --format=custom "$database" > "$folder.partial/$database.dump"
    done
    in_store tar -C /data -cf - . > "$folder.partial/artifacts.tar"
    (cd "$folder.partial" && sha256sum ./*.dump artifacts.tar > SHA256SUMS)
    mv "$folder.partial" "$folder"
    echo "saved: $folder"
}

restore() {
    local folder=$1
    (cd "$folder" && sha256sum --check --quiet SHA256SUMS) ||
        { echo "backup: $folder is not a whole backup: nothing was changed" >&2; exit 2; }
    compose up --detach --wait postgres
    trap 'compose up --detach --wait' EXIT
    compose stop mlflow seaweedfs
    for database in mlflow mlflow_auth; do
        # made anew, so that nothing is left of what a newer version added
        compose exec -T postgres dropdb --username=mlflow --maintenance-db=postgres --if-exists --force "$database"
        compose exec -T postgres createdb --username=mlflow --maintenance-db=postgres "$database"
        compose exec -T postgres pg_restore --username=mlflow --dbname="$database" --exit-on-error \
            < "$folder/$database.dump"
    done
    in_store find /data -mindepth 1 -delete
    in_store tar -C /data -xf - < "$folder/artifacts.tar"
    echo "restored: $folder"
}

case "${1:-} $#" in
    "save 2") save "$2" ;;
    "restore 2") restore "$2" ;;
    *) sed -n '2,6s/^# //p' "$0" >&2; exit 2 ;;
esac
