"""Clips of MVImgNet and CO3D as records of a data set, as a stream, in the order of their names.

Nothing is read ahead of its category but tables of contents, so that sets of any size begin at
once. What makes no clip, or has a damaged picture, is told of and left out.
"""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v3d_jax import errors
from v3d_jax.data import clips, co3d, mvimgnet, orbits, posed


@dataclasses.dataclass(frozen=True)
class ClipArgs:
    """Clips of real places instead of meshes."""

    mvimgnet: Path | None = None
    """Folder of MVImgNet, CATEGORY/OBJECT/{images,sparse}: its clips become the records."""
    co3d: Path | None = None
    """Folder of CO3D version 2, CATEGORY/frame_annotations.jgz ...: likewise."""
    categories: tuple[str, ...] = ()
    """Categories of either to take, by their folders' names; all where none is named."""
    subset: str | None = None
    """CO3D: only frames that this set list, such as fewview_train, has for training."""
    min_quality: float | None = None
    """CO3D: least viewpoint_quality_score of a sequence."""
    arc_length: bool = False
    """Frames evenly by the distance that the camera went, instead of by their number."""


class Source(NamedTuple):
    """One sequence or object that was not read yet; `read` raises `UserError`."""

    name: str
    read: Callable[[], clips.Clip]


def check(args: ClipArgs) -> None:
    """Raises `UserError` for settings that do not go together or name nothing."""
    if args.mvimgnet is not None and args.co3d is not None:
        raise errors.UserError("--mvimgnet and --co3d make a data set each: give one of them")
    if args.co3d is None and (args.subset is not None or args.min_quality is not None):
        raise errors.UserError("--subset and --min-quality are for --co3d: name its folder")
    root = args.mvimgnet or args.co3d
    if root is None:
        if args.categories or args.arc_length:
            raise errors.UserError("--categories and --arc-length are for --mvimgnet and --co3d")
    elif not root.is_dir():
        raise errors.UserError(f"{root} does not exist: give the folder of its categories")
    else:
        for category in args.categories:
            if not (root / category).is_dir():
                raise errors.UserError(f"{root} has no category {category!r}")


def digest(args: ClipArgs) -> str:
    """What the records are a function of beside the settings: names, and sizes of annotations."""
    told = hashlib.sha256()
    if args.mvimgnet is not None:
        for folder in _folders(args):
            told.update(f"{mvimgnet.name(folder)}\0".encode())
    else:
        for category in _categories(args):
            for file in _annotations(args, category):
                size = file.stat().st_size if file.is_file() else -1
                told.update(f"{category}\0{file.name}\0{size}\0".encode())
    return told.hexdigest()


def find(
    args: ClipArgs, views: int, size: int, skip: clips.Skip
) -> Iterator[tuple[str, list[Source]]]:
    """The sources of every category by its name; `skip` is told of what makes no clip and why.

    Raises `UserError` for a folder that holds none of the set, and for damaged annotations.
    """
    clip = clips.ClipConfig(num_frames=views, size=size, arc_length=args.arc_length)
    if args.mvimgnet is not None:
        yield from _mvimgnet(args, mvimgnet.MVImgNetConfig(clip=clip))
    else:
        yield from _co3d(args, co3d.CO3DConfig(clip=clip, min_quality=args.min_quality), skip)


def records(
    sources: list[Source], skip: clips.Skip, *, done: Collection[str], workers: int = 0
) -> Iterator[orbits.Orbit]:
    """The records of all sources whose names are not `done`, in order; `skip` as in `find`.

    `workers` threads read and encode pictures (0: one a core), a few clips ahead.
    """
    workers = workers or os.cpu_count() or 1
    waiting: collections.deque[tuple[str, futures.Future]] = collections.deque()
    left = (source for source in sources if source.name not in done)
    with futures.ThreadPoolExecutor(workers) as pool:
        try:
            for source in left:
                waiting.append((source.name, pool.submit(_record, source)))
                if len(waiting) > 2 * workers:
                    yield from _finished(*waiting.popleft(), skip)
            while waiting:
                yield from _finished(*waiting.popleft(), skip)
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(name: str, job: futures.Future, skip: clips.Skip) -> Iterator[orbits.Orbit]:
    try:
        yield job.result()
    except errors.UserError as error:
        skip(name, str(error))


def _record(source: Source) -> orbits.Orbit:
    return posed.record(source.read())


def _mvimgnet(
    args: ClipArgs, config: mvimgnet.MVImgNetConfig
) -> Iterator[tuple[str, list[Source]]]:
    """An object's model is read with its pictures, for there are very many."""
    found: dict[str, list[Source]] = {}
    for folder in _folders(args):
        source = Source(mvimgnet.name(folder), functools.partial(_object, folder, config))
        found.setdefault(folder.parent.name, []).append(source)
    yield from found.items()


def _object(folder: Path, config: mvimgnet.MVImgNetConfig) -> clips.Clip:
    reason = mvimgnet.refusal(folder, config)
    if reason is not None:
        raise errors.UserError(reason)
    return mvimgnet.read(folder, config, _unused_rng())


def _co3d(
    args: ClipArgs, config: co3d.CO3DConfig, skip: clips.Skip
) -> Iterator[tuple[str, list[Source]]]:
    assert args.co3d is not None
    for category in _categories(args):
        try:
            found = co3d.sequences(args.co3d, category, config, skip, subset=args.subset)
        except co3d.NoSequence:  # of which `skip` was told one by one
            continue
        found.sort(key=lambda one: one.name)
        yield (
            category,
            [
                Source(one.name, functools.partial(co3d.read, one, config, _unused_rng()))
                for one in found
            ],
        )


def _folders(args: ClipArgs) -> list[Path]:
    assert args.mvimgnet is not None
    found = mvimgnet.folders(args.mvimgnet)
    return [one for one in found if not args.categories or one.parent.name in args.categories]


def _categories(args: ClipArgs) -> list[str]:
    assert args.co3d is not None
    if args.categories:
        return sorted(args.categories)
    found = sorted(path.parent.name for path in args.co3d.glob(f"*/{co3d.FRAMES}"))
    if not found:
        raise errors.UserError(f"{args.co3d} holds no CATEGORY/{co3d.FRAMES}: give CO3D's folder")
    return found


def _annotations(args: ClipArgs, category: str) -> list[Path]:
    assert args.co3d is not None
    folder = args.co3d / category
    files = [folder / co3d.FRAMES, folder / co3d.SEQUENCES]
    if args.subset is not None:
        files.append(folder / "set_lists" / f"set_lists_{args.subset}.json")
    return files


def _unused_rng() -> np.random.Generator:
    """Source views are drawn in training, from the record; those of a clip are not kept."""
    return np.random.default_rng(0)


def settings(args: ClipArgs, views: int, size: int) -> dict[str, Any]:
    """The settings that decide the records, as JSON has them."""
    kept: dict[str, Any] = {"views": views, "size": size, "arc_length": args.arc_length}
    if args.co3d is not None:
        kept |= {"subset": args.subset, "min_quality": args.min_quality}
    return kept | {"set": "mvimgnet" if args.mvimgnet is not None else "co3d"}
