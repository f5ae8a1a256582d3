#!/bin/bash
# Training on Slurm, on one node or several: sbatch cluster/slurm.sh --dataset-file corpus --bundle-dir /shared/docs
# The options are those of `hrm-ray train`. The job is put into the queue again until the run has finished.
#SBATCH --job-name=hrm-ray
#SBATCH --nodes=2                 # CHANGE
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16        # CHANGE: CPUs of a node
#SBATCH --gpus-per-node=4         # CHANGE: GPUs of a node; remove the line where there are none
#SBATCH --time=04:00:00           # CHANGE
#SBATCH --signal=B:USR1@600       # ten minutes before the end: the run is saved
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

most_requeues=20                  # a run that fails again and again ends
# CHANGE: the environment in which hrm-ray is installed, on a disk that all nodes share
# source /shared/hrm-ray/.venv/bin/activate

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
node=(ray start --block --disable-usage-stats --num-cpus="${SLURM_CPUS_PER_TASK:-1}")

training=''
stop=''
trap 'stop=1; test -z "$training" || kill -USR1 "$training"' USR1 TERM
trap 'kill $(jobs -p) 2>/dev/null' EXIT

srun --nodes=1 --ntasks=1 -w "$head" "${node[@]}" --head --port="$port" --include-dashboard=false &
for _ in $(seq 60); do
    ray status --address "$head:$port" >/dev/null 2>&1 && break
    sleep 2
done
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" \
        "${node[@]}" --address="$head:$port" &
fi

hrm-ray train --ray-address "$head:$port" --wait-for-resources 10m --auto-resume "$@" &
training=$!
test -z "$stop" || kill -USR1 "$training"
# A signal ends `wait`, not the training.
while kill -0 "$training" 2>/dev/null; do
    wait "$training"
done
wait "$training"
code=$?

# 75: stopped before the end of the time; 1: a failure. After 2 to 6 it would end with the same again.
if { [ "$code" -eq 75 ] || [ "$code" -eq 1 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt "$most_requeues" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
