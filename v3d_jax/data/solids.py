"""Procedural objects: boxes and turned solids joined at random, in colours and lent textures.

A collection of meshes holds few shapes; these are without number, and what a generator learns of
how parts move when an object turns holds for every object. After arXiv 2406.09371, which trains on
such shapes alone. A solid is a pure function of its number and of the meshes that lend textures.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from v3d_jax.data import augment, finder, parts
from v3d_jax.data.parts import Part
from v3d_jax.mesh import surface

OVERLAP = 0.02  # of neighbouring parts, so that none floats
# Where the next part goes: file axis, side, and how likely.
_SIDES = ((1, 1, 0.5), (1, -1, 0.2), (0, 1, 0.1), (2, 1, 0.1), (2, -1, 0.1))

_Look = tuple[np.ndarray, np.ndarray | None]  # RGBA, and a texture that it multiplies


def entries(count: int, meshes: Sequence[finder.Entry]) -> list[finder.Entry]:
    """`count` training objects, named by number; training objects among `meshes` lend textures."""
    lend = finder.lender(meshes) if any(one.split == "train" for one in meshes) else None
    names = [f"solid-{number:06d}" for number in range(count)]
    return [finder.Entry(name, "train", functools.partial(_named, name, lend)) for name in names]


def _named(name: str, lend: finder.Lend | None) -> surface.Mesh:
    digest = hashlib.sha256(name.encode()).digest()
    return solid(name, np.random.default_rng(np.frombuffer(digest, np.uint32)), lend)


def solid(name: str, rng: np.random.Generator, lend: finder.Lend | None = None) -> surface.Mesh:
    """A body and one to five kinds of parts grown out of it or each other, as one mesh.

    A kind of part comes alone, in a pair or in fours. The object stands upright and is mostly the
    same left and right, as made things are.
    """
    looks = _looks(rng, lend)
    half = np.exp(rng.uniform(np.log(0.25), 0.0, 3))
    boxes = [(np.zeros(3), half)]
    pieces = [_place(_primitive(rng), *boxes[0], rng)]
    for _ in range(int(rng.integers(1, 6))):
        center, half = _grow(boxes[int(rng.integers(len(boxes)))], rng)
        flips = _copies(rng)
        shape = _place(_primitive(rng), center, half, rng)
        boxes.append((center, half))
        pieces += [_flip(shape, flip) for flip in flips if not _same(center, flip, flips)]
    dressed = [_dress(piece, looks[int(rng.integers(len(looks)))], rng) for piece in pieces]
    return parts.assemble(name, dressed)


def _looks(rng: np.random.Generator, lend: finder.Lend | None) -> list[_Look]:
    """Two to four materials: a colour, or a texture out of a lent mesh."""
    found = []
    for _ in range(int(rng.integers(2, 5))):
        color = np.append(rng.uniform(0.2, 1.0) * (1 - rng.random() * rng.random(3)), 1.0)
        texture = None
        if lend is not None and rng.random() < 0.5:
            donor = lend(rng)
            opaque = augment.opaque_textures(donor)
            if len(opaque):
                texture, color = donor.atlas[rng.choice(opaque)], np.ones(4)
        found.append((color, texture))
    return found


def _dress(piece: Part, look: _Look, rng: np.random.Generator) -> Part:
    color, texture = look
    uv = piece.uv * rng.choice([1.0, 1.0, 2.0])
    return piece._replace(color=color, texture=texture, uv=uv)


def _grow(
    parent: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half size of a part that touches a side of its parent."""
    center, half = parent
    axis, side, _ = _SIDES[rng.choice(len(_SIDES), p=[chance for *_, chance in _SIDES])]
    size = half * np.exp(rng.uniform(np.log(0.15), np.log(1.15), 3))
    size = np.maximum(size, 0.02)
    room = np.maximum(half - size, 0.0)
    # In the middle or at the edge more often than anywhere between.
    spot = rng.choice([0.0, 0.0, 1.0, 1.0, rng.random()], 3) * rng.choice([-1.0, 1.0], 3) * room
    spot[axis] = side * (half[axis] + size[axis] - OVERLAP)
    return center + spot, size


