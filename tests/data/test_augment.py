"""Augmentations keep what they must: normals square to the surface, winding, counts, seeds."""

import numpy as np
import pytest

from v3d_jax.data import augment, parts
from v3d_jax.mesh import surface


def sphere(rows: int = 24, columns: int = 32) -> surface.Mesh:
    """A textured sphere whose normals are its points."""
    polar, azimuth = np.meshgrid(
        np.linspace(1e-3, np.pi - 1e-3, rows), np.linspace(0, 2 * np.pi, columns), indexing="ij"
    )
    points = np.stack(
        [np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], -1
    ).reshape(-1, 3)
    k = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = (x.reshape(-1) for x in (k[:-1, :-1], k[1:, :-1], k[1:, 1:], k[:-1, 1:]))
    faces = np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)])
    rng = np.random.default_rng(0)
    mesh = surface.from_geometry(points, faces, normals=points[faces])
    uv = np.stack([azimuth / (2 * np.pi), 1 - polar / np.pi], -1).reshape(-1, 2)
    atlas = rng.integers(0, 256, (1, 64, 64, 4), dtype=np.uint8)
    atlas[..., 3] = 255
    return mesh._replace(
        uv=uv[faces].astype(np.float32),
        texture=np.zeros(1, np.int32),
        base_color=np.ones((1, 4), np.float32),
        atlas=atlas,
    )


def plain(color=(0.8, 0.2, 0.2, 1.0)) -> surface.Mesh:
    mesh = sphere(8, 8)
    return surface.from_geometry(mesh.vertices, mesh.faces, color=color, normals=mesh.normals)


def check(mesh: surface.Mesh):
    """Unit normals on the outer side of every face, inside the unit sphere, indices in range."""
    triangles = mesh.vertices[mesh.faces].astype(np.float64)
    face = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    area = np.linalg.norm(face, axis=-1)
    cosine = np.einsum("fci,fi->fc", mesh.normals, face)[area > 1e-4] / area[area > 1e-4, None]
    assert cosine.min() > 0.5
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=-1), 1.0, atol=1e-5)
    assert np.linalg.norm(mesh.vertices, axis=-1).max() < 1.0 + 1e-6
    assert mesh.faces.max() < len(mesh.vertices)
    assert mesh.material.max() < len(mesh.base_color)
    assert mesh.texture.max() < len(mesh.atlas)
    for array, kind in zip(mesh, sphere(3, 4), strict=True):
        assert array.dtype == kind.dtype


def test_tint_colours_what_is_grey_and_nothing_else():
    mesh = plain(color=(0.5, 0.5, 0.5, 1.0))
    mesh = mesh._replace(
        base_color=np.float32([[0.5, 0.5, 0.5, 1.0], [0.8, 0.2, 0.2, 1.0], [0.6, 0.6, 0.6, 1.0]]),
        texture=np.int32([-1, -1, 0]),
        alpha_cutoff=np.zeros(3, np.float32),
        atlas=sphere().atlas,
    )
    found = [augment.tint(mesh, np.random.default_rng(seed)) for seed in range(8)]
    for one in found:
        check(one)
        np.testing.assert_array_equal(one.base_color[1:], mesh.base_color[1:])
        assert one.base_color[0, :3].max() == pytest.approx(0.5)
        assert np.ptp(one.base_color[0, :3]) > 0
    hues = {tuple(np.argsort(one.base_color[0, :3])) for one in found}
    assert len(hues) > 2


