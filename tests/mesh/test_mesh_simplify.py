"""Topology's counts on known solids, and the promises of simplification."""

import mesh_shapes
import numpy as np
import pytest
import trimesh
from scipy import ndimage
from skimage import measure

from v3d_jax.errors import UserError
from v3d_jax.mesh import extract, simplify, topology, unwrap
from v3d_jax.mesh.topology import Triangles


def solid(mesh):
    return Triangles(np.float32(mesh.vertices), np.int32(mesh.faces))


def test_topology_of_known_solids():
    ball, ring = (
        solid(trimesh.creation.icosphere(3)),
        solid(trimesh.creation.torus(1.0, 0.3)),
    )
    assert [topology.euler_number(x) for x in (ball, ring)] == [2, 0]
    assert topology.is_watertight(ball)
    assert topology.is_watertight(ring)
    np.testing.assert_allclose(topology.vertex_normals(ball), ball.vertices, atol=0.02)
    holed = topology.kept(ball, np.arange(len(ball.faces)) > 3)
    turned = ball._replace(faces=np.concatenate([ball.faces[:1, ::-1], ball.faces[1:]]))
    doubled = ball._replace(faces=np.concatenate([ball.faces[:1], ball.faces]))
    assert not any(topology.is_watertight(x) for x in (holed, turned, doubled))
    assert not topology.is_watertight(topology.kept(ball, np.zeros(len(ball.faces), bool)))


