"""What a training loop needs to know of a model: its data, weights, loss, preview and export."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from v3d_jax import errors
from v3d_jax.data import loader, orbits
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.state import Loss, Params
from v3d_jax.weights import folder

Batch = dict[str, np.ndarray]
Preview = Callable[[Params, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@dataclass(frozen=True)
class DataConfig:
    """An orbit data set, and which of its clips are shown while training.

    `previews` clips of the training split and as many of the held-out split, if there is one.
    """

    path: str = "data/orbits"
    split: str = "train"
    heldout: str = "heldout"
    previews: int = 4
    loader: LoaderConfig = field(default_factory=LoaderConfig)


class Objective(NamedTuple):
    """A model to train, as functions and the arrays that training leaves alone.

    init(key) gives fresh parameters, load(folder) those of an exported model; loss is as
    `state.train_step` wants it; preview(ema, frozen, batch, key) gives images
    [rows, columns, h, w, 3] in [0, 1] and scores of every clip; export(folder, ema on the host,
    metadata, dtype) writes the finished model. The held-out clips are the last of `preview_batch`.
    """

    init: Callable[[jax.Array], Params]
    load: Callable[[Path], Params]
    loss: Loss
    frozen: Any
    clips: loader.Clips
    name: Callable[[int], str]
    preview: Preview
    preview_batch: Batch | None
    heldout: int
    export: Callable[[Path, Params, dict[str, Any], folder.FloatName], None]


def heldout_source(config: DataConfig) -> orbits.Source | None:
    """The held-out split, or None where the data set has none of that name."""
    if config.heldout not in orbits.splits(config.path):
        return None
    return orbits.source(config.path, config.heldout)


def preview_batch(
    config: DataConfig, train: loader.Clips, heldout: loader.Clips | None
) -> tuple[Batch | None, int]:
    """The first clips of each split from the first view of their orbits, and how many are held out.

    None instead of a batch where the settings ask for no previews. Raises `UserError` if clips of
    so many frames cannot be cut from the orbits.
    """
    clips, counts = [], []
    for split in (train, heldout):
        counts.append(0 if split is None else min(config.previews, len(split)))
        for index in range(counts[-1]):
            clips.append(split.clip(index, _order(config, split)))
    if not clips:
        return None, 0
    return {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}, counts[-1]


def _order(config: DataConfig, split: loader.Clips) -> np.ndarray:
    try:
        return loader.turn(0, config.loader.num_frames, split.views)
    except ValueError as error:
        raise errors.UserError(f"{config.path}: {error}: change data.loader.num-frames") from None
