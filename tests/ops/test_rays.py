"""Rays, distances along them and projections, against geometry written out in numpy."""

import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from v3d_jax.ops import camera, metrics, rays
from v3d_jax.ops.camera import Camera

WIDTH, HEIGHT = 120, 88

project, bilinear, cube_span = (
    fixtures.jit(f) for f in (rays.project, rays.bilinear, rays.cube_span)
)


@functools.partial(fixtures.jit, static_argnums=1)
def pixel_rays(cameras, size):
    return rays.pixel_rays(cameras, size)


def make_camera(position, target, *, focal=(110.0, 96.0), skew=3.0, centre=(57.0, 47.0)):
    """Neither centred nor square, so that no two numbers can be confused."""
    pose = camera.look_at(jnp.asarray(position), jnp.asarray(target), jnp.asarray([0.0, 0.0, 1.0]))
    intrinsics = [[focal[0], skew, centre[0]], [0.0, focal[1], centre[1]], [0.0, 0.0, 1.0]]
    return Camera(pose, jnp.asarray(intrinsics), jnp.asarray(WIDTH), jnp.asarray(HEIGHT))


def stack(*cameras):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *cameras)


def first(cameras, index=0):
    return jax.tree.map(lambda x: x[index], cameras)


TWO = stack(
    make_camera([2.0, 0.2, 0.3], [0.0, 0.1, 0.0]),
    make_camera([1.6, -1.1, 0.6], [0.1, 0.0, 0.1], focal=(90.0, 104.0), skew=-2.0),
)
# From where the cube is not all of the picture.
FAR = stack(make_camera([3.9, 0.5, 0.6], [0.0] * 3), make_camera([2.5, -2.4, 1.2], [0.0, 0.4, 0.1]))


@pytest.mark.parametrize("factor", [1, 8])
def test_pixels_of_points_on_rays_are_where_the_rays_began(factor):
    size = (HEIGHT // factor, WIDTH // factor)
    found = pixel_rays(TWO, size)
    assert found.origins.shape == found.directions.shape == (2, *size, 3)
    np.testing.assert_allclose(np.linalg.norm(found.directions, axis=-1), 1.0, rtol=1e-6)
    points = found.origins + 1.7 * found.directions
    pixels, _ = camera.project(first(TWO, 1), points[1].reshape(-1, 3))
    y, x = np.mgrid[: size[0], : size[1]]
    want = factor * (np.stack([x, y], axis=-1) + 0.5)
    np.testing.assert_allclose(pixels.reshape(*size, 2), want, atol=2e-4)


def test_rays_enter_and_leave_the_cube_on_its_faces():
    """Of every ray that meets it, by the definition: on a face, and inside in between."""
    found = jax.tree.map(np.asarray, pixel_rays(FAR, (11, 15)))
    enter, leave = (np.asarray(x) for x in cube_span(found))
    at = lambda t: np.abs(found.origins + t[..., None] * found.directions).max(axis=-1)  # noqa: E731
    fine = np.linspace(0.0, 6.0, 2001).reshape(-1, 1, 1, 1) * np.ones_like(enter)[None]
    met = np.stack([at(t) for t in fine]) <= 1.0
    hit = met.any(axis=0)
    assert 0.1 < hit.mean() < 0.9
    for distance in (enter, leave):
        np.testing.assert_allclose(at(distance)[hit], 1.0, atol=1e-5)
    inside = (fine > enter) & (fine < leave)
    assert np.mean((inside == met)[:, hit]) > 0.999


def test_rays_that_miss_the_cube_end_at_the_farthest_exit_of_their_frame():
    found = jax.tree.map(np.asarray, pixel_rays(FAR, (11, 15)))
    enter, leave = (np.asarray(x) for x in cube_span(found))
    on_cube = np.abs(found.origins + leave[..., None] * found.directions).max(axis=-1)
    hit = np.isclose(on_cube, 1.0, atol=1e-5)
    for frame in range(2):
        assert not hit[frame].all()
        assert np.all(enter[frame][~hit[frame]] == enter[frame][hit[frame]].min())
        assert np.all(leave[frame][~hit[frame]] == leave[frame][hit[frame]].max())
    assert leave[0].max() != leave[1].max()
    # The farthest entry, which the release takes, is another number.
    assert leave[0].max() > enter[0][hit[0]].max() + 0.5


def test_cameras_in_the_cube_or_turned_away_get_finite_spans():
    inside = make_camera([0.3, 0.1, 0.0], [1.0, 0.0, 0.0])
    away = make_camera([3.0, 0.0, 0.0], [5.0, 0.0, 0.0])
    enter, leave = cube_span(pixel_rays(stack(inside, away), (7, 9)))
    assert np.all(enter == 0.0)
    assert np.all((leave[0] > 0.6) & (leave[0] < rays.DIAGONAL))
    np.testing.assert_allclose(leave[1], rays.DIAGONAL, rtol=1e-6)
    # Parallel to two pairs of faces.
    axis = rays.Rays(jnp.asarray([[[-3.0, 0.5, 0.0]]]), jnp.asarray([[[1.0, 0.0, 0.0]]]))
    np.testing.assert_allclose(cube_span(axis), [[[2.0]], [[4.0]]], rtol=1e-6)


def test_distances_in_the_cube_are_even_and_jitter_moves_them_a_step_at_most():
    enter, leave = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 2.5])
    distances = functools.partial(fixtures.jit, static_argnums=2)(rays.even_distances)
    plain = distances(enter, leave, 5)
    np.testing.assert_allclose(plain, [[1, 1.5, 2, 2.5, 3], [2, 2.125, 2.25, 2.375, 2.5]])
    jitter = jax.random.uniform(jax.random.key(0), (2, 5))
    moved = distances(enter, leave, 5, jitter)
    np.testing.assert_allclose(moved - plain, jitter * np.asarray([[0.5], [0.125]]), atol=1e-6)


