"""Points on hulls: where they lie, what colour they take, and what happens without masks."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trimesh
from solid_views import SIZE, VIEWS, see

from v3d_jax.ops import camera
from v3d_jax.splat import carve, cloud, silhouette

CONFIG = carve.CarveConfig(resolution=64, coarse=32)
COUNT = 4000
RED, BLUE, GREEN = np.float32([[0.8, 0.1, 0.2], [0.1, 0.2, 0.9], [0.0, 1.0, 0.0]])

initial = fixtures.jit(cloud.initial, static_argnames=("count", "config"))
hull_of = fixtures.jit(carve.hull, static_argnames="config")
sample = fixtures.jit(cloud.sample_surface, static_argnames="count")


def pictures(solid, red):
    """Faces where `red` [f] holds are red, others blue, and the background a green that bleeds."""
    colours = np.where(red[:, None], RED, BLUE)
    return np.where(solid.masks[..., None], colours[solid.faces], GREEN)


def of(solid, red, lenses, key=0):
    arrays = jnp.asarray(pictures(solid, red)), jnp.asarray(solid.masks)
    return initial(jax.random.key(key), *arrays, lenses, count=COUNT, config=CONFIG)


@pytest.fixture(scope="module")
def sphere(solids, lenses):
    """A sphere, red where x is positive."""
    solid = solids["sphere"]
    return of(solid, solid.mesh.triangles_center[:, 0] > 0, lenses)


def test_points_lie_on_the_surface_and_look_outwards(sphere):
    radius = np.linalg.norm(sphere.positions, axis=1)
    # The hull of 18 views stands off a sphere of 0.5 by up to 0.02; a pixel is 0.018.
    assert radius.min() > 0.49
    assert radius.max() < 0.53
    outwards = (np.asarray(sphere.positions) * sphere.normals).sum(1) / radius
    assert outwards.mean() > 0.97
    assert np.quantile(outwards, 0.01) > 0.75
    np.testing.assert_allclose(np.linalg.norm(sphere.normals, axis=1), 1.0, atol=1e-5)


def test_colours_of_a_two_coloured_sphere(sphere):
    x = np.asarray(sphere.positions)[:, 0]
    for side, colour in ((x > 0.06, RED), (x < -0.06, BLUE)):
        assert side.sum() > 0.4 * COUNT
        off = np.abs(np.asarray(sphere.colors)[side] - colour).max(axis=1)
        assert (off < 0.02).mean() > 0.998
        assert off.max() < 0.2  # nowhere the other side's
    between = np.asarray(sphere.colors)[abs(x) <= 0.06]
    assert between[:, 1].max() < 0.25  # no green anywhere
    assert sphere.seen.mean() > 0.99
    assert sphere.carved
    assert cloud.describe(sphere) is None


def test_points_are_spread_by_area(solids, lenses):
    hull = hull_of(solids["box"].masks, lenses, config=CONFIG)
    positions, normals = sample(jax.random.key(0), hull, count=20000)
    axis = np.abs(normals).argmax(axis=1)
    share = np.bincount(axis, minlength=3) / len(axis)
    area = np.asarray([0.6 * 0.5, 0.9 * 0.5, 0.9 * 0.6])
    np.testing.assert_allclose(share, area / area.sum(), atol=0.04)
    # A sphere has facets of every slant: octants, and the poles against the equator.
    hull = hull_of(solids["sphere"].masks, lenses, config=CONFIG)
    positions = np.asarray(sample(jax.random.key(0), hull, count=20000)[0])
    octant = (positions > 0) @ [1, 2, 4]
    np.testing.assert_allclose(np.bincount(octant) / 20000, 0.125, atol=0.01)
    heights = np.abs(positions[:, [2]] / np.linalg.norm(positions, axis=1, keepdims=True))
    np.testing.assert_allclose((heights < 0.5).mean(), 0.5, atol=0.03)  # Archimedes
    diagonal = np.abs(positions).max(axis=1) / np.linalg.norm(positions, axis=1)
    rng = np.random.default_rng(0)
    even = rng.normal(size=(10**5, 3))
    even = np.abs(even).max(axis=1) / np.linalg.norm(even, axis=1)
    np.testing.assert_allclose((diagonal < 0.7).mean(), (even < 0.7).mean(), atol=0.03)


def test_slanted_faces_get_their_share():
    """A square prism on its edge, |x| + |z| <= 0.6 and |y| <= 0.4, whose distances are known."""
    size, voxel = 48, 1.5 / 48
    steps = (np.arange(size) + 0.5) * voxel - 0.75
    x, y, z = np.meshgrid(steps, steps, steps, indexing="ij")
    distance = np.minimum((0.6 - abs(x) - abs(z)) / 2**0.5, 0.4 - abs(y))
    one, none = jnp.float32(voxel), jnp.zeros(2, bool)
    corner = jnp.full(3, -0.75)
    hull = carve.Hull(jnp.asarray(distance, jnp.float32), corner, one, one, none, none)
    normals = np.asarray(sample(jax.random.key(0), hull, count=20000)[1])
    caps = (np.abs(normals[:, 1]) > 0.9).mean()
    slanted, flat = 4 * (0.6 * 2**0.5) * 0.8, 2 * (2 * 0.6**2)
    np.testing.assert_allclose(caps, flat / (flat + slanted), atol=0.03)


def test_points_do_not_repeat(solids, lenses):
    hull = hull_of(solids["two boxes"].masks, lenses, config=CONFIG)
    count = 4 * int(carve.surface(hull).sum())  # several a voxel
    positions = np.asarray(sample(jax.random.key(0), hull, count=count)[0])
    assert len(np.unique(positions.round(5), axis=0)) > 0.999 * count


def test_what_stands_in_front_does_not_colour_what_is_behind(solids, lenses):
    solid = solids["two boxes"]
    told = of(solid, solid.mesh.triangles_center[:, 0] > 0, lenses)
    near = np.asarray(told.positions)[:, 0] > 0
    assert 0.3 < near.mean() < 0.7
    off = np.abs(np.asarray(told.colors) - np.where(near[:, None], RED, BLUE)).max(axis=1)
    assert (off < 0.05).mean() > 0.99


def test_visibility_is_that_of_rays(solids, lenses):
    """Points of the far box as a camera in line with both boxes sees them."""
    solid = solids["two boxes"]
    hull = hull_of(solid.masks, lenses, config=CONFIG)
    positions, normals = sample(jax.random.key(0), hull, count=2000)
    eye = jnp.asarray([2.0, 0.1, 0.3])
    towards = eye[None] - positions
    towards = towards / jnp.linalg.norm(towards, axis=1, keepdims=True)
    clear = np.asarray(cloud._reaches_out(positions, normals, towards, hull))
    # Where the rays cross the planes of the near box.
    towards, positions = np.float64(towards), np.float64(positions)
    planes = np.asarray([0.4, 0.0, 0.1]) + np.asarray([-0.15, 0.15])[:, None, None]
    crossings = np.sort((planes - positions) / towards, axis=0)
    hits = (crossings[0].max(axis=1) < crossings[1].min(axis=1)) & (positions[:, 0] < 0)
    facing = (towards * normals).sum(1) > 0.2
    behind = facing & (positions[:, 0] < 0)
    assert hits[behind].mean() > 0.2
    assert (~hits[behind]).mean() > 0.2
    assert (clear == ~hits)[facing].mean() > 0.95


def test_points_that_no_view_sees(solids):
    """Seen from above only, the hull's under side takes some colour of the object."""
    lenses = camera.orbit(VIEWS, width=SIZE, height=SIZE, elevation=40.0)
    mesh = trimesh.creation.box((0.8, 0.8, 0.2))
    solid = see(mesh, lenses)
    told = of(solid, np.ones(len(mesh.faces), bool), lenses)
    down = np.asarray(told.normals)[:, 2] < -0.5
    up = np.asarray(told.normals)[:, 2] > 0.95
    assert down.sum() > 100
    assert told.seen[down].mean() < 0.05  # it is tangent to lines of sight
    assert told.seen[up].mean() > 0.99
    np.testing.assert_allclose(told.colors, np.tile(RED, (COUNT, 1)), atol=0.02)


