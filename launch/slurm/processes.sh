#!/usr/bin/env bash
# Start the processes of one training on all nodes of a Slurm job. For --launcher of `ca2cl study`, by study.sbatch:
#
#   bash launch/slurm/processes.sh -m ca2cl pretrain ...
#
# Signals to this script reach every process: it becomes srun, which passes them on. Variables: those of job.sbatch.
set -euo pipefail
processes=${CA2CL_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_HOST=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
CA2CL=${CA2CL:-${CA2CL_VENV:-.venv}/bin/ca2cl}
LOGS=${CA2CL_LOGS:-logs}/${SLURM_JOB_NAME}-${SLURM_JOB_ID}
CONFIG=${CA2CL_ACCELERATE:-accelerate_configs/multi_node.yaml}
export MASTER_HOST MASTER_PORT CA2CL LOGS CONFIG PROCESSES=$processes
# job.sbatch says why this is quoted, waits and names the CPUs
# shellcheck disable=SC2016
exec srun --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 --wait=120 --kill-on-bad-exit=0 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    if [ "$((SLURM_NNODES * PROCESSES))" -eq 1 ]; then
        shift 2
        exec $CA2CL "$@"
    fi
    exec $CA2CL launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" \
        --num_processes "$((SLURM_NNODES * PROCESSES))" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MASTER_HOST" --main_process_port "$MASTER_PORT" \
        --tee 3 --log_dir "$LOGS/node-$SLURM_NODEID" "$@"
' ca2cl "$@"
