#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster, one process a GPU:
#
#   NODES=2 GPUS=8 launch/slurm.sh configs/mini.py [--overrides]     submits a job
#
# Needs: sbatch, the package in the current Python environment, and this folder, the data and the
# run's folder on a disk that all nodes see. CPUS (16) are for one process, HOURS (24) for the job;
# SBATCH_PARTITION, SBATCH_ACCOUNT and the like are Slurm's own. Three minutes before the time is
# up the run saves and the job goes into the queue again; pre-empted jobs do as well. Process 0
# writes to v3d_jax-JOB.log.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source launch/environment.sh
need_config "$@"

if [ -z "${SLURM_JOB_ID:-}" ]; then
  nodes="${NODES:-1}" gpus="${GPUS:-8}"
  run sbatch --job-name v3d_jax --nodes "$nodes" --ntasks-per-node "$gpus" \
    --gpus-per-node "$gpus" --cpus-per-task "${CPUS:-16}" --time "${HOURS:-24}:00:00" \
    --signal B:USR1@180 --requeue --open-mode append --output v3d_jax-%j.log \
    launch/slurm.sh "$@"
  exit
fi

# In the job. Slurm tells the batch script alone that time is nearly up (USR1), or of a
# pre-emption (TERM); scancel passes it on to the training, which saves and ends.
again=0
# shellcheck disable=SC2329 # the trap calls it
stop() {
  again=1
  run scancel --signal TERM "$SLURM_JOB_ID"
}
trap stop USR1 TERM
if [ "${DRY_RUN:-0}" = 1 ]; then
  run srun --output 0 --error 0 --kill-on-bad-exit 1 \
    python -m v3d_jax.train "$@" --multihost.distributed
  exit
fi
# Task 0's output alone; without one process the others would wait for ever.
srun --output 0 --error 0 --kill-on-bad-exit 1 \
  python -m v3d_jax.train "$@" --multihost.distributed &
job=$!
# A signal ends the waiting, not the job.
while kill -0 "$job" 2>/dev/null; do wait "$job" || true; done
status=0
wait "$job" || status=$?
if [ "$again" = 1 ] && [ "$status" = 0 ]; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
