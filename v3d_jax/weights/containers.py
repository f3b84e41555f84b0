"""Checkpoints as they come: one file, shards with an index, or a folder with its JSON.

Safetensors are read by their header, everything else as a pickle by the restricted unpickler.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v3d_jax.errors import UserError
from v3d_jax.weights import pickles
from v3d_jax.weights import tensors as tensor_files
from v3d_jax.weights.tensors import Lazy

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
CONFIG = "config.json"
_INDICES = "*.index*.json"
# Names under which Hugging Face's libraries look for weights, theirs first.
_STEMS = (
    *("diffusion_pytorch_model", "model", "pytorch_model"),
    *("open_clip_model", "open_clip_pytorch_model"),
)


class Container(NamedTuple):
    """The tensors of one checkpoint, and what its header and the JSON beside it say."""

    path: Path
    tensors: dict[str, Any]
    metadata: dict[str, str]
    config: dict[str, Any]


def open_file(path: Path) -> Container:
    """Opens one file, or all shards that an index (`*.index.json`) lists.

    Raises `UserError` if one cannot be read or holds no tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(".json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        tensors, metadata = tensor_files.open_file(path)
        return Container(path, tensors, metadata, {})
    arrays = pickles.state_dict(path)
    return Container(path, {name: _mapped(x) for name, x in arrays.items()}, {}, {})


def open_folder(folder: Path) -> Container:
    """Opens the weights of a folder of one network, such as diffusers' `unet`.

    Full precision comes before half (`*.fp16.*`) where there are both.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    for variant in ("", ".fp16"):
        for stem in _STEMS:
            for name in (
                f"{stem}{variant}.safetensors",
                f"{stem}.safetensors.index{variant}.json",
                f"{stem}{variant}.bin",
                f"{stem}.bin.index{variant}.json",
            ):
                if (folder / name).is_file():
                    return open_file(folder / name)._replace(config=config)
    raise UserError(f"{folder} has no weights under a name such as {_STEMS[0]}.safetensors")


def open_path(path: Path) -> Container:
    """Opens a file, or the folder of one network."""
    return open_folder(path) if path.is_dir() else open_file(path)


def files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, sorted; shards that an index lists are one, as the index."""
    indices = [path for path in sorted(folder.glob(_INDICES)) if path.is_file()]
    listed = {folder / name for index in indices for name in _weight_map(index).values()}
    others = (path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES)
    return [*indices, *(path for path in others if path.is_file() and path not in listed)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise UserError(f"{index} has no weight_map: it is no index of tensors")
    for name in set(places.values()):
        # A name with folders could lead anywhere.
        if Path(name).name != name:
            raise UserError(f"{index} refers to {name!r}, which is not a file beside it")
    return places


def _open_shards(index: Path) -> Container:
    places = _weight_map(index)
    shards = {name: open_file(index.parent / name) for name in sorted(set(places.values()))}
    tensors: dict[str, Any] = {}
    for shard in shards.values():
        tensors |= shard.tensors
    lost = [name for name, file in places.items() if name not in shards[file].tensors]
    if lost:
        raise UserError(f"{index}: {places[lost[0]]} lacks {lost[0]} ({len(lost)} lost in all)")
    metadata = next(iter(shards.values())).metadata if shards else {}
    return Container(index, tensors, metadata, {})


def _mapped(array: np.ndarray) -> Lazy:
    dtype = array.dtype.newbyteorder("=")
    return Lazy(array.shape, dtype, functools.partial(_copied, array, dtype))


def _copied(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values, so that the map's pages need not stay in memory."""
    values = np.array(array, dtype)
    pickles.release(array)
    return values
