"""Layouts and files: what xatlas and trimesh are trusted with, read back without them."""

import io

import jax.numpy as jnp
import mesh_shapes
import numpy as np
import painted
import pytest
import trimesh
from PIL import Image

from v3d_jax import errors
from v3d_jax.data import objects
from v3d_jax.mesh import export, extract, simplify, texels, topology, unwrap


@pytest.fixture(scope="module")
def item():
    return painted.painted(painted.solid(), painted.atlas())


def covering(atlas, side):
    """How many faces each texel's centre lies strictly inside of, face by face in float64."""
    count = np.zeros((side, side), int)
    corners = np.float64(atlas.uv[atlas.faces]) * [side, -side] + [0, side]
    low = np.clip(np.floor(corners.min(axis=1) - 0.5).astype(int), 0, side - 1)
    high = np.clip(np.ceil(corners.max(axis=1) + 0.5).astype(int), 1, side)
    for (a, b, c), (left, top), (right, bottom) in zip(corners, low, high, strict=True):
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        sides = [
            (q[0] - p[0]) * (y - p[1]) - (q[1] - p[1]) * (x - p[0])
            for p, q in ((a, b), (b, c), (c, a))
        ]
        sides = np.stack(sides) * np.sign((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0])
        count[top:bottom, left:right] += (sides > 1e-9).all(axis=0)
    return count


def check_layout(triangles, atlas, side):
    np.testing.assert_array_equal(atlas.source[atlas.faces], triangles.faces)
    assert atlas.uv.min() > 0
    assert atlas.uv.max() < 1
    count = covering(atlas, side)
    assert count.max() == 1
    # Utilisation: texels whose centre a face covers.
    assert np.mean(count == 1) >= 0.5 * (side >= 1024)
    assert np.mean(count == 1) == pytest.approx(unwrap.used(atlas), rel=0.05)
    return count


def test_layouts_do_not_overlap(item):
    count = check_layout(item.triangles, item.atlas, painted.SIDE)
    laid = texels.lay(item.atlas, painted.SIDE)
    assert (count.reshape(-1)[laid.index] == 1).mean() > 0.99
    assert len(laid.index) == pytest.approx(np.count_nonzero(count), rel=0.01)
    # Each texel lies where its coordinates say.
    uv = np.einsum("tk,tkc->tc", laid.weights, item.atlas.uv[item.atlas.faces[laid.face]])
    row, column = np.divmod(laid.index, painted.SIDE)
    expected = np.stack([column + 0.5, painted.SIDE - row - 0.5], axis=-1) / painted.SIDE
    np.testing.assert_allclose(uv, expected, atol=1e-3 / painted.SIDE)


@pytest.mark.slow
@pytest.mark.parametrize("name", mesh_shapes.SHAPES)
def test_layouts_at_full_size(name):
    """Section 2.7, test 5: UV in [0, 1], no overlapping texels, at least half of them used."""
    triangles = simplify.simplify(extract.extract(mesh_shapes.SHAPES[name], mesh_shapes.BOX))
    atlas = unwrap.unwrap(triangles, 1024)
    check_layout(triangles, atlas, 1024)
    colors = np.zeros((1024**2, 3), np.uint8)
    check_glb(export.Painted(triangles, atlas, colors))


def test_without_xatlas_a_texture_is_refused(monkeypatch):
    monkeypatch.setattr(unwrap.importlib.util, "find_spec", lambda _: None)
    assert not unwrap.available()
    with pytest.raises(errors.UserError, match="pip install xatlas, or ask for vertex colours"):
        unwrap.unwrap(painted.solid(), 64)


def test_diffusion_is_harmonic_and_keeps_what_is_known():
    solid = painted.solid()
    known = np.abs(solid.vertices[:, 2]) > 0.3
    colors = np.repeat(solid.vertices[:, 2:] > 0, 3, axis=1).astype(np.float32)
    found = texels.diffuse(solid, np.where(known[:, None], colors, 7.0), known)
    np.testing.assert_array_equal(found[known], colors[known])
    ends = topology.edges(solid)[0]
    total, degree = np.zeros_like(found), np.zeros(len(found))
    for a, b in (ends.T, ends.T[::-1]):
        np.add.at(total, a, found[b])
        np.add.at(degree, a, 1)
    off = np.abs(found - total / degree[:, None])[~known]
    assert off.max() < 1e-4
    assert found.min() >= 0
    assert found.max() <= 1
    nothing = np.zeros(len(known), bool)
    np.testing.assert_array_equal(texels.diffuse(solid, colors, nothing), colors)


def test_filling_reaches_every_texel_and_changes_none_that_is_known(item):
    side = painted.SIDE
    laid = texels.lay(item.atlas, side)
    truth = np.float32(item.colors / 255.0)
    height = texels.interpolated(laid, item.triangles, item.triangles.vertices)[:, 2]
    known = np.zeros(side**2, bool)
    known[laid.index[height > -0.25]] = True
    found = texels.fill(laid, item.triangles, side, np.where(known[:, None], truth, 9.0), known)
    np.testing.assert_array_equal(found[known], truth[known])
    assert found.max() <= 1.0
    lost = laid.index[height <= -0.25]
    # A few texels from what is known colours are still about right.
    near = laid.index[(height <= -0.25) & (height > -0.3)]
    assert np.abs(found - truth)[near].mean() < 0.12
    assert np.abs(found - truth)[lost].mean() < 0.3
    # Beyond a chart the nearest texel of it is repeated.
    inside = np.zeros(side**2, bool)
    inside[laid.index] = True
    grid, color = inside.reshape(side, side), found.reshape(side, side, 3)
    rows, columns = np.nonzero(grid[1:-1, 1:-1] & ~grid[1:-1, 2:] & grid[1:-1, :-2])
    np.testing.assert_array_equal(color[rows + 1, columns + 2], color[rows + 1, columns + 1])


