#!/usr/bin/env bash
# Back up the tracking server of docker/compose.yaml, or restore a backup.
#   docker/backup.sh save FOLDER       both databases and all artifacts, with SHA-256 sums; FOLDER must not exist yet
#   docker/backup.sh restore FOLDER    replaces the current content; also on another machine, after make_secrets.sh
# The server is unavailable while artifacts are copied. Trainings continue, and send their data afterwards. The backup
# has the hashes of users' passwords, but not the passwords of docker/secrets/.
# `save` does not change the containers; `restore` recreates them if settings differ (docker/.env, see compose.yaml).
set -euo pipefail
umask 077 # hashes of passwords, and everybody's artifacts

compose() { docker compose --file "$(dirname "$(readlink -f "$0")")/compose.yaml" "$@"; }
# run a program in the store's container, with its volume and without its server
in_store() { compose run --rm --no-deps -T --entrypoint "$1" seaweedfs "${@:2}"; }

save() {
    local folder=$1
    [ ! -e "$folder" ] || { echo "backup: $folder exists: name a new folder" >&2; exit 2; }
    mkdir -p "$folder.partial"
    # --no-recreate: a cron job has another environment than the one that started the server, so a recreated server
    # would lose its name and port
    compose up --detach --wait --no-recreate postgres
    # nothing may write: a run's record must match its artifacts, and SeaweedFS's files are copied directly
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
        # recreated, so that nothing remains of what a newer version added
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
