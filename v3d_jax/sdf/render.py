"""Rendering a field along rays: samples where the surface may be, NeuS's opacity, compositing.

Shapes are static. An occupancy grid holds the signed distance last seen at its cells' centres; a
ray is first cut into equal coarse bins, of which those count whose cell may touch the band around
the surface where opacity changes, and its samples divide the counted length into equal parts. So
the inside of an object takes no samples, as nothing shows through its surface.

Axes: r ray, s sample of a ray, k coarse bin, n cells a side (grids are indexed x y z). World units.
Opacity is NeuS's (arXiv 2106.10689 eq. 13) with the distances at a sample's two ends extrapolated
from its gradient, as in the authors' code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jaxtyping import Array, Bool, Float, Int32

from v3d_jax.ops import camera
from v3d_jax.ops.rays import Rays, box_span, through
from v3d_jax.sdf import field
from v3d_jax.sdf.field import Evaluation, Field, FieldConfig, Level

_HIGHEST = lax.Precision.HIGHEST
_EPS = 1e-5  # of the quotient of logistic functions, as NeuS
_OPAQUE = 1.0 - 1e-6  # alpha that a logarithm can take
# inv_s times the distance at which a surface's opacity has risen to all but 1/1100.
_BAND = 7.0
_HALF_DIAGONAL = 0.5 * np.sqrt(3.0)  # of a cell


@dataclass(frozen=True)
class RenderConfig:
    """Sizes of rendering: all of them are static in the compiled program."""

    samples: int = 32  # a ray
    coarse: int = 256  # bins in which a ray looks for the surface
    occupancy: int = 128  # cells a side


class Samples(NamedTuple):
    """Places along rays, each for a stretch of it; rays that meet nothing have a width of 0."""

    distance: Float[Array, "r s"]  # from the ray's origin
    width: Float[Array, "r"]  # of a stretch

    @property
    def valid(self) -> Bool[Array, "r"]:
        """Whether the ray meets what may be surface."""
        return self.width > 0


class Rendering(NamedTuple):
    """What rays see, on black, and the samples it was composited from."""

    color: Float[Array, "r 3"]
    opacity: Float[Array, "r"]
    depth: Float[Array, "r"]  # along the ray, weighted: 0 where nothing is seen
    normal: Float[Array, "r 3"]  # weighted, not of unit length
    samples: Samples
    found: Evaluation  # at all samples, r * s of them


def pixel_rays(
    cameras: camera.Camera, view: Int32[Array, "r"], pixels: Float[Array, "r 2"]
) -> Rays:
    """Rays through positions (x, y) of the given views, in pixels; centres are half-integers."""
    return through(cameras.world_to_camera[view], cameras.intrinsics[view], pixels)


def march(
    config: FieldConfig,
    render: RenderConfig,
    occupancy: Float[Array, "n n n"],
    sharpness: Float[Array, ""],
    rays: Rays,
    offset: Float[Array, "r"],
) -> Samples:
    """Samples of rays where the surface may be; `offset` in [0, 1) moves all of a ray's together.

    `occupancy` holds signed distances at cells' centres, `sharpness` is inv_s.
    """
    near, far = box_span(rays, config.radius)
    step = (far - near) / render.coarse
    middle = near[:, None] + step[:, None] * (jnp.arange(render.coarse) + 0.5)[None]
    places = rays.origins[:, None] + middle[..., None] * rays.directions[:, None]
    side = occupancy.shape[0]
    cell = jnp.floor(0.5 * side * (places / config.radius + 1.0)).astype(jnp.int32)
    cell = jnp.clip(cell, 0, side - 1)
    flat = (cell[..., 0] * side + cell[..., 1]) * side + cell[..., 2]
    reach = _BAND / sharpness + _HALF_DIAGONAL * 2.0 * config.radius / side
    there = jnp.abs(occupancy.reshape(-1)[flat]) <= reach
    there = there & (far > near)[:, None]
    before = jnp.cumsum(there.astype(jnp.int32), axis=1)
    total = before[:, -1]
    # In counted bins: the sample's place among them, and which bin that is.
    place = (jnp.arange(render.samples)[None] + offset[:, None]) / render.samples
    place = place * total[:, None]
    whole = jnp.minimum(jnp.floor(place).astype(jnp.int32), total[:, None] - 1)
    bin_ = jnp.sum(before[:, None, :] <= whole[:, :, None], axis=-1)
    distance = near[:, None] + step[:, None] * (bin_ + (place - whole))
    return Samples(
        jnp.where(total[:, None] > 0, distance, near[:, None]),
        step * total / render.samples,
    )


def opacity(
    sdf: Float[Array, "r s"],
    slope: Float[Array, "r s"],
    width: Float[Array, "r"],
    sharpness: Float[Array, ""],
    anneal: Float[Array, ""] | float,
) -> Float[Array, "r s"]:
    """Alpha of samples: how much of the logistic function of the distance is lost across each.

    `slope` is the cosine between ray and normal; `anneal` goes from 0, where even surfaces seen
    from behind stop rays (and so get gradients), to 1, NeuS itself.
    """
    falling = -(nn.relu(0.5 - 0.5 * slope) * (1.0 - anneal) + nn.relu(-slope) * anneal)
    half = 0.5 * falling * width[:, None]
    before = nn.sigmoid((sdf - half) * sharpness)
    after = nn.sigmoid((sdf + half) * sharpness)
    return jnp.clip((before - after + _EPS) / (before + _EPS), 0.0, 1.0)


def composite(alpha: Float[Array, "r s"]) -> Float[Array, "r s"]:
    """Weights of samples, front to back: alpha times what the samples before it let through."""
    count = alpha.shape[1]
    passed = jnp.log1p(-jnp.minimum(alpha, _OPAQUE))
    earlier = jnp.triu(jnp.ones((count, count)), k=1)
    return alpha * jnp.exp(jnp.einsum("rs,st->rt", passed, earlier, precision=_HIGHEST))


def render(
    config: FieldConfig,
    settings: RenderConfig,
    params: Field,
    occupancy: Float[Array, "n n n"],
    rays: Rays,
    offset: Float[Array, "r"],
    *,
    anneal: Float[Array, ""] | float = 1.0,
    level: Level = None,
) -> Rendering:
    """What rays see; differentiable by the parameters."""
    sharpness = field.inv_s(params)
    samples = march(config, settings, occupancy, lax.stop_gradient(sharpness), rays, offset)
    places = rays.origins[:, None] + samples.distance[..., None] * rays.directions[:, None]
    found = field.evaluate(config, params, places.reshape(-1, 3), level)
    shape = samples.distance.shape
    normals = field.unit(found.gradient).reshape(*shape, 3)
    slope = jnp.sum(normals * rays.directions[:, None], axis=-1)
    alpha = opacity(found.sdf.reshape(shape), slope, samples.width, sharpness, anneal)
    weights = composite(jnp.where(samples.valid[:, None], alpha, 0.0))
    color = field.shade(config, params, found).reshape(*shape, 3)
    return Rendering(
        jnp.sum(weights[..., None] * color, axis=1),
        jnp.sum(weights, axis=1),
        jnp.sum(weights * samples.distance, axis=1),
        jnp.sum(weights[..., None] * normals, axis=1),
        samples,
        found,
    )
