"""Paths of cameras for films: once around an object, or along the given cameras of a scene.

Axes: v view, t camera of the path.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from v3d_jax.ops import camera
from v3d_jax.splat import carve

_WINDOWS = 16  # in a path: over one of them neighbours are averaged
_LEAST = 1e-3  # length below which averaged directions say nothing


def turn(cameras: camera.Camera, count: int) -> camera.Camera:
    """`count` cameras once around what `cameras` look at, starting near the first of them.

    At their mean distance and height, with the first one's intrinsics; up is what is up in most of
    their pictures.
    """
    centre = carve.viewing_box(cameras).centre
    up = -cameras.world_to_camera[:, 1, :3].mean(axis=0)
    up = up / jnp.maximum(jnp.linalg.norm(up), 1e-6)
    offset = camera.position(cameras) - centre[None]
    height = (offset * up[None]).sum(axis=1)
    across = offset - height[:, None] * up[None]
    radius = jnp.linalg.norm(across, axis=1)
    first = across[jnp.argmax(radius > 0.1 * radius.max())]
    right = first / jnp.linalg.norm(first)
    angle = (2.0 * jnp.pi / count * jnp.arange(count))[:, None]
    ring = jnp.cos(angle) * right[None] + jnp.sin(angle) * jnp.cross(up, right)[None]
    place = centre[None] + radius.mean() * ring + height.mean() * up[None]
    pose = camera.look_at(place, centre, up)
    same = (jnp.broadcast_to(part[:1], (count, *part.shape[1:])) for part in cameras[1:])
    return camera.Camera(pose, *same)


def along(cameras: camera.Camera, count: int) -> camera.Camera:
    """`count` cameras from the first of `cameras` [v] to the last, in their order.

    Places and axes are means of neighbours with Gaussian weights, so that shaking hands are
    steadied and the path stays between the cameras; neighbours that look opposite ways leave the
    nearest one's axes. Intrinsics are the first camera's.
    """
    total = cameras.intrinsics.shape[0]
    time = jnp.linspace(0.0, total - 1.0, count)
    spread = max(1.0, total / _WINDOWS)
    offset = (time[:, None] - jnp.arange(total)[None]) / spread
    weight = jax.nn.softmax(-0.5 * jnp.square(offset), axis=1)
    nearest = jnp.round(time).astype(jnp.int32)
    rows = cameras.world_to_camera[:, :3, :3]

    def mean(values: Float[Array, "v 3"]) -> Float[Array, "t 3"]:
        return jnp.einsum("tv,vi->ti", weight, values, precision=lax.Precision.HIGHEST)

    forward = _unit(mean(rows[:, 2]), rows[nearest, 2])
    right = _unit(jnp.cross(mean(rows[:, 1]), forward), rows[nearest, 0])
    right = right - (right * forward).sum(axis=1, keepdims=True) * forward
    right = right / jnp.linalg.norm(right, axis=1, keepdims=True)
    rotation = jnp.stack([right, jnp.cross(forward, right), forward], axis=1)
    place = mean(camera.position(cameras))
    shift = -jnp.einsum("tij,tj->ti", rotation, place, precision=lax.Precision.HIGHEST)
    pose = jnp.broadcast_to(jnp.eye(4), (count, 4, 4))
    pose = pose.at[:, :3, :3].set(rotation).at[:, :3, 3].set(shift)
    same = (jnp.broadcast_to(part[:1], (count, *part.shape[1:])) for part in cameras[1:])
    return camera.Camera(pose, *same)


def _unit(values: Float[Array, "t 3"], otherwise: Float[Array, "t 3"]) -> Float[Array, "t 3"]:
    length = jnp.linalg.norm(values, axis=1, keepdims=True)
    return jnp.where(length > _LEAST, values / jnp.maximum(length, _LEAST), otherwise)