@pytest.mark.slow
def test_the_key_decides_and_one_program_serves(solids, lenses):
    count = 0

    def counted(key, images, masks):
        nonlocal count
        count += 1
        return cloud.initial(key, images, masks, lenses, 500, CONFIG)

    compiled = fixtures.jit(counted)
    solid = solids["torus"]
    images = jnp.asarray(pictures(solid, solid.mesh.triangles_center[:, 1] > 0))
    first = compiled(jax.random.key(1), images, solid.masks)
    again = compiled(jax.random.key(1), images, solid.masks)
    other = compiled(jax.random.key(2), images, solid.masks)
    nothing = compiled(jax.random.key(1), images, np.zeros_like(solid.masks))
    assert count == 1
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.isclose(first.positions, other.positions).all(axis=1).any()
    assert first.positions.shape == other.positions.shape == (500, 3)
    # Useless masks: random points, from the same program.
    assert first.carved
    assert not nothing.carved
    assert np.isfinite(nothing.positions).all()
    assert np.linalg.norm(nothing.positions, axis=1).max() <= 1.0 + 1e-4
    assert cloud.describe(nothing) == (
        "of 18 masks 18 are empty and 0 full: starting from random points in the cameras' common "
        "view"
    )


def test_bytes_are_as_good_as_floats(solids, lenses, sphere):
    solid = solids["sphere"]
    images = pictures(solid, solid.mesh.triangles_center[:, 0] > 0)
    told = initial(
        jax.random.key(0),
        jnp.asarray((images * 255 + 0.5).astype(np.uint8)),
        jnp.asarray(solid.masks.astype(np.uint8) * 255),
        lenses,
        count=COUNT,
        config=CONFIG,
    )
    np.testing.assert_array_equal(told.positions, sphere.positions)
    np.testing.assert_allclose(told.colors, sphere.colors, atol=3e-3)


