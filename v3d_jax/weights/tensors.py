"""Tensors on disk: read one at a time, written one at a time.

Published checkpoints have ten gigabytes. A `Lazy` tensor knows its shape and type and is read when
its values are asked for, so that a conversion holds one tensor and not the file. Whatever has a
`shape`, a `dtype` and values for `np.asarray` is a tensor here; arrays are as good as `Lazy`.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import safetensors

from v3d_jax.errors import UserError

FLOATS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FloatName = Literal["float32", "bfloat16", "float16"]


@runtime_checkable
class Progress(Protocol):
    """What is told of long work, such as a bar of tqdm."""

    def reset(self, total: int) -> Any:
        """The work begins, and has so many bytes."""

    def update(self, n: int) -> Any:
        """So many bytes more are done."""


_TYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
    "BOOL": np.bool_,
}
_CODES = {np.dtype(kind): code for code, kind in _TYPES.items()}
_LENGTH = 8  # bytes of the header's length, at the start of a file
_METADATA = "__metadata__"
_PROBED = 2**24


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that `np.asarray` reads; `read` is called anew every time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, fresh from the disk; whether to copy is not asked."""
        del copy
        values = self.read()
        return values if dtype is None else values.astype(dtype, copy=False)


def nbytes(tensor: Any) -> int:
    """Bytes of a tensor's values."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def open_file(path: Path) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The tensors of a safetensors file in their order there, and its metadata.

    Raises `UserError` for a file that is damaged, cut short or has types that numpy lacks.
    """
    try:
        # Checks everything: that the tensors fill the file, without gaps or overlaps.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is not a whole safetensors file: {first}") from None
    metadata = header.pop(_METADATA, {})
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _entry(path, _LENGTH + length, name, entry) for name, entry in entries}, metadata


def _entry(path: Path, start: int, name: str, entry: dict[str, Any]) -> Lazy:
    if entry["dtype"] not in _TYPES:
        raise UserError(f"{path}: {name} has the unsupported type {entry['dtype']}")
    shape, dtype = tuple(entry["shape"]), np.dtype(_TYPES[entry["dtype"]])
    begin, end = entry["data_offsets"]
    read = functools.partial(_read, path, start + begin, end - begin, dtype, shape)
    return Lazy(shape, dtype, read)


def _read(
    path: Path, offset: int, length: int, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    # Read, not mapped: mapped pages count as the process's memory until the map is closed.
    try:
        data = np.fromfile(path, np.uint8, length, offset=offset)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if data.size != length:
        raise UserError(f"{path} was cut short while it was read")
    return data.view(dtype).reshape(shape)


def write(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes one safetensors file that everybody may read, holding one tensor at a time.

    A `Lazy` whose values are not of its shape and type raises ValueError.
    """
    # The widest types first: then every tensor starts at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + nbytes(tensors[name])
        code = _CODES[np.dtype(tensors[name].dtype)]
        shape = list(tensors[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        for name in names:
            values, tensor = np.asarray(tensors[name]), tensors[name]
            if values.shape != tuple(tensor.shape) or values.dtype != tensor.dtype:
                raise ValueError(f"{name} is {values.dtype} {values.shape}, not as announced")
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            if progress is not None:
                progress.update(nbytes(tensor))
    path.chmod(0o644)


def write_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Any],
    limit: int,
    *,
    index: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes `<stem>.safetensors`, or several of at most `limit` bytes or one tensor each.

    With `index` several come with the JSON that says which file holds a tensor, as Hugging Face's
    libraries want it.
    """
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + nbytes(tensor) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes(tensor)
    places = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"{stem}{suffix}.safetensors"
        write(path, shard, metadata, progress)
        places |= dict.fromkeys(shard, path.name)
    if index and len(shards) > 1:
        total = sum(nbytes(tensor) for tensor in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": places}
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def cast(tensors: Mapping[str, Any], dtype: FloatName | None) -> dict[str, Lazy]:
    """The tensors in another floating-point type, or in their own; float64 becomes float32.

    Tensors with values beyond float16's range stay float32 where float16 is asked for; to know
    them, wider ones are read here once. Reading a tensor that holds NaN or infinity raises
    `UserError`.
    """
    return {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}


def _cast(name: str, tensor: Any, dtype: FloatName | None) -> Lazy:
    own = np.dtype(tensor.dtype)
    kept = np.dtype(FLOATS[dtype] if dtype else own)
    if kept not in _CODES or kept.itemsize == 8:
        kept = np.dtype(np.float32)
    if dtype == "float16" and own.itemsize + (own == ml_dtypes.bfloat16) > 2:
        values = np.asarray(tensor, np.float32)
        if values.size and np.abs(values).max() > ml_dtypes.finfo(kept).max:
            kept = np.dtype(np.float32)
    return Lazy(tuple(tensor.shape), kept, functools.partial(_converted, name, tensor, kept))


def _converted(name: str, tensor: Any, dtype: np.dtype) -> np.ndarray:
    values = np.asarray(tensor)
    if not is_finite(values):
        raise UserError(f"{name} holds NaN or infinite weights: nothing was saved")
    return values.astype(dtype, copy=False)


def is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, in little memory."""
    flat = values.reshape(-1)
    return all(
        np.isfinite(flat[start : start + _PROBED]).all() for start in range(0, flat.size, _PROBED)
    )


def begin(path: Path, tensors: Iterable[Any], progress: Progress | None = None) -> None:
    """Announces that `tensors` will be written to `path`; `UserError` if the disk is too small."""
    needed = sum(map(nbytes, tensors))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{path} needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB left"
        )
    if progress is not None:
        progress.reset(needed)


def aside(path: Path) -> Path:
    """The hidden name beside `path` under which it is written before it is renamed."""
    return path.parent / f".{path.name}.partial-{os.getpid()}"


def same_type(tensors: Iterable[Any]) -> np.dtype:
    """The type of all of the tensors, or float32 where they differ."""
    types = {np.dtype(tensor.dtype) for tensor in tensors}
    return types.pop() if len(types) == 1 else np.dtype(np.float32)
