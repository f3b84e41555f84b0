"""Where things stand in a random room, and how a camera moves between them.

World: z up, the floor at z = 0, the group of objects that is looked at around the z axis. An object
fills at most the sphere of radius `scale`, so that a layout needs no mesh: what a room is and what
is seen of it are functions of its name alone.
"""

import dataclasses
import hashlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from v3d_jax.data import paths
from v3d_jax.ops import camera

_TRIES = 1000


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """Ranges of random rooms; lengths in world units, angles in degrees.

    Walls are `half` from the middle along x and y. `group` objects stand in a disc of `spread`,
    on a table for the share `tables` of rooms, `furniture` along the walls. A camera stays
    `clear` of whatever there is.
    """

    half: tuple[float, float] = (2.7, 4.0)
    height: tuple[float, float] = (2.6, 3.4)
    tables: float = 0.5
    table: tuple[float, float] = (0.45, 0.8)  # height
    group: tuple[int, int] = (2, 5)
    group_scale: tuple[float, float] = (0.22, 0.5)
    spread: float = 0.8
    furniture: tuple[int, int] = (1, 4)
    furniture_scale: tuple[float, float] = (0.5, 0.9)
    fov: tuple[float, float] = (50.0, 70.0)
    distance: tuple[float, float] = (1.5, 2.3)
    elevation: tuple[float, float] = (5.0, 45.0)
    clear: float = 0.3


class Place(NamedTuple):
    """An object's foot, largest radius, and turn about z in radians."""

    foot: Float[np.ndarray, "3"]
    scale: float
    turn: float


class Layout(NamedTuple):
    """A room: half its width and depth, its height, the table's half width and height, or 0."""

    half: Float[np.ndarray, "2"]
    height: float
    table: tuple[float, float]
    group: list[Place]
    furniture: list[Place]


def generator(name: str, purpose: str) -> np.random.Generator:
    """Random numbers of one purpose for one room: the same whatever else is made."""
    digest = hashlib.sha256(f"{name}\0{purpose}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def layout(name: str, config: LayoutConfig = LayoutConfig()) -> Layout:
    """The room of this name."""
    rng = generator(name, "layout")
    half, height = rng.uniform(*config.half, 2), rng.uniform(*config.height)
    table = (0.0, 0.0)
    if rng.random() < config.tables:
        table = (config.spread + rng.uniform(0.1, 0.4), rng.uniform(*config.table))
    group: list[Place] = []
    wanted = int(rng.integers(config.group[0], config.group[1] + 1))
    for _ in range(_TRIES):
        scale, angle = rng.uniform(*config.group_scale), rng.uniform(0.0, 2.0 * np.pi)
        radius = config.spread * np.sqrt(rng.random())
        foot = np.asarray([radius * np.cos(angle), radius * np.sin(angle), table[1]])
        if len(group) < wanted and _apart(foot, scale, group):
            group.append(Place(foot, scale, rng.uniform(0.0, 2.0 * np.pi)))
    furniture: list[Place] = []
    for _ in range(int(rng.integers(config.furniture[0], config.furniture[1] + 1))):
        scale, wall = rng.uniform(*config.furniture_scale), int(rng.integers(4))
        along, across = wall % 2, 1 - wall % 2
        foot = np.zeros(3)
        foot[across] = (half[across] - scale) * (1.0 if wall < 2 else -1.0)
        foot[along] = rng.uniform(-1.0, 1.0) * (half[along] - scale)
        if _apart(foot, scale, furniture):
            furniture.append(Place(foot, scale, rng.uniform(0.0, 2.0 * np.pi)))
    return Layout(half, height, table, group, furniture)


def cameras(
    name: str, views: int, size: int, config: LayoutConfig = LayoutConfig()
) -> camera.Camera:
    """The cameras along the path through the room of this name, square pictures.

    An arc about the group, a dolly towards it, away or sideways, or a spiral, each as likely; what
    would come too near to something is drawn again, and gets shorter with every try.
    """
    rng, room = generator(name, "path"), layout(name, config)
    for number in range(_TRIES):
        path = _path(rng, room, config, views, extent=0.99**number)
        if _is_clear(paths.centres(path), room, config.clear):
            break
    else:
        raise ValueError(f"{name} leaves no room for a camera")
    lens = camera.pinhole(float(rng.uniform(*config.fov)), size, size)
    one = jnp.ones(views, jnp.int32)
    return camera.Camera(
        jnp.asarray(path, jnp.float32),
        jnp.broadcast_to(lens, (views, 3, 3)),
        one * size,
        one * size,
    )


def _path(
    rng: np.random.Generator, room: Layout, config: LayoutConfig, views: int, extent: float
) -> paths.Poses:
    target = np.asarray([*rng.uniform(-0.25, 0.25, 2), room.table[1] + rng.uniform(0.1, 0.4)])
    azimuth, side = rng.uniform(0.0, 2.0 * np.pi), rng.choice([-1.0, 1.0])
    tilt = np.deg2rad(rng.uniform(*config.elevation))
    distance = rng.uniform(*config.distance)
    toward = [np.cos(tilt) * np.cos(azimuth), np.cos(tilt) * np.sin(azimuth), np.sin(tilt)]
    first = paths.look_at(target + distance * np.asarray(toward), target)
    kind = rng.choice(["arc", "forward", "sideways", "spiral"])
    if kind == "arc":
        up = np.asarray([0.0, 0.0, 1.0])
        return paths.orbit(first, target, up, side * extent * rng.uniform(30.0, 150.0), views)
    if kind == "forward":
        length = extent * rng.uniform(0.3, 0.6) * distance
        path = paths.dolly(first, length * first[2, :3], views)
        return path if side > 0 else path[::-1]
    if kind == "sideways":
        return paths.dolly(first, side * extent * rng.uniform(0.5, 1.4) * first[0, :3], views)
    degrees, turns = extent * rng.uniform(15.0, 35.0), side * rng.uniform(0.5, 2.0)
    return paths.spiral(first, target, degrees, turns, views)


def _apart(foot: np.ndarray, scale: float, others: list[Place]) -> bool:
    """Objects may overlap a little: few fill their spheres."""
    return all(
        np.linalg.norm(foot[:2] - other.foot[:2]) > 0.8 * (scale + other.scale) for other in others
    )


def _is_clear(places: Float[np.ndarray, "t 3"], room: Layout, clear: float) -> bool:
    inside = np.abs(places[:, :2]) < room.half - clear
    level = (places[:, 2] > clear) & (places[:, 2] < room.height - clear)
    if not (inside.all() and level.all()):
        return False
    width, height = room.table
    if width:
        beside = (np.abs(places[:, :2]) > width + clear).any(axis=1)
        if not (beside | (places[:, 2] > height + clear)).all():
            return False
    for place in (*room.group, *room.furniture):
        aside = np.linalg.norm(places[:, :2] - place.foot[:2], axis=1) > place.scale + clear
        above = places[:, 2] > place.foot[2] + 2.0 * place.scale + clear
        if not (aside | above).all():
            return False
    return True