def test_frames_on_white_serve_as_masks(solids, lenses, sphere):
    """What V3D makes: pictures on white, without alpha."""
    solid = solids["sphere"]
    colours = pictures(solid, solid.mesh.triangles_center[:, 0] > 0)
    frames = jnp.asarray(np.where(solid.masks[..., None], colours, 1.0))
    masks = silhouette.from_white(frames)
    np.testing.assert_array_equal(masks, solid.masks)
    told = initial(jax.random.key(0), frames, masks, lenses, count=COUNT, config=CONFIG)
    np.testing.assert_array_equal(told.positions, sphere.positions)
    np.testing.assert_allclose(told.colors, sphere.colors, atol=1e-5)  # no white bleeds in


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_can_take_it(solids, lenses, platform):
    masks = jnp.asarray(solids["box"].masks)
    images = jnp.zeros((*masks.shape, 3), jnp.uint8)
    traced = initial.trace(jax.random.key(0), images, masks, lenses, count=COUNT, config=CONFIG)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "callback" not in text
    assert "f64" not in text


def test_without_masks_points_fill_the_common_view():
    lenses = camera.orbit(VIEWS, width=SIZE, height=SIZE)
    images = jnp.zeros((VIEWS, SIZE, SIZE, 3))
    told = initial(jax.random.key(0), images, None, lenses, count=COUNT, config=CONFIG)
    assert not told.carved
    assert not told.seen.any()
    np.testing.assert_array_equal(told.colors, cloud.GREY)
    np.testing.assert_array_equal(told.normals, 0.0)
    radius = np.linalg.norm(told.positions, axis=1)
    assert radius.max() <= 1.0 + 1e-5
    np.testing.assert_allclose((radius < 0.5).mean(), 0.125, atol=0.02)  # even by volume
    pixels, depth = camera.project(lenses, told.positions)
    assert ((pixels >= 0) & (pixels <= SIZE)).all()
    assert (depth > 0).all()
    assert "or there are none: starting from random points" in cloud.describe(told)


def test_remarks_about_single_masks(sphere):
    some = jnp.arange(VIEWS) < 2
    assert cloud.describe(sphere._replace(empty_masks=some)) == (
        "2 of 18 masks are empty and were left out"
    )
    assert cloud.describe(sphere._replace(empty_masks=some, full_masks=jnp.arange(VIEWS) == 9)) == (
        "2 of 18 masks are empty and were left out; 1 of 18 masks are full and carve nothing"
    )
