"""Launching Triton kernels from JAX on an NVIDIA GPU.

`triton` and `jax_triton` are imported where a kernel is launched.
"""

import importlib
import inspect
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import custom_batching
from jaxtyping import Array


class Launch(NamedTuple):
    """One kernel over one grid."""

    module: str  # of `v3d_jax.splat.kernels`
    kernel: str  # takes all of the following in this order
    inputs: tuple[Array, ...]
    numbers: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    static: dict[str, Any]
    grid: int
    warps: int
    zeroed: tuple[int, ...] = ()  # outputs that start as zeros
    registers: int | None = None  # most that a thread may have; jax-triton 0.3 cannot say it


def kernel(launch: Launch) -> Any:
    """The Triton function of a launch; imports `triton`."""
    module = importlib.import_module(f"v3d_jax.splat.kernels.{launch.module}")
    return getattr(module, launch.kernel)


def run(launch: Launch) -> tuple[Array, ...]:
    """Launches one kernel on an NVIDIA GPU; under `jax.vmap` once for each, one after the other."""

    @custom_batching.sequential_vmap
    def one(*inputs: Array) -> tuple[Array, ...]:
        return through_jax_triton(launch._replace(inputs=inputs))

    return one(*launch.inputs)


def through_jax_triton(launch: Launch) -> tuple[Array, ...]:
    """Launches one kernel, which must not be batched."""
    import jax_triton

    # With jax-triton 0.4 an argument changed its name and Triton's own options came in.
    known = inspect.signature(jax_triton.triton_call).parameters
    types = "out_type" if "out_type" in known else "out_shape"
    options = {types: launch.outputs}
    if "backend_options" in known:
        options["backend_options"] = {"enable_fp_fusion": True}
        if launch.registers is not None:
            options["backend_options"]["maxnreg"] = launch.registers
    with warnings.catch_warnings():
        # Since 0.4, in favour of references, which earlier versions do not take.
        warnings.filterwarnings("ignore", "zeroed_outputs is deprecated", DeprecationWarning)
        return tuple(
            jax_triton.triton_call(
                *launch.inputs,
                *launch.numbers,
                kernel=kernel(launch),
                grid=(launch.grid,),
                num_warps=launch.warps,
                zeroed_outputs=launch.zeroed,
                name=f"splat_{launch.kernel}",
                **options,
                **launch.static,
            )
        )


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    """An output of float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """An output of int32."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
