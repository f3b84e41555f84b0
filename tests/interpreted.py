"""Runs the Triton kernels in Triton's interpreter, on arrays of a CPU: no GPU and no torch.

`launch` stands in for `v3d_jax.splat.kernels.launches.through_jax_triton`.
"""

import contextlib
import os
from unittest import mock

import jax
import numpy as np

from v3d_jax.splat.kernels import launches

if jax.default_backend() != "gpu":
    # Read when a kernel's module is imported, which happens at the first launch.
    os.environ["TRITON_INTERPRET"] = "1"


class _Buffer:
    """What the interpreter wants of a tensor, around a numpy array."""

    def __init__(self, array):
        self.array, self.dtype, self.shape = array, str(array.dtype), array.shape

    def data_ptr(self):
        return self.array.ctypes.data


@contextlib.contextmanager
def interpreter():
    """Triton's interpreter on `_Buffer`s, with scans and reductions a row at a time."""
    from triton.runtime import interpreter as triton_interpreter

    def rows(operation, inputs):
        """Combines whole slices along the axis, where the interpreter takes element by element."""
        arrays = [np.moveaxis(x.handle.data, operation.axis, 0) for x in inputs]
        done = [tuple(a[0] for a in arrays)]
        for i in range(1, len(arrays[0])):
            parts = [*done[-1], *(a[i] for a in arrays)]
            kinds = [x.dtype for x in inputs] * 2
            parts = [operation.to_tensor(p, k) for p, k in zip(parts, kinds, strict=True)]
            found = operation.combine_fn.fn(*parts)
            found = found if isinstance(found, tuple) else (found,)
            done.append(tuple(x.handle.data for x in found))
        return done

    def scan(self, inputs):
        done = [np.stack(x, axis=self.axis) for x in zip(*rows(self, inputs), strict=True)]
        return [self.to_tensor(d, x.dtype) for d, x in zip(done, inputs, strict=True)]

    def reduce(self, inputs):
        done = rows(self, inputs)[-1]
        return [self.to_tensor(d, x.dtype) for d, x in zip(done, inputs, strict=True)]

    with (
        mock.patch.multiple(
            triton_interpreter.GridExecutor,
            _init_args_hst=lambda self, args, kwargs: (args, kwargs),
            _restore_args_dev=lambda *_: None,
        ),
        mock.patch.object(triton_interpreter.ScanOps, "generic_scan", scan),
        mock.patch.object(triton_interpreter.ReduceOps, "generic_reduce", reduce),
    ):
        yield


def launch(call):
    """A `launches.Launch` as a callback that interprets it."""

    kernel = launches.kernel(call)

    def run(*inputs):
        inputs = [np.ascontiguousarray(x) for x in inputs]
        # What a kernel must not read is not a number.
        fill = {np.float32: np.nan, np.int32: -(2**30), np.uint16: 65000, np.uint32: 2**31}
        outputs = [
            np.full(o.shape, 0 if i in call.zeroed else fill[o.dtype.type], o.dtype)
            for i, o in enumerate(call.outputs)
        ]
        with interpreter():
            inputs, outputs_ = (tuple(map(_Buffer, arrays)) for arrays in (inputs, outputs))
            kernel[(call.grid,)](*inputs, *call.numbers, *outputs_, **call.static)
        return tuple(outputs)

    return jax.pure_callback(run, call.outputs, *call.inputs)
