"""Rays of pixels, distances along them, and what cameras see of points.

Axes: `h w` pixels of a picture, `s` samples of a ray, `v` views, `n` points, `c` channel; `*b` any
leading axes. Cameras and pixel coordinates are those of `ops.camera`. Distances are along rays of
unit length, in world units. float32, products in full precision.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from v3d_jax.ops.camera import Camera

# No camera sees a point nearer than this.
NEAREST = 1e-3
# Of the cube [-1, 1]^3.
DIAGONAL = 2.0 * 3.0**0.5

_HIGHEST = jax.lax.Precision.HIGHEST


class Rays(NamedTuple):
    """Half lines; directions have unit length."""

    origins: Float[Array, "*b 3"]
    directions: Float[Array, "*b 3"]


def pixel_rays(cameras: Camera, size: tuple[int, int]) -> Rays:
    """Rays [*v, h, w] through the pixel centres of pictures of `size` (height, width).

    `size` may be another resolution than the cameras', such as that of latents.
    """
    height, width = size
    y = _centres(cameras.height, height)[..., :, None]
    x = _centres(cameras.width, width)[..., None, :]
    pixels = jnp.stack(jnp.broadcast_arrays(x, y), axis=-1)
    pose, intrinsics = (field[..., None, None, :, :] for field in cameras[:2])
    return through(pose, intrinsics, pixels)


def through(
    world_to_camera: Float[Array, "*#b 4 4"],
    intrinsics: Float[Array, "*#b 3 3"],
    pixels: Float[Array, "*b 2"],
) -> Rays:
    """Rays from cameras through positions (x, y) in their pictures, in pixels."""
    lens = intrinsics[..., :2, :]
    y = (pixels[..., 1] - lens[..., 1, 2]) / lens[..., 1, 1]
    x = (pixels[..., 0] - lens[..., 0, 2] - lens[..., 0, 1] * y) / lens[..., 0, 0]
    local = jnp.stack([x, y, jnp.ones_like(x)], axis=-1)
    rotation, offset = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3]
    directions = jnp.einsum("...ji,...j->...i", rotation, local, precision=_HIGHEST)
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    origins = -jnp.einsum("...ji,...j->...i", rotation, offset, precision=_HIGHEST)
    return Rays(jnp.broadcast_to(origins, directions.shape), directions)


def _centres(length: Int[Array, "*v"], count: int) -> Float[Array, "*v l"]:
    """Centres of `count` pixels that share `length` pixels of a camera, in the latter."""
    places = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32), (*length.shape, count))
    return (places + 0.5) / count * length[..., None].astype(jnp.float32)


def box_span(rays: Rays, radius: float) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Distances at which rays enter and leave the cube [-radius, radius]^3, from 0 on.

    Rays that miss it leave before they enter, or as they do.
    """
    tiny = 1e-9
    directions = jnp.where(jnp.abs(rays.directions) < tiny, tiny, rays.directions)
    ends = [(side * radius - rays.origins) / directions for side in (-1.0, 1.0)]
    enter = jnp.maximum(jnp.max(jnp.minimum(*ends), axis=-1), 0.0)
    return enter, jnp.min(jnp.maximum(*ends), axis=-1)


def cube_span(rays: Rays) -> tuple[Float[Array, "*b h w"], Float[Array, "*b h w"]]:
    """As `box_span` of [-1, 1]^3, for rays [*b, h, w] of whole pictures.

    Rays that miss it take the nearest entry and the farthest exit of their picture, so that they
    are sampled where the others are; where all miss, from 0 to the cube's diagonal.
    """
    enter, leave = box_span(rays, 1.0)
    hit = leave > enter
    of_picture = {"axis": (-2, -1), "keepdims": True, "where": hit}
    nearest = jnp.min(enter, initial=jnp.inf, **of_picture)
    farthest = jnp.max(leave, initial=0.0, **of_picture)
    some = farthest > 0.0
    nearest, farthest = jnp.where(some, nearest, 0.0), jnp.where(some, farthest, DIAGONAL)
    return jnp.where(hit, enter, nearest), jnp.where(hit, leave, farthest)


