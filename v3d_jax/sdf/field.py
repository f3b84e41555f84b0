"""The fitted object: a signed distance, a colour, and how sharp the surface looks to a ray.

The distance is a small network of a point and its grid features, negative inside; the colour is
another of that network's output and the surface normal, without a viewing direction, so that what
is fitted is the texture (V3D's mesh_recon). The field lives in the box [-radius, radius]^3.

The gradient of the distance comes in three ways. "analytic": the network's derivative by its input
times the grid's Jacobian, one lookup. "tetrahedral" and "central": differences of four and six more
lookups, with a step tied to the finest level that is open, as Neuralangelo (arXiv 2306.03092).

Axes: n point, l level, f feature, c output of the geometry network. World units.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from v3d_jax.sdf import hashgrid
from v3d_jax.sdf.hashgrid import GridConfig

Level = int | Int32[Array, ""] | None  # how many grid levels are open; None: all

_HIGHEST = lax.Precision.HIGHEST
_SHARPNESS = 10.0  # inv_s = exp(10 v), as NeuS
_BETA = 100.0  # of softplus
_LEAST = 1e-12  # of a squared length that is divided by
_TETRAHEDRON = np.float32([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])


@dataclass(frozen=True)
class FieldConfig:
    """Everything static about a field; the defaults are V3D's sizes."""

    grid: GridConfig = field(default_factory=GridConfig)
    normals: Literal["analytic", "tetrahedral", "central"] = "analytic"
    radius: float = 1.0  # half side of the box
    width: int = 64  # of the geometry network's hidden layer
    outputs: int = 13  # of the geometry network: the distance, first, and features
    color_width: int = 64  # of the colour network's two hidden layers
    color_sees_grid: bool = False  # the colour network gets point and grid features, too
    sphere: float = 0.5  # radius of the sphere that the field starts as, in half sides of the box
    sharpness: float = 0.3  # v at the start


class Layer(NamedTuple):
    """An affine layer; with a gain, weight-normalised: kernel columns are scaled to that length."""

    kernel: Float[Array, "i o"]
    bias: Float[Array, "o"]
    gain: Float[Array, "o"] | None = None


class Field(NamedTuple):
    """The parameters."""

    table: Float[Array, "rows f"]
    geometry: tuple[Layer, Layer]
    color: tuple[Layer, Layer, Layer]
    sharpness: Float[Array, ""]  # v


class Evaluation(NamedTuple):
    """What the field is at points."""

    sdf: Float[Array, "n"]
    gradient: Float[Array, "n 3"]
    outputs: Float[Array, "n c"]  # of the geometry network
    inputs: Float[Array, "n i"]  # of the geometry network: point in the box and grid features


def initial(config: FieldConfig, key: Key[Array, ""]) -> Field:
    """A sphere of any colour (SAL's geometric initialisation, arXiv 1911.10414, as in NeuS)."""
    table_key, first_key, last_key, *color_keys = jax.random.split(key, 6)
    width, features = config.width, config.grid.levels * config.grid.features
    first = math.sqrt(2.0 / width) * jax.random.normal(first_key, (3, width))
    # Features count for nothing yet.
    first = jnp.concatenate([first, jnp.zeros((features, width))])
    spread = 1e-4 * jax.random.normal(last_key, (width, config.outputs))
    last = math.sqrt(math.pi / width) + spread
    geometry = (_normalised(first, 0.0), _normalised(last, -config.sphere))
    given = config.outputs + 3 + (3 + features if config.color_sees_grid else 0)
    sizes = (given, config.color_width, config.color_width, 3)
    color = tuple(
        Layer(_kaiming(one, i, o), jnp.zeros(o))
        for one, i, o in zip(color_keys, sizes[:-1], sizes[1:], strict=True)
    )
    table = hashgrid.initial(config.grid, table_key)
    return Field(table, geometry, color, jnp.asarray(config.sharpness, jnp.float32))


def inv_s(params: Field) -> Float[Array, ""]:
    """Sharpness of the surface: the slope of the logistic function of the distance, a length^-1."""
    return jnp.exp(jnp.clip(_SHARPNESS * params.sharpness, -14.0, 14.0))


def sdf(
    config: FieldConfig, params: Field, points: Float[Array, "n 3"], level: Level = None
) -> Float[Array, "n"]:
    """Signed distance, negative inside; beyond the box that of the nearest features."""
    return _outputs(params, _inputs(config, params, points, level)[0])[:, 0]


def evaluate(
    config: FieldConfig, params: Field, points: Float[Array, "n 3"], level: Level = None
) -> Evaluation:
    """Signed distance, its gradient and the features; differentiable by the parameters."""
    if config.normals == "analytic":
        return _analytic(config, params, points, level)
    inputs, _ = _inputs(config, params, points, level)
    outputs = _outputs(params, inputs)
    gradient = _differences(config, params, points, level)
    return Evaluation(outputs[:, 0], gradient, outputs, inputs)


