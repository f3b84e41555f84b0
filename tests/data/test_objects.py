"""Meshes written here are read back: positions, colours, textures, orientation, to the digit."""

import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from v3d_jax.data import objects, parts

# File axes: y up, front z. A tetrahedron whose bounding box is centred on the origin already.
POINTS = np.asarray([[-1, -1, -1], [1, -1, -1], [0, 1, -1], [0, -1, 1]], np.float32)
FACES = np.asarray([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]], np.int32)
UV = np.asarray([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]], np.float32)
# Rows from the top: so (0.25, 0.25), lower left, is blue.
TEXELS = np.asarray([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
BY_UV = np.asarray([[0, 0, 255], [255, 255, 0], [255, 0, 0], [0, 255, 0]], np.uint8)


def world(points: np.ndarray) -> np.ndarray:
    """By hand: front z becomes x, right x becomes y, up y becomes z; farthest at 1."""
    turned = np.stack([points[:, 2], points[:, 0], points[:, 1]], axis=-1)
    return turned / np.linalg.norm(turned, axis=-1).max()


def corners(mesh) -> np.ndarray:
    """Triangles with each one's corners sorted, so that numbering does not matter."""
    triangles = mesh.vertices[mesh.faces]
    return np.sort(triangles.round(5).view([("", np.float32)] * 3)[..., 0], axis=1)


def texel(mesh, face: int, corner: int) -> np.ndarray:
    """What the mesh's texture shows at a corner; v = 1 is the top row."""
    size = mesh.atlas.shape[-2]
    u, v = mesh.uv[face, corner]
    row = mesh.texture[mesh.material[face]]
    return mesh.atlas[row, int((1 - v) * size), int(u * size)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_obj(folder, mtl: str, *, uv: bool = True, normals: bool = False):
    lines = ["mtllib m.mtl"]
    lines += [f"v {x} {y} {z}" for x, y, z in POINTS]
    lines += [f"vt {u} {v}" for u, v in UV]
    lines += ["vn 0 1 0"] if normals else []
    lines += ["usemtl stuff"]
    for face in FACES + 1:
        names = [f"{k}/{k if uv else ''}{'/1' if normals else ''}".rstrip("/") for k in face]
        lines.append("f " + " ".join(names))
    (folder / "m.mtl").write_text("newmtl stuff\n" + mtl)
    (folder / "m.obj").write_text("\n".join(lines) + "\n")
    (folder / "t.png").write_bytes(png(TEXELS))
    return folder / "m.obj"


def write_glb(path, material: dict, *, node: dict | None = None, colors=None, normals=None):
    """A GLB of the tetrahedron by hand, as the glTF 2.0 specification lays it out."""
    arrays = {"POSITION": POINTS, "TEXCOORD_0": np.stack([UV[:, 0], 1 - UV[:, 1]], -1)}
    if colors is not None:
        arrays["COLOR_0"] = colors
    if normals is not None:
        arrays["NORMAL"] = normals
    views, accessors, blob = [], [], b""

    def add(data: bytes) -> int:
        nonlocal blob
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(data)})
        blob += data + b"\0" * (-len(data) % 4)
        return len(views) - 1

    attributes = {}
    for name, array in arrays.items():
        kind = {2: "VEC2", 3: "VEC3", 4: "VEC4"}[array.shape[1]]
        accessor = {"bufferView": add(array.astype("<f4").tobytes()), "componentType": 5126}
        accessor |= {"count": len(array), "type": kind}
        if name == "POSITION":
            accessor |= {"min": array.min(0).tolist(), "max": array.max(0).tolist()}
        attributes[name] = len(accessors)
        accessors.append(accessor)
    indices = {"bufferView": add(FACES.astype("<u4").tobytes()), "componentType": 5125}
    accessors.append({**indices, "count": FACES.size, "type": "SCALAR"})
    primitive = {"attributes": attributes, "indices": len(accessors) - 1, "material": 0}
    document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, **(node or {})}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [material],
        "textures": [{"source": 0}],
        "images": [{"bufferView": add(png(TEXELS)), "mimeType": "image/png"}],
        "accessors": accessors,
    }
    document |= {"bufferViews": views, "buffers": [{"byteLength": len(blob)}]}
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text
    body += struct.pack("<I4s", len(blob), b"BIN\0") + blob
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body)
    return path


