"""Pinhole cameras and V3D's orbit.

World: right-handed, z up. Camera axes: OpenCV (x right, y down, z forward). Pixel centres lie at
half-integers, so the centre of a `width` x `height` image is (width / 2, height / 2). Angles are in
degrees, azimuth counter-clockwise seen from above. float32; products in full precision, because
a rounded pose moves pixels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# V3D's cameras (v3d recon/utils/camera_utils.py; paper section 3.2).
ORBIT_FRAMES = 18
ORBIT_RADIUS = 2.0
ORBIT_FOV = 60.0

_HIGHEST = jax.lax.Precision.HIGHEST


class Camera(NamedTuple):
    """One camera, or a batch with leading axes.

    `world_to_camera` is rigid; `intrinsics` are in pixels; `width` and `height` are int32 arrays
    of the batch shape. Array shapes inside a compiled program cannot come from them: functions
    that need a static size take it as an argument.
    """

    world_to_camera: Float[Array, "*v 4 4"]
    intrinsics: Float[Array, "*v 3 3"]
    width: Int[Array, "*v"]
    height: Int[Array, "*v"]


def look_at(
    position: Float[Array, "*v 3"],
    target: Float[Array, "3"],
    up: Float[Array, "3"],
) -> Float[Array, "*v 4 4"]:
    """World-to-camera transform of a camera at `position` that looks at `target`.

    `up` must not be parallel to the viewing direction (the result is then NaN).
    """
    forward = jnp.broadcast_to(target, position.shape) - position
    forward = forward / jnp.linalg.norm(forward, axis=-1, keepdims=True)
    right = jnp.cross(forward, jnp.broadcast_to(up, forward.shape))
    right = right / jnp.linalg.norm(right, axis=-1, keepdims=True)
    down = jnp.cross(forward, right)
    rotation = jnp.stack([right, down, forward], axis=-2)
    translation = -jnp.einsum("...ij,...j->...i", rotation, position, precision=_HIGHEST)
    top = jnp.concatenate([rotation, translation[..., None]], axis=-1)
    bottom = jnp.broadcast_to(jnp.asarray([0.0, 0.0, 0.0, 1.0]), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], axis=-2)


def pinhole(fov: float, width: int, height: int) -> Float[Array, "3 3"]:
    """Intrinsics in pixels for a horizontal field of view in degrees, square pixels, centred."""
    focal = 0.5 * width / np.tan(0.5 * np.deg2rad(fov))
    return jnp.asarray(
        [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]], jnp.float32
    )


def orbit(
    num_frames: int = ORBIT_FRAMES,
    *,
    width: int,
    height: int,
    radius: float = ORBIT_RADIUS,
    fov: float = ORBIT_FOV,
    elevation: float = 0.0,
    start_azimuth: float = 0.0,
) -> Camera:
    """V3D's orbit: `num_frames` cameras at equal azimuths around the origin, frame 0 first.

    The defaults are the release's: azimuth 20 k degrees, elevation 0, radius 2, fov 60 degrees.
    """
    azimuth = np.deg2rad(start_azimuth + 360.0 / num_frames * np.arange(num_frames))
    tilt = np.deg2rad(elevation)
    position = radius * np.stack(
        [
            np.cos(tilt) * np.cos(azimuth),
            np.cos(tilt) * np.sin(azimuth),
            np.full(num_frames, np.sin(tilt)),
        ],
        axis=-1,
    )
    pose = look_at(jnp.asarray(position, jnp.float32), jnp.zeros(3), jnp.asarray([0.0, 0.0, 1.0]))
    intrinsics = jnp.broadcast_to(pinhole(fov, width, height), (num_frames, 3, 3))
    size = jnp.ones(num_frames, jnp.int32)
    return Camera(pose, intrinsics, size * width, size * height)


def camera_to_world(camera: Camera) -> Float[Array, "*v 4 4"]:
    """The inverse of `world_to_camera`, from its rotation and translation."""
    rotation = jnp.swapaxes(camera.world_to_camera[..., :3, :3], -1, -2)
    translation = -jnp.einsum(
        "...ij,...j->...i", rotation, camera.world_to_camera[..., :3, 3], precision=_HIGHEST
    )
    top = jnp.concatenate([rotation, translation[..., None]], axis=-1)
    return jnp.concatenate([top, camera.world_to_camera[..., 3:, :]], axis=-2)


def position(camera: Camera) -> Float[Array, "*v 3"]:
    """Camera centres in world units."""
    return camera_to_world(camera)[..., :3, 3]


def to_opengl(camera: Camera) -> Float[Array, "*v 4 4"]:
    """Camera-to-world with OpenGL axes (x right, y up, z backward), as NeRF files store it."""
    return _flip(camera_to_world(camera))


def from_opengl(pose: Float[Array, "*v 4 4"]) -> Float[Array, "*v 4 4"]:
    """`world_to_camera` (OpenCV axes) of a rigid OpenGL camera-to-world matrix."""
    pose = _flip(pose)
    rotation = jnp.swapaxes(pose[..., :3, :3], -1, -2)
    translation = -jnp.einsum("...ij,...j->...i", rotation, pose[..., :3, 3], precision=_HIGHEST)
    top = jnp.concatenate([rotation, translation[..., None]], axis=-1)
    return jnp.concatenate([top, pose[..., 3:, :]], axis=-2)


def _flip(pose: Float[Array, "*v 4 4"]) -> Float[Array, "*v 4 4"]:
    """The same pose with the y and z axes of the camera turned around."""
    return pose * jnp.broadcast_to(jnp.asarray([1.0, -1.0, -1.0, 1.0]), pose.shape)


def project(
    camera: Camera, points: Float[Array, "n 3"]
) -> tuple[Float[Array, "*v n 2"], Float[Array, "*v n"]]:
    """Pixel coordinates and depths (camera z) of world points; pixels are inf or NaN at depth 0."""
    rotation, offset = camera.world_to_camera[..., :3, :3], camera.world_to_camera[..., :3, 3]
    local = jnp.einsum("...ij,nj->...ni", rotation, points, precision=_HIGHEST)
    local = local + offset[..., None, :]
    image = jnp.einsum("...ij,...nj->...ni", camera.intrinsics, local, precision=_HIGHEST)
    return image[..., :2] / image[..., 2:3], local[..., 2]
