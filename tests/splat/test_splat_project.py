"""Projection against the derivative of the pinhole map, and its limits."""

import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.ops import camera as cameras
from v3d_jax.splat import project as projection
from v3d_jax.splat.project import BLUR


def projected(gaussians, camera, **sizes):
    sizes = {"width": scenes.WIDTH, "height": scenes.HEIGHT} | sizes
    return projection.project(
        gaussians.means, gaussians.rotations, gaussians.scales, camera, **sizes
    )


def matrices(p):
    """Conics [v, n, 2, 2] in float64."""
    xx, xy, yy = (np.asarray(x, np.float64) for x in (p.conic_xx, p.conic_xy, p.conic_yy))
    return np.stack([xx, xy, xy, yy], -1).reshape(*xx.shape, 2, 2)


def test_rotations_are_those_of_quaternions():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(20, 4))
    rows = projection.rotation_rows(jnp.asarray(q, jnp.float32))
    matrix = np.asarray(jnp.stack([jnp.stack(row, -1) for row in rows], -2), np.float64)
    np.testing.assert_allclose(
        matrix @ matrix.swapaxes(1, 2), np.tile(np.eye(3), (20, 1, 1)), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, atol=1e-6)
    unit = q / np.linalg.norm(q, axis=1, keepdims=True)
    # the axis is fixed, and the trace is 1 + 2 cos(angle)
    np.testing.assert_allclose(np.einsum("nij,nj->ni", matrix, unit[:, 1:]), unit[:, 1:], atol=1e-6)
    np.testing.assert_allclose(
        np.trace(matrix, axis1=1, axis2=2), 4 * unit[:, 0] ** 2 - 1, atol=2e-6
    )
    turn = jnp.asarray([[np.cos(0.25), 0.0, 0.0, np.sin(0.25)]], jnp.float32)
    assert float(projection.rotation_rows(turn)[1][0][0]) > 0  # counter-clockwise about z


def test_covariance_is_the_jacobian_of_the_pinhole_map():
    gaussians = scenes.as_float(scenes.scene("mixed", count=30), jnp.float32)
    camera = scenes.views()
    p = projected(gaussians, camera)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), camera)

        def pixel(mean, view):
            one = jax.tree.map(lambda x: x[view], wide)
            return cameras.project(one, mean[None])[0][0]

        for view in range(scenes.VIEWS):
            for n in range(30):
                mean = jnp.asarray(np.asarray(gaussians.means[n], np.float64))
                jacobian = np.asarray(jax.jacfwd(pixel)(mean, view))
                q = jnp.asarray(np.asarray(gaussians.rotations[n : n + 1]), jnp.float64)
                rows = projection.rotation_rows(q)
                turn = np.asarray([[float(value[0]) for value in row] for row in rows])
                root = jacobian @ turn * np.exp(np.float64(gaussians.log_scales[n]))
                covariance = root @ root.T + BLUR * np.eye(2)
                np.testing.assert_allclose(matrices(p)[view, n] @ covariance, np.eye(2), atol=2e-4)
                np.testing.assert_allclose(p.variance_x[view, n], covariance[0, 0], rtol=1e-5)
                np.testing.assert_allclose(p.variance_y[view, n], covariance[1, 1], rtol=1e-5)
                x, y = np.asarray(pixel(mean, view))
                np.testing.assert_allclose(p.mean_x[view, n], x, atol=1e-4)
                np.testing.assert_allclose(p.mean_y[view, n], y, atol=1e-4)


def test_needles_keep_their_width():
    gaussians = scenes.as_float(scenes.scene("needle"), jnp.float32)
    gaussians = gaussians._replace(
        log_scales=jnp.broadcast_to(jnp.log(jnp.asarray([5.0, 1e-4, 1e-4])), (scenes.COUNT, 3))
    )
    p = projected(gaussians, scenes.views())
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), gaussians)
        camera = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), scenes.views())
        true = projected(wide, camera)
        # the determinant of the conic, whose textbook form would cancel here
        expected = np.linalg.det(matrices(true))
        ratio = np.asarray(true.conic_xx) * np.asarray(true.variance_x)
    assert np.quantile(ratio, 0.9) > 1e4
    small = np.linalg.eigvalsh(matrices(p))[..., 1]
    np.testing.assert_allclose(small, np.linalg.eigvalsh(matrices(true))[..., 1], rtol=1e-4)
    assert (expected > 0).all()


def test_near_plane_and_side_clamp():
    camera = jax.tree.map(lambda x: x[:1], scenes.views())
    to_world = np.asarray(cameras.camera_to_world(camera)[0])
    local = np.asarray([[0, 0, 0.0101, 1], [0, 0, 0.0099, 1], [0, 0, -1, 1], [30, 0, 0.5, 1]])
    means = jnp.asarray((local @ to_world.T)[:, :3], jnp.float32)
    count = len(local)
    rotations = jnp.tile(jnp.asarray([[1.0, 0.0, 0.0, 0.0]]), (count, 1))
    p = projection.project(
        means, rotations, jnp.full((count, 3), 0.01), camera, width=96, height=80
    )
    np.testing.assert_array_equal(p.visible[0], [True, False, False, True])
    # far to the side, the blur of perspective stops growing at 15 % beyond the border
    focal = float(camera.intrinsics[0, 0, 0])
    slope = 0.5 * 96 / focal + 0.15 * 96 / focal
    widest = (focal / 0.5 * 0.01) ** 2 * (1 + slope**2) + BLUR
    np.testing.assert_allclose(float(p.variance_x[0, 3]), widest, rtol=1e-4)
