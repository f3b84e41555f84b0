"""Cameras: the published orbit, round trips, projection."""

import jax.numpy as jnp
import numpy as np

from v3d_jax.ops import camera


def test_orbit_has_the_published_poses():
    # v3d-facts, pose check at azimuth 20 degrees.
    orbit = camera.orbit(width=512, height=512)
    pose = np.asarray(camera.camera_to_world(orbit))[1]
    np.testing.assert_allclose(pose[:3, 3], [1.8794, 0.6840, 0.0], atol=1e-4)
    np.testing.assert_allclose(pose[:3, 0], [-0.3420, 0.9397, 0.0], atol=1e-4)
    np.testing.assert_allclose(pose[:3, 1], [0.0, 0.0, -1.0], atol=1e-6)
    np.testing.assert_allclose(pose[:3, 2], [-0.9397, -0.3420, 0.0], atol=1e-4)
    np.testing.assert_allclose(orbit.intrinsics[0, 0, 0], 443.405, atol=1e-3)


def test_orbit_starts_on_the_x_axis_and_tilts_up():
    orbit = camera.orbit(4, width=8, height=8, elevation=30.0, start_azimuth=90.0)
    first = np.asarray(camera.position(orbit))[0]
    np.testing.assert_allclose(first, [0.0, 2 * np.cos(np.pi / 6), 1.0], atol=1e-6)


def test_opengl_round_trip():
    orbit = camera.orbit(5, width=8, height=8, elevation=-20.0)
    again = camera.from_opengl(camera.to_opengl(orbit))
    np.testing.assert_allclose(again, orbit.world_to_camera, atol=1e-6)


def test_projection_of_known_points():
    orbit = camera.orbit(4, width=64, height=64)
    points = jnp.asarray([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    pixels, depth = camera.project(orbit, points)
    np.testing.assert_allclose(depth[0], 2.0, atol=1e-6)
    focal = 32 / np.tan(np.pi / 6)
    # From (2, 0, 0), +y is to the right and +z is up.
    expected = [[32, 32], [32 + focal / 2, 32], [32, 32 - focal / 2]]
    np.testing.assert_allclose(pixels[0], expected, atol=1e-4)
