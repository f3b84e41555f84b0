"""Meshes to an orbit data set: `python -m v3d_jax.render MESHES... --out DIR`.

MESHES are mesh files, folders that are searched for them, furniture catalogues (.sh3f) and packed
collections. DIR becomes a TFDS data set for `v3d_jax.train`, of orbits around the meshes or, with
`--scenes N`, of camera paths through N rooms that the meshes furnish. Meshes that cannot be read or
show nothing are named in DIR/skipped.csv and left out. When it was stopped, or killed, the same
command goes on where it was. With `--latents MODEL` what a training of MODEL needs of the frames is
computed as well.

    python -m v3d_jax.render --mvimgnet ROOT --out DIR --views 24

makes the data set of clips of real places instead, of MVImgNet or, by `--co3d ROOT`, of CO3D.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro
from tqdm import tqdm

from v3d_jax import console, errors
from v3d_jax.data import (
    finder,
    latents,
    objects,
    orbits,
    quality,
    reading,
    recording,
    rooms,
    solids,
    turntable,
)
from v3d_jax.training import cached


@dataclasses.dataclass(frozen=True)
class RenderArgs:
    """Renders orbits around meshes into a data set."""

    out: Path
    """Folder to make; it must not exist, or have been made by the same command."""
    turntable: Annotated[turntable.TurntableConfig, tyro.conf.arg(name="")]
    quality: Annotated[quality.QualityConfig, tyro.conf.arg(name="")]
    reading: Annotated[reading.ReadConfig, tyro.conf.arg(name="")]
    clips: Annotated[recording.ClipArgs, tyro.conf.arg(name="")]
    meshes: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Mesh files, folders, .sh3f catalogues or packed collections."""
    solids: int = 0
    """Procedural objects to render besides, with textures lent from the training meshes."""
    scenes: int = 0
    """Rooms furnished with the meshes to render, instead of the meshes; for configs/scene.py."""
    split: Literal["all", "train", "heldout"] = "all"
    """Which objects to render; each goes into the split of its own."""
    heldout: Path | None = None
    """Text file of the held-out objects' names, one a line; collections know theirs."""
    part: str = "1/1"
    """Which part of the objects to render, as in 2/8, each into an --out of its own."""
    image_size: int = latents.CacheConfig.image_size
    """Pixels of the input views kept beside latents; training asks for latents.cache.image-size."""
    latents: str | None = None
    """Model folder whose autoencoder and pooled image tower encode the frames for training."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations when encoding."""
    workers: int = 0
    """Threads that have meshes read and encode pictures; 0 for one a core."""


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, makes the data set, and reports what was made and left out."""
    args = tyro.cli(RenderArgs, args=argv, prog="python -m v3d_jax.render", description=__doc__)
    _check(args)
    # Parts that render beside each other have their programs in common.
    console.enable_cache()
    if args.clips.mvimgnet is not None or args.clips.co3d is not None:
        _record(args)
    else:
        _render_meshes(args)
    if args.latents is not None:
        config = cached.CachedLatentsConfig(cache=latents.CacheConfig(args.image_size))
        cached.write(args.out, args.latents, config, jnp.dtype(args.dtype))


def _render_meshes(args: RenderArgs) -> None:
    """Finds what the meshes are, and renders what is not there yet."""
    lenders = finder.find(args.meshes, _names(args.heldout))
    with reading.Readers(args.reading, args.quality) as readers:
        lenders = [readers.guarded(entry) for entry in lenders]
        lenders += solids.entries(args.solids, lenders)
        everything = rooms.entries(args.scenes, lenders) if args.scenes else lenders
        first, step = _part(args.part)
        entries = [entry for entry in everything if args.split in ("all", entry.split)][first::step]
        if not entries:
            raise errors.UserError(f"no object is in split {args.split!r} and part {args.part}")
        made_from = _made_from(args, [*entries, *(lenders if args.scenes else ())])
        if args.out.exists() and orbits.made_from(args.out) == made_from:
            print(f"{args.out} is complete already")
        else:
            _render(args, entries, lenders, made_from)


def _render(
    args: RenderArgs,
    entries: Sequence[finder.Entry],
    lenders: Sequence[finder.Entry],
    made_from: dict[str, Any],
) -> None:
    """Renders what is not there yet, and completes the data set."""
    config = args.turntable
    size = {"views": config.views, "size": config.size}
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(orbits.Writer(args.out, **size, made_from=made_from))
        left = [entry for entry in entries if entry.name not in writer.skipped]
        wanted = sum(turntable.orbits_of(entry, config) for entry in left)
        if writer.done or writer.skipped:
            print(f"going on: {len(writer.done)} orbits are there, {wanted} wanted")
        bar = tqdm(desc="rendering", unit="orbit", total=wanted, initial=len(writer.done))
        stack.enter_context(bar)

        def leave_out(entry: finder.Entry, error: objects.UnreadableMesh) -> None:
            kind = "" if isinstance(error, quality.Refused) else "unreadable: "
            writer.skip(entry.name, f"{kind}{error.reason}")
            bar.total -= turntable.orbits_of(entry, config)
            bar.write(f"left out: {entry.name}: {kind}{error.reason}", file=sys.stderr)

        for split, orbit in turntable.render(
            left,
            config,
            leave_out,
            accepts=args.quality,
            done=writer.done,
            lenders=lenders,
            workers=args.workers,
        ):
            writer.add(split, orbit)
            bar.update()
        counts = writer.finish(entry.name for entry in entries)
    made = ", ".join(f"{number} in {split}" for split, number in sorted(counts.items()))
    kept = len(entries) - len(writer.skipped)
    print(f"{kept} objects, {counts.total()} orbits ({made}): {args.out}")
    if writer.skipped:
        print(f"{len(writer.skipped)} objects left out: {args.out / orbits.SKIPPED}")


def _record(args: RenderArgs) -> None:
    """Writes the clips of real places that are not there yet, and completes the data set."""
    views, size = args.turntable.views, args.turntable.size
    heldout, (first, step) = set(_names(args.heldout)), _part(args.part)
    made_from = {
        "settings": recording.settings(args.clips, views, size),
        "clips": recording.digest(args.clips),
        "heldout": sorted(heldout),
        "split": args.split,
        "part": args.part,
    }
    if args.out.exists() and orbits.made_from(args.out) == made_from:
        print(f"{args.out} is complete already")
        return
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            orbits.Writer(args.out, views=views, size=size, made_from=made_from)
        )
        done = {name for name, _ in writer.done}
        if done or writer.skipped:
            print(f"going on: {len(done)} clips are there")
        bar = stack.enter_context(tqdm(desc="reading", unit="clip", total=0, initial=len(done)))

        def leave_out(name: str, reason: str) -> None:
            if name not in writer.skipped:
                writer.skip(name, reason)
                bar.write(f"left out: {name}: {reason}", file=sys.stderr)

        count = 0
        for category, found in recording.find(args.clips, views, size, leave_out):
            bar.set_postfix_str(category, refresh=False)
            splits = {one.name: "heldout" if one.name in heldout else "train" for one in found}
            chosen = [one for one in found if args.split in ("all", splits[one.name])]
            mine = chosen[(first - count) % step :: step]
            count += len(chosen)
            mine = [one for one in mine if one.name not in writer.skipped]
            bar.total += len(mine)
            for orbit in recording.records(mine, leave_out, done=done, workers=args.workers):
                writer.add(splits[orbit.name], orbit)
                bar.update()
        counts = writer.finish()
    made = ", ".join(f"{number} in {split}" for split, number in sorted(counts.items()))
    print(f"{counts.total()} clips ({made}): {args.out}")
    if writer.skipped:
        print(f"{len(writer.skipped)} clips left out: {args.out / orbits.SKIPPED}")


def _made_from(args: RenderArgs, entries: Sequence[finder.Entry]) -> dict[str, Any]:
    """What decides the records: the settings, and the objects' names, splits and files' sizes."""
    digest = hashlib.sha256()
    for entry in entries:
        size = 0 if entry.file is None else entry.file.stat().st_size
        digest.update(f"{entry.name}\0{entry.split}\0{size}\0".encode())
    settings = {**dataclasses.asdict(args.turntable), **dataclasses.asdict(args.quality)}
    return {"settings": settings, "objects": digest.hexdigest(), "part": args.part}


def _part(text: str) -> tuple[int, int]:
    """The first object of a part such as 2/8, and how far it is to the next."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise errors.UserError(f"--part {text}: write which part of how many, as in 2/8")
    return int(number) - 1, int(parts)


def _check(args: RenderArgs) -> None:
    config = args.turntable
    least = {"views": 1, "size": 1, "supersample": 1, "variants": 1, "elevation_jitter": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise errors.UserError(f"--{name.replace('_', '-')} must be at least {low}")
    recording.check(args.clips)
    if args.clips.mvimgnet is not None or args.clips.co3d is not None:
        if args.meshes or args.scenes or args.solids:
            raise errors.UserError("--mvimgnet and --co3d need no meshes: leave these out")
        if config.views < 2:
            raise errors.UserError("--views must be at least 2 for clips")
    if config.elevation_jitter >= 90:
        raise errors.UserError("--elevation-jitter must be below 90 degrees")
    if args.scenes and config.variants > 1:
        raise errors.UserError("--variants is for objects: ask for more --scenes instead")
    for name in ("workers", "solids", "scenes"):
        if getattr(args, name) < 0:
            raise errors.UserError(f"--{name} must be at least 0")
    for name, number in dataclasses.asdict(args.reading).items():
        if number <= 0:
            raise errors.UserError(f"--{name.replace('_', '-')} must be above 0")


def _names(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"--heldout {path} cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def cli() -> None:
    """The console script."""
    errors.run(main)


if __name__ == "__main__":
    cli()
