#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs: waits for it in the queue, sets it up, trains by ssh:
#
#   NAME=orbits ZONE=us-central2-b TYPE=v4-32 RUNTIME=tpu-ubuntu2204-base \
#     STORAGE=10.0.0.2:/v3d launch/tpu_pod.sh configs/mini.py [--overrides]
#
# Needs: gcloud, logged in with a project that may create TPUs, and an NFS share STORAGE (such as
# Filestore's) that the slice can reach: it becomes /mnt/v3d on every worker, and the data and
# --run.dir must lie there. SPOT=1 takes machines that may be pre-empted: a slice that is lost is
# asked for again and the run continues from its last checkpoint. Worker 0 writes to the terminal,
# the others to worker.log at home. Delete the slice when done; the last line says how.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
need NAME ZONE TYPE RUNTIME STORAGE
need_config "$@"

dry="${DRY_RUN:-0}"
queue=(gcloud compute tpus queued-resources)
nodes=(gcloud compute tpus tpu-vm)

state() {
  "${queue[@]}" describe "$NAME" --zone "$ZONE" --format 'value(state.state)' 2>/dev/null || true
}

acquire() {
  local flags=(--node-id "$NAME" --zone "$ZONE" --accelerator-type "$TYPE")
  flags+=(--runtime-version "$RUNTIME")
  if [ "${SPOT:-0}" = 1 ]; then flags+=(--spot); fi
  if [ "$dry" = 1 ] || [ -z "$(state)" ]; then run "${queue[@]}" create "$NAME" "${flags[@]}"; fi
  until [ "$dry" = 1 ] || [ "$(state)" = ACTIVE ]; do
    case "$(state)" in
      FAILED | SUSPENDED)
        release
        "${queue[@]}" create "$NAME" "${flags[@]}"
        ;;
    esac
    sleep 30
  done
}

release() {
  run "${queue[@]}" delete "$NAME" --zone "$ZONE" --force --quiet
}

everywhere() {
  run "${nodes[@]}" ssh "$NAME" --zone "$ZONE" --worker all --command "$1"
}

set_up() {
  everywhere "sudo apt-get -qq install -y nfs-common python3.11-venv && sudo mkdir -p /mnt/v3d && \
(mountpoint -q /mnt/v3d || sudo mount $STORAGE /mnt/v3d)" &&
    run "${nodes[@]}" scp --recurse --zone "$ZONE" --worker all v3d_jax configs setup.py \
      pyproject.toml README.md "$NAME": &&
    everywhere "python3.11 -m venv venv && venv/bin/pip install -q '.[tpu]'"
}

train() {
  local worker="http://metadata.google.internal/computeMetadata/v1/instance/attributes"
  everywhere "[ \"\$(curl -s -H 'Metadata-Flavor: Google' $worker/agent-worker-number)\" = 0 ] || \
exec >worker.log 2>&1; export JAX_COMPILATION_CACHE_DIR=/mnt/v3d/xla; \
exec venv/bin/python -m v3d_jax.train $(printf '%q ' "$@")--multihost.distributed"
}

while true; do
  acquire
  # A slice may be lost at any time, while it is set up as well.
  if set_up && train "$@"; then break; fi
  found="$("${nodes[@]}" describe "$NAME" --zone "$ZONE" --format 'value(state)' || echo GONE)"
  if [ "$found" = READY ]; then
    echo "error: training failed on a slice that is there; not tried again" >&2
    exit 1
  fi
  echo "the slice is $found; asking for another" >&2
  release
done
echo "done; DELETE IT: ${queue[*]} delete $NAME --zone $ZONE --force"
