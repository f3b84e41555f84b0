#!/usr/bin/env bash
# Trains on this machine's devices:
#
#   launch/local.sh configs/mini.py [--overrides]
#
# With PROCESSES=2 the devices are shared out to two processes, as on two machines: for CPUs, or to
# try out what several hosts will do. Needs: the package, and PORT (12355) free for PROCESSES > 1.
# A run that was stopped continues; stop it with Ctrl-C or SIGTERM and it saves first. Process 0
# writes to the terminal, the others to process-N.log in the folder LOGS (logs).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
need_config "$@"

processes="${PROCESSES:-1}"
if [ "$processes" = 1 ]; then
  [ "${DRY_RUN:-0}" = 1 ] || exec python -m v3d_jax.train "$@"
  run python -m v3d_jax.train "$@"
  exit
fi

logs="${LOGS:-logs}"
[ "${DRY_RUN:-0}" = 1 ] || mkdir -p "$logs"
address="localhost:${PORT:-12355}"
pids=()
start() {
  # Not by `run`: a function in the background would keep the signal from the program.
  local command=(
    python -m v3d_jax.train "${@:2}" --multihost.coordinator "$address"
    --multihost.num-processes "$processes" --multihost.process-id "$1"
  )
  if [ "${DRY_RUN:-0}" = 1 ]; then
    run "${command[@]}"
  elif [ "$1" = 0 ]; then
    "${command[@]}" &
    pids+=($!)
  else
    "${command[@]}" >"$logs/process-$1.log" 2>&1 &
    pids+=($!)
  fi
}

# All get the signal and save together.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((number = 0; number < processes; number++)); do
  start "$number" "$@"
done
status=0
for pid in ${pids[@]+"${pids[@]}"}; do
  # A signal ends the waiting, not the process.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  wait "$pid" || status=$?
done
[ "$status" = 0 ] || echo "the other processes' output: $logs" >&2
exit "$status"
