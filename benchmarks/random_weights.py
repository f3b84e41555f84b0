"""Weights and batches of random numbers: what speed is measured with, quickly made at any size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 2**24 + 1  # odd, so that arrays of even sizes begin at other places


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One weight of an initialiser's size, float32, cut from one random block.

    `name` ends as the weight's path does: scales are about 1.
    """
    scale = max(1, int(np.prod(shape[:-1]))) ** -0.5 if len(shape) > 1 else 0.05
    return np.resize(_block(), shape) * np.float32(scale) + np.float32(name.endswith("scale"))


def weights(abstract: Any, place: Callable[[np.ndarray, Any], Any], placements: Any) -> Any:
    """A tree of such weights in the types of `abstract`, each put by `place(array, placement)`."""

    def made(path: Any, leaf: Any, placement: Any) -> Any:
        values = weight(jax.tree_util.keystr(path, simple=True), leaf.shape)
        return place(values.astype(leaf.dtype), placement)

    return jax.tree_util.tree_map_with_path(made, abstract, placements)


def batch(abstract: dict[str, Any]) -> dict[str, np.ndarray]:
    """Pictures of random bytes, places of 0, and standard normal numbers for everything else."""
    rng = np.random.default_rng(0)
    made = {}
    for name, leaf in abstract.items():
        if leaf.dtype == jnp.uint8:
            made[name] = rng.integers(0, 256, leaf.shape, np.uint8)
        elif jnp.issubdtype(leaf.dtype, jnp.integer):
            made[name] = np.zeros(leaf.shape, leaf.dtype)
        else:
            made[name] = rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)
    return made


_kept: list[np.ndarray] = []


def _block() -> np.ndarray:
    if not _kept:
        _kept.append(np.random.default_rng(0).standard_normal(_BLOCK, np.float32))
    return _kept[0]