def check_glb(item):
    tree, arrays, faces, picture = painted.unpack(export.glb(item))
    if item.atlas is None:
        source, expected = np.arange(len(item.triangles.vertices)), item.triangles.faces
    else:
        source, expected = item.atlas.source, item.atlas.faces
        flipped = item.atlas.uv * [1, -1] + [0, 1]
        np.testing.assert_allclose(arrays["TEXCOORD_0"], flipped, atol=1e-6)
    np.testing.assert_array_equal(faces, expected)
    vertices = export.to_file(np.float32(item.triangles.vertices))[source]
    np.testing.assert_array_equal(arrays["POSITION"], vertices)
    np.testing.assert_allclose(np.linalg.norm(arrays["NORMAL"], axis=1), 1.0, atol=1e-5)
    material = tree["materials"][0]
    assert material["extensions"] == {"KHR_materials_unlit": {}}
    assert "KHR_materials_unlit" in tree["extensionsUsed"]
    metal = material["pbrMetallicRoughness"]
    assert (metal["metallicFactor"], metal["roughnessFactor"]) == (0.0, 1.0)
    assert metal.get("baseColorFactor", [1.0] * 4) == [1.0] * 4
    return tree, arrays, picture


def test_glb_holds_the_surface_exactly(item, tmp_path):
    tree, _, picture = check_glb(item)
    np.testing.assert_array_equal(picture.reshape(-1, 3), item.colors)
    assert tree["samplers"][tree["textures"][0]["sampler"]]["wrapS"] == 33071
    export.save(tmp_path / "a.glb", item)
    assert [file.name for file in tmp_path.iterdir()] == ["a.glb"]
    again = trimesh.load(tmp_path / "a.glb", force="mesh", process=False)
    np.testing.assert_array_equal(again.faces, item.atlas.faces)
    np.testing.assert_allclose(again.visual.uv, item.atlas.uv, atol=1e-6)
    merged = topology.Triangles(item.triangles.vertices, item.atlas.source[again.faces])
    assert topology.is_watertight(merged)
    welded, index = np.unique(np.float32(again.vertices), axis=0, return_inverse=True)
    assert topology.is_watertight(topology.Triangles(welded, index.reshape(-1)[again.faces]))


def test_glb_vertex_colours_are_linear_floats(item):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (len(item.triangles.vertices), 3), np.uint8)
    _, arrays, picture = check_glb(export.Painted(item.triangles, None, colors))
    assert picture is None
    linear = arrays["COLOR_0"]
    srgb = np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    )
    np.testing.assert_array_equal(np.uint8(srgb * 255 + 0.5), colors)


def test_files_stand_upright_with_the_first_camera_in_front(item, tmp_path):
    """The package's reader turns y up back into z up, front along x."""
    for suffix in ("glb", "obj"):
        export.save(tmp_path / f"a.{suffix}", item)
        found = objects.load(tmp_path / f"a.{suffix}", texture_size=64)
        vertices = item.triangles.vertices[item.atlas.source]
        scale = np.ptp(found.vertices, axis=0).max() / np.ptp(vertices, axis=0).max()
        read = found.vertices[found.faces].reshape(-1, 3)
        order = (scale * vertices[item.atlas.faces]).reshape(-1, 3)
        shift = (read - order).mean(axis=0)
        np.testing.assert_allclose(read, order + shift, atol=1e-4)


def test_obj_brings_its_texture_and_no_darkening(item, tmp_path):
    export.save(tmp_path / "b.obj", item)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["b.mtl", "b.obj", "b.png"]
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "b.png")).reshape(-1, 3), item.colors
    )
    text = (tmp_path / "b.mtl").read_text()
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
    assert np.float64(lines["Kd"].split()).tolist() == [1.0, 1.0, 1.0]
    assert np.float64(lines["Ks"].split()).tolist() == [0.0, 0.0, 0.0]
    assert lines["map_Kd"] == "b.png"
    assert "mtllib b.mtl" in (tmp_path / "b.obj").read_text()


def test_ply_lies_in_the_world_with_vertex_colours(item):
    found = trimesh.load(io.BytesIO(export.ply(item)), file_type="ply", process=False)
    np.testing.assert_array_equal(found.faces, item.triangles.faces)
    np.testing.assert_array_equal(np.float32(found.vertices), item.triangles.vertices)
    expected = painted.pattern(item.triangles.vertices) * 255
    off = np.abs(found.visual.vertex_colors[:, :3] - expected).max(axis=1)
    assert np.median(off) < 12


def test_what_cannot_be_written_is_one_line(item, tmp_path):
    with pytest.raises(errors.UserError, match=r"meshes are written as \.glb, \.obj, \.ply"):
        export.save(tmp_path / "a.stl", item)
    with pytest.raises(errors.UserError, match="cannot write"):
        export.save(tmp_path / "missing" / "a.glb", item)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no square"):
        export.glb(item._replace(colors=item.colors[:-1]))
    assert jnp.asarray(export.to_linear(np.uint8([[0, 128, 255]]))).round(4).tolist() == [
        [0.0, pytest.approx(0.2159, abs=1e-4), 1.0]
    ]
