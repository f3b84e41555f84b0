"""Our model folder: `config.json` (settings, format version, provenance) and `*.safetensors`.

A tensor's name is its dotted path in `nnx.split(Generator(config))[1]`, such as
`unet.time_embed.0.kernel`. A quantised kernel is an int8 tensor of that name beside float32 scales
per output channel named `<name>.scale`. Weights above 2 GB are cut into several files. Nothing
in the folder is a pickle.
"""

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx
from safetensors import numpy as safetensors_numpy

from v3d_jax import errors
from v3d_jax.diffusion import sampler
from v3d_jax.nn import generator
from v3d_jax.weights import quantize as quantization
from v3d_jax.weights import settings

FORMAT = "v3d_jax model 1"
CONFIG = "config.json"
SHARD_BYTES = 2 * 10**9
SCALE = ".scale"
FLOATS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
LISTED = 8

FloatName = Literal["float32", "bfloat16", "float16"]


class Model(NamedTuple):
    """A generator's settings, how to sample it, its weights (float32) and where they came from."""

    generator: generator.GeneratorConfig
    sampling: sampler.SamplingConfig
    params: Any
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
) -> None:
    """Writes a model folder aside and renames it into place, replacing a model folder there.

    `params` is the generator's nnx State, or the same tree as plain dicts. With `quantize` large
    kernels become int8 (see `weights.quantize`) and the rest float16; otherwise every tensor is
    kept as `dtype`. `metadata` (JSON) is provenance. Raises `UserError` if `params` do not fit
    `generator_config`, hold NaN, or `folder` exists and is something else.
    """
    target = Path(folder).resolve()
    if target.exists() and not _is_replaceable(target):
        raise errors.UserError(f"{target} exists and is not a model folder: choose another name")
    tensors = flatten(params)
    _check_names(flatten(abstract_params(generator_config)), _shapes(tensors), "these weights")
    for name, tensor in tensors.items():
        if not np.isfinite(np.asarray(tensor, np.float32)).all():
            raise errors.UserError(f"{name} holds NaN or infinite weights: nothing was saved")
    config = {
        "format": FORMAT,
        "generator": settings.to_json(generator_config),
        "sampling": settings.to_json(sampling_config),
        "metadata": metadata or {},
    }
    aside = target.parent / f".{target.name}.partial-{os.getpid()}"
    aside.mkdir(parents=True)
    try:
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_shards(aside, _encode(tensors, quantize, clip, dtype))
        _rename_into_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load(folder: str | os.PathLike) -> Model:
    """Reads a model folder; weights come back as float32 in the tree that `nnx.split` gives.

    Raises `UserError` (one line) if the folder, its settings or a file cannot be read, or listing
    the tensors that are missing, unexpected or of another shape than the settings ask for.
    """
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
    abstract = abstract_params(generator_config)
    tensors = _decode(_read_tensors(folder), folder)
    _check_names(flatten(abstract), _shapes(tensors), str(folder))
    leaves = [jnp.asarray(tensors[name]) for name in flatten(abstract)]
    params = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return Model(generator_config, sampling_config, params, config.get("metadata", {}))


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
    leaves, structure = _layout(config)
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


def _encode(
    tensors: dict[str, Any], quantize: bool, clip: quantization.Clip, dtype: FloatName
) -> Iterator[tuple[str, np.ndarray]]:
    for name, leaf in tensors.items():
        tensor = np.asarray(leaf)
        if quantize and quantization.applies(name, tensor.shape):
            codes, scale = quantization.quantize(tensor.astype(np.float32), clip)
            yield name, codes
            yield name + SCALE, scale
            continue
        kept = FLOATS["float16" if quantize else dtype]
        if tensor.size and np.abs(tensor.astype(np.float32)).max() > ml_dtypes.finfo(kept).max:
            kept = np.float32
        yield name, np.ascontiguousarray(tensor.astype(kept))


def _decode(stored: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Float32 tensors by name: int8 ones take in their scales, floating-point ones are cast."""
    tensors = {}
    scales = {name + SCALE for name, tensor in stored.items() if tensor.dtype == np.int8}
    lost = sorted(scales - set(stored))
    if lost:
        raise errors.UserError(f"{folder}: quantised tensors without scales: {_listed(lost)}")
    for name, tensor in stored.items():
        if name in scales:
            continue
        if tensor.dtype == np.int8:
            scale = stored[name + SCALE].astype(np.float32)
            if tensor.ndim == 0 or scale.shape != tensor.shape[-1:]:
                raise errors.UserError(
                    f"{folder}: {name} {tensor.shape} has scales of shape {scale.shape}"
                )
            tensors[name] = quantization.dequantize(quantization.Quantized(tensor, scale))
        elif tensor.dtype in FLOATS.values():
            tensors[name] = tensor.astype(np.float32)
        else:
            raise errors.UserError(f"{folder}: {name} has the unsupported type {tensor.dtype}")
    return tensors


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file that everybody may read."""
    safetensors_numpy.save_file(tensors, path)
    # The library makes files that only their owner can read, useless once root has installed them.
    path.chmod(0o644)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    shards, size = [{}], 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    for index, shard in enumerate(shards, 1):
        suffix = f"-{index:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        write_tensors(folder / f"model{suffix}.safetensors", shard)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise errors.UserError(f"{folder} has no *.safetensors file: the weights are missing")
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        try:
            shard = safetensors_numpy.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            first = str(error).splitlines()[0]
            raise errors.UserError(f"{path} is not a whole safetensors file: {first}") from None
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
