#!/usr/bin/env bash
# Trains on this machine's devices: launch/local.sh configs/mini.py [--overrides]
# A run that was stopped continues; stop it with Ctrl-C or SIGTERM and it saves first.
set -euo pipefail
cd "$(dirname "$0")/.."

# Compiled programs are kept, so that a run cut into pieces compiles once.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/v3d_jax/xla}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

exec python -m v3d_jax.train "$@"