def even_distances(
    enter: Float[Array, "*b"],
    leave: Float[Array, "*b"],
    samples: int,
    jitter: Float[Array, "*b s"] | None = None,
) -> Float[Array, "*b s"]:
    """Evenly spaced from `enter` to `leave`, both included, each later by `jitter` of a step."""
    place = jnp.broadcast_to(jnp.arange(samples, dtype=jnp.float32), (*enter.shape, samples))
    place = place if jitter is None else place + jitter
    return enter[..., None] + (leave - enter)[..., None] * (place / (samples - 1))


def disparity_distances(
    near: Float[Array, "*b"],
    far: Float[Array, "*b"],
    samples: int,
    jitter: Float[Array, "*b s"] | None = None,
) -> Float[Array, "*b s"]:
    """One in each of `samples` bins of equal disparity from `near` to `far`.

    `jitter` is the place in the bin, from 0 to 1; without it samples are in the middle.
    """
    place = jnp.broadcast_to(jnp.arange(samples, dtype=jnp.float32), (*near.shape, samples))
    z = (place + (0.5 if jitter is None else jitter)) / samples
    return 1.0 / ((1.0 - z) / near[..., None] + z / far[..., None])


def project(
    cameras: Camera, points: Float[Array, "n 3"]
) -> tuple[Float[Array, "*v n 2"], Bool[Array, "*v n"]]:
    """Pixel coordinates of points, and which of them are before the camera and in its picture.

    All others have coordinates 0, whatever they and the cameras are. Nothing hides a point.
    """
    rotation, offset = cameras.world_to_camera[..., :3, :3], cameras.world_to_camera[..., :3, 3]
    local = jnp.einsum("...ij,nj->...ni", rotation, points, precision=_HIGHEST)
    local = local + offset[..., None, :]
    # Points behind are moved before the division: its gradient is finite for them too.
    ahead = local[..., 2] > NEAREST
    local = jnp.where(ahead[..., None], local, 1.0)
    pixels = jnp.einsum(
        "...ij,...nj->...ni", cameras.intrinsics[..., :2, :], local, precision=_HIGHEST
    )
    pixels = pixels / local[..., 2:]
    size = jnp.stack([cameras.width, cameras.height], axis=-1)[..., None, :]
    visible = ahead & jnp.all((pixels >= 0.0) & (pixels <= size), axis=-1)
    return jnp.where(visible[..., None], pixels, 0.0), visible


def bilinear(image: Float[Array, "h w *c"], pixels: Float[Array, "*n 2"]) -> Float[Array, "..."]:
    """An image [*n, *c] at pixel coordinates (x, y), whose centres are at half-integers.

    Beyond the outermost centres their values hold. Interpolates in float32 and returns the dtype of
    `image`.
    """
    cells, weights = corners(image.shape[:2], pixels)
    table = image.reshape(-1, *image.shape[2:])
    channels = (1,) * (image.ndim - 2)
    taps = [table.at[cell].get(mode="promise_in_bounds").astype(jnp.float32) for cell in cells]
    found = sum(
        weight.reshape(*weight.shape, *channels) * tap
        for weight, tap in zip(weights, taps, strict=True)
    )
    return found.astype(image.dtype)


def between_centres(
    size: tuple[int, int], pixels: Float[Array, "*n 2"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Positions (x, y) counted from the first cell's centre, none beyond the outermost centres."""
    x, y = (
        jnp.clip(pixels[..., axis] - 0.5, 0.0, length - 1.0)
        for axis, length in enumerate(size[::-1])
    )
    return x, y


def corners(
    size: tuple[int, int], pixels: Float[Array, "*n 2"]
) -> tuple[list[Int[Array, "*n"]], list[Float[Array, "*n"]]]:
    """The four cells around positions (x, y) in a picture (height, width), and their weights.

    Cells are counted row by row; their centres are at half-integers, and beyond the outermost the
    nearest ones count alone.
    """
    height, width = size
    x, y = between_centres(size, pixels)
    left, top = jnp.floor(x).astype(jnp.int32), jnp.floor(y).astype(jnp.int32)
    right, bottom = jnp.minimum(left + 1, width - 1), jnp.minimum(top + 1, height - 1)
    x, y = x - left, y - top
    cells = [row * width + column for row in (top, bottom) for column in (left, right)]
    weights = [down * across for down in (1.0 - y, y) for across in (1.0 - x, x)]
    return cells, weights
