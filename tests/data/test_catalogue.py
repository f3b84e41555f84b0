"""A furniture catalogue zipped here: its table, its turned models, and what damage does to it."""

import zipfile

import numpy as np
import pytest

from v3d_jax.data import catalogue, objects, parts

TABLE = r"""
# a comment
! another
license=Free  as \
    can be
id#1=x#tri
name#1=Caf\u00e9 chair\: red
category#1=Kitchen
model#1=/x/tri/tri.obj
width#1=10
depth#1 20.5
height#1: 30
creator#1=Someone
doorOrWindow#1=false
name#2=Turned
category#2=Kitchen
model#2=/x/tri/tri.obj
width#2=10
depth#2=20
height#2=30
modelRotation#2=0 0 1 0 1 0 -1 0 0
license#2=Other
doorOrWindow#2=true
"""
OBJ = "mtllib tri.mtl\nv -1 -1 0\nv 1 -1 0\nv 0 1 0\nusemtl a\nf 1 2 3\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "shop.sh3f"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(catalogue.PROPERTIES, TABLE)
        archive.writestr("x/tri/tri.obj", OBJ)
        archive.writestr("x/tri/tri.mtl", "newmtl a\nKd 0.5 0.25 0.125\n")
    return path


def test_entries(path):
    first, second = catalogue.entries(path)
    assert first.name == "Café chair: red"
    assert first.size == (10.0, 20.5, 30.0)
    assert (first.creator, first.license) == ("Someone", "Free as can be")
    assert (second.creator, second.license) == ("", "Other")
    assert (first.door_or_window, second.door_or_window) == (False, True)
    assert first.identity == "shop/tri"
    assert first.model == "x/tri/tri.obj"


def test_models_are_turned_as_the_catalogue_says(path):
    first, second = (objects.load_entry(entry) for entry in catalogue.entries(path))
    np.testing.assert_allclose(first.base_color, [[0.5, 0.25, 0.125, 1.0]])
    np.testing.assert_allclose(first.normals, np.tile([1.0, 0.0, 0.0], (1, 3, 1)))
    # A row-major turn that takes the file's front z to x, which is the world's y.
    np.testing.assert_allclose(second.normals, np.tile([0.0, 1.0, 0.0], (1, 3, 1)), atol=1e-7)


def test_damage_is_reported_by_name(path, tmp_path):
    entry = catalogue.entries(path)[0]
    with pytest.raises(parts.UnreadableMesh, match=r"shop/gone: .*no item named"):
        objects.load_entry(entry.__class__(**{**vars(entry), "model": "x/gone.obj"}))
    broken = tmp_path / "broken.sh3f"
    broken.write_bytes(path.read_bytes()[:100])
    with pytest.raises(parts.UnreadableMesh, match="not a furniture catalogue"):
        catalogue.entries(broken)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr(catalogue.PROPERTIES, "model#1=/a.obj\n")
    with pytest.raises(parts.UnreadableMesh, match="name#1 is missing"):
        catalogue.entries(broken)
