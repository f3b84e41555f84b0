"""Arrays out of pickle files, without trusting the file and without PyTorch.

A pickle is a program that may call anything it can import. The unpickler here imports nothing that
a file names: array parts are built by the functions below, and every other global is refused, or,
for the bookkeeping of training frameworks that surrounds the tensors of a checkpoint, replaced by
an inert `Foreign` object. Read are pickled containers of numpy arrays, and PyTorch's zip files
(`torch.save` since 1.6), whose tensors are memory-mapped and cost nothing until they are used.
"""

import io
import math
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from v3d_jax.errors import UserError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_NUMPY_KINDS = "biufc"
# Packages whose objects checkpoints carry beside the tensors; their classes become `Foreign`.
_FOREIGN = frozenset(
    {
        *("argparse", "diffusers", "functools", "ldm", "lightning", "lightning_fabric", "numpy"),
        *("omegaconf", "pathlib", "pytorch_lightning", "sgm", "torch", "transformers", "typing"),
    }
)
_CONTAINERS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "tuple"): tuple,
    # Protocol 2 calls `bytes` for an empty text only; a number would allocate memory at will.
    ("builtins", "bytes"): lambda: b"",
    ("builtins", "complex"): complex,
    ("builtins", "bool"): bool,
    ("builtins", "int"): int,
    ("builtins", "float"): float,
    ("builtins", "str"): str,
    ("collections", "Counter"): dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
}
# The magic number that opens PyTorch's pickles from before 1.6.
_OLD_TORCH = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_LOCAL_HEADER = struct.Struct("<26xHH")
# What a damaged pickle runs into inside the interpreter's own unpickler.
_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError,
    RecursionError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


class RefusedError(UserError):
    """The file asks for something that is not array data."""


class Foreign:
    """Stands for an object of a class that is not built; takes whatever the pickle gives it."""

    def __new__(cls, *args: Any, **kwargs: Any):
        """Ignores the arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any):
        """Ignores the state."""

    def __setitem__(self, key: Any, value: Any):
        """Ignores the item."""

    def __hash__(self) -> int:
        return id(self)

    def append(self, value: Any):
        """Ignores the value."""

    def extend(self, values: Any):
        """Ignores the values."""

    add = append


class _Dtype:
    """A numpy dtype under construction: its code, then its byte order."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple):
        self.order = state[1] if state[1] in "<>" else "="

    def build(self) -> np.dtype:
        try:
            dtype = np.dtype(self.code).newbyteorder(self.order)
        except (TypeError, ValueError):
            raise RefusedError(f"refused: arrays of type {self.code!r}") from None
        if dtype.kind not in _NUMPY_KINDS or dtype.subdtype is not None:
            raise RefusedError(f"refused: arrays of type {self.code!r}")
        return dtype


class _NumpyArray:
    """A numpy array under construction; `build` once the whole file is read."""

    def __init__(self, *_: Any):
        self.array = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise RefusedError("refused: arrays of objects")
        self.array = _from_buffer(data, dtype, shape, "F" if fortran else "C")


class _StorageType(NamedTuple):
    """A PyTorch storage class, named but not imported."""

    dtype: Any


class _Unpickler(pickle.Unpickler):
    """Builds containers and arrays; `storage` reads a tensor's memory from the surrounding zip."""

    def __init__(
        self,
        file: Any,
        *,
        storage: Callable[[str, np.dtype], np.ndarray] | None = None,
        foreign: bool = False,
    ):
        super().__init__(file)
        self.storage, self.foreign = storage, foreign

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global; raises `RefusedError` where there is none."""
        module = "builtins" if module == "__builtin__" else module
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if (module, name) in _NUMPY:
            return _NUMPY[module, name]
        if self.storage is not None and (module, name) in _TORCH:
            return _TORCH[module, name]
        if self.storage is not None and module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if self.foreign and module.partition(".")[0] in _FOREIGN:
            return type("Foreign", (Foreign,), {"origin": f"{module}.{name}"})
        raise RefusedError(f"refused: it asks for {module}.{name}, which is not array data")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A tensor's memory: ("storage", type, key, device, number of elements)."""
        if self.storage is None or not isinstance(pid, tuple) or pid[:1] != ("storage",):
            raise RefusedError("refused: it refers to something outside the file")
        _, kind, key, _, length = pid
        if not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise RefusedError("refused: a tensor of an unknown type")
        memory = self.storage(key, np.dtype(kind.dtype))
        if len(memory) < length:
            raise UserError("cut short: a tensor's data ends early")
        return memory[:length]


