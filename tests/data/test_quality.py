import numpy as np
import pytest

from v3d_jax.data import quality
from v3d_jax.mesh import surface

CONFIG = quality.QualityConfig()


def box(*extents):
    corners = np.stack(np.meshgrid(*([0.0, x] for x in extents)), axis=-1).reshape(-1, 3)
    faces = np.asarray([[0, 1, 2], [1, 3, 2], [4, 5, 6], [5, 7, 6]])
    return surface.from_geometry(corners, faces)


def frames(cover: float, low: int, high: int):
    """Two views whose first rows hold the object, in greys between `low` and `high`."""
    made = np.zeros((2, 50, 50, 4), np.uint8)
    rows = round(50 * cover)
    made[:, :rows, :, :3] = np.linspace(low, high, 50).astype(np.uint8)[:, None]
    made[:, :rows, :, 3] = 255
    return made


@pytest.mark.parametrize(
    ("changes", "mesh", "reason"),
    [
        ({"max_faces": 3}, box(1, 1, 1), "x: it has 4 faces"),
        ({"min_thickness": 0.02}, box(1, 1, 0.01), "x: it is flat"),
        ({"min_chroma": 0.1}, box(1, 1, 1), "x: it is grey"),
    ],
)
def test_meshes_are_refused_only_where_the_settings_say_so(changes, mesh, reason):
    quality.check_mesh("x", mesh, CONFIG)
    with pytest.raises(quality.Refused) as caught:
        quality.check_mesh("x", mesh, quality.QualityConfig(**changes))
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (frames(0.0, 0, 255), "its frames are empty"),
        (frames(0.02, 0, 255), "it covers 2.00% of its frames"),
        (frames(0.5, 128, 128), r"its frames have one colour \(contrast 0\.0000"),
    ],
)
def test_frames_that_show_nothing_are_refused(frames, reason):
    with pytest.raises(quality.Refused, match=reason):
        quality.check_frames("x", frames, quality.QualityConfig(min_cover=0.03, min_contrast=0.001))


def test_frames_that_show_something_are_good():
    quality.check_frames("x", frames(0.02, 100, 100), CONFIG)


def test_files_are_refused_by_their_size(tmp_path):
    file = tmp_path / "mesh.glb"
    file.write_bytes(bytes(20_000))
    quality.check_file("x", file, CONFIG)
    with pytest.raises(quality.Refused, match=r"x: its file has 0\.0 MB"):
        quality.check_file("x", file, quality.QualityConfig(max_megabytes=0.01))
    # A catalogue holds many objects.
    quality.check_file("x", file.rename(tmp_path / "all.sh3f"), quality.QualityConfig(0.01))
