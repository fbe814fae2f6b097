#!/bin/bash
# All GPUs of one machine: `node.sh my.yaml`. On each of several that share their disks:
# NODES=4 RENDEZVOUS=first-machine:29500 node.sh my.yaml
# A process that dies takes the others with it; all of them then start again, up to ten times, and go on. Not by torchrun's
# own restarts: of those, processes were seen that never met again.
set -uo pipefail
# torchrun kills its processes 30 seconds after SIGTERM: before they have finished a step and written a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}"
config=$1; shift
stopped=
stop() { stopped=1; kill -TERM "$child"; }
trap stop TERM INT
for _ in $(seq 10); do
  "${PYTHON:-python}" -m torch.distributed.run --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-localhost:0}" --rdzv-id "${RUN_ID:-magic-mirror}" \
    -m mm_core.training train --config "$config" "$@" &
  child=$!
  wait "$child" && exit 0
  if [ -n "$stopped" ]; then wait "$child"; exit 143; fi
  sleep 10
done
exit 1
