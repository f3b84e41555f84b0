#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a workload of xpk:
#
#   NAME=orbits CLUSTER=tpus ZONE=us-east5-b TYPE=v5p-32 IMAGE=python:3.11 STORAGE=v3d-data \
#     launch/gke.sh configs/mini.py [--overrides]
#
# Needs: xpk and Docker, a cluster made by `xpk cluster create`, and STORAGE, a volume attached by
# `xpk storage attach`, on which the data and --run.dir lie. SLICES (1) of them train together.
# IMAGE is a base with Python 3.11; xpk adds this folder to it. A pod that is pre-empted has two
# minutes to save, and the workload is started again up to RESTARTS (100) times. Process 0 writes to
# the workload's log, the others to /tmp/worker.log in their pods.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
need NAME CLUSTER ZONE TYPE IMAGE STORAGE
need_config "$@"

# Slice and worker are GKE's names; xpk starts one container a worker.
command="[ \${MEGASCALE_SLICE_ID:-0}-\${TPU_WORKER_ID:-0} = 0-0 ] || exec >/tmp/worker.log 2>&1; \
pip install -q '.[tpu]' && exec python -m v3d_jax.train $(printf '%q ' "$@")--multihost.distributed"
run xpk workload create --workload "$NAME" --cluster "$CLUSTER" --zone "$ZONE" \
  --tpu-type "$TYPE" --num-slices "${SLICES:-1}" --base-docker-image "$IMAGE" --script-dir . \
  --storage "$STORAGE" --max-restarts "${RESTARTS:-100}" \
  --termination-grace-period-seconds 120 --command "$command"