def _copies(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Signs of x and z of a part and its mirror images: alone, in a pair, in fours."""
    pair, four = [(1, 1), (-1, 1)], [(1, 1), (-1, 1), (1, -1), (-1, -1)]
    kinds = [[(1, 1)], pair, four]
    return kinds[rng.choice(3, p=[0.35, 0.4, 0.25])]


def _same(center: np.ndarray, flip: tuple[int, int], flips: list[tuple[int, int]]) -> bool:
    """Whether an earlier copy of a part at `center` lies where this one would."""
    where = center[[0, 2]]
    before = flips[: flips.index(flip)]
    return any(np.allclose(where * np.array(flip), where * np.array(other)) for other in before)


def _flip(piece: Part, flip: tuple[int, int]) -> Part:
    return piece if flip == (1, 1) else parts.transform(piece, np.diag([flip[0], 1.0, flip[1]]))


def _place(
    shape: tuple[np.ndarray, np.ndarray, np.ndarray],
    center: np.ndarray,
    half: np.ndarray,
    rng: np.random.Generator,
) -> Part:
    """A primitive of [-1, 1]^3 in its box, on its side now and then, or a little tilted."""
    vertices, faces, uv = shape
    if rng.random() < 0.25:
        vertices = np.roll(vertices, 1, axis=1)
    vertices = vertices * half
    if rng.random() < 0.15:
        angle = rng.uniform(-0.4, 0.4)
        cos, sin = np.cos(angle), np.sin(angle)
        vertices = vertices @ np.asarray([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    return Part(vertices + center, faces, None, uv, np.ones(4), None, 0.0)


def _primitive(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box, or one of the turned solids: cylinder, prism, cone, ball, ring, vase."""
    kind = rng.choice(["box", "cylinder", "prism", "cone", "ball", "ring", "vase"],
                      p=[0.4, 0.14, 0.08, 0.08, 0.1, 0.05, 0.15])  # fmt: skip
    t = np.linspace(0.0, 1.0, 13)
    up = 2.0 * t - 1.0
    flat = np.asarray([0.0, 1.0])
    if kind == "box":
        return _box()
    if kind == "ball":
        return lathe(np.sin(np.pi * t), -np.cos(np.pi * t))
    if kind == "ring":
        hole = rng.uniform(0.3, 0.8)
        angle = 2.0 * np.pi * t
        thick = 0.5 * (1.0 - hole)
        return lathe(1.0 - thick + thick * np.cos(angle), np.sin(angle), closed=True)
    if kind == "vase":
        bumps = rng.uniform(0.2, 1.0, 4)
        radius = np.interp(3.0 * t, np.arange(4), bumps)
        radius = np.convolve(np.pad(radius, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")
        return lathe(radius / radius.max(), up)
    sides = int(rng.integers(3, 9)) if kind == "prism" else 24
    top = rng.choice([0.0, rng.uniform(0.2, 0.9)]) if kind == "cone" else 1.0
    return lathe(1.0 + (top - 1.0) * flat, 2.0 * flat - 1.0, sides=sides)


def lathe(
    radius: np.ndarray, height: np.ndarray, *, sides: int = 24, closed: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A profile turned about y: vertices [v,3], faces [f,3] that face outwards, uv [f,3,2].

    The profile runs upwards on the outside; unless it is `closed` its ends become lids.
    """
    angle = 2.0 * np.pi * np.arange(sides) / sides
    ring = np.stack([np.cos(angle), np.zeros(sides), np.sin(angle)], axis=-1)
    rings = radius[:, None, None] * ring + height[:, None, None] * [0.0, 1.0, 0.0]
    vertices = rings.reshape(-1, 3)
    row, column = np.meshgrid(np.arange(len(radius) - 1), np.arange(sides), indexing="ij")
    row, column = row.reshape(-1), column.reshape(-1)
    after = (column + 1) % sides
    a, b = row * sides + column, row * sides + after
    c, d = a + sides, b + sides
    faces = [np.stack([a, c, b], axis=-1), np.stack([b, c, d], axis=-1)]
    along = np.linspace(0.0, 1.0, len(radius))
    at = {
        "a": np.stack([column / sides, along[row]], axis=-1),
        "b": np.stack([(column + 1) / sides, along[row]], axis=-1),
        "c": np.stack([column / sides, along[row + 1]], axis=-1),
        "d": np.stack([(column + 1) / sides, along[row + 1]], axis=-1),
    }
    uv = [np.stack([at[k] for k in corners], axis=1) for corners in ("acb", "bcd")]
    if not closed:
        fan = np.arange(1, sides - 1)
        zero = np.zeros_like(fan)
        last = (len(radius) - 1) * sides
        faces += [np.stack([zero, fan, fan + 1], axis=-1)]
        faces += [last + np.stack([zero, fan + 1, fan], axis=-1)]
        disc = 0.5 + 0.5 * ring[:, [0, 2]]
        uv += [disc[np.stack([zero, fan, fan + 1], axis=-1)]]
        uv += [disc[np.stack([zero, fan + 1, fan], axis=-1)]]
    return vertices, np.concatenate(faces), np.concatenate(uv)


def _box() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cube [-1, 1]^3 with a whole texture on every side."""
    corners, faces, uv = [], [], []
    square = np.asarray([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64)
    for axis in range(3):
        for side in (-1.0, 1.0):
            face = np.insert(square, axis, side, axis=1)
            normal = np.cross(face[1] - face[0], face[2] - face[0])
            order = [0, 1, 2, 3] if normal[axis] * side > 0 else [0, 3, 2, 1]
            start = len(corners) * 4
            corners.append(face)
            faces += [[start + order[0], start + order[1], start + order[2]]]
            faces += [[start + order[0], start + order[2], start + order[3]]]
            places = 0.5 + 0.5 * square
            uv += [places[[order[0], order[1], order[2]]], places[[order[0], order[2], order[3]]]]
    return np.concatenate(corners), np.asarray(faces), np.asarray(uv)
