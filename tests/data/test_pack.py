"""A packed collection gives back what went in, within the bounds its format states."""

import zipfile
from concurrent import futures

import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.data import pack
from v3d_jax.mesh import surface


def random_mesh(seed: int, *, textures: int = 2, size: int = 64) -> surface.Mesh:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(40, 3))
    points /= np.linalg.norm(points, axis=-1).max()
    normals = rng.normal(size=(60, 3, 3))
    ramp = np.linspace(0, 255, size)
    atlas = np.zeros((textures, size, size, 4), np.uint8)
    for k in range(textures):
        atlas[k] = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 40.0 * (k + seed), 255.0), -1)
    return surface.Mesh(
        vertices=points.astype(np.float32),
        faces=rng.integers(0, 40, (60, 3)).astype(np.int32),
        normals=(normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32),
        uv=rng.uniform(-2, 3, (60, 3, 2)).astype(np.float32),
        material=rng.integers(0, textures + 1, 60).astype(np.int32),
        base_color=rng.uniform(size=(textures + 1, 4)).astype(np.float32),
        texture=np.arange(-1, textures).astype(np.int32),
        alpha_cutoff=rng.uniform(size=textures + 1).astype(np.float32),
        atlas=atlas,
    )


@pytest.fixture
def items():
    return [
        pack.Item("a/é", "train", random_mesh(0), {"creator": "me"}),
        pack.Item("b", "heldout", random_mesh(1, textures=0), {}),
        pack.Item("c", "train", random_mesh(0), {}),
    ]


def test_round_trip(items, tmp_path):
    path = tmp_path / "o.pack"
    pack.save(path, items, about={"faces": 5})
    assert [p.name for p in tmp_path.iterdir()] == ["o.pack"]
    collection = pack.Collection(path)
    assert collection.about == {"faces": 5}
    found = [collection.read(number) for number in range(3)]
    assert [(i.name, i.split, i.info) for i in found] == [(i.name, i.split, i.info) for i in items]
    for new, old in zip((i.mesh for i in found), (i.mesh for i in items), strict=True):
        moved = new.vertices[new.faces] - old.vertices[old.faces]
        assert np.abs(moved).max() <= pack.POSITION_STEP / 2 + 1e-6
        cosine = np.einsum("fci,fci->fc", new.normals, old.normals)
        assert cosine.min() > np.cos(np.deg2rad(1.0))
        np.testing.assert_array_equal(new.material, old.material)
        np.testing.assert_array_equal(new.texture, old.texture)
        np.testing.assert_allclose(new.base_color, old.base_color, atol=0.5 / 255 + 1e-6)
        np.testing.assert_allclose(new.alpha_cutoff, old.alpha_cutoff, atol=0.5 / 255 + 1e-6)
        assert new.atlas.shape == old.atlas.shape
        # WebP is lossy: a smooth ramp comes back within a few levels.
        assert np.abs(new.atlas.astype(int) - old.atlas).sum() <= 3.0 * new.atlas.size
        assert (new.atlas[..., 3] == old.atlas[..., 3]).all()
        textured = (old.texture >= 0)[old.material]
        shift = (new.uv - old.uv)[textured]
        whole = np.rint(shift[:, :1])
        np.testing.assert_allclose(shift, np.broadcast_to(whole, shift.shape), atol=1e-3)
        for a, b in zip(new, old, strict=True):
            assert a.dtype == b.dtype


def test_equal_textures_are_stored_once(items, tmp_path):
    pack.save(tmp_path / "o.pack", items)
    with zipfile.ZipFile(tmp_path / "o.pack") as archive:
        names = [name for name in archive.namelist() if name.startswith("textures/")]
    assert len(names) == 2


def test_threads_share_a_collection(items, tmp_path):
    path = tmp_path / "o.pack"
    pack.save(path, items)
    collection = pack.Collection(path)
    alone = [collection.read(number) for number in range(3)]
    with futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(collection.read, [0, 1, 2] * 8))
    for place, item in enumerate(together):
        assert item.name == items[place % 3].name
        for a, b in zip(item.mesh, alone[place % 3].mesh, strict=True):
            np.testing.assert_array_equal(a, b)


def test_octahedral_normals():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5000, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    axes = np.concatenate([np.eye(3), -np.eye(3)])
    np.testing.assert_allclose(pack.from_octahedral(pack.octahedral(axes)), axes, atol=1e-12)
    found = pack.from_octahedral(pack.octahedral(vectors))
    assert np.einsum("ni,ni->n", found, vectors).min() > np.cos(np.deg2rad(1.0))


def test_far_texture_coordinates_lose_whole_repeats_only():
    mesh = random_mesh(3)
    far = mesh._replace(uv=mesh.uv + np.float32([1000.0, -2000.0]))
    blob, counts = pack.encode(far)
    again = pack.decode(blob, counts, far.atlas)
    shift = (again.uv - far.uv)[(far.texture >= 0)[far.material]]
    np.testing.assert_allclose(
        shift, np.broadcast_to(np.rint(shift[:, :1]), shift.shape), atol=2e-3
    )


@pytest.mark.parametrize("name", ["a/é", "d"])
def test_save_refuses_and_leaves_nothing_under_the_name(items, tmp_path, name):
    wrong = pack.Item(name, "train" if name == "a/é" else "test", random_mesh(5), {})
    with pytest.raises(ValueError, match=name):
        pack.save(tmp_path / "o.pack", [*items, wrong])
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_one_line(items, tmp_path):
    path = tmp_path / "o.pack"
    for content in (b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(errors.UserError, match="not a packed object collection"):
            pack.Collection(path)
    pack.save(path, items)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("objects/0").header_offset
    data[start + 60 : start + 90] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match="is damaged"):
        pack.Collection(path).read(0)
