import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.nn import pixelnerf
from v3d_jax.ops import corner_sums, rays, target
from v3d_jax.ops.camera import Camera
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import sharding

WAYS = {
    "products": lambda size, pixels, values, seen: corner_sums.products(size, pixels, values),
    "fused": functools.partial(corner_sums.fused, interpret=True),
}


def inputs(size, points, channels=32, dtype=jnp.float32):
    """Places in two maps and beyond their borders, values of both signs, and who has some."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-2.0, max(size) + 2.0, (2, points, 2)).astype(np.float32)
    # Exactly on a cell's centre, and all the samples of a ray in one row.
    pixels[0, :40], pixels[1, 64:192, 1] = 1.5, 2.25
    seen = rng.uniform(size=(2, points)) < 0.7
    seen[0, 128:192] = False
    values = rng.standard_normal((2, points, channels)) * seen[..., None]
    return jnp.asarray(pixels), jnp.asarray(values, dtype), jnp.asarray(seen)


def test_scatter_is_the_transpose_of_bilinear_look_ups():
    size, (pixels, values, seen) = (5, 7), inputs((5, 7), 300, 3)
    maps = jnp.zeros((2, *size, 3))
    expected = jax.vjp(lambda maps: jax.vmap(rays.bilinear)(maps, pixels), maps)[1](values)[0]
    np.testing.assert_allclose(corner_sums.scatter(size, pixels, values, seen), expected, atol=1e-4)


def test_nothing_is_scattered_of_points_that_are_not_seen():
    size, (pixels, values, seen) = (5, 7), inputs((5, 7), 300, 3)
    everywhere = jnp.where(seen[..., None], values, 100.0)
    found, wanted = (corner_sums.scatter(size, pixels, x, seen) for x in (everywhere, values))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("size", "points"), [((5, 7), 300), ((17, 40), 2048), ((32, 32), 2300)])
def test_products_are_what_is_scattered(way, size, points):
    pixels, values, seen = inputs(size, points)
    found = WAYS[way](size, pixels, values, seen)
    assert found.shape == (2, *size, 32)
    expected = np.asarray(corner_sums.scatter(size, pixels, values, seen))
    assert np.abs(expected).max() > 10.0
    np.testing.assert_allclose(found, expected, atol=5e-4)


@pytest.mark.parametrize("way", WAYS)
def test_sums_of_16_bits_are_float32_and_weights_rounded_once(way):
    size, (pixels, values, seen) = (16, 33), inputs((16, 33), 3000, dtype=jnp.bfloat16)
    found = WAYS[way](size, pixels, values, seen)
    assert found.dtype == jnp.float32
    expected = corner_sums.scatter(size, pixels, values, seen)
    assert jnp.linalg.norm(found - expected) < 0.004 * jnp.linalg.norm(expected)


def test_what_many_points_have_for_a_cell_adds_up_in_the_kernel():
    """In 16 bits a sum of ones ends at 256."""
    pixels, values = jnp.full((1, 5000, 2), 1.5), jnp.ones((1, 5000, 32), jnp.bfloat16)
    found = corner_sums.fused((3, 3), pixels, values, jnp.ones((1, 5000), bool), interpret=True)
    expected = np.zeros((1, 3, 3, 32), np.float32)
    expected[:, 1, 1] = 5000
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("platform", "dtype", "channels", "way"),
    [
        ("cpu", jnp.bfloat16, 32, "scatter"),
        ("cuda", jnp.bfloat16, 64, "pallas_call"),
        ("cuda", jnp.bfloat16, 48, "dot_general"),
        ("cuda", jnp.float32, 32, "scatter"),
        ("tpu", jnp.bfloat16, 32, "dot_general"),
        ("tpu", jnp.float32, 32, "dot_general"),
    ],
)
def test_platform_and_shape_choose(platform, dtype, channels, way):
    arrays = inputs((8, 8), 100, channels, dtype)
    with target.traced_for(platform):
        traced = str(jax.make_jaxpr(lambda *x: corner_sums.add((8, 8), *x))(*arrays))
    found = {name: name in traced for name in ("scatter", "pallas_call", "dot_general")}
    assert found["scatter"] == (way == "scatter")
    assert found["pallas_call"] == (way == "pallas_call")
    assert found["dot_general"] == (way != "scatter")


@pytest.mark.parametrize(("frames", "fuses"), [(1, True), (2, False)])
def test_devices_run_the_kernel_on_clips_of_their_own(frames, fuses):
    mesh = meshes.make(meshes.MeshConfig(2, frames=frames), jax.devices("cpu"))
    clips, views = 8, 2
    pose = jnp.broadcast_to(jnp.eye(4), (clips, views, 4, 4))
    intrinsics = jnp.broadcast_to(jnp.eye(3), (clips, views, 3, 3))
    side = jnp.full((clips, views), 64)
    cameras = Camera(pose, intrinsics, side, side)
    maps = jnp.zeros((clips, views, 8, 8, 32), jnp.bfloat16)

    def slope(maps, points):
        source = pixelnerf.Source(maps, cameras, jnp.ones((clips, views), bool))

        def total(wide):
            return jnp.sum(pixelnerf.look_up(source, wide, points).mean)

        return jax.grad(total)(maps.astype(jnp.float32))

    points = jnp.ones((clips, 16, 4, 3))
    with target.traced_for("cuda"):
        traced = str(jax.make_jaxpr(sharding.on_mesh(slope, mesh))(maps, points))
        alone = str(jax.make_jaxpr(slope)(maps, points))
    assert "pallas_call" in alone
    assert ("pallas_call" in traced) == fuses
    assert ("shard_map" in traced) == fuses


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "channels"), [((32, 32), 32), ((64, 64), 128), ((36, 64), 64)])
def test_kernel_adds_up_on_a_gpu_what_is_scattered(size, channels):
    pixels, values, seen = inputs(size, 50_000, channels, jnp.bfloat16)
    found = jax.jit(functools.partial(corner_sums.fused, size))(pixels, values, seen)
    expected = jax.jit(functools.partial(corner_sums.scatter, size))(pixels, values, seen)
    assert jnp.linalg.norm(found - expected) < 0.004 * jnp.linalg.norm(expected)
