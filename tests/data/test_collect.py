"""Both packages' folder layouts, built here in small: what is taken, left out, and reported."""

import struct
import zipfile

import numpy as np
import pytest

from v3d_jax.data import catalogue, collect, pack, selection

CONFIG = collect.CollectConfig(faces=100, processes=0)
SOLID = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nusemtl a\nf 1 3 2\nf 1 2 4\nf 2 3 4\nf 1 4 3\n"


def add_catalogue(root):
    folder = root / collect.SWEETHOME3D
    folder.mkdir(parents=True)
    table, models = ["license=CC0"], {}
    for number, (name, color, category) in enumerate(
        [
            ("mug", "0.9 0.1 0.1", "Kitchen"),
            ("cup", "0.5 0.5 0.5", "Kitchen"),
            ("gate", "0.9 0.1 0.1", "Doors and windows"),
            ("torn", None, "Kitchen"),
        ]
    ):
        table += [f"{key}#{number}=1" for key in ("width", "depth", "height")]
        table += [f"name#{number}={name}", f"category#{number}={category}"]
        table += [f"model#{number}=/{name}/{name}.obj", f"creator#{number}=Ann"]
        models[f"{name}/{name}.obj"] = "mtllib m.mtl\n" + SOLID
        if color:
            models[f"{name}/m.mtl"] = f"newmtl a\nKd {color}\n"
    with zipfile.ZipFile(folder / "shop.sh3f", "w") as archive:
        archive.writestr(catalogue.PROPERTIES, "\n".join(table))
        for name, text in models.items():
            archive.writestr(name, text)


def add_model(root, name: str, color=(0.9, 0.1, 0.1), turn: int = 0):
    """A G3D tetrahedron; `turn` renumbers its corners, which makes it another model."""
    path = root / collect.MEGAGLEST / f"{name}.g3d"
    path.parent.mkdir(parents=True, exist_ok=True)
    points = np.asarray([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], "<f4")
    faces = np.roll(np.asarray([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]], "<u4"), turn, axis=0)
    data = b"G3D\4" + struct.pack("<HB", 1, 0) + bytes(64) + struct.pack("<3I", 1, 4, 12)
    data += struct.pack("<8f2I", *color, 0, 0, 0, 0, 1, 0, 0)
    path.write_bytes(data + points.tobytes() + points.tobytes() + faces.tobytes())
    return path


def test_sweethome3d(tmp_path, capsys):
    add_catalogue(tmp_path)
    found, dropped = collect.sweethome3d(tmp_path, CONFIG, selection.SelectionConfig())
    assert [(c.name, c.title, c.creator, c.license) for c in found] == [
        ("sweethome3d/shop/mug", "mug", "Ann", "CC0")
    ]
    assert dropped == {"door or window": 1, "grey": 1, "unreadable": 1}
    assert capsys.readouterr().out == "skipped shop/torn: m.mtl is missing or damaged\n"


def test_doors_and_windows_alone(tmp_path):
    add_catalogue(tmp_path)
    found, dropped = collect.sweethome3d(
        tmp_path, CONFIG, selection.SelectionConfig(), openings=True
    )
    assert [c.name for c in found] == ["sweethome3d/shop/gate"]
    assert dropped == {"no door or window": 3}


def test_megaglest_through_to_a_pack(tmp_path):
    add_model(tmp_path, "data/menu")
    add_model(tmp_path, "techs/ox_walking")
    standing = add_model(tmp_path, "techs/ox_standing")
    (standing.parent / "link.g3d").symlink_to(standing)
    add_model(tmp_path, "techs/hut", turn=1)
    add_model(tmp_path, "techs/grey", color=(0.5, 0.5, 0.5))
    add_model(tmp_path, "tilesets/bodypart1", turn=2)
    found, dropped = collect.megaglest(tmp_path, CONFIG, selection.SelectionConfig())
    assert [c.name for c in found] == ["megaglest/techs/hut", "megaglest/techs/ox_standing"]
    assert dropped == {"menu": 1, "gore": 1, "grey": 1, "same model": 1}
    collect.write(tmp_path / "o.pack", found[:1], found[1:], CONFIG)
    collection = pack.Collection(tmp_path / "o.pack")
    hut, ox = (collection.read(number) for number in range(2))
    assert (hut.split, ox.split) == ("train", "heldout")
    assert hut.info["license"] == collect.MEGAGLEST_LICENSE
    assert ox.mesh.base_color[0] == pytest.approx([0.9, 0.1, 0.1, 1.0], abs=0.002)


def test_ready_shrinks_what_is_too_large(tmp_path):
    add_model(tmp_path, "techs/hut")
    (item,), _ = collect.megaglest(tmp_path, CONFIG, selection.SelectionConfig())
    atlas = np.full((2, 128, 128, 4), 255, np.uint8)
    config = collect.CollectConfig(faces=100, few_textures=1, small_texture_size=64)
    done = collect.ready(item._replace(mesh=item.mesh._replace(atlas=atlas)), "train", config)
    assert done.mesh.atlas.shape == (2, 64, 64, 4)
    assert done.info["simplified"] == "none"
    assert done.info["faces_before"] == 4
