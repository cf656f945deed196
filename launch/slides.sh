#!/usr/bin/env bash
# Slides to shards, a pre-trained encoder, a probe on other slides, heat-maps of these, and a report.
#
#     bash launch/slides.sh cohort.csv OUT --mpp 0.5
#
# cohort.csv has the columns slide, patient, label, mpp and split, with the splits train and test (docs/slides.md). A
# folder of slides, which has no labels, does in its place: all of it is trained on, there is no probe, and the maps are of
# clusters. Arguments after OUT say how slides are cut (--mpp, --tile, --tissue, --max_tiles ...).
# RECIPE is the recipe of the pre-training: smoke (a test run of about a minute, which learns nothing useful) unless set.
# CA2CL is the command, if it is not on the path. Run it again to go on.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: bash launch/slides.sh SLIDES OUT [--mpp 0.5 and other settings of tiles]" >&2
    exit 2
fi
slides=$1 out=$2
shift 2
case " $* " in *" --mpp"*) ;; *) set -- --mpp 0.5 "$@" ;; esac
ca2cl=${CA2CL:-ca2cl} recipe=${RECIPE:-smoke}
tracking=(--tracking.root "$out/tracking")

stage() {
    local name=$1 started=$SECONDS
    shift
    printf '\n$ %s\n' "$*"
    "$@"
    echo "($name: $((SECONDS - started)) s)"
}

case $slides in
*.csv)
    for split in train test; do
        stage "shard $split" "$ca2cl" shard "$slides" "$out/shards/$split" --split "$split" --preview "$out/$split.html" "$@"
    done
    ;;
*) stage shard "$ca2cl" shard "$slides" "$out/shards/train" --preview "$out/train.html" "$@" ;;
esac

stage pretrain "$ca2cl" pretrain --recipe "$recipe" --data.shards "$out/shards/train" --run.output_dir "$out/run" \
    "${tracking[@]}"

test=()
if [ -d "$out/shards/test" ]; then
    test=(--test "$out/shards/test")
    stage probe "$ca2cl" probe --encoder "$out/run" --train "$out/shards/train" "${test[@]}" --labels 0.1 1.0 \
        --output "$out/probe.json" "${tracking[@]}"
    stage heatmap "$ca2cl" heatmap "$out/probe.json" "$slides" --split test --out "$out/maps" "$@" "${tracking[@]}"
else
    stage heatmap "$ca2cl" heatmap "$out/run" "$slides" --clusters 6 --out "$out/maps" "$@" "${tracking[@]}"
fi

stage report "$ca2cl" report "$out/run" "$out/report.html" "${test[@]}" "${tracking[@]}"
printf '\nLook at %s/*.html and %s/maps/*.png.\n' "$out" "$out"
