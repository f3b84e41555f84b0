"""Fewer faces, the same shape and texture: spheres, grids and loose leaves."""

import importlib.util

import numpy as np
import pytest

from v3d_jax.data import collapse, simplify
from v3d_jax.mesh import surface


def grid(side: int, *, lift: float = 0.0) -> surface.Mesh:
    """A square of 2 (side - 1)^2 faces whose texture coordinates are linear in position."""
    x, y = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    points = np.stack([x, y, lift * (x**2 + y**2)], axis=-1).reshape(-1, 3)
    k = np.arange(side * side).reshape(side, side)
    a, b, c, d = (v.reshape(-1) for v in (k[:-1, :-1], k[1:, :-1], k[1:, 1:], k[:-1, 1:]))
    faces = np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)])
    mesh = surface.from_geometry(points, faces)
    return mesh._replace(uv=uv_of(mesh.vertices)[mesh.faces])


def uv_of(points: np.ndarray) -> np.ndarray:
    return (points[..., :2] @ [[0.3, 0.1], [-0.2, 0.5]] + [0.5, 0.25]).astype(np.float32)


def leaves(count: int) -> surface.Mesh:
    """Separate small squares of two faces all over the unit ball."""
    rng = np.random.default_rng(0)
    corner = 0.02 * np.asarray([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    points = rng.uniform(-0.5, 0.5, (count, 1, 3)) + corner
    faces = 4 * np.arange(count)[:, None, None] + [[0, 1, 2], [0, 2, 3]]
    return surface.from_geometry(points.reshape(-1, 3), faces.reshape(-1, 3))


def area(mesh: surface.Mesh) -> float:
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return 0.5 * np.linalg.norm(cross, axis=-1).sum()


def test_small_meshes_stay():
    mesh = grid(5)
    assert simplify.simplify(mesh, 32) == (mesh, "none")


@pytest.mark.parametrize("quadric", [True, False])
def test_texture_stays_where_it_was(quadric, monkeypatch):
    if quadric:
        pytest.importorskip("fast_simplification")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    mesh, steps = simplify.simplify(grid(41, lift=0.3), 800)
    assert steps == ("quadric" if quadric else "cluster")
    assert 300 < len(mesh.faces) <= 820
    assert np.linalg.norm(mesh.vertices, axis=-1).max() == pytest.approx(1.0, abs=1e-6)
    # Undo the scale: texture coordinates are an affine function of x and y still.
    corners = mesh.vertices[mesh.faces].reshape(-1, 3).astype(np.float64)
    columns = np.concatenate([corners[:, :2], np.ones((len(corners), 1))], axis=1)
    fit, *_ = np.linalg.lstsq(columns, mesh.uv.reshape(-1, 2), rcond=None)
    error = columns @ fit - mesh.uv.reshape(-1, 2)
    # Corners that do not take their texture along are off by 0.01 in the median, 0.04 at worst.
    assert np.median(np.abs(error)) < 1e-4
    assert np.abs(error).max() < 0.01
    assert np.ptp(mesh.uv) == pytest.approx(np.ptp(uv_of(grid(2).vertices)), rel=0.1)


def test_continued_is_exact_on_a_plane():
    rng = np.random.default_rng(0)
    old = rng.normal(size=(50, 3, 3)) * [1.0, 1.0, 0.0]
    new = old + 0.05 * rng.normal(size=old.shape) * [1.0, 1.0, 0.0]
    edges = old[:, 1:, :2] - old[:, :1, :2]
    fat = np.abs(np.linalg.det(edges)) > 0.5
    found = collapse.continued(old[fat], uv_of(old[fat]), new[fat])
    assert fat.sum() > 10
    np.testing.assert_allclose(found, uv_of(new[fat]), atol=1e-5)


def test_a_face_without_extent_keeps_its_texture():
    old = np.zeros((1, 3, 3))
    values = np.arange(6.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(collapse.continued(old, values, old + 1.0), values)


def test_leaves_are_thinned_and_enlarged():
    mesh = leaves(500)
    loose, piece = simplify.loose_pieces(mesh)
    assert loose.all()
    assert len(np.unique(piece)) == 500
    few = simplify.prune(mesh, piece, 200)
    assert len(few.faces) == 200
    assert area(few) == pytest.approx(area(mesh), rel=1e-4)
    done, steps = simplify.simplify(mesh, 200)
    assert steps == "prune"
    assert 100 <= len(done.faces) <= 200


def test_a_trunk_and_leaves_lose_the_same_share():
    trunk, crown = grid(31, lift=0.2), leaves(900)
    both = collapse.join(trunk, crown)
    loose, _ = simplify.loose_pieces(both)
    np.testing.assert_array_equal(loose, np.arange(len(both.faces)) >= len(trunk.faces))
    done, steps = simplify.simplify(both, 900)
    assert steps.startswith("prune ")
    assert 700 <= len(done.faces) <= 930


def test_cluster_groups_stay_apart():
    mesh = grid(9)
    twice = collapse.join(mesh, mesh)
    group = np.repeat([0, 1], len(mesh.vertices))
    _, together = collapse.cluster_collapse(twice.vertices, twice.faces, twice.material, 64)
    _, apart = collapse.cluster_collapse(twice.vertices, twice.faces, twice.material, 64, group)
    assert np.intersect1d(together[group == 0], together[group == 1]).size > 0
    assert np.intersect1d(apart[group == 0], apart[group == 1]).size == 0


def striped(side: int) -> surface.Mesh:
    """The square in two halves of different materials, and a jump of the texture in the second."""
    mesh = grid(side)
    middle = mesh.vertices[mesh.faces].mean(axis=1)
    uv = mesh.uv + np.where(middle[:, 1] > 0.4, 0.7, 0.0)[:, None, None].astype(np.float32)
    return mesh._replace(
        material=(middle[:, 0] > 0.1).astype(np.int32),
        uv=np.where((middle[:, 0] > 0.1)[:, None, None], uv, mesh.uv).astype(np.float32),
        base_color=np.ones((2, 4), np.float32),
        texture=np.zeros(2, np.int32),
        alpha_cutoff=np.zeros(2, np.float32),
        atlas=np.zeros((1, 64, 64, 4), np.uint8),
    )


def test_seams_are_where_looks_change_and_where_the_surface_ends():
    mesh = striped(21)
    edges = collapse.seam_edges(mesh, mesh.faces)
    ends = mesh.vertices[edges]
    along = np.abs(ends[:, 0] - ends[:, 1]) < 1e-6

    def count(axis: int, place: float, rest: float = -2.0) -> int:
        there = along[:, axis] & (np.abs(ends[:, 0, axis] - place) < 1e-6)
        return int(np.count_nonzero(there & (ends[:, :, 1 - axis].mean(axis=1) > rest)))

    assert len(edges) == 4 * 20 + 20 + 9
    assert count(0, 0.1) == 20
    assert count(1, 0.4, rest=0.1) == 9
    untextured = mesh._replace(texture=np.full(2, -1, np.int32))
    assert len(collapse.seam_edges(untextured, mesh.faces)) == 4 * 20 + 20


def test_flat_surfaces_keep_their_materials_seams_and_outline():
    pytest.importorskip("fast_simplification")
    mesh = striped(41)
    done, steps = simplify.simplify(mesh, 400)
    assert steps == "quadric"
    assert len(done.faces) <= 408
    assert area(done) == pytest.approx(area(mesh) / 2, rel=1e-3)  # scaled into the unit sphere
    assert collapse.area_change(
        mesh, done._replace(vertices=done.vertices * np.float32(2**0.5))
    ) == pytest.approx(0.0, abs=1e-3)
    flat = done.vertices[..., :2] * np.sqrt(2)
    jump = (done.uv - uv_of(flat)[done.faces]).reshape(-1, 6)
    middle = flat[done.faces].mean(axis=1)
    second = (middle[:, 0] > 0.1) & (middle[:, 1] > 0.4)
    np.testing.assert_allclose(jump, np.where(second, 0.7, 0.0)[:, None] * np.ones(6), atol=2e-3)


def test_components():
    links = np.asarray([[5, 3], [3, 1], [0, 2], [4, 4]])
    assert collapse.components(7, links).tolist() == [0, 1, 0, 1, 4, 1, 6]
    chain = np.stack([np.arange(999), np.arange(1, 1000)], axis=-1)
    rng = np.random.default_rng(0)
    assert (collapse.components(1000, rng.permutation(chain)) == 0).all()


def test_area_change():
    mesh = striped(5)
    assert collapse.area_change(mesh, mesh) == 0.0
    assert collapse.area_change(mesh, collapse.subset(mesh, mesh.material == 0)) == np.inf
    half = np.arange(len(mesh.faces)) % 2 == 0
    assert collapse.area_change(mesh, collapse.subset(mesh, half)) == pytest.approx(0.5, abs=0.01)


def test_shrink_textures():
    mesh = grid(3)._replace(atlas=np.full((2, 256, 256, 4), 90, np.uint8))
    assert simplify.shrink_textures(mesh, 128).atlas.shape == (2, 128, 128, 4)
    assert simplify.shrink_textures(mesh, 256) is mesh
    empty = mesh._replace(atlas=np.zeros((0, 256, 256, 4), np.uint8))
    assert simplify.shrink_textures(empty, 64).atlas.shape == (0, 64, 64, 4)