def check_shape(mesh):
    points = world(POINTS)
    assert len(mesh.faces) == 4
    expected = points[FACES].astype(np.float32).round(5).view([("", np.float32)] * 3)[..., 0]
    found = {tuple(map(tuple, t.tolist())) for t in corners(mesh)}
    wanted = {tuple(map(tuple, t.tolist())) for t in np.sort(expected, axis=1)}
    for a, b in zip(sorted(found), sorted(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    # Counter-clockwise seen from outside stays so.
    triangles = mesh.vertices[mesh.faces]
    outward = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    assert (np.einsum("fi,fi->f", outward, triangles.mean(1) - points.mean(0)) > 0).all()


def check_texture(mesh):
    points = world(POINTS)
    for face in range(4):
        for corner in range(3):
            place = mesh.vertices[mesh.faces[face, corner]]
            number = np.linalg.norm(points - place, axis=-1).argmin()
            np.testing.assert_array_equal(texel(mesh, face, corner), [*BY_UV[number], 255])


def test_obj_with_texture_shows_it_in_place_of_kd(tmp_path):
    mesh = objects.load(write_obj(tmp_path, "Kd 0.1 0.2 0.3\nd 0.5\nmap_Kd t.png\n"))
    check_shape(mesh)
    check_texture(mesh)
    np.testing.assert_allclose(mesh.base_color, [[1, 1, 1, 0.5]])
    # No normals in the file and edges far sharper than the crease angle: flat faces.
    triangles = mesh.vertices[mesh.faces]
    flat = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
    np.testing.assert_allclose(mesh.normals, np.repeat(flat[:, None], 3, 1), atol=1e-5)


def test_obj_without_texture_has_kd_and_normals_are_turned(tmp_path):
    mesh = objects.load(write_obj(tmp_path, "Kd 0.1 0.2 0.3\n", uv=False, normals=True))
    check_shape(mesh)
    np.testing.assert_allclose(mesh.base_color, [[0.1, 0.2, 0.3, 1.0]], atol=1e-6)
    assert mesh.texture.tolist() == [-1]
    np.testing.assert_allclose(mesh.normals, np.broadcast_to([0.0, 0.0, 1.0], (4, 3, 3)))


def test_glb_factor_is_linear_light_and_texture_is_placed(tmp_path):
    pbr = {"baseColorFactor": [1.0, 0.2, 0.0, 0.4], "baseColorTexture": {"index": 0}}
    mesh = objects.load(write_glb(tmp_path / "a.glb", {"pbrMetallicRoughness": pbr}))
    check_shape(mesh)
    check_texture(mesh)
    # sRGB of linear 0.2 is 0.4845; OPAQUE (the default) ignores alpha. 8-bit factors in trimesh.
    np.testing.assert_allclose(mesh.base_color, [[1.0, 0.4845, 0.0, 1.0]], atol=3e-3)


def test_glb_alpha_modes(tmp_path):
    pbr = {"baseColorFactor": [1.0, 1.0, 1.0, 0.4]}
    blend = objects.load(
        write_glb(tmp_path / "b.glb", {"pbrMetallicRoughness": pbr, "alphaMode": "BLEND"})
    )
    assert abs(blend.base_color[0, 3] - 0.4) < 2e-3
    assert blend.alpha_cutoff[0] == 0.0
    mask = {"pbrMetallicRoughness": pbr, "alphaMode": "MASK", "alphaCutoff": 0.25}
    mask = objects.load(write_glb(tmp_path / "m.glb", mask))
    assert mask.alpha_cutoff[0] == 0.25


def test_glb_node_transform_moves_points_and_normals(tmp_path):
    # A quarter turn about y (up): file front z turns to x; a mirror on top turns faces over.
    half = np.sqrt(0.5)
    node = {"rotation": [0.0, half, 0.0, half], "translation": [5.0, 0.0, 0.0], "scale": [2.0] * 3}
    normals = np.tile(np.float32([0.0, 0.0, 1.0]), (4, 1))
    mesh = objects.load(write_glb(tmp_path / "a.glb", {}, node=node, normals=normals))
    turned = np.stack([POINTS[:, 2], POINTS[:, 1], -POINTS[:, 0]], axis=-1)
    np.testing.assert_allclose(
        np.sort(mesh.vertices, axis=0), np.sort(world(turned), axis=0), atol=1e-5
    )
    # File normal z turns to file x, which is the world's y.
    np.testing.assert_allclose(mesh.normals, np.tile([0.0, 1.0, 0.0], (4, 3, 1)), atol=1e-6)
    node = {"scale": [-1.0, 1.0, 1.0]}
    mesh = objects.load(write_glb(tmp_path / "b.glb", {}, node=node))
    triangles = mesh.vertices[mesh.faces]
    outward = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    middle = mesh.vertices.mean(0)
    assert (np.einsum("fi,fi->f", outward, triangles.mean(1) - middle) > 0).all()
    assert (np.einsum("fci,fi->fc", mesh.normals, outward) > 0).all()


def test_glb_vertex_colours_become_texels_of_faces(tmp_path):
    colors = np.asarray([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]], np.float32)
    mesh = objects.load(write_glb(tmp_path / "a.glb", {}, colors=colors))
    mean = colors[FACES].mean(1)[:, :3]
    srgb = np.where(mean <= 0.0031308, 12.92 * mean, 1.055 * mean ** (1 / 2.4) - 0.055)
    points = world(POINTS)
    for face in range(4):
        places = mesh.vertices[mesh.faces[face]].mean(0)
        number = np.linalg.norm(points[FACES].mean(1) - places, axis=-1).argmin()
        np.testing.assert_allclose(texel(mesh, face, 0)[:3], 255 * srgb[number], atol=1.0)


@pytest.mark.parametrize("per", ["vertex", "face"])
def test_ply_colours(tmp_path, per):
    colors = np.asarray([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    rgb = "property uchar red\nproperty uchar green\nproperty uchar blue\n"
    lines = ["ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y"]
    lines += ["property float z\n" + (rgb if per == "vertex" else "") + "element face 4"]
    lines += ["property list uchar int vertex_indices\n" + (rgb if per == "face" else "")]
    text = "\n".join(lines) + "end_header\n"
    for point, color in zip(POINTS, colors, strict=True):
        text += " ".join(map(str, [*point, *(color if per == "vertex" else [])])) + "\n"
    for face, color in zip(FACES, colors, strict=True):
        text += " ".join(map(str, [3, *face, *(color if per == "face" else [])])) + "\n"
    path = tmp_path / "a.ply"
    path.write_text(text)
    mesh = objects.load(path)
    check_shape(mesh)
    expected = colors if per == "face" else colors[FACES].mean(1)
    found = np.stack([texel(mesh, face, 1)[:3] for face in range(4)])
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_result_is_centred_and_just_inside_the_unit_sphere(tmp_path):
    path = write_obj(tmp_path, "Kd 1 1 1\n")
    text = path.read_text().replace("v 1.0 -1.0 -1.0", "v 11.0 -1.0 -1.0")
    path.write_text(text)
    mesh = objects.load(path)
    np.testing.assert_allclose(mesh.vertices.min(0) + mesh.vertices.max(0), 0.0, atol=1e-6)
    assert abs(np.linalg.norm(mesh.vertices, axis=-1).max() - 1.0) < 1e-6


def cylinder(sides: int) -> tuple[np.ndarray, np.ndarray]:
    angle = 2 * np.pi * np.arange(sides) / sides
    ring = np.stack([np.cos(angle), np.zeros(sides), np.sin(angle)], axis=-1)
    points = np.concatenate([ring, ring + np.eye(3)[1], np.eye(3)[1:2]])
    here, after = np.arange(sides), np.roll(np.arange(sides), -1)
    wall = [[here, here + sides, after], [after, here + sides, after + sides]]
    top = [here + sides, np.full(sides, 2 * sides), after + sides]
    return points, np.concatenate([np.stack(x, axis=-1) for x in (*wall, top)])


def test_normals_by_crease_angle_are_smooth_round_and_sharp_at_the_rim():
    sides = 24
    points, faces = cylinder(sides)
    normals = parts.creased_normals(points, faces)
    wall, top = faces[: 2 * sides], normals[2 * sides :]
    radial = points[wall] * [1.0, 0.0, 1.0]
    # Two triangles of one side and one of the next pull by less than half a side's angle.
    cosine = np.einsum("fci,fci->fc", normals[: 2 * sides], radial)
    assert cosine.min() > np.cos(np.pi / sides)
    assert np.abs(normals[: 2 * sides, :, 1]).max() < 1e-6
    np.testing.assert_allclose(top, np.broadcast_to([0.0, 1.0, 0.0], top.shape), atol=1e-6)


def sheet(second: dict) -> parts.Part:
    part = parts.Part(
        vertices=np.asarray([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float),
        faces=np.asarray([[0, 1, 2], [0, 2, 3]]),
        normals=None,
        uv=None,
        color=np.asarray([1.0, 0.0, 0.0, 1.0]),
        texture=None,
        cutoff=0.0,
    )
    return part._replace(**second)


def test_of_equal_faces_back_to_back_one_stays():
    back = sheet({"faces": np.asarray([[2, 1, 0], [3, 2, 0]])})
    mesh = parts.assemble("a", [sheet({}), back, sheet({})])
    assert len(mesh.faces) == 2
    assert len(mesh.vertices) == 4
    # The first ones stay: they look along the file's z, which is the world's x.
    np.testing.assert_allclose(mesh.normals, np.tile([1.0, 0.0, 0.0], (2, 3, 1)), atol=1e-7)


def test_different_faces_back_to_back_are_moved_apart():
    blue = {"color": np.asarray([0.0, 0.0, 1.0, 1.0]), "faces": np.asarray([[2, 1, 0], [3, 2, 0]])}
    mesh = parts.assemble("a", [sheet({}), sheet(blue)])
    assert len(mesh.faces) == 4
    assert len(mesh.vertices) == 8
    red, other = (mesh.vertices[mesh.faces[mesh.material == k]][..., 0] for k in (0, 1))
    np.testing.assert_allclose(red - parts.SHEET, 0.0, atol=1e-6)
    np.testing.assert_allclose(other + parts.SHEET, 0.0, atol=1e-6)
    # Facing the same way, as a decal does, they stay where they are.
    decal = parts.assemble("a", [sheet({}), sheet({"color": blue["color"]})])
    assert len(decal.faces) == 4
    np.testing.assert_allclose(decal.vertices[:, 0], 0.0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.stl", b"solid", "not one of"),
        ("a.glb", b"glTF\2\0\0\0", ""),
        ("a.obj", b"v 0 0 0\n", "no triangles"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "no triangles"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nv nan 1 0\nf 1 2 3\n", "finite"),
        ("a.obj", b"mtllib no.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "no.mtl is missing"),
        ("a.ply", b"not a ply", ""),
        ("gone.obj", None, "missing"),
    ],
)
def test_what_cannot_be_read_whole_is_named_in_one_line(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(objects.UnreadableMesh) as caught:
        objects.load(path)
    assert name in caught.value.name
    assert reason in caught.value.reason
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_texture_is_an_error(tmp_path):
    path = write_obj(tmp_path, "map_Kd t.png\n")
    (tmp_path / "t.png").write_bytes(png(TEXELS)[:45])
    with pytest.raises(objects.UnreadableMesh, match=r"t\.png is missing or damaged"):
        objects.load(path)
    (tmp_path / "t.png").unlink()
    with pytest.raises(objects.UnreadableMesh, match=r"t\.png is missing or damaged"):
        objects.load(path)


def test_import_loads_neither_trimesh_nor_pillow():
    code = "import sys, v3d_jax.data.objects; print({'trimesh', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
