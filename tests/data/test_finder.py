import zipfile

import numpy as np
import pytest

from v3d_jax import errors
from v3d_jax.data import finder, objects, pack
from v3d_jax.mesh import surface

TETRAHEDRON = """v 0 0 0
v 1 0 0
v 0 1 0
v 0 0 1
f 1 3 2
f 1 2 4
f 1 4 3
f 2 3 4
"""

PROPERTIES = """
id#1=a
name#1=Tetra
category#1=Solids
model#1=/models/tetra.obj
width#1=10
depth#1=10
height#1=10
id#2=b
name#2=Gone
category#2=Solids
model#2=/models/gone.obj
width#2=10
depth#2=10
height#2=10
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.obj", "b/a.OBJ", "b/c.obj"):
        (tmp_path / name).write_text(TETRAHEDRON)
    (tmp_path / "notes.txt").write_text("not a mesh")
    with zipfile.ZipFile(tmp_path / "shop.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", PROPERTIES)
        archive.writestr("models/tetra.obj", TETRAHEDRON)
    return tmp_path


def names(entries):
    return [entry.name for entry in entries]


def test_folders_are_searched_in_order(folder):
    found = finder.find([folder])
    assert names(found) == ["b/a", "b/c", "shop/tetra", "shop/gone", "z"]
    assert {entry.split for entry in found} == {"train"}
    for entry in found:
        if entry.name != "shop/gone":
            assert len(entry.load().faces) == 4


def test_an_unreadable_object_is_found_out_when_it_is_read(folder):
    (folder / "z.obj").write_text("no mesh at all")
    (folder / "torn.sh3f").write_bytes(b"PK")
    bad = [e for e in finder.find([folder]) if e.name in ("z", "shop/gone")]
    bad += [e for e in finder.find([folder]) if e.name.endswith("torn.sh3f")]
    assert len(bad) == 3
    for entry in bad:
        with pytest.raises(objects.UnreadableMesh):
            entry.load()


def test_equal_names_stay_apart_and_a_file_reached_twice_counts_once(folder, tmp_path):
    twin = tmp_path / "b" / "z.obj"
    twin.write_text(TETRAHEDRON)
    found = finder.find([folder / "z.obj", folder / "b", folder, folder / "z.obj"])
    assert names(found) == ["z", "a", "c", f"{twin}: z", "shop/tetra", "shop/gone"]


def test_held_out_names_decide_the_split(folder):
    found = finder.find([folder], ["z", "shop/tetra", "absent"])
    assert [e.name for e in found if e.split == "heldout"] == ["shop/tetra", "z"]


def test_collections_know_names_and_splits(tmp_path):
    vertices = np.asarray([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32) * 0.5
    mesh = surface.from_geometry(vertices, np.asarray([[0, 2, 1], [0, 1, 3]]))
    items = [pack.Item("one", "train", mesh, {}), pack.Item("two", "heldout", mesh, {})]
    pack.save(tmp_path / "objects.bin", items)
    found = finder.find([tmp_path / "objects.bin"])
    assert [(e.name, e.split) for e in found] == [("one", "train"), ("two", "heldout")]
    assert len(found[1].load().faces) == 2


def test_what_holds_no_meshes_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for path, message in (
        ("absent", "does not exist"),
        ("empty", "holds no meshes"),
        ("notes.txt", "is none of: .glb"),
    ):
        with pytest.raises(errors.UserError, match=message):
            finder.find([tmp_path / path])
    with pytest.raises(errors.UserError, match="no meshes were named"):
        finder.find([])
