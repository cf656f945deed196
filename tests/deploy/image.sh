#!/usr/bin/env bash
# Builds docker/Dockerfile by buildah on a Debian base made by debootstrap, and runs `ca2cl doctor`, the quickstart and
# two processes in the image, as a user who is not root. No Docker, no daemon, no registry.
#
#   bash tests/deploy/image.sh FOLDER     # root; apt-get install buildah debootstrap; 30 GB in FOLDER; a quarter of an hour
#
# DETECTRON2=git+https://... builds that in, and loads it. BUILD_FLAGS are more flags for buildah: --volume and --env for
# a package index of one's own. What FOLDER has already of the base is used again; delete it afterwards.
# shellcheck disable=SC2016  # what is in single quotes is for the shell in the image
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?give a folder}
mkdir -p "$folder"
folder=$(realpath "$folder")
read -ra flags <<<"${BUILD_FLAGS:-}"
export BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver vfs "$@"; }

if [ ! -f "$folder/debian.tar" ]; then
    debootstrap --variant=minbase --include=ca-certificates bookworm "$folder/debian" >"$folder/debootstrap.log"
    tar -C "$folder/debian" -cf "$folder/debian.tar.new" .
    mv "$folder/debian.tar.new" "$folder/debian.tar"
    rm -rf "$folder/debian"
fi
base=$(buildah from scratch)
buildah add --quiet "$base" "$folder/debian.tar" / >/dev/null
buildah commit --quiet --rm "$base" localhost/debian:bookworm >/dev/null

began=$SECONDS
buildah bud --layers=false "${flags[@]}" --build-arg BASE=localhost/debian:bookworm \
    --build-arg EXTRAS="${DETECTRON2:+detection}" --build-arg DETECTRON2="${DETECTRON2:-}" \
    --file docker/Dockerfile --tag localhost/ca2cl . >"$folder/build.log" 2>&1 ||
    { tail -n 30 "$folder/build.log" >&2; exit 1; }
echo "built in $((SECONDS - began)) s: $(buildah images --format '{{.Size}}' localhost/ca2cl)"

inside=$(buildah from localhost/ca2cl)
# the image's own entrypoint, user and folder, as Docker would run it
inside() { buildah run --env HOME=/home/ca2cl --env CUDA_VISIBLE_DEVICES=-1 --env OMP_NUM_THREADS=1 "$inside" -- "$@"; }
inside sh -c '
    set -e
    test "$(id -u)" = 1000 && echo "user      $(id -un), $(id -u)"
    ! command -v g++ && echo "compiler  none"
    du -sh /opt/ca2cl | sed "s/^/packages  /"
'
inside ca2cl doctor || echo "doctor    $? (what it remarks on stands above)"
if [ -n "${DETECTRON2:-}" ]; then
    inside python3 -c 'import detectron2._C, detectron2; print("detectron2", detectron2.__version__)'
fi
inside ca2cl quickstart quickstart
echo "quickstart: 0"
inside sh -c 'ca2cl launch --config_file /opt/ca2cl/accelerate_configs/cpu.yaml --num_processes 2 -m ca2cl pretrain \
    --recipe smoke --data.shards quickstart/shards/train --run.output_dir two'
echo "two processes: 0"
buildah rm "$inside" >/dev/null
