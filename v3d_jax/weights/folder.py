"""Our model folder: `config.json` (settings, format version, provenance) and `*.safetensors`.

A tensor's name is its dotted path in `nnx.split(Generator(config))[1]`, such as
`unet.time_embed.0.kernel`. A quantised kernel is an int8 tensor of that name beside float32 scales
per output channel named `<name>.scale`. Weights above 2 GB are cut into several files. Nothing
in the folder is a pickle. A model that shares weights with another may leave them out: its
`config.json` then names the other's folder as its "base", relative to its own.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v3d_jax import errors
from v3d_jax.diffusion import sampler
from v3d_jax.nn import generator
from v3d_jax.weights import quantize as quantization
from v3d_jax.weights import settings
from v3d_jax.weights import tensors as tensor_files
from v3d_jax.weights.tensors import FLOATS, FloatName, Lazy

FORMAT = "v3d_jax model 1"
CONFIG = "config.json"
SHARD_BYTES = 2 * 10**9
SCALE = ".scale"
LISTED = 8


class Model(NamedTuple):
    """A generator's settings, how to sample it, its weights and where they came from."""

    generator: generator.GeneratorConfig
    sampling: sampler.SamplingConfig
    params: Any
    metadata: dict[str, Any]


class Unread(NamedTuple):
    """A model whose weights are still on the disk: tensors by dotted path, in their stored types.

    The tensors are all that `generator` asks for, and of the right shapes.
    """

    generator: generator.GeneratorConfig
    sampling: sampler.SamplingConfig
    tensors: dict[str, Any]
    metadata: dict[str, Any]


def save(
    folder: str | os.PathLike,
    generator_config: generator.GeneratorConfig,
    sampling_config: sampler.SamplingConfig,
    params: Any,
    *,
    quantize: bool = False,
    clip: quantization.Clip = "mse",
    dtype: FloatName = "float32",
    metadata: dict[str, Any] | None = None,
    base: str | None = None,
) -> None:
    """Writes a model folder aside and renames it into place, replacing a model folder there.

    `params` is the generator's nnx State, or the same tree as plain dicts. With `quantize` large
    kernels become int8 (see `weights.quantize`) and the rest float16; otherwise every tensor is
    kept as `dtype`. `metadata` (JSON) is provenance. What the model folder `base` (a path from
    `folder`) holds to the bit, or to the bit once kept as float16, is left out. Raises `UserError`
    if `params` do not fit `generator_config`, hold NaN, `folder` exists and is something else, or
    the disk is full.
    """
    tensors = flatten(params)
    _check_names(flatten(abstract_params(generator_config)), _shapes(tensors), "these weights")
    if base is not None:
        shared = _base(Path(folder), base)
        tensors = {name: x for name, x in tensors.items() if not _equal(x, shared.get(name))}
    stored = _quantised(tensors, clip) if quantize else tensor_files.cast(tensors, dtype)
    _store(folder, Unread(generator_config, sampling_config, stored, metadata or {}), base=base)


def write(
    folder: str | os.PathLike,
    model: Unread,
    dtype: FloatName | None = None,
    progress: tensor_files.Progress | None = None,
) -> None:
    """Like `save`, for weights that are read one at a time; without `dtype` in their own types."""
    _store(folder, model._replace(tensors=tensor_files.cast(model.tensors, dtype)), progress)


def _store(
    folder: str | os.PathLike,
    model: Unread,
    progress: tensor_files.Progress | None = None,
    base: str | None = None,
) -> None:
    target = Path(folder).resolve()
    if target.exists() and not _is_replaceable(target):
        raise errors.UserError(f"{target} exists and is not a model folder: choose another name")
    tensor_files.begin(target, model.tensors.values(), progress)
    config = {
        "format": FORMAT,
        "generator": settings.to_json(model.generator),
        "sampling": settings.to_json(model.sampling),
        "metadata": model.metadata,
        **({} if base is None else {"base": base}),
    }
    aside = tensor_files.aside(target)
    aside.mkdir(parents=True)
    try:
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensor_files.write_shards(aside, "model", model.tensors, SHARD_BYTES, progress=progress)
        _rename_into_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load(folder: str | os.PathLike) -> Model:
    """Reads a model folder; weights come back as float32 in the tree that `nnx.split` gives.

    Raises `UserError` (one line) if the folder, its settings or a file cannot be read, or listing
    the tensors that are missing, unexpected or of another shape than the settings ask for.
    """
    return read(open_folder(folder))


