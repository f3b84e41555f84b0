"""Gathers the training objects out of two Debian packages' folders and readies them for a pack."""

import dataclasses
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent import futures
from pathlib import Path

from v3d_jax.data import catalogue, objects, pack, parts, selection, simplify
from v3d_jax.mesh import surface

SWEETHOME3D = "share/sweethome3d/furniture"
MEGAGLEST = "share/games/megaglest"
MEGAGLEST_CREATOR = "The Glest and MegaGlest teams and contributors"
MEGAGLEST_LICENSE = "CC-BY-SA 3.0"

# Categories and folders that hold no objects: openings of walls, and the game's menu.
_OPENINGS = "Doors and windows"
_MENU = "data"
# Remains of people, which no one wants to see turning.
_GORE = re.compile(r"bodypart|impaled|hanged|hell\d")


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """How objects are readied: at most `faces` faces; textures of `texture_size` texels a side.

    Objects with more than `few_textures` of them get `small_texture_size`. `processes` 0 means a
    thread of this one.
    """

    faces: int = 8000
    texture_size: int = 256
    small_texture_size: int = 128
    few_textures: int = 2
    processes: int = 2


def sweethome3d(
    root: Path,
    config: CollectConfig,
    selected: selection.SelectionConfig,
    openings: bool = False,
) -> tuple[list[selection.Candidate], Counter]:
    """The good objects of every catalogue below `root`, and how many were left out for what.

    Doors and windows are left out, or with `openings` everything else is.
    """
    entries = [
        entry
        for path in sorted((root / SWEETHOME3D).glob("*.sh3f"))
        for entry in catalogue.entries(path)
    ]
    found, dropped = [], Counter()
    doors = [entry.door_or_window or entry.category == _OPENINGS for entry in entries]
    kept = [entry for entry, door in zip(entries, doors, strict=True) if door == openings]
    dropped["no door or window" if openings else "door or window"] = len(entries) - len(kept)
    entries = kept
    for entry, mesh in _load(entries, objects.load_entry, config, selected, dropped):
        found.append(
            selection.Candidate(
                name=f"sweethome3d/{entry.identity}",
                title=entry.name,
                category=entry.category,
                mesh=mesh,
                creator=entry.creator,
                license=entry.license,
            )
        )
    return found, dropped


def megaglest(
    root: Path, config: CollectConfig, selected: selection.SelectionConfig
) -> tuple[list[selection.Candidate], Counter]:
    """The good distinct models of the game below `root`, and how many were left out for what."""
    top, dropped = root / MEGAGLEST, Counter()
    paths = [path for path in sorted(top.rglob("*.g3d")) if not path.is_symlink()]
    dropped["menu"] = sum(path.relative_to(top).parts[0] == _MENU for path in paths)
    paths = [path for path in paths if path.relative_to(top).parts[0] != _MENU]
    dropped["gore"] = sum(bool(_GORE.search(path.stem)) for path in paths)
    paths = [path for path in paths if not _GORE.search(path.stem)]
    good = list(_load(paths, objects.load, config, selected, dropped))
    keep = selection.distinct([path for path, _ in good], [mesh for _, mesh in good])
    dropped["same model"] = len(good) - len(keep)
    found = []
    for path, mesh in (good[number] for number in keep):
        name = path.relative_to(top).with_suffix("")
        found.append(
            selection.Candidate(
                name=f"megaglest/{name.as_posix()}",
                title=name.stem,
                category="Game",
                mesh=mesh,
                creator=MEGAGLEST_CREATOR,
                license=MEGAGLEST_LICENSE,
            )
        )
    return found, dropped


def _load(
    sources: Iterable,
    load: Callable,
    config: CollectConfig,
    selected: selection.SelectionConfig,
    dropped: Counter,
) -> Iterable[tuple[object, surface.Mesh]]:
    """Yields the readable good ones in order; counts the others in `dropped`, naming unreadable."""
    with _pool(config) as pool:
        jobs = [pool.submit(load, source, config.texture_size) for source in sources]
        for source, job in zip(sources, jobs, strict=True):
            try:
                mesh = job.result()
            except parts.UnreadableMesh as error:
                print(f"skipped {error}")
                dropped["unreadable"] += 1
                continue
            reason = selection.refusal(mesh, selected)
            if reason is None:
                yield source, mesh
            else:
                dropped[reason] += 1


def _pool(config: CollectConfig) -> futures.Executor:
    if config.processes == 0:
        return futures.ThreadPoolExecutor(1)
    # Spawned, because a fork of a process that runs jax may hang.
    context = multiprocessing.get_context("spawn")
    return futures.ProcessPoolExecutor(config.processes, mp_context=context)


def ready(item: selection.Candidate, split: str, config: CollectConfig) -> pack.Item:
    """One object with fewer faces and smaller textures where it has too many, and its credits."""
    mesh, steps = simplify.simplify(item.mesh, config.faces)
    if len(mesh.atlas) > config.few_textures:
        mesh = simplify.shrink_textures(mesh, config.small_texture_size)
    info = {
        "title": item.title,
        "category": item.category,
        "creator": item.creator,
        "license": item.license,
        "simplified": steps,
        "faces_before": len(item.mesh.faces),
    }
    return pack.Item(item.name, split, mesh, info)


def write(
    path: Path,
    train: Iterable[selection.Candidate],
    heldout: Iterable[selection.Candidate],
    config: CollectConfig,
) -> None:
    """Readies the objects, several at a time, and packs them."""
    work = [(item, "train") for item in train] + [(item, "heldout") for item in heldout]
    with _pool(config) as pool:
        jobs = [pool.submit(ready, item, split, config) for item, split in work]
        pack.save(path, (job.result() for job in jobs), about=dataclasses.asdict(config))
