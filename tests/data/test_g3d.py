"""G3D files packed here by the format's description, byte by byte, and read back."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from v3d_jax.data import g3d, objects

POSITION = np.asarray([[-1, -1, 0], [1, -1, 0], [0, 1, 0]], np.float32)
NORMAL = np.tile(np.float32([0.0, 0.0, 1.0]), (3, 1))
UV = np.asarray([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75]], np.float32)
# Top row red and green, bottom row blue and yellow; the blue texel is transparent.
TEXELS = np.asarray(
    [[[255, 0, 0, 255], [0, 255, 0, 255]], [[0, 0, 255, 0], [255, 255, 0, 255]]], np.uint8
)
TEAM_COLOR, TWO_SIDED = 1, 2


def mesh_bytes(*, texture="t.png", flags=TWO_SIDED, opacity=1.0, frames=2, indices=(0, 1, 2)):
    data = b"plane".ljust(64, b"\0")
    data += struct.pack("<3I", frames, 3, len(indices))
    data += struct.pack("<3f", 0.2, 0.4, 0.6) + struct.pack("<3f", 1, 1, 1)
    data += struct.pack("<2f", 5.0, opacity) + struct.pack("<2I", flags, 1 if texture else 0)
    data += texture.encode().ljust(64, b"\0") if texture else b""
    data += POSITION.tobytes() + (POSITION + 7).tobytes() * (frames - 1)
    data += NORMAL.tobytes() + (-NORMAL).tobytes() * (frames - 1)
    data += UV.tobytes() if texture else b""
    return data + np.asarray(indices, "<u4").tobytes()


def write(folder, *meshes, version=4):
    folder.mkdir(parents=True, exist_ok=True)
    header = b"G3D" + bytes([version]) + struct.pack("<HB", len(meshes), 0)
    (folder / "m.g3d").write_bytes(header + b"".join(meshes))
    buffer = io.BytesIO()
    Image.fromarray(TEXELS).save(buffer, "PNG")
    (folder / "t.png").write_bytes(buffer.getvalue())
    return folder / "m.g3d"


def test_first_frame_with_alpha_as_holes(tmp_path):
    (part,) = g3d.read(write(tmp_path, mesh_bytes(opacity=0.5)))
    np.testing.assert_array_equal(part.vertices, POSITION)
    np.testing.assert_array_equal(part.normals, NORMAL[None])
    np.testing.assert_array_equal(part.uv, UV[None])
    np.testing.assert_array_equal(part.texture, TEXELS)
    np.testing.assert_allclose(part.color, [1.0, 1.0, 1.0, 0.5])
    assert part.cutoff == 0.5


def test_world_orientation_and_untextured_colour(tmp_path):
    mesh = objects.load(write(tmp_path, mesh_bytes(texture="")))
    np.testing.assert_allclose(mesh.base_color, [[0.2, 0.4, 0.6, 1.0]])
    # The file's front z is the world's x, its right x is y, its up y is z.
    np.testing.assert_allclose(mesh.vertices[:, 0], 0.0)
    np.testing.assert_allclose(mesh.normals, np.tile([1.0, 0.0, 0.0], (1, 3, 1)))
    np.testing.assert_allclose(mesh.vertices[:, 1:], POSITION[:, :2] / np.sqrt(2), rtol=1e-6)


def test_alpha_of_a_unit_marks_its_team_colour(tmp_path):
    path = write(tmp_path / "factions", mesh_bytes(flags=TEAM_COLOR))
    (part,) = g3d.read(path, team_color=(0.0, 1.0, 0.2))
    assert (part.texture[..., 3] == 255).all()
    np.testing.assert_array_equal(part.texture[1, 0, :3], [0, 255, 51])
    np.testing.assert_array_equal(part.texture[0], TEXELS[0])
    assert part.cutoff == 0.0


def test_scenery_has_no_team(tmp_path):
    (part,) = g3d.read(write(tmp_path / "tilesets" / "x", mesh_bytes(flags=TEAM_COLOR)))
    np.testing.assert_array_equal(part.texture, TEXELS)
    assert part.cutoff == 0.5


def test_tint_mixes_by_alpha():
    texture = np.full((1, 1, 4), 100, np.uint8)
    mixed = g3d.tint(texture, (1.0, 0.0, 0.5))
    alpha = 100 / 255
    expected = alpha * 100 + (1 - alpha) * 255 * np.asarray([1.0, 0.0, 0.5])
    np.testing.assert_allclose(mixed[0, 0, :3], expected, atol=0.5)


def test_several_meshes(tmp_path):
    mesh = objects.load(write(tmp_path, mesh_bytes(), mesh_bytes(texture="", frames=1)))
    assert mesh.material.tolist() == [0, 1]
    assert mesh.texture.tolist() == [0, -1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], "ends too early"),
        (lambda data: data[:60], "ends too early"),
        (lambda data: b"G4D" + data[3:], "not a G3D file"),
        (lambda data: data[:3] + b"\3" + data[4:], "version 3"),
        (lambda data: data[:-4] + struct.pack("<I", 3), "past the last vertex"),
    ],
)
def test_damaged_files(tmp_path, change, reason):
    path = write(tmp_path, mesh_bytes())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(objects.UnreadableMesh, match=reason):
        objects.load(path)


def test_missing_texture_and_odd_indices(tmp_path):
    with pytest.raises(objects.UnreadableMesh, match=r"gone\.png is missing"):
        objects.load(write(tmp_path, mesh_bytes(texture="gone.png")))
    with pytest.raises(objects.UnreadableMesh, match="no triangles"):
        objects.load(write(tmp_path, mesh_bytes(indices=(0, 1))))
