"""Procedural objects: their surfaces, their independence of each other, and the command."""

import numpy as np
import pytest

from v3d_jax.data import finder, solids
from v3d_jax.mesh import surface

NUMBERS = range(12)


def volume(vertices, faces) -> float:
    """Signed volume inside a closed surface whose faces look outwards."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    return float(np.sum(np.cross(a, b) * c) / 6.0)


def edges(vertices, faces):
    """How often every directed edge occurs, with vertices told apart by their place."""
    _, place = np.unique(np.round(vertices, 9), axis=0, return_inverse=True)
    corner = place.reshape(-1)[faces]
    corner = corner[[len(set(face)) == 3 for face in corner.tolist()]]
    pairs = np.concatenate([corner[:, [0, 1]], corner[:, [1, 2]], corner[:, [2, 0]]])
    found, count = np.unique(pairs, axis=0, return_counts=True)
    return {tuple(pair): n for pair, n in zip(found.tolist(), count.tolist(), strict=True)}


def assert_closed(vertices, faces):
    directed = edges(vertices, faces)
    assert set(directed.values()) == {1}
    assert all((b, a) in directed for a, b in directed)


def test_turned_solids_are_closed_and_have_the_volume_of_their_profile():
    vertices, faces, uv = solids.lathe(np.asarray([1.0, 1.0]), np.asarray([-1.0, 1.0]), sides=6)
    assert_closed(vertices, faces)
    assert uv.shape == (*faces.shape, 2)
    assert volume(vertices, faces) == pytest.approx(2 * 6 * np.sin(np.pi / 3) / 2)
    t = np.pi * np.linspace(0, 1, 65)
    ball = solids.lathe(np.sin(t), -np.cos(t), sides=96)
    assert_closed(*ball[:2])
    assert volume(*ball[:2]) == pytest.approx(4 / 3 * np.pi, rel=5e-3)
    ring = solids.lathe(0.75 + 0.25 * np.cos(2 * t), np.sin(2 * t), sides=96, closed=True)
    assert volume(*ring[:2]) == pytest.approx(2 * np.pi * 0.75 * np.pi * 0.25, rel=5e-3)
    box = solids._box()
    assert_closed(*box[:2])
    assert volume(*box[:2]) == pytest.approx(8.0)


def test_every_number_is_another_object_and_always_the_same():
    entries = solids.entries(len(NUMBERS), [])
    assert [entry.name for entry in entries[:2]] == ["solid-000000", "solid-000001"]
    assert {entry.split for entry in entries} == {"train"}
    meshes = [entry.load() for entry in entries]
    again = solids.entries(3, [])[2].load()
    for field, other in zip(meshes[2], again, strict=True):
        np.testing.assert_array_equal(field, other)
    assert len({mesh.vertices.tobytes() for mesh in meshes}) == len(meshes)
    for mesh in meshes:
        assert np.linalg.norm(mesh.vertices, axis=-1).max() == pytest.approx(1.0, abs=1e-5)
        assert not surface.has_alpha(mesh)
        assert len(mesh.atlas) == 0
        assert (np.ptp(mesh.vertices, axis=0) > 0.02).all()


def test_training_meshes_lend_textures_and_held_out_ones_do_not():
    plain = surface.from_geometry(np.eye(3), np.asarray([[0, 1, 2]]))
    lent = plain._replace(atlas=np.full((1, 64, 64, 4), 255, np.uint8), texture=np.zeros(1, int))

    def textured(split):
        entries = solids.entries(len(NUMBERS), [finder.Entry("mesh", split, lambda: lent)])
        return sum(len(entry.load().atlas) > 0 for entry in entries)

    assert textured("train") > len(NUMBERS) // 2
    assert textured("heldout") == 0
