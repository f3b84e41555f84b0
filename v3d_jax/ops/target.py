"""The platform that a program is traced for: the default backend's, unless another is named.

A function that has an implementation a platform asks here, so that a program can be compiled ahead
of time for a platform that is not at hand.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import AxisType

GPUS = ("gpu", "cuda")  # what JAX calls them: a backend, and what a program is lowered for

_named: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """Such as "cpu", "gpu" or "tpu"; starts the default backend only where none is named."""
    return _named.get() or jax.default_backend()


def free_axes() -> dict[str, int]:
    """Axes of the mesh in context over which the compiler may split arrays, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind is not AxisType.Manual}


def has_triton() -> bool:
    """Whether this JAX still has Pallas's Triton back end, which is deprecated since 0.11."""
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced in this block is for `platform`.

    Compiled functions that were traced before keep what they were traced for.
    """
    token = _named.set(platform)
    try:
        yield
    finally:
        _named.reset(token)
