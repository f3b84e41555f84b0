"""Small posed views that tests write to disk in every dialect."""

from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from v3d_jax import errors
from v3d_jax.data import views
from v3d_jax.ops import camera

COUNT, WIDTH, HEIGHT = 4, 24, 16


class Scene(NamedTuple):
    images: np.ndarray  # uint8 [v, h, w, 3]
    alpha: np.ndarray  # uint8 [v, h, w]
    cameras: camera.Camera
    opengl: np.ndarray  # float64 camera-to-world


def scene() -> Scene:
    """Views of noise with alpha, from cameras that share no axis with the world."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8)
    alpha = rng.integers(1, 255, (COUNT, HEIGHT, WIDTH), dtype=np.uint8)
    cameras = camera.orbit(
        COUNT, width=WIDTH, height=HEIGHT, radius=3.0, fov=50.0, elevation=25.0, start_azimuth=10.0
    )
    return Scene(images, alpha, cameras, np.asarray(camera.to_opengl(cameras), np.float64))


def frames(scene: Scene, suffix: str = ".png", written: str | None = None) -> list[dict]:
    """The "frames" of a transforms file whose pictures are images/0.png ..."""
    written = suffix if written is None else written
    return [
        {"file_path": f"images/{index}{written}", "transform_matrix": pose.tolist()}
        for index, pose in enumerate(scene.opengl)
    ]


def write_pictures(folder, scene: Scene, suffix: str = ".png", *, alpha: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, opacity) in enumerate(zip(scene.images, scene.alpha, strict=True)):
        pixels = np.concatenate([image, opacity[..., None]], -1) if alpha else image
        Image.fromarray(pixels).save(folder / f"{index}{suffix}")


def refused(source, *parts: str) -> str:
    """The one line that reading `source` is refused with; it has all `parts`."""
    with pytest.raises(errors.UserError) as caught:
        views.read(source)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message
