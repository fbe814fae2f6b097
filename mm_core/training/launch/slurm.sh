#!/bin/bash
# `sbatch --nodes 1 slurm.sh my.yaml`, or more nodes. Killed, preempted or out of time, the job is queued again and goes on.
#SBATCH --job-name magic-mirror
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --signal B:TERM@600
set -euo pipefail
export NODES=$SLURM_JOB_NUM_NODES RUN_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500
export RENDEZVOUS
srun bash mm_core/training/launch/node.sh "$@" &
steps=$!
# Ten minutes before the end: a checkpoint is written, the processes end, and the job queues itself again.
trap 'scancel --signal TERM "$SLURM_JOB_ID".0; wait "$steps" || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM
wait "$steps"
