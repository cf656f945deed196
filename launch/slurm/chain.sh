#!/usr/bin/env bash
# The whole pipeline as Slurm jobs that wait for each other: shards -> pre-training -> probe, fine-tuning, detection.
#
#   TRAIN=NCT-CRC-HE-100K TEST=CRC-VAL-HE-7K WORK=work NODES=2 GPUS=8 CPUS=96 \
#       bash launch/slurm/chain.sh --run.epochs 200
#
# Arguments go to pre-training and override its recipe. A job starts when the jobs that it needs have succeeded, also
# after they were preempted and requeued. If one of them fails, the jobs that need it are cancelled. The downstream jobs
# find the encoder by the MLflow id of the run.
#
# Settings of all jobs are Slurm's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT (24:00:00) and
# SBATCH_MEM_PER_NODE (200G). There is none for CPUs: use CPUS. Variables of this script:
#   TRAIN, TEST   folders of tiles, with one folder for each class
#   WORK          folder for shards, the run and the reports, seen by every node; default work
#   GLANDS        the unzipped GlaS, for detection (extra `detection`); default none
#   RECIPE        default nct_resnet18
#   NODES, GPUS   nodes of pre-training, GPUs of each node; default 1 and 0. The other jobs take one GPU if GPUS > 0
#   CPUS          cores of a node for pre-training and for writing shards; default 1. Jobs of one GPU get its share
#   PROBE, FINETUNE, DETECT   more arguments for these verbs
# and job.sbatch's CA2CL_VENV, CA2CL, CA2CL_PROCESSES, CA2CL_ACCELERATE.
set -euo pipefail
: "${TRAIN:?the folder of training tiles, such as NCT-CRC-HE-100K}"
: "${TEST:?the folder of test tiles, such as CRC-VAL-HE-7K}"
WORK=${WORK:-work} NODES=${NODES:-1} GPUS=${GPUS:-0} CPUS=${CPUS:-1} RECIPE=${RECIPE:-nct_resnet18}
read -ra probe <<<"${PROBE:-}"
read -ra finetune <<<"${FINETUNE:-}"
read -ra detect <<<"${DETECT:-}"
job=launch/slurm/job.sbatch
mkdir -p "$WORK"

# submit NAME NODES GPUS CPUS AFTER VERB ...: print the job id; AFTER is "" or ids joined by colons
submit() {
    local name=$1 nodes=$2 gpus=$3 cpus=$4 after=$5 flags=(--parsable --kill-on-invalid-dep=yes)
    shift 5
    flags+=(--job-name "ca2cl-$name" --nodes "$nodes" --cpus-per-task "$cpus" --output "$WORK/%x-%j.log")
    if [ "$gpus" -gt 0 ]; then flags+=(--gpus-per-node "$gpus"); fi
    if [ -n "$after" ]; then flags+=(--dependency "afterok:$after"); fi
    sbatch "${flags[@]}" "$job" "$@"
}

one=$((GPUS > 0 ? 1 : 0)) share=$((CPUS / (GPUS > 1 ? GPUS : 1)))
share=$((share > 0 ? share : 1))
processes=${CA2CL_PROCESSES:-}
export CA2CL_LOGS=$WORK/logs CA2CL_PROCESSES=
train=$(submit shard-train 1 0 "$CPUS" "" shard "$TRAIN" "$WORK/shards/train")
test=$(submit shard-test 1 0 "$CPUS" "" shard "$TEST" "$WORK/shards/test")
run=$(CA2CL_PROCESSES=$processes submit pretrain "$NODES" "$GPUS" "$CPUS" "$train" \
    pretrain --recipe "$RECIPE" --data.shards "$WORK/shards/train" --run.output_dir "$WORK/run" "$@")

export CA2CL_RUN=$WORK/run
sets=(--train "$WORK/shards/train" --test "$WORK/shards/test")
submit probe 1 "$one" "$share" "$run:$test" \
    probe "${sets[@]}" --output "$WORK/probe.json" "${probe[@]}" >/dev/null
submit finetune 1 "$one" "$share" "$run:$test" \
    finetune "${sets[@]}" --output_dir "$WORK/finetune" "${finetune[@]}" >/dev/null
if [ -n "${GLANDS:-}" ]; then
    submit detect 1 "$one" "$share" "$run" \
        detect --dataset glas --data "$GLANDS" --output_dir "$WORK/detect" "${detect[@]}" >/dev/null
fi
squeue --me --format "%8i %18j %10T %E"
