"""Extraction against surfaces known in closed form and against dense evaluation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import mesh_shapes
import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.mesh import extract, topology

SMALL = extract.ExtractConfig(resolution=96, coarse=32, batch=64)
BOX = mesh_shapes.BOX


def on_box(point):
    """How far points are from the border of the box."""
    return np.abs(np.abs(np.asarray(point)).max(axis=1) - 1.0)


@pytest.mark.parametrize("name", mesh_shapes.SHAPES)
def test_surfaces_are_closed_and_lie_where_the_field_is_zero(name):
    field = mesh_shapes.SHAPES[name]
    found = extract.extract(field, BOX, SMALL)
    assert topology.is_watertight(found)
    assert topology.euler_number(found) == mesh_shapes.EULER[name]
    assert topology.components(found).max() == 0
    off = np.abs(np.asarray(field(jnp.asarray(found.vertices))))
    cell = 2.0 / 96
    assert off.max() < (0.4 if name == "pierced" else 0.1) * cell
    volume = topology.volumes(found, topology.components(found))[0]
    assert volume == pytest.approx(mesh_shapes.VOLUME.get(name, volume), rel=5e-3)
    assert volume > 0
    assert np.linalg.norm(topology.cross(found), axis=1).min() > 0


@pytest.mark.parametrize("name", ["bumpy", "pierced"])
def test_blocks_near_the_surface_give_what_all_blocks_give(name, monkeypatch):
    field = mesh_shapes.SHAPES[name]
    calls = []
    evaluate = extract._evaluate
    monkeypatch.setattr(extract, "_evaluate", lambda *a: calls.append(1) or evaluate(*a))
    found = extract.extract(field, BOX, SMALL)
    sparse = len(calls) * SMALL.batch
    monkeypatch.setattr(extract, "_near", lambda *_: (np.ones((12,) * 3, bool),) * 2)
    dense = extract.extract(field, BOX, SMALL)
    np.testing.assert_array_equal(found.vertices, dense.vertices)
    np.testing.assert_array_equal(found.faces, dense.faces)
    assert sparse < 0.6 * 12**3


def test_a_surface_that_the_coarse_grid_half_misses_is_followed():
    """A thin rod leaves a ball; its field is too steep for any coarse sample to feel it."""

    def rod(points):
        ball = jnp.linalg.norm(points, axis=-1) - 0.3
        thin = jnp.maximum(jnp.hypot(points[:, 0], points[:, 1] - 0.003) - 0.03, points[:, 2] - 0.8)
        return jnp.minimum(ball, jnp.where(thin < 0, thin, 40.0 * thin) + 40.0 * (points[:, 2] < 0))

    found = extract.extract(rod, BOX, replace(SMALL, coarse=16))
    assert topology.is_watertight(found)
    assert found.vertices[:, 2].max() == pytest.approx(0.8, abs=0.02)


def test_what_leaves_the_box_is_closed_on_its_border():
    def beam(points):
        return jnp.hypot(points[:, 1], points[:, 2] - 0.1) - 0.3

    found = extract.extract(beam, BOX, SMALL)
    assert topology.is_watertight(found)
    assert topology.euler_number(found) == 2
    assert np.abs(found.vertices[:, 0]).max() == pytest.approx(1.0, abs=1e-5)
    caps = np.abs(found.vertices[:, 0]) > 0.999
    assert np.hypot(found.vertices[caps, 1], found.vertices[caps, 2] - 0.1).max() < 0.305


def test_floaters_and_cavities_go_and_second_pieces_stay():
    def scene(points):
        def ball(centre, radius):
            return jnp.linalg.norm(points - jnp.asarray([centre]), axis=-1) - radius

        hollow = jnp.maximum(ball([-0.4, 0, 0], 0.4), -ball([-0.4, 0, 0], 0.2))
        return jnp.minimum(jnp.minimum(hollow, ball([0.5, 0, 0], 0.3)), ball([0.3, 0.7, 0.7], 0.1))

    found = extract.extract(scene, BOX, SMALL)
    volumes = topology.volumes(found, topology.components(found))
    expected = [4 / 3 * np.pi * radius**3 for radius in (0.3, 0.4)]
    np.testing.assert_allclose(np.sort(volumes), expected, rtol=0.02)
    one = extract.extract(scene, BOX, replace(SMALL, share=1.0))
    assert topology.components(one).max() == 0


def test_world_units_and_boxes_off_the_origin():
    box = extract.Box(np.float32([3.0, -1.0, 10.0]), 0.5)
    centre = jnp.asarray([[3.2, -0.7, 10.3]])
    found = extract.extract(lambda p: jnp.linalg.norm(p - centre, axis=-1) - 0.1, box, SMALL)
    radius = np.linalg.norm(found.vertices - np.asarray(centre), axis=1)
    np.testing.assert_allclose(radius, 0.1, atol=1e-4)


def test_one_program_for_all_fields_of_a_shape():
    def ball(radius, points):
        return jnp.linalg.norm(points, axis=-1) - radius

    before = extract._evaluate._cache_size()
    for radius in (0.3, 0.5):
        field = jax.tree_util.Partial(ball, jnp.asarray(radius))
        found = extract.extract(field, BOX, SMALL)
        radii = np.linalg.norm(found.vertices, axis=1)
        np.testing.assert_allclose(radii, radius, atol=1e-3)
    assert extract._evaluate._cache_size() == before + 1


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (lambda p: jnp.ones(len(p)), "no surface: all of its box is outside"),
        (lambda p: -jnp.ones(len(p)), "no surface: all of its box is inside"),
        (lambda p: jnp.full(len(p), jnp.nan), "not finite"),
        (lambda p: jnp.sin(1e4 * p.sum(axis=1)), "noise"),
    ],
    ids=["outside", "inside", "nan", "noise"],
)
def test_fields_without_a_surface(field, message):
    with pytest.raises(errors.UserError, match=message) as caught:
        extract.extract(field, BOX, replace(SMALL, most_faces=200_000))
    assert "\n" not in str(caught.value)


def test_sizes_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiples of 8"):
        extract.extract(mesh_shapes.sphere, BOX, replace(SMALL, resolution=100))
