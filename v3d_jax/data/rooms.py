"""Scenes to train on: rooms with textured walls, a group of objects on the floor or on a table.

A scene is a pure function of its name and of the objects that furnish it, which are all of its own
split: held-out objects are in held-out scenes and in no others. It is rendered as an object is, by
`data.turntable`, from the cameras of `data.layouts`.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from v3d_jax.data import augment, finder, layouts
from v3d_jax.data.layouts import Layout, Place
from v3d_jax.mesh import surface

# Of so many scenes one is held out.
HELDOUT = 16
# Walls in tiles: faces that reach behind the camera are not drawn, and must be small for that.
TILE = 0.25
PATTERN = 64
_FACES, _OBJECT_FACES = 60_000, 20_000
_LENT = 8


def entries(count: int, objects: Sequence[finder.Entry]) -> list[finder.Entry]:
    """`count` scenes named by number, every `HELDOUT`-th of held-out objects where there are some.

    Without training objects all scenes are held out.
    """
    lends = {
        split: finder.lender(objects, split)
        for split in ("train", "heldout")
        if any(entry.split == split for entry in objects)
    }
    found = []
    for number in range(count):
        name, split = f"room-{number:06d}", "heldout" if number % HELDOUT == 0 else "train"
        split = split if split in lends else next(iter(lends))
        load = functools.partial(room, name, lends[split], split == "train")
        found.append(
            finder.Entry(name, split, load, cameras=functools.partial(layouts.cameras, name))
        )
    return found


def room(name: str, lend: finder.Lend, vary: bool = True) -> surface.Mesh:
    """The scene of this name as one mesh; with `vary` every other object is an augmented copy.

    Raises `objects.UnreadableMesh` when no object can be read.
    """
    plan, rng = layouts.layout(name), layouts.generator(name, "things")
    pieces, faces = _shell(plan, rng, lend), 0
    for place in (*plan.group, *plan.furniture):
        mesh = _small(rng, lend)
        if vary and rng.random() < 0.5:
            mesh = augment.augment(mesh, rng, lend)
        faces += len(mesh.faces)
        if faces > _FACES:
            break
        pieces.append(_placed(mesh, place))
    merged = surface.merged(pieces)
    return merged._replace(vertices=merged.vertices.astype(np.float32))


def _small(rng: np.random.Generator, lend: finder.Lend) -> surface.Mesh:
    """The first lent mesh of few enough faces, or the smallest of some."""
    best = None
    for _ in range(_LENT):
        mesh = lend(rng)
        if len(mesh.faces) <= _OBJECT_FACES:
            return mesh
        best = mesh if best is None or len(mesh.faces) < len(best.faces) else best
    assert best is not None
    return best


def _placed(mesh: surface.Mesh, place: Place) -> surface.Mesh:
    turn = augment.about_z(np.full(1, place.turn))[0]
    vertices = place.scale * (mesh.vertices @ turn.T)
    vertices[:, 2] -= vertices[:, 2].min()
    return mesh._replace(vertices=vertices + place.foot, normals=mesh.normals @ turn.T)


def _shell(plan: Layout, rng: np.random.Generator, lend: finder.Lend) -> list[surface.Mesh]:
    """Floor, ceiling, four walls of one look, and the table."""
    (x, y), z = plan.half, plan.height
    floor, ceiling, wall = (_look(rng, lend) for _ in range(3))
    # The ceiling is pale, as ceilings are.
    ceiling = ceiling._replace(base_color=0.5 + 0.5 * ceiling.base_color)
    corner = np.asarray([-x, -y, 0.0])
    wide, deep, up = np.diag([2.0 * x, 2.0 * y, z])
    pieces = [
        _panel(corner, wide, deep, floor),
        _panel(corner + up, deep, wide, ceiling),
        _panel(corner, up, wide, wall),
        _panel(corner, deep, up, wall),
        _panel(corner + wide, up, deep, wall),
        _panel(corner + deep, wide, up, wall),
    ]
    width, height = plan.table
    if width:
        look, thick = _look(rng, lend), min(0.06, 0.5 * height)
        pieces += _box(width, height - thick, height, look)
        pieces += _box(0.2 * width, 0.0, height - thick, look)
    return pieces


def _box(half: float, bottom: float, top: float, look: surface.Mesh) -> list[surface.Mesh]:
    """Six panels around the z axis."""
    low = np.asarray([-half, -half, bottom])
    edges = np.diag([2.0 * half, 2.0 * half, top - bottom])
    found = []
    for axis in range(3):
        across, along = edges[(axis + 1) % 3], edges[(axis + 2) % 3]
        found += [_panel(low, along, across, look), _panel(low + edges[axis], across, along, look)]
    return found


def _panel(
    corner: Float[np.ndarray, "3"],
    across: Float[np.ndarray, "3"],
    along: Float[np.ndarray, "3"],
    look: surface.Mesh,
) -> surface.Mesh:
    """A rectangle in tiles; its normal is across x along, and a texture covers one unit."""
    sides = np.stack([across, along])
    lengths = np.linalg.norm(sides, axis=1)
    columns, rows = (max(1, int(np.ceil(length / TILE))) for length in lengths)
    u, v = np.meshgrid(np.linspace(0, 1, columns + 1), np.linspace(0, 1, rows + 1))
    shares = np.stack([u.ravel(), v.ravel()], axis=-1)
    first = (np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)).ravel()
    quads = np.stack([first, first + 1, first + columns + 2, first + columns + 1], axis=-1)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int32)
    normal = np.cross(*sides) / np.prod(lengths)
    return look._replace(
        vertices=corner + shares @ sides,
        faces=faces,
        normals=np.broadcast_to(normal, (len(faces), 3, 3)).astype(np.float32),
        uv=(shares * lengths)[faces].astype(np.float32),
        material=np.zeros(len(faces), np.int32),
    )


def _look(rng: np.random.Generator, lend: finder.Lend) -> surface.Mesh:
    """A mesh of no faces and one material: a texture out of a lent mesh, or a pattern."""
    texture = None
    if rng.random() < 0.5:
        donor = lend(rng)
        opaque = augment.opaque_textures(donor)
        texture = donor.atlas[rng.choice(opaque)] if len(opaque) else None
    texture = _pattern(rng) if texture is None else texture
    return surface.from_geometry(np.zeros((0, 3)), np.zeros((0, 3)))._replace(
        base_color=np.asarray([[*rng.uniform(0.75, 1.0, 3), 1.0]], np.float32),
        texture=np.zeros(1, np.int32),
        atlas=np.ascontiguousarray(texture)[None],
    )


def _pattern(rng: np.random.Generator) -> UInt8[np.ndarray, "s s 4"]:
    """Checks, stripes, tiles with joints or blotches, in two colours."""
    colors = 1.0 - rng.uniform(0.1, 0.8, (2, 1)) * rng.random((2, 3))
    row, column = np.mgrid[:PATTERN, :PATTERN] // (PATTERN // int(rng.choice([2, 4, 8])))
    kind = rng.choice(["checks", "stripes", "tiles", "blotches"])
    if kind == "checks":
        share = (row + column) % 2.0
    elif kind == "stripes":
        share = column % 2.0
    elif kind == "tiles":
        place = np.arange(PATTERN) % (PATTERN // 4) < 2
        share = (place[:, None] | place[None, :]).astype(float)
    else:
        share = np.kron(rng.random((8, 8)), np.ones((PATTERN // 8, PATTERN // 8)))
    rgb = colors[0] + share[..., None] * (colors[1] - colors[0])
    rgb = np.clip(rgb + rng.normal(0.0, 0.02, (PATTERN, PATTERN, 1)), 0.0, 1.0)
    alpha = np.ones((PATTERN, PATTERN, 1))
    return np.rint(255.0 * np.concatenate([rgb, alpha], axis=-1)).astype(np.uint8)
