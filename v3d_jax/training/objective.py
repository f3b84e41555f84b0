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
    """Orbit data sets, and which of their clips are shown while training.

    `path` names one data set or several of the same views and size, whose training splits are
    joined. `previews` clips of the training split and as many of the held-out split of the first
    data set, if it has one, are shown.
    """

    path: tuple[str, ...] = ("data/orbits",)
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
    The loss wants batches with so many `pictures` of every clip.
    """

    init: Callable[[jax.Array], Params]
    load: Callable[[Path], Params]
    loss: Loss
    frozen: Any
    clips: loader.Clips
    preview: Preview
    preview_batch: Batch | None
    heldout: int
    export: Callable[[Path, Params, dict[str, Any], folder.FloatName], None]
    pictures: int = 0


def train_sources(config: DataConfig) -> list[orbits.Source]:
    """The training split of every data set.

    Raises `UserError` if there is none, or if they differ in the number or the size of views.
    """
    sources = [orbits.source(path, config.split) for path in config.path]
    if not sources:
        raise errors.UserError("no data set is named: give --data.path")
    for other in sources[1:]:
        shapes = [(one.views, one.size) for one in (sources[0], other)]
        if shapes[0] != shapes[1]:
            raise errors.UserError(
                f"{other.path} has {other.views} views of {other.size} pixels, {sources[0].path} "
                f"{sources[0].views} of {sources[0].size}: data sets must agree"
            )
    return sources


def heldout_source(config: DataConfig) -> orbits.Source | None:
    """The held-out split of the first data set, or None where it has none of that name."""
    path = config.path[0]
    if config.heldout not in orbits.splits(path):
        return None
    return orbits.source(path, config.heldout)


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
        raise errors.UserError(
            f"{config.path[0]}: {error}: change data.loader.num-frames"
        ) from None


def fit(params: Params, abstract: Params, source: str) -> Params:
    """The parameters, if they are those of the settings; otherwise a `UserError`."""
    same_tree = jax.tree.structure(params) == jax.tree.structure(abstract)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=False)
    if not same_tree or any(np.shape(leaf) != wanted.shape for leaf, wanted in pairs):
        raise errors.UserError(f"{source} is a model of another size: it cannot start this run")
    return params
