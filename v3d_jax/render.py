"""Meshes to an orbit data set: `python -m v3d_jax.render MESHES... --out DIR`.

MESHES are mesh files, folders that are searched for them, furniture catalogues (.sh3f) and packed
collections. DIR becomes a TFDS data set for `v3d_jax.train`. Meshes that cannot be read are named
and left out.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from v3d_jax import errors
from v3d_jax.data import finder, objects, orbits, solids, turntable

_Record = tuple[str, orbits.Orbit]


@dataclasses.dataclass(frozen=True)
class RenderArgs:
    """Renders orbits around meshes into a data set."""

    meshes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Mesh files, folders, .sh3f catalogues or packed collections."""
    out: Path
    """Folder to make; it must not exist."""
    turntable: Annotated[turntable.TurntableConfig, tyro.conf.arg(name="")]
    solids: int = 0
    """Procedural objects to render besides, with textures lent from the training meshes."""
    split: Literal["all", "train", "heldout"] = "all"
    """Which objects to render; each goes into the split of its own."""
    heldout: Path | None = None
    """Text file of the held-out objects' names, one a line; collections know theirs."""
    workers: int = 0
    """Threads that read meshes and encode pictures; 0 for one a core."""


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, renders, and reports what was made and what was left out."""
    args = tyro.cli(RenderArgs, args=argv, prog="python -m v3d_jax.render", description=__doc__)
    config = args.turntable
    _check(config, args.workers, args.solids)
    orbits.check_destination(args.out)
    entries = finder.find(args.meshes, _names(args.heldout))
    entries += solids.entries(args.solids, entries)
    entries = [entry for entry in entries if args.split in ("all", entry.split)]
    if not entries:
        raise errors.UserError(f"none of the objects is in split {args.split!r}")
    skipped: list[str] = []
    with tqdm(desc="rendering", unit="view", total=turntable.count(entries, config)) as bar:

        def unreadable(entry: finder.Entry, error: objects.UnreadableMesh) -> None:
            skipped.append(entry.name)
            bar.total -= turntable.count([entry], config)
            bar.write(f"unreadable: {error}", file=sys.stderr)

        records = turntable.render(entries, config, unreadable, workers=args.workers)
        counts = orbits.build(
            args.out, _counted(records, bar), views=config.views, size=config.size
        )
    made = ", ".join(f"{number} in {split}" for split, number in sorted(counts.items()))
    print(f"{len(entries) - len(skipped)} objects, {counts.total()} orbits ({made}): {args.out}")
    if skipped:
        print(f"{len(skipped)} unreadable, left out: {', '.join(skipped)}")


def _counted(records: Iterator[_Record], bar: tqdm) -> Iterator[_Record]:
    for split, orbit in records:
        yield split, orbit
        bar.update(len(orbit.frames))


def _check(config: turntable.TurntableConfig, workers: int, solid_count: int) -> None:
    least = {"views": 1, "size": 1, "supersample": 1, "variants": 1, "elevation_jitter": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise errors.UserError(f"--{name.replace('_', '-')} must be at least {low}")
    if config.elevation_jitter >= 90:
        raise errors.UserError("--elevation-jitter must be below 90 degrees")
    for name, number in (("workers", workers), ("solids", solid_count)):
        if number < 0:
            raise errors.UserError(f"--{name} must be at least 0")


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