def test_distances_in_disparity_have_one_in_every_bin():
    near, far = jnp.asarray([0.5, 0.5]), jnp.asarray([10_000.0, 2.0])
    distances = functools.partial(fixtures.jit, static_argnums=2)(rays.disparity_distances)
    edges = 1.0 / np.linspace([2.0, 2.0], [1e-4, 0.5], 9, axis=-1)
    jitter = jax.random.uniform(jax.random.key(0), (2, 8), minval=0.01, maxval=0.99)
    moved = distances(near, far, 8, jitter)
    assert np.all((edges[:, :-1] < moved) & (moved < edges[:, 1:]))
    middle = 0.5 * (1.0 / edges[:, :-1] + 1.0 / edges[:, 1:])
    np.testing.assert_allclose(1.0 / distances(near, far, 8), middle, rtol=1e-5)


def test_only_points_before_a_camera_and_in_its_picture_are_visible():
    """The pose is the identity: the camera at the origin looks along z."""
    plain = first(TWO)._replace(world_to_camera=jnp.eye(4))
    u = lambda x, z: 110.0 * x / z + 57.0  # noqa: E731
    points = {
        "ahead": ([0.2, 0.0, 1.0], True),
        "left": ([-0.6, 0.0, 1.0], False),
        "right": ([0.6, 0.0, 1.0], False),
        "above": ([0.0, -0.6, 1.0], False),
        "below": ([0.0, 0.6, 1.0], False),
        "behind": ([-0.2, 0.0, -1.0], False),
        "camera": ([0.0, 0.0, 0.0], False),
        "beside": ([1.0, 1.0, 0.0], False),
    }
    at = jnp.asarray([point for point, _ in points.values()])
    pixels, visible = project(plain, at)
    assert visible.tolist() == [seen for _, seen in points.values()]
    np.testing.assert_allclose(pixels[0], [u(0.2, 1.0), 47.0], rtol=1e-6)
    # What lies behind would otherwise be taken for a pixel of the picture.
    assert 0 < u(-0.2, -1.0) < WIDTH
    assert not np.any(pixels[1:])
    slope = fixtures.jit(jax.jacobian(lambda p: rays.project(plain, p)[0]))(at)
    assert np.isfinite(slope).all()
    assert np.any(slope[0])


def test_cameras_of_padding_see_nothing():
    broken = Camera(
        jnp.full((4, 4), jnp.nan), jnp.full((3, 3), jnp.inf), jnp.asarray(0), jnp.asarray(0)
    )
    pixels, visible = project(stack(broken, first(TWO)), jnp.asarray([[0.0, 0.1, 0.0]]))
    assert visible.tolist() == [[False], [True]]
    assert np.isfinite(pixels).all()


def test_bilinear_is_exact_on_planes_and_repeats_the_border():
    y, x = np.mgrid[:5, :7] + 0.5
    plane = jnp.asarray(np.stack([2 * x - y, 3.0 + 0 * x], axis=-1), jnp.float32)
    at = np.random.default_rng(0).uniform([0.5, 0.5], [6.5, 4.5], (40, 2))
    found = bilinear(plane, jnp.asarray(at, jnp.float32))
    np.testing.assert_allclose(found[:, 0], 2 * at[:, 0] - at[:, 1], atol=1e-5)
    np.testing.assert_allclose(found[:, 1], 3.0, atol=1e-6)
    corners = bilinear(plane, jnp.asarray([[-9.0, -9.0], [0.5, 0.5], [99.0, 99.0]]))
    np.testing.assert_allclose(corners[:, 0], [0.5, 0.5, 8.5], atol=1e-6)
    slope = fixtures.jit(jax.grad(lambda p: rays.bilinear(plane, p)[0]))(jnp.asarray([3.2, 2.1]))
    np.testing.assert_allclose(slope, [2.0, -1.0], atol=1e-5)
    half = bilinear(plane.astype(jnp.bfloat16), jnp.asarray([[3.0, 2.0]]))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("channels", [(), (3,)])
