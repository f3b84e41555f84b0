"""Where splats of a scene start: on pixels' rays, where other views agree on the colour.

Plane sweeping (Collins 1996) of single rays: a point tried along a pixel's ray is worth the more,
the better the views that see it from about the same side agree with the pixel. Distances are tried
in steps of disparity, for that is what moves in pictures, and once more around the best. Where
nothing can be told (one colour all over) a random distance is taken, which is a start as well. Some
points lie on a far shell, for what is behind all else, such as the sky.

Axes: v view, h w image, p point, k candidate on a ray. Lengths are those of `scene.Frame`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from v3d_jax.ops import camera, image, rays
from v3d_jax.splat import silhouette

_SIDE = 128  # pixels of the longer side of pictures that are compared
_BATCH = 4096  # points at a time


@dataclass(frozen=True)
class SweepConfig:
    """How a scene's points are found; lengths in the frame's units."""

    near: float = 0.1  # first distance that is tried
    far: float = 30.0  # last one, and the shell's radius
    shell: float = 0.05  # share of the points on the shell, from 0 to 1
    candidates: int = 48  # distances tried on a ray, and half as many again around the best
    compared: int = 100  # views that are asked at most
    aside: float = 0.3  # radians from the ray at which a view's say has fallen to exp(-1/2)
    doubt: float = 0.5  # views' worth of disagreement that every candidate starts with

    def on_shell(self, count: int) -> int:
        """How many of `count` points lie on the shell."""
        return round(self.shell * count)


class Swept(NamedTuple):
    """Coloured points, and which of them another view could see at some distance."""

    positions: Float[Array, "p 3"]
    colors: Float[Array, "p 3"]
    shared: Bool[Array, "p"]  # False on the shell


class _Pixel(NamedTuple):
    view: Int[Array, "*p"]
    origin: Float[Array, "*p 3"]
    direction: Float[Array, "*p 3"]
    seen: Float[Array, "*p 3"]  # the colour in the pictures that are compared


def points(
    key: Key[Array, ""],
    images: silhouette.Images,
    cameras: camera.Camera,
    count: int,
    config: SweepConfig,
) -> Swept:
    """`count` points of a scene, spread over the pixels of all views; those of the shell are last.

    Memory beyond the result is that of small pictures and of some thousand rays.
    """
    pixel_key, distance_key = jax.random.split(key)
    view = jnp.arange(count) % len(images)
    place = jax.random.uniform(pixel_key, (count, 2)) * jnp.stack(
        [cameras.width, cameras.height], axis=1
    )[view].astype(jnp.float32)
    small, lenses = _shrunk(images, cameras)
    ray = rays.through(cameras.world_to_camera[view], cameras.intrinsics[view], place)
    colors = _look_up(images, view, place)
    factor = lenses.width[0] / cameras.width[0]
    pixels = _Pixel(view, ray.origins, ray.directions, _look_up(small, view, place * factor))
    shell = config.on_shell(count)
    if shell == count:
        positions = pixels.origin + config.far * pixels.direction
        return Swept(positions, colors, jnp.zeros(count, bool))
    near = jax.tree.map(lambda leaf: leaf[: count - shell], pixels)
    distance, shared = _distances(distance_key, near, small, lenses, config)
    distance = jnp.concatenate([distance, jnp.full(shell, config.far)])
    positions = pixels.origin + distance[:, None] * pixels.direction
    return Swept(positions, colors, jnp.concatenate([shared, jnp.zeros(shell, bool)]))


def _shrunk(
    images: silhouette.Images, cameras: camera.Camera
) -> tuple[Float[Array, "v a b 3"], camera.Camera]:
    """Pictures of at most `_SIDE` pixels a side, and their cameras."""
    height, width = images.shape[1:3]
    factor = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = lax.map(lambda one: image.resize(silhouette.to_unit(one), size), images)
    scale = jnp.asarray([[size[1] / width], [size[0] / height], [1.0]])
    views = jnp.ones(len(images), jnp.int32)
    intrinsics = cameras.intrinsics * scale[None]
    return small, cameras._replace(
        intrinsics=intrinsics, width=views * size[1], height=views * size[0]
    )


def _look_up(
    images: silhouette.Images, view: Int[Array, "p"], place: Float[Array, "p 2"]
) -> Float[Array, "p 3"]:
    """Colours of the nearest pixels."""
    height, width = images.shape[1:3]
    column, row = (
        jnp.clip(jnp.floor(place[:, axis]).astype(jnp.int32), 0, length - 1)
        for axis, length in ((0, width), (1, height))
    )
    return silhouette.to_unit(images[view, row, column])


def _distances(
    key: Key[Array, ""],
    pixels: _Pixel,
    small: Float[Array, "v a b 3"],
    lenses: camera.Camera,
    config: SweepConfig,
) -> tuple[Float[Array, "p"], Bool[Array, "p"]]:
    """The distance on every ray at which other views agree most, and whether any was asked."""
    step = -(-len(small) // config.compared)
    asked = (jnp.arange(len(small)), small, lenses)
    asked = jax.tree.map(lambda leaf: leaf[::step], asked)
    # Two pixels at random differ by as much.
    common = 2.0 * jnp.var(small, axis=(0, 1, 2)).mean()
    keys = jax.random.split(key, len(pixels.view))

    def one(given: tuple[Array, _Pixel]) -> tuple[Array, Array]:
        coarse_key, fine_key = jax.random.split(given[0])
        pixel, bins = given[1], config.candidates
        nearest, farthest = 1.0 / config.near, 1.0 / config.far
        width = (nearest - farthest) / bins
        place = (jnp.arange(bins) + jax.random.uniform(coarse_key, (bins,))) * width + farthest
        cost, weight = _costs(pixel, 1.0 / place, asked, common, config)
        best = place[jnp.argmin(cost)]
        bins //= 2
        offset = (jnp.arange(bins) + jax.random.uniform(fine_key, (bins,))) * 2.0 / bins - 1.0
        place = jnp.clip(best + width * offset, farthest, nearest)
        cost, _ = _costs(pixel, 1.0 / place, asked, common, config)
        return 1.0 / place[jnp.argmin(cost)], (weight > 0.0).any()

    return lax.map(one, (keys, pixels), batch_size=_BATCH)


def _costs(
    pixel: _Pixel,
    distance: Float[Array, "k"],
    asked: tuple[Int[Array, "v"], Float[Array, "v a b 3"], camera.Camera],
    common: Float[Array, ""],
    config: SweepConfig,
) -> tuple[Float[Array, "k"], Float[Array, "k"]]:
    """How much the other views disagree with a pixel at distances on its ray, and their weight.

    Squared differences no larger than `common`, weighted by how little a view is aside; a view that
    something hides the point from is one of those that disagree, and the fewer the nearer it is.
    """
    positions = pixel.origin[None] + distance[:, None] * pixel.direction[None]

    def view(sums: tuple[Array, Array], given: tuple) -> tuple[tuple, None]:
        number, picture, lens = given
        places, visible = rays.project(lens, positions)
        towards = positions - camera.position(lens)[None]
        length = jnp.maximum(jnp.linalg.norm(towards, axis=1), rays.NEAREST)
        aside = 1.0 - (towards * pixel.direction[None]).sum(axis=1) / length
        weight = jnp.where(visible & (number != pixel.view), jnp.exp(-aside / config.aside**2), 0.0)
        square = jnp.square(rays.bilinear(picture, places) - pixel.seen[None]).mean(axis=1)
        return (sums[0] + weight * jnp.minimum(square, common), sums[1] + weight), None

    zero = jnp.zeros(distance.shape)
    (total, weight), _ = lax.scan(view, (zero, zero), asked)
    return (total + config.doubt * common) / (weight + config.doubt), weight
