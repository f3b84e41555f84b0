import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.nn import pixelnerf
from v3d_jax.ops import corner_sums, rays, target
from v3d_jax.ops.camera import Camera
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import program, sharding


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


@pytest.mark.parametrize(("size", "points"), [((5, 7), 300), ((17, 40), 2048), ((32, 32), 2300)])
def test_products_are_what_is_scattered(size, points):
    pixels, values, seen = inputs(size, points)
    found = corner_sums.products(size, pixels, values)
    assert found.shape == (2, *size, 32)
    expected = np.asarray(corner_sums.scatter(size, pixels, values, seen))
    assert np.abs(expected).max() > 10.0
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_sums_of_16_bits_are_float32_and_weights_rounded_once():
    size, (pixels, values, seen) = (16, 33), inputs((16, 33), 3000, dtype=jnp.bfloat16)
    found = corner_sums.products(size, pixels, values)
    assert found.dtype == jnp.float32
    expected = corner_sums.scatter(size, pixels, values, seen)
    assert jnp.linalg.norm(found - expected) < 0.004 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_what_many_points_have_for_a_cell_adds_up(platform):
    """In 16 bits a sum of ones ends at 256."""
    pixels, values = jnp.full((1, 5000, 2), 1.5), jnp.ones((1, 5000, 32), jnp.bfloat16)
    with target.traced_for(platform):
        found = corner_sums.add((3, 3), pixels, values, jnp.ones((1, 5000), bool))
    expected = np.zeros((1, 3, 3, 32), np.float32)
    expected[:, 1, 1] = 5000
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("platform", "way"), [("cpu", "scatter"), ("cuda", "scatter"), ("tpu", "dot_general")]
)
def test_platform_chooses(platform, way):
    arrays = inputs((8, 8), 100, dtype=jnp.bfloat16)
    with target.traced_for(platform):
        traced = str(jax.make_jaxpr(lambda *x: corner_sums.add((8, 8), *x))(*arrays))
    found = [name for name in ("scatter", "dot_general") if name in traced]
    assert found == [way]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("fsdp", "frames"), [(1, 1), (2, 1), (2, 2)])
def test_devices_add_up_for_their_own_clips(fsdp, frames, platform):
    """Nothing of maps, points or sums goes from one to another."""
    mesh, views = meshes.make(meshes.MeshConfig(fsdp, frames=frames)), 2
    cameras = Camera(
        jnp.broadcast_to(jnp.eye(4), (8, views, 4, 4)),
        jnp.broadcast_to(30.0 * jnp.eye(3), (8, views, 3, 3)),
        *[jnp.full((8, views), 64)] * 2,
    )

    def slope(maps, points):
        source = pixelnerf.Source(maps, cameras, jnp.ones((8, views), bool))

        def total(wide):
            return jnp.sum(jnp.sin(pixelnerf.look_up(source, wide, points).mean))

        return jax.grad(total)(maps.astype(jnp.float32))

    clips = sharding.batch(mesh)
    step = jax.jit(sharding.on_mesh(slope, mesh), in_shardings=(clips, clips), out_shardings=clips)
    maps, points = jnp.zeros((8, views, 8, 8, 32), jnp.bfloat16), jnp.ones((8, 16, 4, 3))
    with target.traced_for(platform):
        text = step.lower(maps, points).compile().as_text()
    assert program.collectives(text) == []