def open_folder(folder: str | os.PathLike) -> Unread:
    """Like `load`, without reading the weights; those kept as int8 count as float32."""
    folder = Path(folder)
    config = read_config(folder)
    where = str(folder / CONFIG)
    missing = sorted({"generator", "sampling"} - set(config))
    if missing:
        raise errors.UserError(f"{where}: missing {', '.join(missing)}")
    generator_config = settings.from_json(
        generator.GeneratorConfig, config["generator"], f"{where}: generator"
    )
    sampling_config = settings.from_json(
        sampler.SamplingConfig, config["sampling"], f"{where}: sampling"
    )
    tensors = _decode(_open_tensors(folder), folder)
    if (base := config.get("base")) is not None:
        tensors = {**_base(folder, base), **tensors}
    _check_names(flatten(abstract_params(generator_config)), _shapes(tensors), str(folder))
    return Unread(generator_config, sampling_config, tensors, config.get("metadata", {}))


def read(
    model: Unread, advance: Callable[[int], Any] | None = None, activations: Any = np.float32
) -> Model:
    """The model with its weights read, as float32; `advance` is told 1 for every tensor.

    For inference with other `activations`, weights that networks use in that type are held in it
    from the start: the same results in half the memory.
    """
    abstract = abstract_params(model.generator)
    names = flatten(abstract)
    cast = generator.cast_weights(names)
    leaves = []
    for name in names:
        tensor = np.asarray(model.tensors[name]).astype(np.float32, copy=False)
        leaves.append(jnp.asarray(tensor.astype(activations) if name in cast else tensor))
        if advance is not None:
            advance(1)
    params = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return Model(model.generator, model.sampling, params, model.metadata)


def is_model(folder: str | os.PathLike) -> bool:
    """Whether a folder's `config.json` says that it is one of ours, of any version."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(config, dict) and str(config.get("format")).startswith("v3d_jax ")


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The folder's `config.json` as a dict, its format checked; `UserError` if it is not ours."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise errors.UserError(f"{folder} is not a model folder: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise errors.UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise errors.UserError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    return config


def abstract_params(config: generator.GeneratorConfig) -> Any:
    """The generator's weights as shapes and dtypes: the State of `nnx.split`, without memory."""
    # Weights know nothing of the clips: models that differ in them share a trace.
    side = config.autoencoder.factor * 2 ** (len(config.unet.channel_mult) - 1)
    leaves, structure = _layout(dataclasses.replace(config, num_frames=1, image_size=side))
    return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=8)
def _layout(config: generator.GeneratorConfig) -> tuple[tuple[Any, ...], Any]:
    """Leaves and structure of the weights, remembered: tracing a constructor takes seconds."""
    leaves, structure = jax.tree.flatten(nnx.split(generator.abstract(config))[1])
    return tuple(leaves), structure