def load(path: str | os.PathLike, *, foreign: bool = False) -> Any:
    """The containers, numbers, texts and numpy arrays of a pickle or a PyTorch zip file.

    With `foreign`, objects of well-known training frameworks become inert `Foreign` objects; all
    else that is not array data raises `RefusedError`. A file that is missing, cut short or of
    another kind raises `UserError`. Both messages are one line that names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _load_zip(path, foreign)
            file.seek(0)
            if _OLD_TORCH in file.read(32):
                raise UserError(
                    "written by PyTorch before 1.6: save it again with a newer torch.save"
                )
            file.seek(0)
            return _finish(_Unpickler(file, foreign=foreign).load())
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable pickle: {_one_line(error)}") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: damaged or not a pickle: {_one_line(error)}") from None


def state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The named tensors of a checkpoint: a bare state dict, or the `state_dict` of Lightning's.

    Entries that are not arrays are left out; a file without any raises `UserError`.
    """
    content = load(path, foreign=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, dict) else ()
    arrays = {key: value for key, value in entries if isinstance(value, np.ndarray)}
    if not arrays:
        raise UserError(f"{path}: holds no named tensors at its top level or under state_dict")
    return arrays


def _load_zip(path: Path, foreign: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        roots = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError("a zip file, but not one of torch.save")
        root = roots[0].removesuffix("data.pkl")
        order = "<"
        if f"{root}byteorder" in archive.namelist():
            order = {b"little": "<", b"big": ">"}[archive.read(f"{root}byteorder")]
        # One map for all: every map holds the file open once more, and systems allow few.
        mapped = np.memmap(path, np.uint8, "r")
        memories: dict[str, np.ndarray] = {}

        def storage(key: str, dtype: np.dtype) -> np.ndarray:
            if key not in memories:
                memories[key] = _memory(mapped, archive, archive.getinfo(f"{root}data/{key}"))
            memory = memories[key]
            memory = memory[: len(memory) // dtype.itemsize * dtype.itemsize]
            return memory.view(dtype if dtype.itemsize == 1 else dtype.newbyteorder(order))

        data = io.BytesIO(archive.read(roots[0]))
        return _finish(_Unpickler(data, storage=storage, foreign=foreign).load())


def _memory(mapped: np.ndarray, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of a zip entry, from the map of the file where they are stored uncompressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size == 0:
        return np.frombuffer(archive.read(info), np.uint8)
    start = info.header_offset
    # The local header's own lengths: its extra field pads the data to an aligned offset.
    name, extra = _LOCAL_HEADER.unpack(mapped[start : start + _LOCAL_HEADER.size].tobytes())
    begin = start + _LOCAL_HEADER.size + name + extra
    return mapped[begin : begin + info.file_size]


def release(array: np.ndarray) -> None:
    """Gives the memory of a mapped array back; its values are read again when they are used.

    Arrays that are not mapped stay as they are.
    """
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _finish(value: Any) -> Any:
    """Replaces arrays under construction; containers keep their kind."""
    if isinstance(value, _NumpyArray):
        return value.array
    if isinstance(value, dict):
        return type(value)((key, _finish(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return type(value)([_finish(entry) for entry in value])
    return value


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    array = np.frombuffer(data, dtype.build())
    if math.prod(shape) != array.size:
        raise UserError("damaged: an array's data does not fill its shape")
    return array.reshape(shape, order=order)


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return _from_buffer(data, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    """Python 2's protocol carries bytes as text in Latin-1."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"refused: text encoded as {encoding!r}")
    return text.encode("latin-1")


def _tensor(
    storage: np.ndarray,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: Any,
) -> np.ndarray:
    """A strided view of a storage; strides are checked, so that no view leaves the memory."""
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise UserError("damaged: a tensor's shape does not fit its strides")
    if math.prod(size) == 0:
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= len(storage):
        raise UserError("damaged: a tensor reaches beyond its storage")
    steps = tuple(step * storage.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
    return np.asarray(view)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_ARRAY_MODULES = ("numpy.core", "numpy._core")
_NUMPY: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NumpyArray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{(f"{m}.multiarray", "_reconstruct"): _NumpyArray for m in _ARRAY_MODULES},
    **{(f"{m}.multiarray", "scalar"): _scalar for m in _ARRAY_MODULES},
    **{(f"{m}.numeric", "_frombuffer"): _from_buffer for m in _ARRAY_MODULES},
}
_TORCH: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