def test_bilinear_look_up(channels):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(7, 9, *channels)).astype(np.float32)
    pixels = rng.uniform(-3, 12, (200, 2)).astype(np.float32)
    told = np.asarray(rays.bilinear(jnp.asarray(image), jnp.asarray(pixels)))
    layers = image.reshape(7, 9, -1)
    expected = [
        ndimage.map_coordinates(layers[..., i], pixels.T[::-1] - 0.5, order=1, mode="nearest")
        for i in range(layers.shape[-1])
    ]
    np.testing.assert_allclose(told.reshape(200, -1), np.stack(expected, -1), atol=1e-5)
    centres = jnp.asarray([[0.5, 0.5], [8.5, 6.5], [3.5, 2.5]])
    at = rays.bilinear(jnp.asarray(image), centres)
    np.testing.assert_array_equal(at, image[[0, 6, 2], [0, 8, 3]])


# A plane through `POINT` that no camera looks at squarely, with axes to paint it by.
POINT = np.asarray([0.1, 0.05, -0.1])
NORMAL = np.asarray([0.9, -0.3, 0.3]) / np.linalg.norm([0.9, -0.3, 0.3])
AXES = np.linalg.svd(NORMAL[None])[2][1:]


def paint(points):
    """Smooth, but different everywhere: a wrong place shows."""
    a, b = np.moveaxis((points - POINT) @ AXES.T, -1, 0)
    waves = [np.sin(19.0 * a + 3.0 * b), np.sin(17.0 * b - 5.0 * a), np.sin(11.0 * (a + b))]
    return 0.5 + 0.5 * np.stack(waves, axis=-1)


def on_plane(cameras):
    """World points that pixels see, from inverse matrices in float64; the plane has no border."""
    pose = np.linalg.inv(np.asarray(cameras.world_to_camera, np.float64))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    local = np.stack([x, y, np.ones_like(x)], axis=-1)
    local = local @ np.linalg.inv(np.asarray(cameras.intrinsics, np.float64)).T
    directions = local @ pose[:3, :3].T
    depth = ((POINT - pose[:3, 3]) @ NORMAL) / (directions @ NORMAL)
    assert depth.min() > 0.0
    return pose[:3, 3] + depth[..., None] * directions


def test_a_textured_plane_is_rendered_from_the_other_camera_by_correspondence():
    """35 dB where the source sees the plane; the source's picture shifted by 0.3 pixels: less."""
    target, source = first(TWO, 0), first(TWO, 1)
    picture = jnp.asarray(paint(on_plane(source)), jnp.float32)
    wanted = paint(on_plane(target))
    # Depths along the target's own rays.
    seen = pixel_rays(target, (HEIGHT, WIDTH))
    facing = np.asarray(seen.directions, np.float64) @ NORMAL
    depth = (POINT - np.asarray(seen.origins, np.float64)) @ NORMAL / facing
    points = seen.origins + jnp.asarray(depth, jnp.float32)[..., None] * seen.directions
    pixels, visible = project(source, points.reshape(-1, 3))
    visible = np.asarray(visible).reshape(HEIGHT, WIDTH)
    # As told by the source's homogeneous matrix.
    matrix = np.asarray(source.intrinsics, np.float64) @ np.asarray(source.world_to_camera)[:3]
    image = np.concatenate([on_plane(target), np.ones((HEIGHT, WIDTH, 1))], axis=-1) @ matrix.T
    x, y = image[..., 0] / image[..., 2], image[..., 1] / image[..., 2]
    inside = (image[..., 2] > 0) & (x > 0) & (x < WIDTH) & (y > 0) & (y < HEIGHT)
    assert np.mean(visible != inside) < 1e-3
    assert 0.3 < visible.mean() < 0.97

    def score(offset):
        found = np.asarray(bilinear(picture, pixels + offset)).reshape(wanted.shape)
        error = np.mean(np.square(found - wanted)[visible])
        return -10.0 * np.log10(error)

    assert score(0.0) > 35.0
    assert score(0.3) < 30.0
    # The pictures differ: without correspondence there is nothing like it.
    assert metrics.psnr(picture, jnp.asarray(wanted, jnp.float32)) < 15.0
