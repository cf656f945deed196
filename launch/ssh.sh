#!/usr/bin/env bash
# ca2cl on several hosts by plain SSH:
#
#   CA2CL_PROCESSES=8 bash launch/ssh.sh hosts.txt \
#       pretrain --recipe nct_resnet18 --data.shards /data/shards --run.output_dir /data/run
#
# hosts.txt has one name or address in each line (`#` starts a comment). Rank 0 runs on the first host, and the others
# connect to it under that name. Every host needs this folder under the same path, with ca2cl in CA2CL_VENV, and must
# see the shards and run.output_dir. SSH must not ask for a password: use keys, with users and ports in ~/.ssh/config.
#   CA2CL_PROCESSES   processes a host; default 1
#   CA2CL_VENV        virtual environment, default .venv in this folder
#   CA2CL_ACCELERATE  launcher configuration, default accelerate_configs/multi_node.yaml
#   CA2CL_PORT        port of rank 0, default 29500
#   CA2CL_SSH         default "ssh"
# Variables that begin with MLFLOW_, NCCL_, GLOO_, TORCH_, OMP_, AWS_, CUDA_, ACCELERATE_ or PYTHON are passed on,
# through the connection and not on a command line.
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to this script, or a lost connection to a host, end the job with a checkpoint. If a
# host fails, the others get SIGTERM. Two minutes later they get it again, which ends ranks that still wait for the
# failed host. The exit code is the first one that was not 0: 85 after a checkpoint (run the script again), 2 for bad
# input, 255 if SSH could not log in.
set -euo pipefail
if [ $# -lt 2 ] || [ ! -f "$1" ]; then
    echo "usage: bash launch/ssh.sh HOSTS_FILE VERB [--setting VALUE ...]; $0 begins with an explanation" >&2
    exit 2
fi
cd "$(dirname "$0")/.." || exit 2
hosts_file=$(cd "$OLDPWD" && realpath "$1")
shift
mapfile -t hosts < <(sed 's/#.*//' "$hosts_file" | awk 'NF { print $1 }')
if [ "${#hosts[@]}" -eq 0 ]; then
    echo "$hosts_file: names no host" >&2
    exit 2
fi
processes=${CA2CL_PROCESSES:-1}
total=$((${#hosts[@]} * processes))
read -ra ssh <<<"${CA2CL_SSH:-ssh}"

# Runs on each host. It reads variables from the connection up to a line with a dot, starts the job, and then reads
# names of signals for it. The end of the connection counts as SIGTERM.
# shellcheck disable=SC2016
remote='
exec 3<&0
while IFS= read -r line <&3 && [ "$line" != . ]; do export "$line"; done
cd "$1" || exit 2
shift
"$@" &
job=$!
{ while read -r name <&3; do kill -s "$name" $job; done; kill -s TERM $job; } 2>/dev/null &
reader=$!
wait $job
code=$?
kill $reader 2>/dev/null
exit $code'

folder=$(mktemp -d)
pids=() pipes=() codes=()
trap 'rm -rf "$folder"' EXIT

tell() { # tell SIGNAL: send it to every host that still runs
    for rank in "${!pids[@]}"; do
        if [ -z "${codes[rank]:-}" ]; then echo "$1" >&"${pipes[rank]}" || true; fi
    done
}
trap 'tell TERM' TERM INT HUP
trap 'tell USR1' USR1
trap '' PIPE # writing to a host that is gone must not end this script

for rank in "${!hosts[@]}"; do
    command=("$PWD" "${CA2CL_VENV:-.venv}/bin/ca2cl")
    if [ "$total" -gt 1 ]; then
        command+=(launch --config_file "${CA2CL_ACCELERATE:-accelerate_configs/multi_node.yaml}"
            --num_machines "${#hosts[@]}" --num_processes "$total" --machine_rank "$rank"
            --main_process_ip "${hosts[0]}" --main_process_port "${CA2CL_PORT:-29500}" -m ca2cl)
    fi
    mkfifo "$folder/$rank"
    "${ssh[@]}" -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[rank]}" \
        "bash -c $(printf '%q' "$remote") ca2cl $(printf '%q ' "${command[@]}" "$@")" \
        <"$folder/$rank" > >(trap '' INT; exec sed -u "s/^/[${hosts[rank]}] /") 2>&1 & # Ctrl-C would end sed at once
    pids[rank]=$!
    exec {pipe}>"$folder/$rank"
    pipes[rank]=$pipe
    { env | grep -E '^(MLFLOW|NCCL|GLOO|TORCH|OMP|AWS|CUDA|ACCELERATE)_|^PYTHON' || true; echo .; } >&"$pipe" || true
done

first=0 left=${#hosts[@]} again=0
while [ "$left" -gt 0 ]; do
    for rank in "${!pids[@]}"; do
        if [ -n "${codes[rank]:-}" ] || kill -0 "${pids[rank]}" 2>/dev/null; then continue; fi
        code=0
        wait "${pids[rank]}" || code=$?
        codes[rank]=$code
        left=$((left - 1))
        if [ "$first" -eq 0 ]; then first=$code; fi
        case $code in
        0 | 85) ;;
        *) # otherwise the other ranks would wait for it until a collective times out
            echo "[${hosts[rank]}] ended with $code" >&2
            if [ "$again" -eq 0 ]; then
                tell TERM
                again=$((SECONDS + 120))
            fi
            ;;
        esac
    done
    # A rank inside a collective does not see the first signal. The launcher passes on the second, which ends the rank.
    if [ "$again" -gt 0 ] && [ "$SECONDS" -ge "$again" ]; then
        tell TERM
        again=$((SECONDS + 120))
    fi
    sleep 0.3 & # in the background, because traps wait for a foreground command
    wait $! || true
done
exit "$first"