def test_sheets_that_share_an_edge_are_parted():
    """Four cubes of a 2 x 2 x 2 chessboard: each pair has an edge in common, faces have two."""
    places = np.float32([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    cube = solid(trimesh.creation.box(extents=[1, 1, 1]))
    corners = np.concatenate([cube.vertices + 0.5 + place for place in places])
    faces = np.concatenate([cube.faces + 8 * i for i in range(4)])
    shared, index = np.unique(corners, axis=0, return_inverse=True)
    board = Triangles(shared, np.int32(index.reshape(-1)[faces]))
    assert sorted(topology.edges(board)[1])[-6:] == [4] * 6
    parted = topology.unpinched(board)
    assert topology.is_watertight(parted)
    assert set(topology.edges(parted)[1]) == {2}
    assert len(parted.vertices) == len(shared) + 6
    one = np.zeros(len(parted.faces), int)
    np.testing.assert_allclose(topology.volumes(parted, one), 4.0, rtol=1e-6)
    # Parted by solids: no triangle joins two cubes.
    centre = parted.vertices[parted.faces].mean(axis=1)
    cell = {tuple(np.floor(c).astype(int)) for c in centre - 1e-3 * topology.cross(parted)}
    assert cell == {tuple(place.astype(int)) for place in places}
    whole = topology.unpinched(cube)
    np.testing.assert_array_equal(whole.faces, cube.faces)


def test_faces_back_to_back_are_dropped():
    """Their edges would be crowded again however often they are cut."""
    ball = solid(trimesh.creation.icosphere(2))
    a, b, c = ball.faces[7]
    fold = np.int32([[a, b, 0], [0, b, a], [c, 0, a], [a, 0, c], [a, 0, c]])
    folded = ball._replace(faces=np.concatenate([fold[:3], ball.faces, fold[3:]]))
    found = topology.unpinched(folded)
    wanted = np.concatenate([ball.faces, fold[4:]])
    np.testing.assert_array_equal(topology.unfolded(folded).faces, wanted)
    np.testing.assert_array_equal(found.faces, wanted)
    assert topology.unfolded(ball) is ball


def test_the_share_of_sharp_edges():
    """Of a cube's 18 edges 12 are its own, the others lie in its faces."""
    cube = solid(trimesh.creation.box(extents=[1, 2, 3]))
    assert topology.sharp(cube, 89.0) == pytest.approx(12 / 18)
    assert topology.sharp(cube, 91.0) == 0.0
    assert topology.sharp(solid(trimesh.creation.icosphere(3)), 20.0) == 0.0


def test_flaws_are_found():
    ball = solid(trimesh.creation.icosphere(3))
    assert simplify.flaws(ball, ball).count == 0
    turned = ball._replace(faces=np.concatenate([ball.faces[:7, ::-1], ball.faces[7:]]))
    assert simplify.flaws(turned, ball).flipped.nonzero()[0].tolist() == list(range(7))
    a, b, _ = ball.faces[5]
    needle = np.concatenate([ball.vertices, ball.vertices[[a, b]].mean(0, keepdims=True)])
    flat = Triangles(needle, np.concatenate([ball.faces, [[a, b, len(ball.vertices)]]]))
    assert simplify.flaws(flat, ball).flat.nonzero()[0].tolist() == [len(ball.faces)]


def check(name, resolution, faces, limit, count):
    field = mesh_shapes.SHAPES[name]
    whole = extract.extract(field, mesh_shapes.BOX, extract.ExtractConfig(resolution=resolution))
    small = simplify.simplify(whole, faces)
    assert 0.9 * faces < len(small.faces) <= 1.1 * faces < len(whole.faces)
    assert topology.is_watertight(small)
    assert topology.euler_number(small) == mesh_shapes.EULER[name]
    assert simplify.flaws(small, whole).count == 0
    assert mesh_shapes.hausdorff(small, whole, count, limit) <= limit


@pytest.mark.parametrize("name", ["torus", "pierced"])
def test_simplified_surfaces_stay_close_closed_and_sound(name):
    check(name, 96, 4_000, 0.4 * 2 / 96, 5_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", mesh_shapes.SHAPES)
def test_simplified_surfaces_at_full_size(name):
    """Section 2.7, test 5: Hausdorff distance at most 0.002, no degenerate or flipped faces."""
    check(name, 384, simplify.FACES, 2e-3, 30_000)


def test_units_do_not_matter():
    """fast-simplification alone leaves a large ball as it is, and is rough with a small one."""
    ball = solid(trimesh.creation.icosphere(5))
    for unit in (1e-3, 1.0, 1e3):
        found = simplify.simplify(ball._replace(vertices=np.float32(unit) * ball.vertices), 4_000)
        assert len(found.faces) == 4_000
        radius = np.linalg.norm(found.vertices, axis=1) / unit
        np.testing.assert_allclose(radius, 1.0, atol=2e-3)


def test_few_faces_are_left_alone():
    ball = solid(trimesh.creation.icosphere(2))
    assert simplify.simplify(ball, len(ball.faces)) is ball


def test_a_broken_result_is_not_used(monkeypatch):
    ball = solid(trimesh.creation.icosphere(4))
    sound, tried = simplify._collapsed, []

    def collapsed(triangles, faces, boldness):
        tried.append(boldness)
        found = sound(triangles, faces, boldness)
        return found if len(tried) == 3 else topology.kept(found, np.arange(len(found.faces)) > 0)

    monkeypatch.setattr(simplify, "_BOLDNESS", (3.0, 4.0, 3.5, 5.0))
    monkeypatch.setattr(simplify, "_collapsed", collapsed)
    found = simplify.simplify(ball, 3_000)
    assert len(tried) == 3
    assert topology.is_watertight(found)
    monkeypatch.setattr(
        simplify, "_collapsed", lambda *_: topology.kept(ball, ball.faces[:, 0] > 9)
    )
    assert simplify.simplify(ball, 3_000) is ball


def test_a_surface_as_rough_as_its_samples_is_made_small_and_cut_into_large_charts(monkeypatch):
    """No setting keeps all of its handles, and small charts of it take xatlas minutes."""
    steps = np.linspace(-1.0, 1.0, 80)
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(steps, steps, steps, indexing="ij")))
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=radius.shape), 1.5)
    points, corners, _, _ = measure.marching_cubes(np.float32(radius - 0.7 + 0.6 * noise), 0.0)
    rough = topology.largest(Triangles(np.float32(points), np.int32(corners)), 0.01)
    assert len(rough.faces) > 40_000
    assert topology.euler_number(rough) < -10
    found = simplify.simplify(rough, 8_000)
    assert 7_200 < len(found.faces) <= 16_000
    assert topology.is_watertight(found)
    tried = []
    monkeypatch.setattr(unwrap, "_packed", lambda *given: tried.append(given[-1]))
    for surface in (found, solid(trimesh.creation.icosphere(4))):
        with pytest.raises(UserError, match="do not fit on one texture"):
            unwrap.unwrap(surface, 256)
    assert tried == [2.0, 4.0, 0.5, 1.0, 2.0]
