"""Packs the objects of two installed Debian packages for training.

    apt-get install sweethome3d-furniture megaglest-data
    python launch/pack_objects.py --root /usr --out objects.pack

Two cores, about five minutes; 1,250 objects, under 30 MB. Grey objects without a texture are
trained on, since augmented copies give them colours. With --choose it also chooses the held-out
objects anew, out of the others, and prints their names, instead of using the packaged list.

With --furniture it packs the first package's alone, with fewer --faces and smaller textures what
furnishes scene_mini's rooms (docs/evaluation.md).

With --openings it packs instead the furniture's doors and windows, of which the shipped model has
seen none: 20 to fine-tune it on and 10 held out (configs/mini_finetune.py).
"""

import argparse
import dataclasses
from pathlib import Path

from v3d_jax.data import collect, selection


def main() -> None:
    """Reads, selects, splits and packs; prints the counts."""
    config = collect.CollectConfig()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("/usr"))
    parser.add_argument("--out", type=Path, default=Path("objects.pack"))
    parser.add_argument("--choose", type=int, help="choose so many held-out objects anew")
    parser.add_argument("--furniture", action="store_true", help="without the game's models")
    parser.add_argument("--faces", type=int, default=config.faces, help="of an object at most")
    parser.add_argument("--texture-size", type=int, default=config.texture_size)
    parser.add_argument("--openings", action="store_true", help="doors and windows alone")
    arguments = parser.parse_args()
    config = dataclasses.replace(config, faces=arguments.faces, texture_size=arguments.texture_size)
    if arguments.openings:
        openings(arguments, config)
        return
    selected = selection.SelectionConfig()
    if not arguments.choose:
        selected = dataclasses.replace(selected, min_chroma=0.0)
    furniture, dropped = collect.sweethome3d(arguments.root, config, selected)
    print(f"sweethome3d: {len(furniture)} good; left out: {dict(dropped)}")
    game = []
    if not arguments.furniture:
        game, dropped = collect.megaglest(arguments.root, config, selected)
        print(f"megaglest: {len(game)} good; left out: {dict(dropped)}")
    names = selection.heldout_names()
    if arguments.choose:
        names = selection.choose_heldout(furniture, arguments.choose)
        print(*names, sep="\n")
    write(arguments.out, [*furniture, *game], names, config)


def openings(arguments: argparse.Namespace, config: collect.CollectConfig) -> None:
    """Packs doors and windows, which are flat and often grey by nature."""
    everything = selection.SelectionConfig(min_thickness=0.0, min_chroma=0.0)
    found, dropped = collect.sweethome3d(arguments.root, config, everything, openings=True)
    print(f"sweethome3d: {len(found)} good; left out: {dict(dropped)}")
    names = selection.choose_heldout(found, arguments.choose or 10, largest_family=2)
    write(arguments.out, found, names, config)


def write(
    out: Path,
    found: list[selection.Candidate],
    heldout: list[str],
    config: collect.CollectConfig,
) -> None:
    """Splits the objects by name and packs them; prints the counts."""
    train, held, related = selection.split(found, heldout)
    print(f"{len(train)} train, {len(held)} held out, {len(related)} too like those")
    collect.write(out, train, held, config)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
