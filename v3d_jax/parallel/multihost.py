"""Several processes as one program: start, who writes files, and agreeing to stop."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from v3d_jax import errors


@dataclass(frozen=True)
class MultihostConfig:
    """How this process finds the others.

    With `distributed` and nothing else a TPU pod, a Slurm job or an MPI job is recognised. The
    rest is for plain machines: `coordinator` is `host:port` of process 0.
    """

    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def initialize(config: MultihostConfig) -> None:
    """Joins the other processes; must come before anything that touches a device.

    Raises `UserError` if the three addresses are given in part.
    """
    address = (config.coordinator, config.num_processes, config.process_id)
    given = [value is not None for value in address]
    if any(given) and not all(given):
        raise errors.UserError(
            "coordinator, num-processes and process-id belong together: give all three or none"
        )
    if config.distributed or all(given):
        # Its service takes SIGTERM for itself, and then a run that is told to stop goes on.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(*address)


def is_main() -> bool:
    """Whether this process writes the files that are written once."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """True everywhere if true in one process. All processes must call it at the same place."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def to_host(tree: Any) -> Any:
    """Whole numpy arrays of a tree that may lie in parts on several processes' devices."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
