"""Visual hulls of known solids, against float64 loops over every view."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from solid_views import MESHES, SIZE, VIEWS, see

from v3d_jax.ops import camera
from v3d_jax.splat import carve

CONFIG = carve.CarveConfig(resolution=64, coarse=32)
HALF, FINE = 0.68, 88  # half side and resolution of the reference grid

hull_of = fixtures.jit(carve.hull, static_argnames="config")


def points_of_grid(half, size):
    steps = (np.arange(size) + 0.5) * (2 * half / size) - half
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)


def brute_force(masks, lenses, half=HALF, size=FINE):
    """Points of a grid that every mask holds, interpolated to 0.5 and more; [size]^3."""
    points = points_of_grid(half, size)
    left = np.arange(len(points))
    for mask, pose, intrinsics in zip(
        masks, *(np.float64(field) for field in lenses[:2]), strict=True
    ):
        local = points[left] @ pose[:3, :3].T + pose[:3, 3]
        pixels = local @ intrinsics.T
        x, y = (pixels[:, :2] / pixels[:, 2:] - 0.5).T
        value = ndimage.map_coordinates(mask.astype(float), [y, x], order=1, mode="nearest")
        left = left[value >= 0.5]
    inside = np.zeros(len(points), bool)
    inside[left] = True
    return inside.reshape(size, size, size)


def look_up(grid, hull, points):
    """The voxel of every point; False outside the grid."""
    index = np.floor((points - np.asarray(hull.corner)) / float(hull.voxel)).astype(int)
    within = ((index >= 0) & (index < len(grid))).all(axis=1)
    return np.asarray(grid)[tuple(np.clip(index, 0, len(grid) - 1).T)] & within


@pytest.fixture(scope="module")
def hulls(solids, lenses):
    return {name: hull_of(solid.masks, lenses, config=CONFIG) for name, solid in solids.items()}


@pytest.fixture(scope="module")
def references(solids, lenses):
    return {name: brute_force(solid.masks, lenses) for name, solid in solids.items()}


@pytest.mark.parametrize("name", MESHES)
def test_hull_holds_the_surface(solids, hulls, name):
    points = solids[name].mesh.sample(20000, seed=0)
    assert look_up(carve.cover(hulls[name]), hulls[name], points).mean() >= 0.999


@pytest.mark.parametrize("name", MESHES)
def test_hull_is_that_of_a_loop_over_views(hulls, references, name):
    hull, expected = hulls[name], references[name]
    voxel = 2 * HALF / FINE
    assert voxel < float(hull.voxel)
    truth = expected.sum() * voxel**3
    np.testing.assert_allclose(carve.volume(hull), truth, rtol=0.02)
    np.testing.assert_allclose(carve.inside(hull).sum() * hull.voxel**3, truth, rtol=0.05)
    points = points_of_grid(HALF, FINE)
    assert look_up(carve.cover(hull), hull, points[expected.reshape(-1)]).all()
    # The cover is no wider than it says: a voxel's half diagonal and half a pixel, of a distance
    # that is underestimated by the cosine of up to 40 degrees.
    margin = (0.5 * 3**0.5 * float(hull.voxel) + 0.5 * float(hull.pixel)) / np.cos(np.deg2rad(40))
    near = ndimage.distance_transform_edt(~expected) * voxel <= margin + voxel
    size = CONFIG.resolution
    centres = np.stack(np.nonzero(carve.cover(hull)), -1) + 0.5
    centres = centres * float(hull.voxel) + np.asarray(hull.corner)
    index = np.floor((centres + HALF) / voxel).astype(int)
    assert 0 < len(centres) < size**3
    assert near[tuple(index.T)].mean() > 0.99


@pytest.mark.parametrize("name", MESHES)
def test_grid_is_spent_on_the_hull(hulls, references, name):
    """The box is found, with at most two coarse voxels to spare on either side."""
    hull = hulls[name]
    there = np.stack(np.nonzero(references[name]))
    extent = (np.ptp(there, axis=1).max() + 1) * 2 * HALF / FINE
    coarse = 2 * 1.1547 / CONFIG.coarse
    side = CONFIG.resolution * float(hull.voxel)
    assert extent <= side <= extent + 4 * coarse + 3 * float(hull.voxel)
    assert not any(np.asarray(carve.inside(hull)).take([0, -1], axis).any() for axis in range(3))


def test_surface_is_inside_and_next_to_outside(hulls):
    hull = hulls["torus"]
    full = np.asarray(carve.inside(hull))
    expected = full & ~ndimage.binary_erosion(full)
    np.testing.assert_array_equal(carve.surface(hull), expected)
    assert 0 < expected.sum() < full.sum()
    everything = hull._replace(distance=jnp.ones((4, 4, 4)))
    assert carve.surface(everything).sum() == 4**3 - 2**3  # the grid's end is outside


def test_one_program_for_all_and_the_same_every_time(solids, lenses):
    count = 0

    def counted(masks, cameras):
        nonlocal count
        count += 1
        return carve.hull(masks, cameras, CONFIG)

    compiled = fixtures.jit(counted)
    first = compiled(solids["box"].masks, lenses)
    turned = lenses._replace(world_to_camera=jnp.roll(lenses.world_to_camera, 1, axis=0))
    compiled(np.roll(solids["torus"].masks, 1, axis=0), turned)
    again = compiled(solids["box"].masks, lenses)
    assert count == 1
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_does_not_grow_with_views_times_voxels(solids, lenses):
    config = carve.CarveConfig(resolution=128, coarse=64)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (solids["box"].masks, lenses)
    )
    compiled = fixtures.jit(carve.hull, static_argnums=2).lower(*shapes, config).compile()
    memory = compiled.memory_analysis()
    grid, pixels = 4 * config.resolution**3, 4 * VIEWS * SIZE**2
    assert memory.temp_size_in_bytes < 3 * grid + 4 * pixels  # a tenth of views x voxels


def test_masks_may_be_bytes_floats_or_bits(solids, lenses, hulls):
    masks = solids["box"].masks
    for same in (masks.astype(np.float32), masks.astype(np.uint8) * 255, masks * np.float32(0.6)):
        np.testing.assert_array_equal(
            hull_of(same, lenses, config=CONFIG).distance, hulls["box"].distance
        )
    assert not carve.inside(hull_of(masks * np.float32(0.4), lenses, config=CONFIG)).any()


def test_a_view_with_an_empty_mask_is_left_out_and_reported(solids, lenses, hulls):
    masks = solids["two boxes"].masks.copy()
    masks[4] = False
    hull = hull_of(masks, lenses, config=CONFIG)
    np.testing.assert_array_equal(np.nonzero(hull.empty_masks)[0], [4])
    assert not hull.full_masks.any()
    assert carve.usable(hull)
    others = np.arange(VIEWS) != 4
    rest = camera.Camera(*(field[others] for field in lenses))
    expected = hull_of(masks[others], rest, config=CONFIG)
    np.testing.assert_allclose(carve.volume(hull), carve.volume(expected), rtol=1e-3)
    assert not hulls["two boxes"].empty_masks.any()


def test_a_full_mask_carves_nothing_and_is_reported(solids, lenses):
    masks = solids["box"].masks.copy()
    masks[[0, 7]] = True
    hull = hull_of(masks, lenses, config=CONFIG)
    np.testing.assert_array_equal(np.nonzero(hull.full_masks)[0], [0, 7])
    assert not hull.empty_masks.any()
    assert carve.usable(hull)
    others = ~np.isin(np.arange(VIEWS), [0, 7])
    rest = camera.Camera(*(field[others] for field in lenses))
    expected = hull_of(masks[others], rest, config=CONFIG)
    np.testing.assert_allclose(carve.volume(hull), carve.volume(expected), rtol=1e-3)


def test_masks_that_say_nothing(solids, lenses):
    masks = solids["box"].masks
    empty = hull_of(np.zeros_like(masks), lenses, config=CONFIG)
    assert empty.empty_masks.all()
    assert not carve.inside(empty).any()
    assert not carve.usable(empty)
    full = hull_of(np.ones_like(masks), lenses, config=CONFIG)
    assert full.full_masks.all()
    assert not carve.usable(full)
    # Masks that have nothing in common.
    apart = np.zeros_like(masks)
    apart[:9, :40], apart[9:, -40:] = True, True
    hull = hull_of(apart, lenses, config=CONFIG)
    assert not carve.inside(hull).any()
    assert not carve.usable(hull)
    for one in (empty, full, hull):
        assert all(np.isfinite(field).all() for field in one)


def test_an_object_that_a_view_shows_in_part_is_whole(solids, lenses):
    """A mask that touches the border goes on beyond it."""
    zoom = lenses.intrinsics.at[3, 0, 0].mul(3.0).at[3, 1, 1].mul(3.0)
    zoomed = lenses._replace(intrinsics=zoom)
    solid = see(solids["box"].mesh, zoomed)
    assert solid.masks[3][:, [0, -1]].any()
    assert not solid.masks[3].all()
    hull = hull_of(solid.masks, zoomed, config=CONFIG)
    points = solid.mesh.sample(20000, seed=0)
    assert look_up(carve.cover(hull), hull, points).mean() >= 0.999
    np.testing.assert_allclose(carve.volume(hull), 0.3, rtol=0.02)  # that of a plain view


def test_views_that_miss_a_part_can_be_tolerated(solids, lenses, hulls):
    masks = solids["two boxes"].masks.copy()
    masks[0, :, : SIZE // 2] = False  # one of the boxes
    assert masks[0].any()
    points = solids["two boxes"].mesh.sample(5000, seed=0)
    strict = hull_of(masks, lenses, config=CONFIG)
    assert look_up(carve.cover(strict), strict, points).mean() < 0.85
    lenient = hull_of(masks, lenses, config=carve.CarveConfig(64, 32, tolerated=1))
    assert look_up(carve.cover(lenient), lenient, points).mean() > 0.999
    assert float(carve.volume(lenient)) < 1.5 * float(carve.volume(hulls["two boxes"]))


def test_viewing_box_of_an_orbit_and_of_one_elsewhere():
    lenses = camera.orbit(width=512, height=512)
    box = carve.viewing_box(lenses)
    np.testing.assert_allclose(box.centre, np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(box.inner, 1.0, rtol=1e-5)  # 2 sin 30
    np.testing.assert_allclose(box.outer, 2 * np.tan(np.deg2rad(30)), rtol=1e-5)
    np.testing.assert_allclose(box.pixel, 2 / 443.405, rtol=1e-4)
    shift = np.float32([5.0, -3.0, 2.0])
    pose = np.asarray(lenses.world_to_camera).copy()
    pose[:, :3, 3] -= pose[:, :3, :3] @ shift
    moved = carve.viewing_box(lenses._replace(world_to_camera=jnp.asarray(pose)))
    np.testing.assert_allclose(moved.centre, shift, atol=2e-3)
    np.testing.assert_allclose(moved.inner, 1.0, rtol=2e-3)


def test_viewing_box_of_parallel_cameras_lies_in_front():
    pose = np.broadcast_to(np.eye(4, dtype=np.float32), (3, 4, 4)).copy()
    pose[:, 0, 3] = [-1.0, 0.0, 1.0]
    one = camera.orbit(3, width=64, height=64)
    box = carve.viewing_box(one._replace(world_to_camera=jnp.asarray(pose)))
    assert all(np.isfinite(field).all() for field in box)
    assert float(box.centre[2]) > 0.3
    assert float(box.inner) > 0
