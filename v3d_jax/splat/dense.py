"""The slow twin of `rasterize`: every Gaussian on every pixel, one after the other.

No tiles, no lists, no capacity, no custom gradient; the same projection and cut-offs. Works in
float64 (under `jax.enable_x64`) and is the reference that the fast path is held to.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from v3d_jax.ops import camera as cameras
from v3d_jax.ops.camera import Camera
from v3d_jax.splat import gaussians as splats
from v3d_jax.splat.bin import ALPHA_MIN
from v3d_jax.splat.chunk import ALPHA_MAX, T_MIN
from v3d_jax.splat.gaussians import Gaussians
from v3d_jax.splat.project import NEAR, Projection, project


def rasterize(
    gaussians: Gaussians,
    camera: Camera,
    background: Float[Array, "3"] | None = None,
    *,
    width: int,
    height: int,
    near: float = NEAR,
) -> tuple[Float[Array, "i h w 3"], Float[Array, "i h w"], Float[Array, "i h w"]]:
    """Colour, alpha and expected depth of a batch of views, as `rasterize.rasterize`.

    Time and, for the gradient, memory are proportional to Gaussians x pixels.
    """
    position = cameras.position(camera).astype(gaussians.means.dtype)
    shown = splats.color(gaussians.sh, gaussians.means, position)
    projection = project(
        gaussians.means,
        gaussians.rotations,
        gaussians.scales,
        camera,
        width=width,
        height=height,
        near=near,
    )
    draw = functools.partial(_one_view, gaussians.opacities, width, height)
    channels, alpha = lax.map(lambda view: draw(*view), (projection, shown))
    color, depth = channels[..., :3], channels[..., 3] / jnp.maximum(alpha, 1e-10)
    if background is not None:
        color = color + (1.0 - alpha)[..., None] * background[None, None, None]
    return color, alpha, depth


def _one_view(
    opacities: Array, width: int, height: int, projection: Projection, shown: Array
) -> tuple[Array, Array]:
    order = jnp.argsort(jnp.where(projection.visible, projection.depth, jnp.inf), stable=True)
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    x, y = (axis.astype(shown.dtype) for axis in (x, y))

    @jax.checkpoint
    def step(state: tuple, splat: tuple) -> tuple[tuple, None]:
        t, stopped, channels = state
        p, opacity, values = splat
        dx, dy = x - p.mean_x, y - p.mean_y
        power = 0.5 * (p.conic_xx * dx * dx + p.conic_yy * dy * dy) + p.conic_xy * dx * dy
        alpha = jnp.minimum(opacity * jnp.exp(-power), ALPHA_MAX)
        seen = p.visible & (alpha >= ALPHA_MIN)
        after = t * (1.0 - alpha)
        stopped = stopped | (seen & (after <= T_MIN))
        kept = seen & ~stopped
        weight = jnp.where(kept, alpha * t, 0.0)
        channels = channels + weight[..., None] * values[None, None]
        return (jnp.where(kept, after, t), stopped, channels), None

    values = jnp.concatenate([shown, projection.depth[:, None]], axis=1)
    splats_in_order = jax.tree.map(lambda a: a[order], (projection, opacities, values))
    start = jnp.ones_like(x), jnp.zeros(x.shape, bool), jnp.zeros((*x.shape, 4), x.dtype)
    (t, _, channels), _ = lax.scan(step, start, splats_in_order)
    return channels, 1.0 - t