def test_colour_matrix():
    np.testing.assert_allclose(augment.color_matrix(0.0, 1.0, 1.0), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(
        augment.color_matrix(120.0, 1.0, 1.0) @ [0.9, 0.2, 0.1], [0.1, 0.9, 0.2], atol=1e-12
    )
    np.testing.assert_allclose(augment.color_matrix(33.0, 2.0, 1.5) @ np.ones(3), 1.5)
    np.testing.assert_allclose(augment.color_matrix(77.0, 0.0, 1.0) @ [0.3, 0.6, 0.0], 0.3)


def test_recolor_leaves_geometry_alpha_and_textured_base():
    mesh = sphere()
    mesh.atlas[..., 3] = np.random.default_rng(1).integers(0, 256, mesh.atlas.shape[:3])
    changed = augment.recolor(mesh, np.random.default_rng(0))
    assert (changed.atlas[..., :3] != mesh.atlas[..., :3]).mean() > 0.5
    np.testing.assert_array_equal(changed.atlas[..., 3], mesh.atlas[..., 3])
    np.testing.assert_array_equal(changed.base_color, mesh.base_color)
    assert changed.vertices is mesh.vertices
    flat = augment.recolor(plain(), np.random.default_rng(0))
    assert np.abs(flat.base_color[0, :3] - [0.8, 0.2, 0.2]).max() > 0.05
    assert flat.base_color[0, 3] == 1.0


def test_mirror_twice_is_the_mesh():
    mesh = sphere()
    once = augment.mirror(mesh)
    check(once)
    np.testing.assert_array_equal(once.vertices[:, 1], -mesh.vertices[:, 1])
    for a, b in zip(augment.mirror(once), mesh, strict=True):
        np.testing.assert_array_equal(a, b)


def test_stretched_sphere_has_the_ellipsoids_normals():
    factors = np.asarray([1.3, 0.8, 1.0])
    mesh = sphere()
    done = augment.stretch(mesh, factors)
    check(done)
    expected = parts.unit(mesh.vertices[mesh.faces] / factors)
    np.testing.assert_allclose(done.normals, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [lambda m: augment.twist(m, 70.0), lambda m: augment.bend(m, 0.4, 30.0)],
    ids=["twist", "bend"],
)
def test_warped_normals_are_those_of_the_warped_surface(change):
    # Stretched first, because a twisted sphere is the same sphere.
    mesh = augment.stretch(sphere(96, 128), np.asarray([1.0, 0.5, 1.0]))
    done = change(mesh)
    check(done)
    assert np.abs(done.normals - mesh.normals).max() > 0.1
    smooth = parts.creased_normals(done.vertices, done.faces, 180.0)
    middle = np.abs(mesh.vertices[mesh.faces][..., 2]).max(axis=1) < 0.9
    cosine = np.einsum("fci,fci->fc", smooth, done.normals)[middle]
    assert cosine.min() > np.cos(np.deg2rad(3.5))


def test_swap_takes_the_donors_texture_and_keeps_holes():
    mesh, donor = sphere(), sphere()
    donor.atlas[..., :3] = 77
    done = augment.swap_textures(mesh, donor, np.random.default_rng(0))
    assert (done.atlas[..., :3] == 77).all()
    holes = mesh._replace(atlas=np.array(mesh.atlas))
    holes.atlas[0, :8, :8, 3] = 0
    kept = augment.swap_textures(holes, donor, np.random.default_rng(0))
    np.testing.assert_array_equal(kept.atlas, holes.atlas)
    assert augment.swap_textures(plain(), donor, np.random.default_rng(0)).texture[0] == -1


def test_paint_textures_a_plain_material():
    donor = sphere()
    done = augment.paint(plain(), donor, np.random.default_rng(0))
    check(done)
    np.testing.assert_array_equal(done.atlas, donor.atlas)
    np.testing.assert_array_equal(done.base_color, np.ones((1, 4)))
    # Of a face seen most along x, the texture lies in y and z.
    corners = done.vertices[done.faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    along_x = np.abs(normal).argmax(axis=-1) == 0
    flat, uv = corners[along_x][..., 1:], done.uv[along_x]
    scale = np.ptp(uv) / np.ptp(flat)
    assert 0.5 <= scale <= 2.0
    np.testing.assert_allclose(uv, scale * flat, atol=1e-5)
    glass = plain((0.5, 0.5, 0.5, 0.3))
    assert augment.paint(glass, donor, np.random.default_rng(0)).texture[0] == -1


def test_join_stands_things_beside_each_other():
    meshes = [sphere(), plain(), sphere()]
    done = augment.join(meshes, np.random.default_rng(0))
    check(done)
    assert len(done.faces) == sum(len(m.faces) for m in meshes)
    assert done.texture.tolist() == [0, -1, 1]
    groups = [done.vertices[done.faces[done.material == k]].reshape(-1, 3) for k in range(3)]
    lowest = [points[:, 2].min() for points in groups]
    np.testing.assert_allclose(lowest, lowest[0], atol=1e-3)
    middles = [points.mean(axis=0) for points in groups]
    radii = [np.ptp(points[:, 2]) / 2 for points in groups]
    for k in range(2):
        assert np.linalg.norm(middles[k] - middles[k + 1]) > 0.99 * (radii[k] + radii[k + 1])


def test_augment_is_a_function_of_its_generator_and_leaves_its_input():
    donors = [sphere(10, 12), plain()]

    def lend(rng: np.random.Generator) -> surface.Mesh:
        return donors[int(rng.integers(2))]

    mesh = sphere(12, 16)
    before = [np.array(x) for x in mesh]
    for seed in range(20):
        first, again = (augment.augment(mesh, np.random.default_rng(seed), lend) for _ in range(2))
        check(first)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
    check(augment.augment(mesh, np.random.default_rng(5)))
    for a, b in zip(mesh, before, strict=True):
        np.testing.assert_array_equal(a, b)
