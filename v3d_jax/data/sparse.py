"""Sparse clouds of posed pictures by COLMAP, and how far two clouds are from each other.

Where frames agree with each other as views of one thing, COLMAP finds the same places in them:
the number of its points, and their distance from those of real frames, tell how consistent
generated frames are. V3D's hydrant figure reports both; its settings are not known, those here are
COLMAP's own. Axes: v view, h w picture, p point. World units; cameras as in `ops.camera`.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from v3d_jax.errors import UserError

_ERROR = 2  # of the levels of COLMAP's log


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """How COLMAP makes points of pictures whose cameras are known."""

    two_view_tracks: bool = False
    """Keep points that only two frames show, which COLMAP leaves out."""


class Cloud(NamedTuple):
    """Points, and by how many pixels their places in the pictures are off on average."""

    positions: Float[np.ndarray, "p 3"]
    reprojection: float | None  # None where there are no points


class Distance(NamedTuple):
    """How far two clouds are from each other."""

    accuracy: float  # of the first cloud's points to the nearest of the second's, on average
    completeness: float  # of the second's to the first's
    chamfer: float  # the mean of both


def check() -> None:
    """Raises `UserError` without pycolmap, before work is done that would need it."""
    _pycolmap()


def triangulate(
    images: UInt8[np.ndarray, "v h w 3"],
    world_to_camera: Float[np.ndarray, "v 4 4"],
    intrinsics: Float[np.ndarray, "v 3 3"],
    config: SparseConfig = SparseConfig(),
) -> Cloud:
    """COLMAP's points of pictures with these cameras, which it does not change.

    SIFT, exhaustive matching with geometric verification, and triangulation, on the CPU. Points
    whose lines of sight part by less than 1.5 degrees or that are 4 pixels off do not count, as is
    COLMAP's way. From one seed, but its threads still change last digits and at times a point.
    Raises `UserError` without pycolmap and for cameras with skew.
    """
    pycolmap = _pycolmap()
    if np.abs(intrinsics[:, 0, 1]).max() > 0.0:
        raise UserError("COLMAP has no camera with skew: give pictures of square axes")
    with tempfile.TemporaryDirectory() as folder, _quiet(pycolmap):
        root = Path(folder)
        pictures, database = root / "images", root / "database.db"
        pictures.mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(pictures / f"{number:06d}.png")
        pycolmap.set_random_seed(0)
        pycolmap.extract_features(
            database,
            pictures,
            camera_mode=pycolmap.CameraMode.PER_IMAGE,
            reader_options=pycolmap.ImageReaderOptions(camera_model="PINHOLE"),
            device=pycolmap.Device.cpu,
        )
        model = pycolmap.Reconstruction()
        with pycolmap.Database.open(database) as opened:
            _pose(pycolmap, opened, model, world_to_camera, intrinsics)
        verifying = pycolmap.TwoViewGeometryOptions()
        verifying.ransac.random_seed = 0
        pycolmap.match_exhaustive(
            database, verification_options=verifying, device=pycolmap.Device.cpu
        )
        options = pycolmap.IncrementalPipelineOptions(random_seed=0)
        options.triangulation.ignore_two_view_tracks = not config.two_view_tracks
        made = root / "points"
        made.mkdir()
        found = pycolmap.triangulate_points(model, database, pictures, made, options=options)
        positions = [point.xyz for _, point in sorted(found.points3D.items())]
        error = float(found.compute_mean_reprojection_error()) if positions else None
    return Cloud(np.asarray(positions, np.float64).reshape(-1, 3), error)


def distance(cloud: Float[np.ndarray, "p 3"], other: Float[np.ndarray, "q 3"]) -> Distance | None:
    """Mean distances between nearest points, not squared; None where a cloud is empty."""
    from scipy import spatial

    if not len(cloud) or not len(other):
        return None
    accuracy = float(spatial.cKDTree(other).query(cloud)[0].mean())
    completeness = float(spatial.cKDTree(cloud).query(other)[0].mean())
    return Distance(accuracy, completeness, 0.5 * (accuracy + completeness))


def radius(cloud: Float[np.ndarray, "p 3"]) -> float | None:
    """Root mean square distance of points from their mean: a scale for distances; None if 0."""
    if not len(cloud):
        return None
    found = float(np.sqrt(np.square(cloud - cloud.mean(axis=0)).sum(axis=1).mean()))
    return found or None


def _pose(
    pycolmap: Any,
    database: Any,
    model: Any,
    world_to_camera: Float[np.ndarray, "v 4 4"],
    intrinsics: Float[np.ndarray, "v 3 3"],
) -> None:
    """Gives every picture of the database its camera, there and in the model."""
    for image in database.read_all_images():
        number = int(Path(image.name).stem)
        lens, matrix = database.read_camera(image.camera_id), intrinsics[number].astype(float)
        lens.params = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]
        lens.has_prior_focal_length = True
        database.update_camera(lens)
        model.add_camera_with_trivial_rig(lens)
        pose = pycolmap.Rigid3d(world_to_camera[number, :3].astype(float))
        model.add_image_with_trivial_frame(image, pose)


def _pycolmap() -> Any:
    try:
        import pycolmap
    except ImportError:
        raise UserError("COLMAP is not installed: pip install '.[colmap]'") from None
    return pycolmap


@contextlib.contextmanager
def _quiet(pycolmap: Any) -> Iterator[None]:
    """Keeps what COLMAP logs on its way off the terminal."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = _ERROR
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before
