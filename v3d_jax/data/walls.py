"""Procedural rooms: boxes seen from inside, with patterned walls and pictures hung on them.

A room is a background whose every point is known: a view of it is exact at any place inside. The
same number gives the same room. Axes: v view, h w image, p point.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from v3d_jax.ops import camera, rays

_WAVES = 5  # of a wall's pattern
_PICTURES = 4  # on a wall


class Room(NamedTuple):
    """Walls 0 to 5 are at -x, +x, -y, +y, -z and +z; coordinates on one are its other two axes."""

    half: Float[np.ndarray, "3"]  # sides, world units
    base: Float[np.ndarray, "6 3"]  # colours, sRGB
    waves: Float[np.ndarray, "6 m 6"]  # frequency (2) in cycles a unit, phase, colour (3)
    pictures: Float[np.ndarray, "6 f 7"]  # centre (2), half sides (2), colour (3)


def room(number: int, half: tuple[float, float, float] = (3.0, 2.5, 1.6)) -> Room:
    """A room of the given half sides, centred at the origin."""
    rng = np.random.default_rng(number)
    frequency = rng.uniform(-0.8, 0.8, (6, _WAVES, 2))
    phase = rng.uniform(0.0, 2.0 * np.pi, (6, _WAVES, 1))
    waves = np.concatenate([frequency, phase, rng.uniform(-0.1, 0.1, (6, _WAVES, 3))], axis=2)
    sides = np.stack([np.delete(half, axis) for axis in (0, 0, 1, 1, 2, 2)])[:, None]
    centre = rng.uniform(-0.8, 0.8, (6, _PICTURES, 2)) * sides
    frames = [centre, rng.uniform(0.15, 0.6, centre.shape), rng.uniform(size=(6, _PICTURES, 3))]
    return Room(
        np.asarray(half),
        rng.uniform(0.3, 0.8, (6, 3)),
        waves,
        np.concatenate(frames, axis=2),
    )


def color(room: Room, positions: Float[np.ndarray, "*p 3"]) -> Float[np.ndarray, "*p 3"]:
    """Colours in [0, 1] of points on the walls."""
    flat = positions.reshape(-1, 3)
    relative = flat / room.half
    axis = np.abs(relative).argmax(axis=1)
    wall = 2 * axis + (np.take_along_axis(relative, axis[:, None], 1)[:, 0] > 0)
    found = np.zeros_like(flat)
    for number in range(6):
        here = wall == number
        place = np.delete(flat[here], number // 2, axis=1)
        waves = room.waves[number]
        turns = 2.0 * np.pi * place @ waves[:, :2].T + waves[:, 2]
        shown = room.base[number] + np.sin(turns) @ waves[:, 3:]
        for picture in room.pictures[number]:
            inside = (np.abs(place - picture[:2]) <= picture[2:4]).all(axis=1)
            shown[inside] = picture[4:]
        found[here] = shown
    return np.clip(found, 0.0, 1.0).reshape(positions.shape)


def draw(
    room: Room, cameras: camera.Camera, size: tuple[int, int], supersample: int = 3
) -> Float[np.ndarray, "v h w 3"]:
    """What cameras [v] inside the room see of its walls, pictures of `size` (height, width).

    Raises ValueError for a camera that is not inside.
    """
    height, width = size
    if (np.abs(np.asarray(camera.position(cameras))) >= room.half).any():
        raise ValueError("every camera must be inside the room")
    shape = (height, supersample, width, supersample, 3)
    pictures = []
    for view in range(len(cameras.intrinsics)):
        lens = camera.Camera(*(field[view] for field in cameras))
        ray = rays.pixel_rays(lens, (height * supersample, width * supersample))
        origin = np.asarray(ray.origins, np.float64)
        direction = np.asarray(ray.directions, np.float64)
        direction = np.where(np.abs(direction) < 1e-9, 1e-9, direction)
        # From inside, the wall that is hit is the first one ahead.
        leave = (np.sign(direction) * room.half - origin) / direction
        hit = origin + leave.min(axis=-1, keepdims=True) * direction
        pictures.append(color(room, hit).reshape(shape).mean(axis=(1, 3)))
    return np.stack(pictures).astype(np.float32)
