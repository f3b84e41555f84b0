"""Rooms to train on: cameras that hit nothing, held-out objects apart, and a rendered data set."""

import numpy as np
import pytest

from v3d_jax import errors, render
from v3d_jax.data import finder, layouts, orbits, png, rooms
from v3d_jax.mesh import surface
from v3d_jax.ops import camera

NAMES = [f"room-{number:06d}" for number in range(60)]


def tetrahedron(color):
    corners = np.asarray([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3.0)
    faces = np.asarray([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    return surface.from_geometry(corners, faces, color=(*color, 1.0))


COLORS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.1, 0.9)}
OBJECTS = [
    finder.Entry(name, "heldout" if name == "blue" else "train", lambda c=color: tetrahedron(c))
    for name, color in COLORS.items()
]


def test_cameras_stay_clear_of_walls_and_things():
    kinds = set()
    for name in NAMES:
        room, seen = layouts.layout(name), layouts.cameras(name, 6, 32)
        places = np.asarray(camera.position(seen))
        assert (np.abs(places[:, :2]) < room.half - 0.25).all()
        assert (places[:, 2] > 0.25).all()
        assert (places[:, 2] < room.height - 0.25).all()
        for thing in (*room.group, *room.furniture):
            middle = np.asarray(thing.foot) + np.asarray([0.0, 0.0, thing.scale])
            assert np.linalg.norm(places - middle, axis=1).min() > thing.scale + 0.05
        steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
        assert steps.min() > 0.01
        forward = np.asarray(seen.world_to_camera)[:, 2, :3]
        straight = np.linalg.norm(np.diff(places, 2, axis=0)) < 1e-4
        along = abs(np.dot(forward[0], places[1] - places[0])) / steps[0]
        kinds.add(("forward" if along > 0.9 else "sideways") if straight else "curved")
        fov = 2.0 * np.rad2deg(np.arctan(16.0 / float(seen.intrinsics[0, 0, 0])))
        assert 50.0 <= fov <= 70.0
    assert kinds == {"forward", "sideways", "curved"}


def test_a_room_is_a_function_of_its_name():
    again = [layouts.cameras(NAMES[0], 4, 32).world_to_camera for _ in range(2)]
    np.testing.assert_array_equal(*again)
    other = layouts.cameras(NAMES[1], 4, 32).world_to_camera
    assert not np.array_equal(again[0], other)
    entry = rooms.entries(2, OBJECTS)[1]
    for one, two in zip(entry.load(), entry.load(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_things_stand_on_floor_or_table_within_closed_walls():
    tables, lend = 0, finder.lender(OBJECTS)
    for name in NAMES[:12]:
        room, mesh = layouts.layout(name), rooms.room(name, lend, vary=False)
        assert mesh.vertices.dtype == np.float32
        low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
        np.testing.assert_allclose(high[:2], room.half, rtol=1e-6)
        np.testing.assert_allclose([low[2], high[2]], [0.0, room.height], atol=1e-6)
        things = mesh.texture[mesh.material] < 0  # walls and table have textures
        assert things.sum() == 4 * len((*room.group, *room.furniture))
        group = mesh.vertices[mesh.faces[things]][: 4 * len(room.group)]
        np.testing.assert_allclose(group[..., 2].min(), room.table[1], atol=1e-6)
        tables += room.table[1] > 0.0
        edges = mesh.vertices[mesh.faces[~things]]
        longest = np.linalg.norm(edges - np.roll(edges, 1, axis=1), axis=-1).max()
        assert longest <= rooms.TILE * 2.0**0.5 + 1e-5
    assert 0 < tables < 12


def test_held_out_objects_furnish_held_out_rooms_alone():
    entries = rooms.entries(rooms.HELDOUT + 2, OBJECTS)
    assert [entry.split for entry in entries].count("heldout") == 2
    blue, others = 0, 0
    for entry in entries:
        mesh = entry.load()
        plain = mesh.base_color[(mesh.texture < 0)][:, :3]
        is_blue = np.allclose(plain, COLORS["blue"])
        assert is_blue == (entry.split == "heldout"), entry.name
        blue, others = blue + is_blue, others + (not is_blue)
    assert min(blue, others) >= 2
    alone = rooms.entries(3, OBJECTS[2:])
    assert {entry.split for entry in alone} == {"heldout"}


def box_obj():
    corners = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    quads = ((1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4))
    lines = ["v {} {} {}".format(*corner) for corner in corners]
    return "\n".join([*lines, *(f"f {a} {b} {c}\nf {a} {c} {d}" for a, b, c, d in quads)])


@pytest.mark.slow
def test_scenes_are_rendered_whole_with_their_cameras(tmp_path, capsys):
    for name in ("box", "kept"):
        (tmp_path / f"{name}.obj").write_text(box_obj())
    (tmp_path / "heldout.txt").write_text("kept\n")
    out = tmp_path / "out"
    render.main(
        [
            str(tmp_path), "--out", str(out), "--views", "3", "--size", "24", "--scenes", "2",
            "--heldout", str(tmp_path / "heldout.txt"), "--workers", "1",
        ]
    )  # fmt: skip
    assert "2 orbits (1 in heldout, 1 in train)" in capsys.readouterr().out
    for split, name in (("heldout", NAMES[0]), ("train", NAMES[1])):
        made = orbits.source(out, split)[0]
        wanted = layouts.cameras(name, 3, 24)
        assert made.name == name
        np.testing.assert_array_equal(made.world_to_camera, wanted.world_to_camera)
        np.testing.assert_array_equal(made.intrinsics, wanted.intrinsics)
        np.testing.assert_array_equal(made.azimuths, 0.0)
        frames = np.stack([png.decode(frame) for frame in made.frames])
        assert frames[..., 3].min() == 255  # walls all around
        assert frames[..., :3].std() > 8.0
        assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1.0


def test_copies_are_for_objects(tmp_path):
    with pytest.raises(errors.UserError, match="--variants is for objects"):
        render.main([str(tmp_path), "--out", "x", "--scenes", "2", "--variants", "2"])
