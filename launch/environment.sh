# shellcheck shell=bash
# Sourced by the other scripts. With DRY_RUN=1 `run` prints commands instead of running them.

# Compiled programs are kept, so that a run cut into pieces compiles once.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/v3d_jax/xla}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@" | sed 's/ $//'
    printf '\n'
  else
    "$@"
  fi
}

# Ends with status 2 unless the variables named are set.
need() {
  local variable
  for variable in "$@"; do
    if [ -z "${!variable:-}" ]; then
      echo "error: set $variable: see the head of $0" >&2
      exit 2
    fi
  done
}

# Ends with status 2 unless there is a config file to train.
need_config() {
  if [ "$#" -lt 1 ] || [ ! -f "$1" ]; then
    echo "error: name a config file, as in $0 configs/mini.py [--overrides]" >&2
    exit 2
  fi
}
