"""The objects behind what a user names: mesh files, folders, catalogues, packed collections.

Every object gets a name that no other one has, and a split. Nothing is read but tables of contents
until an object's `load` is called.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v3d_jax import errors
from v3d_jax.data import catalogue, objects, pack
from v3d_jax.mesh import surface
from v3d_jax.ops.camera import Camera

CATALOGUE = ".sh3f"
# Meshes that stay in memory to lend textures and company; a few hundred kB each.
LENDABLE = 1024

Lend = Callable[[np.random.Generator], surface.Mesh]


class Entry(NamedTuple):
    """One object, not read yet; `load` raises `objects.UnreadableMesh`.

    `file` is the mesh file or catalogue that a parser will read it from, in any process. A scene
    has `cameras` of its own, so many of this width and height; an object is seen all around.
    """

    name: str
    split: str
    load: Callable[[], surface.Mesh]
    file: Path | None = None
    cameras: Callable[[int, int], Camera] | None = None


def find(paths: Sequence[Path], heldout: Iterable[str] | None = None) -> list[Entry]:
    """All objects behind `paths`, in order; folders are searched recursively, by file name.

    Objects are named by their file (below the folder that was named, without the ending), by
    catalogue and model, or as their collection names them; where two names are equal, the later
    one is preceded by its file. A file that is reached twice counts once. Split: "heldout" for
    names in `heldout`; otherwise what a collection says, and "train" for everything else. Raises
    UserError for what does not exist or holds no meshes.
    """
    heldout = set(heldout or ())
    found: dict[str, Entry] = {}
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise errors.UserError(f"{path} does not exist")
        files = _search(path) if path.is_dir() else [(path, path.stem)]
        if not files:
            raise errors.UserError(f"{path} holds no meshes ({_kinds()})")
        for file, name in files:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            for entry in _entries(file, name):
                name = entry.name if entry.name not in found else f"{file}: {entry.name}"
                split = "heldout" if name in heldout else entry.split
                found[name] = entry._replace(name=name, split=split)
    if not found:
        raise errors.UserError(f"no meshes were named; give files or folders ({_kinds()})")
    return list(found.values())


def lender(entries: Sequence[Entry], split: str = "train") -> Lend:
    """A function that gives a random readable mesh of a split.

    It raises `objects.UnreadableMesh` when it has found that none can be read.
    """
    training = [entry for entry in entries if entry.split == split]
    load = functools.lru_cache(LENDABLE)(lambda place: training[place].load())
    unreadable: set[int] = set()

    def lend(rng: np.random.Generator) -> surface.Mesh:
        while len(unreadable) < len(training):
            place = int(rng.integers(len(training)))
            if place in unreadable:
                continue
            try:
                return load(place)
            except objects.UnreadableMesh:
                unreadable.add(place)
        raise objects.UnreadableMesh("a mesh to borrow from", "none can be read")

    return lend


def _search(folder: Path) -> list[tuple[Path, str]]:
    """Mesh files and catalogues below a folder, with the mesh files' names."""
    kinds = (*objects.SUFFIXES, CATALOGUE)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file())
    return [(path, str(path.relative_to(folder).with_suffix(""))) for path in files]


def _entries(path: Path, name: str) -> list[Entry]:
    """What one file holds; `name` is the object's if it holds just one."""
    suffix = path.suffix.lower()
    if suffix in objects.SUFFIXES:
        return [Entry(name, "train", functools.partial(objects.load, path), path)]
    if suffix == CATALOGUE:
        return _catalogue(path)
    try:
        collection = pack.Collection(path)
    except errors.UserError:
        raise errors.UserError(f"{path} is none of: {_kinds()}") from None
    return [
        Entry(row["name"], row["split"], functools.partial(_packed, collection, number))
        for number, row in enumerate(collection.rows)
    ]


def _catalogue(path: Path) -> list[Entry]:
    """A catalogue's objects; a damaged one counts as one unreadable object."""
    try:
        entries = catalogue.entries(path)
    except objects.UnreadableMesh as error:
        return [Entry(str(path), "train", functools.partial(_raise, error))]
    found = {}
    for entry in entries:  # a model that is listed twice is one object
        found.setdefault(
            entry.identity,
            Entry(entry.identity, "train", functools.partial(objects.load_entry, entry), path),
        )
    return list(found.values())


def _packed(collection: pack.Collection, number: int) -> surface.Mesh:
    try:
        return collection.read(number).mesh
    except errors.UserError as error:
        raise objects.UnreadableMesh(collection.rows[number]["name"], str(error)) from error


def _raise(error: Exception) -> surface.Mesh:
    raise error


def _kinds() -> str:
    return f"{', '.join((*objects.SUFFIXES, CATALOGUE))} or a packed collection"
