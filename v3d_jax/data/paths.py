"""Camera paths through a scene, and what cameras have in common.

Axes: t frame of a path, v view. Poses are world-to-camera with OpenCV axes, as `ops.camera` says,
in numpy's float64. A path is a motion of its first camera, which stays what it was: paths can begin
at any picture.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from v3d_jax.data import poses

Poses = Float[np.ndarray, "t 4 4"]
# Of the smaller singular value to the larger, where axes count as parallel: about 3 degrees.
_PARALLEL = 1e-3
# Where cameras look at nothing in common, what they look at is taken to be so many times as far as
# they are apart.
_REACH = 2.0
# Rays of a picture along each side, and depths along each of them, that `seen` tries.
_RAYS, _DEPTHS = 8, 24


class Lens(NamedTuple):
    """The intrinsics of pictures of one size."""

    intrinsics: Float[np.ndarray, "3 3"]  # pixels
    size: tuple[int, int]  # width and height


def orbit(
    first: Float[np.ndarray, "4 4"],
    pivot: Float[np.ndarray, "3"],
    up: Float[np.ndarray, "3"],
    degrees: float,
    frames: int,
) -> Poses:
    """An arc about the axis through `pivot` along `up`, counter-clockwise seen from its tip."""
    angles = np.deg2rad(np.linspace(0.0, degrees, frames))
    axis = np.asarray(up, np.float64) / np.linalg.norm(up)
    return _moved(first, [_about(pivot, rotation(axis * angle)) for angle in angles])


def spiral(
    first: Float[np.ndarray, "4 4"],
    pivot: Float[np.ndarray, "3"],
    degrees: float,
    turns: float,
    frames: int,
) -> Poses:
    """Around the line from `pivot` to the first camera, up to `degrees` away from it at the end."""
    right, down = first[0, :3], first[1, :3]
    shares = np.linspace(0.0, 1.0, frames)
    motions = []
    for share in shares:
        angle = 2.0 * np.pi * turns * share
        axis = np.cos(angle) * right + np.sin(angle) * down
        motions.append(_about(pivot, rotation(np.deg2rad(degrees * share) * axis)))
    return _moved(first, motions)


def dolly(first: Float[np.ndarray, "4 4"], motion: Float[np.ndarray, "3"], frames: int) -> Poses:
    """Straight on by `motion` (world units), the camera looking the same way all the time."""
    motions = np.tile(np.eye(4), (frames, 1, 1))
    motions[:, :3, 3] = np.linspace(0.0, 1.0, frames)[:, None] * np.asarray(motion)
    return _moved(first, list(motions))


def look_at(
    position: Float[np.ndarray, "3"], target: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "4 4"]:
    """The pose of a camera that looks at `target`, z up; not straight up or down."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = [right, np.cross(forward, right), forward]
    pose[:3, 3] = -pose[:3, :3] @ position
    return pose


def rotation(turn: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The rotation about `turn` by its length in radians (Rodrigues' formula)."""
    angle = np.linalg.norm(turn)
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = turn / angle
    cross = np.asarray([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross


def centres(world_to_camera: Poses) -> Float[np.ndarray, "t 3"]:
    """Where cameras are."""
    return -np.einsum("tji,tj->ti", world_to_camera[:, :3, :3], world_to_camera[:, :3, 3])


def common_point(world_to_camera: Float[np.ndarray, "v 4 4"]) -> Float[np.ndarray, "3"] | None:
    """The point nearest to the axes of all cameras, by least squares.

    None where the axes are nearly parallel, or where it lies behind one of the cameras.
    """
    forward = world_to_camera[:, 2, :3]
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    total = across.sum(axis=0)
    values = np.linalg.svd(total, compute_uv=False)
    if values[-1] < _PARALLEL * values[0]:
        return None
    places = centres(world_to_camera)
    point = np.linalg.solve(total, np.einsum("vij,vj->i", across, places))
    ahead = np.einsum("vi,vi->v", forward, point - places)
    return point if ahead.min() > 0.0 else None


def depth(world_to_camera: Float[np.ndarray, "v 4 4"], number: int) -> float:
    """How far ahead of one of the cameras is what all of them look at, by their poses alone.

    The depth of `common_point`, or, where they have none, twice the largest distance between two
    cameras.
    """
    point = common_point(world_to_camera)
    if point is None:
        return _REACH * width(world_to_camera)
    return float(world_to_camera[number, 2, :3] @ point + world_to_camera[number, 2, 3])


def width(world_to_camera: Float[np.ndarray, "v 4 4"]) -> float:
    """The largest distance between two cameras."""
    places = centres(world_to_camera)
    return float(np.linalg.norm(places[:, None] - places, axis=-1).max())


def seen(
    pose: Float[np.ndarray, "4 4"],
    others: Float[np.ndarray, "v 4 4"],
    lens: Lens,
) -> Bool[np.ndarray, " v"]:
    """Which of the other cameras have a point of the first one's picture in theirs.

    Points are tried at depths from a hundredth to a hundred times the cameras' largest distance.
    """
    reach = np.linalg.norm(centres(others) - centres(pose[None]), axis=-1).max()
    depths = max(reach, 1e-6) * np.geomspace(0.01, 100.0, _DEPTHS)
    places = (np.arange(_RAYS) + 0.5) / _RAYS
    x, y = np.meshgrid(places * lens.size[0], places * lens.size[1])
    pixels = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    local = np.linalg.inv(lens.intrinsics) @ pixels
    local = (local[:, :, None] * depths).reshape(3, -1)
    world = poses.inverse(pose) @ np.concatenate([local, np.ones((1, local.shape[1]))])
    found = np.einsum("vij,jn->vin", others[:, :3], world)
    image = np.einsum("ij,vjn->vin", lens.intrinsics, found)
    ahead = found[:, 2] > 0.0
    u, v = (image[:, axis] / np.where(ahead, image[:, 2], 1.0) for axis in (0, 1))
    inside = (u >= 0.0) & (u <= lens.size[0]) & (v >= 0.0) & (v <= lens.size[1])
    return (ahead & inside).any(axis=1)


def _about(
    pivot: Float[np.ndarray, "3"], turn: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "4 4"]:
    """The rotation about a point as a motion of the world."""
    motion = np.eye(4)
    motion[:3, :3] = turn
    motion[:3, 3] = pivot - turn @ np.asarray(pivot, np.float64)
    return motion


def _moved(first: Float[np.ndarray, "4 4"], motions: list[np.ndarray]) -> Poses:
    """The camera after rigid motions that it makes in the world."""
    return np.stack([first @ poses.inverse(motion) for motion in motions])
