"""Where splats start: points on the visual hull with the colours that views see there.

Axes: v view, h w image, n voxels a side, p points. World units, colours in [0, 1], sRGB.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from v3d_jax.ops import camera, rays
from v3d_jax.splat import carve, silhouette

GREY = 0.5
_PULLS = 3  # Newton steps onto the surface
# How much a view's say falls off as it sees a point from the side: cos^4 leaves the straightest.
_FACING_POWER = 4
_UNSEEN = 1e-6  # weight of views from which a point is hidden: they count where no other does


class Cloud(NamedTuple):
    """Coloured points, and what the masks were worth (`describe` says it in words)."""

    positions: Float[Array, "p 3"]
    colors: Float[Array, "p 3"]
    normals: Float[Array, "p 3"]  # unit, outward; 0 for random points
    seen: Bool[Array, "p"]  # whether some view sees the point; False for random points
    carved: Bool[Array, ""]  # False: the points are random, for want of usable masks
    empty_masks: Bool[Array, "v"]
    full_masks: Bool[Array, "v"]


def initial(
    key: Key[Array, ""],
    images: silhouette.Images,
    masks: silhouette.Alpha | None,
    cameras: camera.Camera,
    count: int,
    config: carve.CarveConfig,
) -> Cloud:
    """`count` points on the hull of `masks`; random ones where there are no usable masks.

    `images` are straight colours, or on any background if masks tell it from the object.
    """
    surface_key, random_key = jax.random.split(key)
    scattered = scatter(random_key, cameras, count)
    views = len(images)
    if masks is None:
        nothing, none = jnp.zeros(scattered.shape), jnp.zeros(views, bool)
        grey = jnp.full(scattered.shape, GREY)
        return Cloud(
            scattered, grey, nothing, jnp.zeros(count, bool), jnp.asarray(False), none, none
        )
    hull = carve.hull(masks, cameras, config)
    carved = carve.usable(hull)
    positions, normals = sample_surface(surface_key, hull, count)
    colors, seen = paint(positions, normals, hull, images, masks, cameras)
    return Cloud(
        jnp.where(carved, positions, scattered),
        jnp.where(carved, colors, GREY),
        jnp.where(carved, normals, 0.0),
        seen & carved,
        carved,
        hull.empty_masks,
        hull.full_masks,
    )


def describe(cloud: Cloud) -> str | None:
    """What a user should know about the masks, in one line; None if nothing.

    Reads the arrays, so it runs outside compiled code.
    """
    empty, full = int(cloud.empty_masks.sum()), int(cloud.full_masks.sum())
    views = len(cloud.empty_masks)
    if not cloud.carved:
        if not empty and not full:
            reason = "the views' masks have no common hull, or there are none"
        else:
            reason = f"of {views} masks {empty} are empty and {full} full"
        return f"{reason}: starting from random points in the cameras' common view"
    told = [f"{empty} of {views} masks are empty and were left out"] if empty else []
    told += [f"{full} of {views} masks are full and carve nothing"] if full else []
    return "; ".join(told) or None


def scatter(key: Key[Array, ""], cameras: camera.Camera, count: int) -> Float[Array, "p 3"]:
    """Points spread evenly over the ball that all cameras see whole."""
    box = carve.viewing_box(cameras)
    return box.centre[None] + box.inner * jax.random.ball(key, 3, shape=(count,))


def sample_surface(
    key: Key[Array, ""], hull: carve.Hull, count: int
) -> tuple[Float[Array, "p 3"], Float[Array, "p 3"]]:
    """`count` points spread evenly by area over the hull's surface, and their outward normals.

    Drawn stratified, so a voxel gets its share to within one point. Meaningless where the hull is
    empty.
    """
    rank_key, jitter_key = jax.random.split(key)
    total = jnp.cumsum(_area_weights(hull).reshape(-1))
    stratum = (jnp.arange(count) + jax.random.uniform(rank_key, (count,))) / count
    rank = jnp.floor(stratum * total[-1]).astype(jnp.int32)
    voxel = jnp.searchsorted(total, jnp.minimum(rank, total[-1] - 1), side="right")
    index = jnp.stack(jnp.unravel_index(voxel, hull.distance.shape), axis=-1)
    offset = jax.random.uniform(jitter_key, (count, 3))
    place = index.astype(jnp.float32) + offset  # in voxels from the corner

    def pull(_: Array, place: Array) -> Array:
        value, slope = _trilinear(hull, place)
        square = jnp.maximum((slope**2).sum(axis=-1), 1e-12)
        step = -(value / square)[:, None] * slope
        # Near edges of the hull the slope belongs to neither side; keep to the neighbourhood.
        length = jnp.linalg.norm(step, axis=-1, keepdims=True)
        return place + step * jnp.minimum(1.0, 1.0 / jnp.maximum(length, 1e-12))

    place = lax.fori_loop(0, _PULLS, pull, place)
    slope = _trilinear(hull, place)[1]
    normal = -slope / jnp.maximum(jnp.linalg.norm(slope, axis=-1, keepdims=True), 1e-12)
    return hull.corner[None] + hull.voxel * place, normal


def paint(
    positions: Float[Array, "p 3"],
    normals: Float[Array, "p 3"],
    hull: carve.Hull,
    images: silhouette.Images,
    masks: silhouette.Alpha,
    cameras: camera.Camera,
) -> tuple[Float[Array, "p 3"], Bool[Array, "p"]]:
    """Colours of points, and which of them some view sees.

    The mean over views that the hull does not hide the point from, weighted by cos^4 of the angle
    to its normal and by the mask, so that no background bleeds in. A point that no view sees takes
    what lies in its direction.
    """

    def one(sums: tuple[Array, Array, Array], view: tuple) -> tuple[tuple, None]:
        total, weight, seen = sums
        image, mask, lens = view
        cover = silhouette.to_unit(mask)[..., None]
        layers = jnp.concatenate([silhouette.to_unit(image) * cover, cover], axis=-1)
        pixels, depth, _ = carve.see(lens, positions)
        size = jnp.stack([lens.width, lens.height]).astype(jnp.float32)
        shown = (depth > 0) & ((pixels >= 0) & (pixels <= size[None])).all(axis=-1)
        towards = camera.position(lens)[None] - positions
        towards = towards / jnp.linalg.norm(towards, axis=-1, keepdims=True)
        facing = jnp.maximum((towards * normals).sum(axis=-1), 0.0)
        clear = _reaches_out(positions, normals, towards, hull)
        share = jnp.where(clear, facing**_FACING_POWER, 0.0) + _UNSEEN
        sample = rays.bilinear(layers, pixels) * jnp.where(shown, share, 0.0)[:, None]
        visible = shown & clear & (facing > 0.1) & (sample[:, 3] > 0)
        return (total + sample[:, :3], weight + sample[:, 3], seen | visible), None

    count = positions.shape[:1]
    start = jnp.zeros((*count, 3)), jnp.zeros(count), jnp.zeros(count, bool)
    (total, weight, seen), _ = lax.scan(one, start, (images, masks, cameras))
    known = (weight > 0)[:, None]
    return jnp.where(known, total / jnp.where(known, weight[:, None], 1.0), GREY), seen


def _area_weights(hull: carve.Hull) -> Int[Array, "n n n"]:
    """Hundredths of a voxel face that each surface voxel stands for; 0 elsewhere.

    A slanted surface has fewer voxels for its area: one for each column along the axis nearest to
    the normal n, hence 1 / max |n_i|. Whole numbers, so that the running sum is exact.
    """
    padded = jnp.pad(hull.distance, 1, mode="edge")
    slopes = [
        (jnp.roll(padded, -1, axis) - jnp.roll(padded, 1, axis))[1:-1, 1:-1, 1:-1]
        for axis in range(3)
    ]
    length = jnp.sqrt(sum(slope**2 for slope in slopes))
    largest = jnp.maximum(jnp.maximum(abs(slopes[0]), abs(slopes[1])), abs(slopes[2]))
    area = jnp.where(largest > 0, length / jnp.where(largest > 0, largest, 1.0), 1.0)
    return jnp.where(carve.surface(hull), jnp.round(100.0 * area), 0.0).astype(jnp.int32)


def _trilinear(
    hull: carve.Hull, place: Float[Array, "p 3"]
) -> tuple[Float[Array, "p"], Float[Array, "p 3"]]:
    """Distance in voxels and its slope at places given in voxels from the corner."""
    size = hull.distance.shape[0]
    scaled = hull.distance.reshape(-1) / hull.voxel
    place = jnp.clip(place - 0.5, 0.0, size - 1.001)
    base = jnp.floor(place).astype(jnp.int32)
    steps = jnp.indices((2, 2, 2)).reshape(3, 8, 1)
    i, j, k = (base[None, :, axis] + steps[axis] for axis in range(3))
    cell = scaled[(i * size + j) * size + k].reshape(2, 2, 2, -1)
    part = place - base
    ends = jnp.stack([1.0 - part, part])  # weights of the lower and upper neighbour
    shapes = ((2, 1, 1, -1), (1, 2, 1, -1), (1, 1, 2, -1))
    along = [ends[..., axis].reshape(shape) for axis, shape in enumerate(shapes)]
    rise = [jnp.asarray([-1.0, 1.0]).reshape(shape) for shape in shapes]
    value = (cell * along[0] * along[1] * along[2]).sum(axis=(0, 1, 2))
    slopes = [
        (cell * rise[axis] * along[axis - 1] * along[axis - 2]).sum(axis=(0, 1, 2))
        for axis in range(3)
    ]
    return value, jnp.stack(slopes, axis=-1)


def _reaches_out(
    positions: Float[Array, "p 3"],
    normals: Float[Array, "p 3"],
    towards: Float[Array, "p 3"],
    hull: carve.Hull,
) -> Bool[Array, "p"]:
    """Whether rays from points on the surface leave the grid without entering the hull.

    Sphere tracing: outside, |distance| is the length that is surely free. Rays start a voxel above
    the surface; one that skims along it until its steps are spent is taken for free.
    """
    size = hull.distance.shape[0]
    flat = hull.distance.reshape(-1) / hull.voxel
    start = (positions + hull.voxel * normals - hull.corner[None]) / hull.voxel

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        travelled, clear = state
        place = start + travelled[:, None] * towards
        index = jnp.floor(place).astype(jnp.int32)
        here = ((index >= 0) & (index < size)).all(axis=-1)
        index = jnp.clip(index, 0, size - 1)
        value = flat[(index[:, 0] * size + index[:, 1]) * size + index[:, 2]]
        clear = clear & ~(here & (value > 0))
        # The value is that of the voxel's centre, half a diagonal away at most.
        return travelled + jnp.maximum(-value - 1.0, 0.5), clear

    count = positions.shape[:1]
    state = jnp.zeros(count), jnp.ones(count, bool)
    return lax.fori_loop(0, size, step, state)[1]