def shade(config: FieldConfig, params: Field, found: Evaluation) -> Float[Array, "n 3"]:
    """Colours in [0, 1], sRGB, of evaluated points."""
    seen = [found.outputs, unit(found.gradient)]
    hidden = jnp.concatenate(seen + [found.inputs] * config.color_sees_grid, axis=-1)
    for layer in params.color[:-1]:
        hidden = jax.nn.relu(_affine(layer, hidden, lax.Precision.DEFAULT))
    # A colour is right to 1 / 255: the device's fastest product will do.
    return jax.nn.sigmoid(_affine(params.color[-1], hidden, lax.Precision.DEFAULT))


def unit(vectors: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    """Vectors scaled to unit length; finite, with finite derivatives, at 0."""
    squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * lax.rsqrt(jnp.maximum(squared, _LEAST))


def finest_cell(config: FieldConfig, level: Level) -> Array | float:
    """Edge of a cell of the finest open level, world units."""
    edges = [2.0 * config.radius / (side - 1) for side in config.grid.resolutions]
    if level is None:
        return edges[-1]
    return jnp.asarray(edges)[jnp.clip(level, 1, len(edges)) - 1]


def _analytic(config: FieldConfig, params: Field, points: Array, level: Level) -> Evaluation:
    """J^T dMLP/dfeatures + dMLP/dpoint, written out so that only first derivatives are left."""
    first, last = params.geometry
    inputs, jacobian = _inputs(config, params, points, level)
    before = _affine(first, inputs, _HIGHEST)
    hidden, slope = _softplus(before)
    outputs = _affine(last, hidden, _HIGHEST)
    through = slope * _kernel(last)[:, 0][None]
    by_input = jnp.einsum("nw,iw->ni", through, _kernel(first), precision=_HIGHEST)
    by_feature = by_input[:, 3:].reshape(jacobian.shape[:3])
    # Over levels and features, elementwise: too short for a matrix product.
    through_grid = jnp.sum(by_feature[..., None] * jacobian, axis=(1, 2))
    gradient = (by_input[:, :3] + 0.5 * through_grid) / config.radius
    return Evaluation(outputs[:, 0], gradient, outputs, inputs)


def _differences(config: FieldConfig, params: Field, points: Array, level: Level) -> Array:
    step = finest_cell(config, level)
    if config.normals == "tetrahedral":
        # Corners of a cube at this half side are one step away; sum of v v^T is 4.
        directions, scale = _TETRAHEDRON / math.sqrt(3.0), 0.75
    else:
        directions, scale = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32), 0.5
    places = points[:, None] + step * directions[None]
    values = sdf(config, params, places.reshape(-1, 3), level).reshape(len(points), -1)
    return (scale / step) * jnp.einsum("nk,kd->nd", values, directions, precision=_HIGHEST)


def _outputs(params: Field, inputs: Float[Array, "n i"]) -> Float[Array, "n c"]:
    first, last = params.geometry
    return _affine(last, _softplus(_affine(first, inputs, _HIGHEST))[0], _HIGHEST)


def _inputs(
    config: FieldConfig, params: Field, points: Array, level: Level
) -> tuple[Float[Array, "n i"], Float[Array, "n l f 3"]]:
    """The point in half sides of the box, and the features of open levels with their Jacobian."""
    place = points / config.radius
    features, jacobian = hashgrid.encode(config.grid, params.table, 0.5 * (place + 1.0))
    if level is not None:
        isopen = (jnp.arange(config.grid.levels) < level).astype(jnp.float32)[None, :, None]
        features, jacobian = features * isopen, jacobian * isopen[..., None]
    return jnp.concatenate([place, features.reshape(len(points), -1)], axis=-1), jacobian


def _softplus(z: Array) -> tuple[Array, Array]:
    """Softplus with beta 100 and its derivative, from one exponential."""
    small = jnp.exp(-jnp.abs(_BETA * z))
    slope = jnp.where(z > 0, 1.0, small) / (1.0 + small)
    return jnp.maximum(z, 0.0) + jnp.log1p(small) / _BETA, slope


def _affine(layer: Layer, x: Array, precision: lax.Precision) -> Array:
    return jnp.einsum("ni,io->no", x, _kernel(layer), precision=precision) + layer.bias[None]


def _kernel(layer: Layer) -> Array:
    if layer.gain is None:
        return layer.kernel
    length = jnp.sqrt(jnp.sum(jnp.square(layer.kernel), axis=0))
    return layer.kernel * (layer.gain / length)[None]


def _normalised(kernel: Array, bias: float) -> Layer:
    """A weight-normalised layer that computes with `kernel` at first."""
    length = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0))
    return Layer(kernel, jnp.full(kernel.shape[1], bias, jnp.float32), length)


def _kaiming(key: Key[Array, ""], i: int, o: int) -> Array:
    bound = math.sqrt(6.0 / i)
    return jax.random.uniform(key, (i, o), minval=-bound, maxval=bound)
