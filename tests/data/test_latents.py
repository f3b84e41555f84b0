import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.data import latents, loader, orbits, png
from v3d_jax.ops import image

CONFIG = latents.CacheConfig(image_size=8, orbits_per_call=2, threads=2)


class Encoder:
    """Means of 8 x 8 pixels and their red mean twice: four channels that follow the picture."""

    def __init__(self):
        self.shapes = []

    def __call__(self, frames):
        self.shapes.append(frames.shape)
        blocks = frames.reshape(len(frames), 2, 8, 2, 8, 3).mean(axis=(2, 4)) / 255.0
        return np.concatenate([blocks, blocks[..., :1]], axis=-1).astype(np.float32)


@pytest.fixture
def source(orbit_folder):
    return orbits.source(orbit_folder)


@pytest.fixture
def cache(source):
    return latents.encode_orbits(source, Encoder(), CONFIG)


def test_every_view_of_every_orbit_is_encoded(source, noise_orbits):
    encode = Encoder()
    cache = latents.encode_orbits(source, encode, CONFIG)
    assert encode.shapes == [(12, 16, 16, 3)] * 3
    assert (len(cache), cache.views) == (5, 6)
    assert cache.latents.dtype == np.float16
    assert cache.names == [orbit.name for orbit in noise_orbits]
    for index, orbit in enumerate(noise_orbits):
        frames = np.stack([png.decode_on_white(frame) for frame in orbit.frames])
        np.testing.assert_array_equal(cache.latents[index], Encoder()(frames).astype(np.float16))
        # What the image tower makes of the pictures itself when it samples.
        small = image.resize(jnp.asarray(frames, jnp.float32), (8, 8), "bilinear")
        assert np.abs(cache.images[index] - np.asarray(small)).max() <= 1.0
        np.testing.assert_array_equal(cache.azimuths[index], orbit.azimuths)
        assert cache.elevations[index] == orbit.elevation


def test_batches_hold_whole_clips(cache):
    config = loader.LoaderConfig(batch_size=4, num_frames=3, threads=1, prefetch=1)
    with contextlib.closing(loader.batches(cache, config)) as stream:
        for _ in range(5):
            batch = next(stream)
            shapes = {name: array.shape for name, array in batch.items()}
            assert shapes == {
                "latents": (4, 3, 2, 2, 4),
                "image": (4, 8, 8, 3),
                "azimuth": (4, 3),
                "elevation": (4,),
                "index": (4,),
            }
            for row, index in enumerate(batch["index"]):
                azimuths = list(cache.azimuths[index])
                views = [azimuths.index(azimuth) for azimuth in batch["azimuth"][row]]
                np.testing.assert_array_equal(views, loader.turn(views[0], 3, 6))
                np.testing.assert_array_equal(batch["latents"][row], cache.latents[index, views])
                np.testing.assert_array_equal(batch["image"][row], cache.images[index, views[0]])


def test_batches_can_hold_pictures_of_random_frames(source, cache, noise_orbits):
    config = loader.LoaderConfig(batch_size=4, num_frames=3, threads=1, prefetch=1)
    joined = loader.JoinedClips([cache, cache])
    seen = set()
    with contextlib.closing(loader.batches(joined, config, pictures=2)) as stream:
        for _ in range(5):
            batch = next(stream)
            assert batch["pictures"].shape == (4, 2, 16, 16, 3)
            for row, index in enumerate(batch["index"]):
                orbit = noise_orbits[index % len(cache)]
                places = batch["places"][row]
                assert len(set(places)) == 2
                seen.update(places.tolist())
                azimuths = batch["azimuth"][row, places]
                views = [list(orbit.azimuths).index(azimuth) for azimuth in azimuths]
                for picture, view in zip(batch["pictures"][row], views, strict=True):
                    np.testing.assert_array_equal(picture, png.decode_on_white(orbit.frames[view]))
    assert seen == {0, 1, 2}
    with pytest.raises(ValueError, match="4 pictures cannot be taken from 3 frames"):
        loader.batches(joined, config, pictures=4)


def test_a_saved_cache_is_read_and_not_encoded_again(source, cache, tmp_path):
    def refuse(frames):
        raise AssertionError("encoded again")

    encode = Encoder()
    latents.open_or_encode(source, encode, "weights a", CONFIG, folder=tmp_path)
    assert encode.shapes
    again = latents.open_or_encode(source, refuse, "weights a", CONFIG, folder=tmp_path)
    assert again.names == cache.names
    for name in latents.ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(cache, name))
    np.testing.assert_array_equal(
        again.pictures(1, np.array([2, 0])), cache.pictures(1, np.array([2, 0]))
    )


def test_two_processes_may_encode_the_same(source, cache, tmp_path):
    """The one that is done later keeps the other's folder, and leaves nothing beside it."""
    path = tmp_path / "latents"
    latents.write(path, cache, {"made": "first"})
    latents.write(path, cache, {"made": "second"})
    assert latents.load(path, {"made": "first"}, source).names == cache.names
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="cannot write"):
        latents.write(tmp_path / "file" / "latents", cache, {})


def test_other_weights_data_or_sizes_are_encoded_anew(source, orbit_folder, tmp_path):
    def made(source, weights, config):
        encode = Encoder()
        latents.open_or_encode(source, encode, weights, config, folder=tmp_path)
        return bool(encode.shapes)

    assert made(source, "a", CONFIG)
    assert not made(source, "a", CONFIG)
    assert made(source, "b", CONFIG)
    assert made(orbits.source(orbit_folder, "heldout"), "a", CONFIG)
    assert made(source, "a", latents.CacheConfig(image_size=16, orbits_per_call=2))


def test_a_cache_is_not_saved_where_nobody_asked(source, tmp_path):
    latents.open_or_encode(source, Encoder(), "a", CONFIG, folder=tmp_path, save=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_foreign_cache_is_refused(source, tmp_path):
    latents.open_or_encode(source, Encoder(), "a", CONFIG, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.raises(errors.UserError, match="other data or weights"):
        latents.load(path, {"data": "something else"}, source)
    (path / "images.npy").write_bytes(b"")
    with pytest.raises(errors.UserError, match="is damaged"):
        latents.open_or_encode(source, Encoder(), "a", CONFIG, folder=tmp_path)


@pytest.mark.parametrize("bad", [np.nan, 1e6])
def test_a_latent_that_float16_cannot_hold_names_the_orbit(source, bad):
    def encode(frames):
        values = np.zeros((len(frames), 2, 2, 4), np.float32)
        values[7] = bad
        return values

    with pytest.raises(FloatingPointError, match="objet é1"):
        latents.encode_orbits(source, encode, CONFIG)


def test_fingerprints_follow_names_types_and_bits():
    base = {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}
    changed = [
        {"a": np.zeros(3, np.float32), "c": base["b"]},
        {"a": np.zeros(3, np.int32), "b": base["b"]},
        {"a": np.asarray([0, 0, 1e-30], np.float32), "b": base["b"]},
        {"a": np.zeros((3, 1), np.float32), "b": base["b"]},
    ]
    digests = [latents.fingerprint(tree) for tree in (base, *changed)]
    assert len(set(digests)) == 5
    assert latents.fingerprint(dict(reversed(base.items()))) == digests[0]