def flatten(params: Any) -> dict[str, Any]:
    """The leaves of an nnx State, or of the same tree as plain dicts, by dotted path."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        # A State holds variables, whose array sits one attribute deeper than in a plain dict.
        keys = path[:-1] if isinstance(path[-1], jax.tree_util.GetAttrKey) else path
        named[jax.tree_util.keystr(keys, simple=True, separator=".")] = leaf
    return named


def _base(folder: Path, base: Any) -> dict[str, Lazy]:
    """The tensors of the model that another one in `folder` shares weights with."""
    where = f"{folder / CONFIG}: base"
    if not isinstance(base, str) or not base:
        raise errors.UserError(f"{where} is {base!r}: the path of a model folder is needed")
    # Not resolved against the disk: the folder of a model to be saved need not be there.
    path = Path(os.path.normpath(folder / base))
    if read_config(path).get("base") is not None:
        raise errors.UserError(f"{where}: {path} has a base itself: name a whole model")
    return _decode(_open_tensors(path), path)


def _equal(leaf: Any, other: Lazy | None) -> bool:
    if other is None or tuple(other.shape) != tuple(leaf.shape):
        return False
    ours, theirs = np.asarray(leaf, np.float32), np.asarray(other).astype(np.float32)
    halved = theirs.astype(np.float16).astype(np.float32)
    return np.array_equal(ours, theirs) or np.array_equal(ours, halved)


def _quantised(tensors: dict[str, Any], clip: quantization.Clip) -> dict[str, Any]:
    """Large kernels as int8 codes and float32 scales, all else as float16."""
    encoded: dict[str, Any] = {}
    for name, leaf in tensors.items():
        if not quantization.applies(name, leaf.shape):
            encoded |= tensor_files.cast({name: leaf}, "float16")
        else:
            kernel = np.asarray(leaf, np.float32)
            if not tensor_files.is_finite(kernel):
                raise errors.UserError(f"{name} holds NaN or infinite weights: nothing was saved")
            encoded[name], encoded[name + SCALE] = quantization.quantize(kernel, clip)
    return encoded


def _decode(stored: dict[str, Lazy], folder: Path) -> dict[str, Lazy]:
    """Floating-point tensors by name: int8 ones take in their scales."""
    tensors = {}
    scales = {name + SCALE for name, tensor in stored.items() if tensor.dtype == np.int8}
    lost = sorted(scales - set(stored))
    if lost:
        raise errors.UserError(f"{folder}: quantised tensors without scales: {_listed(lost)}")
    for name, tensor in stored.items():
        if name in scales:
            continue
        if tensor.dtype == np.int8:
            scale = stored[name + SCALE]
            if not tensor.shape or scale.shape != tensor.shape[-1:]:
                raise errors.UserError(
                    f"{folder}: {name} {tensor.shape} has scales of shape {scale.shape}"
                )
            read = functools.partial(_dequantised, tensor, scale)
            tensors[name] = Lazy(tensor.shape, np.dtype(np.float32), read)
        elif tensor.dtype in FLOATS.values():
            tensors[name] = tensor
        else:
            raise errors.UserError(f"{folder}: {name} has the unsupported type {tensor.dtype}")
    return tensors


def _dequantised(codes: Lazy, scale: Lazy) -> np.ndarray:
    scales = np.asarray(scale, np.float32)
    return quantization.dequantize(quantization.Quantized(np.asarray(codes), scales))


def _open_tensors(folder: Path) -> dict[str, Lazy]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise errors.UserError(f"{folder} has no *.safetensors file: the weights are missing")
    tensors: dict[str, Lazy] = {}
    for path in files:
        shard, _ = tensor_files.open_file(path)
        twice = sorted(set(shard) & set(tensors))
        if twice:
            raise errors.UserError(f"{path} repeats tensors of another file: {_listed(twice)}")
        tensors |= shard
    return tensors


def _check_names(abstract: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: str) -> None:
    missing = [name for name in abstract if name not in shapes]
    unexpected = [name for name in shapes if name not in abstract]
    misshapen = [
        f"{name} {shapes[name]} not {leaf.shape}"
        for name, leaf in abstract.items()
        if name in shapes and shapes[name] != leaf.shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    found = [f"{len(names)} {what}: {_listed(names)}" for what, names in groups.items() if names]
    if found:
        raise errors.UserError(f"{where} do not fit the generator's settings: {'; '.join(found)}")


def _shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _is_replaceable(target: Path) -> bool:
    return target.is_dir() and ((target / CONFIG).is_file() or not any(target.iterdir()))


def _rename_into_place(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    old = aside.with_name(aside.name + ".old")
    target.rename(old)
    aside.rename(target)
    shutil.rmtree(old)
