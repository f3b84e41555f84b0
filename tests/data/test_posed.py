"""Clips of real places as records of a data set, beside rendered ones."""

import numpy as np

from v3d_jax.data import clips, orbits, posed

SIZE = 16


def clip() -> clips.Clip:
    """Three pictures of noise, the second of them narrower than the others."""
    rng = np.random.default_rng(0)
    sizes = np.asarray([[SIZE, SIZE], [10, SIZE], [SIZE, 12]], np.int32)
    images = rng.integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    poses, scale, centre = clips.normalise(line())
    return clips.Clip(
        images=images,
        mask=np.full((3, SIZE, SIZE), 255, np.uint8),
        world_to_camera=poses.astype(np.float32),
        intrinsics=np.tile(np.diag([20.0, 20.0, 1.0]).astype(np.float32), (3, 1, 1)),
        sizes=sizes,
        sources=np.zeros(1, np.int32),
        valid=np.ones(1, bool),
        scale=np.float32(scale),
        centre=centre.astype(np.float32),
        frames=np.arange(3, dtype=np.int32),
        names=np.asarray(["a", "b", "c"]),
        name=np.asarray("hydrant/12"),
    )


def line():
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = [0.0, 1.0, 2.5]
    return poses


def test_a_clip_of_a_real_place_comes_back_from_a_data_set(tmp_path):
    given = clip()
    orbits.build(tmp_path / "data", [("train", posed.record(given))], views=3, size=SIZE)
    found = orbits.source(tmp_path / "data")[0]
    assert found.name == "hydrant/12"
    np.testing.assert_array_equal(found.world_to_camera, given.world_to_camera)
    np.testing.assert_array_equal(found.intrinsics, given.intrinsics)
    np.testing.assert_array_equal(found.azimuths, 0.0)
    shown = orbits.pixels(found, range(3))
    for picture, wanted, (width, height) in zip(shown, given.images, given.sizes, strict=True):
        np.testing.assert_array_equal(picture[:height, :width], wanted[:height, :width])
        assert (picture[height:] == 255).all()
        assert (picture[:, width:] == 255).all()
