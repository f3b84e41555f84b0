"""Portrait pictures of a patterned room, from hand-held cameras inside that look one way."""

import functools
import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from v3d_jax.data import output, walls
from v3d_jax.ops import camera

VIEWS, WIDTH, HEIGHT = 16, 36, 48
HELD = np.arange(VIEWS) % 4 == 1


class Shots(NamedTuple):
    images: np.ndarray  # uint8 [v, h, w, 3]
    cameras: camera.Camera


def cameras() -> camera.Camera:
    """In the rear half of the room, towards its far wall."""
    rng = np.random.default_rng(0)
    low, high = [-1.2, -0.9, -0.5], [-0.2, 0.9, 0.5]
    places = rng.uniform(low, high, (VIEWS, 3))
    targets = np.stack(
        [np.full(VIEWS, 3.0), rng.uniform(-1.0, 1.0, VIEWS), rng.uniform(-0.5, 0.5, VIEWS)], axis=1
    )
    up = jnp.asarray([0.0, 0.0, 1.0])
    poses = [
        camera.look_at(jnp.asarray(place, jnp.float32), jnp.asarray(target, jnp.float32), up)
        for place, target in zip(places, targets, strict=True)
    ]
    return batch(jnp.stack(poses))


def batch(poses: jnp.ndarray) -> camera.Camera:
    """Cameras of the room's lens at poses [v, 4, 4]."""
    count = len(poses)
    intrinsics = jnp.broadcast_to(camera.pinhole(55.0, WIDTH, HEIGHT), (count, 3, 3))
    size = jnp.ones(count, jnp.int32)
    return camera.Camera(poses, intrinsics, size * WIDTH, size * HEIGHT)


@functools.cache
def shots() -> Shots:
    drawn = walls.draw(walls.room(0), cameras(), (HEIGHT, WIDTH))
    return Shots((drawn * 255.0 + 0.5).astype(np.uint8), cameras())


def part(lenses: camera.Camera, chosen: np.ndarray) -> camera.Camera:
    return camera.Camera(*(field[chosen] for field in lenses))


def write(folder, images: np.ndarray, lenses: camera.Camera, absent: int = 0) -> None:
    """A folder with a transforms file that names `absent` pictures more than there are."""
    folder.mkdir()
    names = [f"{index:02d}.png" for index in range(len(images))]
    for name, picture in zip(names, images, strict=True):
        Image.fromarray(picture).save(folder / name)
    content = output.transforms(lenses, names)
    frames = content["frames"]
    frames[1:1] = [{**frames[0], "file_path": f"gone{index}.png"} for index in range(absent)]
    (folder / "transforms.json").write_text(json.dumps(content))
