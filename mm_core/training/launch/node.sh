#!/bin/bash
# All GPUs of one machine: `node.sh my.yaml`. On each of several that share their disks:
# NODES=4 RENDEZVOUS=first-machine:29500 node.sh my.yaml
# A process that dies takes the others of its try with it; the command then starts again, ten times, and goes on.
set -euo pipefail
config=$1; shift
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" --max-restarts 10 \
  --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-localhost:0}" --rdzv-id "${RUN_ID:-magic-mirror}" \
  -m mm_core.training train --config "$config" "$@"
