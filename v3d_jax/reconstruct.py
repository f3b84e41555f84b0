"""Posed views to 3D Gaussians or a mesh: `python -m v3d_jax.reconstruct SOURCE --out DIR`.

The views are of an object (on white or with alpha) or of an unbounded scene around the cameras.

SOURCE is a folder that `python -m v3d_jax.sample` wrote, a transforms file or its folder, the mp4
of an orbit, or a folder with a COLMAP model. DIR gets splats.ply and splats.mp4, with
`--stages splats,mesh` also mesh.glb, preview.png and report.json (docs/method.md).
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from v3d_jax import console, errors, meshing, splatting, surfacing, unbounded
from v3d_jax.data import output, views

STAGES = ("splats", "mesh")


@dataclasses.dataclass(frozen=True)
class ReconstructArgs:
    """Fits 3D Gaussians, a mesh or both to posed views of an object, or Gaussians to a scene."""

    source: tyro.conf.Positional[Path]
    """A result of v3d_jax.sample, a transforms file or its folder, an mp4, a COLMAP model."""
    out: Path = Path("out")
    """Folder that receives the result."""
    stages: str = "splats"
    """What to make, separated by commas: splats, mesh."""
    splats: Annotated[splatting.SplatArgs, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=splatting.SplatArgs
    )
    surface: Annotated[surfacing.SurfaceArgs, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=surfacing.SurfaceArgs
    )
    mesh: Annotated[meshing.MeshArgs, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=meshing.MeshArgs
    )
    scene: Literal["auto", "object", "unbounded"] = "auto"
    """An object, or an unbounded scene whose pictures are fitted whole; auto: an object if there is
    alpha or a mask, or if the pictures' borders are white."""
    background: Literal["black", "white", "random"] = "black"
    """Behind all Gaussians of an unbounded scene; random, anew each step, leaves none of it."""
    hold_out: int = 0
    """Scores every N-th view, the first included, instead of fitting it; 0: none."""
    max_side: int = views.MAX_SIDE
    """Pictures longer than this many pixels are shrunk."""
    tolerated: int = 0
    """Views that may miss a part of the object before it is cut away from the start."""
    seed: int = 0
    """Of all random numbers."""
    cache: bool = True
    """Keep compiled programs in the user's cache folder (~/.cache/v3d_jax)."""


def cli() -> None:
    """Entry point of `v3d-reconstruct` and `python -m v3d_jax.reconstruct`."""
    errors.run(main)


def main() -> None:
    """Parses the command line and runs it."""
    run(tyro.cli(ReconstructArgs, prog="python -m v3d_jax.reconstruct"))


def run(args: ReconstructArgs) -> Path:
    """Reads, fits and writes; returns the folder. Raises `UserError`."""
    _check(args)
    if args.cache:
        console.enable_cache()
    wanted, seconds = _stages(args.stages), dict[str, float]()
    with console.timed(seconds, "load"):
        given = views.read(args.source, max_side=args.max_side)
    for remark in given.notes:
        console.note(remark)
    frames, held = _frames(args, given)
    written: dict[str, Any] = {}
    reports, made, failure = {}, [], None
    if "splats" in wanted:
        splats = splatting.reconstruct(args.splats, frames, args.seed, seconds, held)
        reports["splats"], written["splats"] = splats.report, output.Splats(*splats[:3])
        made.append(splatting.told(splats, seconds))
    if "mesh" in wanted:
        # Splats are worth keeping where there can be no mesh.
        try:
            fit = meshing.field_of(args.surface)
            mesh = meshing.reconstruct(args.mesh, frames, fit, args.seed, seconds)
            written["mesh"] = output.Mesh(mesh.painted, mesh.renders, meshing.formats(args.mesh))
            reports["mesh"] = mesh.report
            made.append(meshing.told(mesh, seconds))
        except errors.UserError as error:
            if not written:
                raise
            failure = error
    shown = (views.on_white(frames.images, frames.alpha) * 255.0 + 0.5).astype(np.uint8)
    report = {
        "source": str(args.source),
        "views": len(given.images),
        "size": [given.images.shape[2], given.images.shape[1]],
        "scene": "object" if frames.scene is None else "unbounded",
        "notes": list(given.notes),
        "seed": args.seed,
        **reports,
        **console.machine(seconds),
    }
    output.write_reconstruction(args.out, shown, report, **written)
    print(f"{args.out}: {', '.join(made)}, of {len(shown)} views")
    if failure is not None:
        raise errors.UserError(f"{args.out} has no mesh: {failure}")
    return args.out


def _frames(
    args: ReconstructArgs, given: views.Views
) -> tuple[splatting.Frames, splatting.Frames | None]:
    """The frames to fit, and those that are held out."""
    kind = unbounded.kind(given.images, given.alpha) if args.scene == "auto" else args.scene
    whole = splatting.Frames(given.images, given.alpha, given.cameras, args.tolerated)
    if kind == "unbounded":
        if "mesh" in _stages(args.stages):
            raise errors.UserError(
                f"{args.source}: a mesh is made of an object on white or with alpha, and this is "
                "an unbounded scene: give --stages splats, or --scene object if it is none"
            )
        if given.alpha is not None:
            console.note("masks and alpha are not used: a scene's pictures are fitted whole")
        scene = unbounded.Scene(given.points, args.background)
        whole = whole._replace(alpha=None, scene=scene)
    if not args.hold_out:
        return whole, None
    held = np.arange(len(given.images)) % args.hold_out == 0
    if held.sum() < 1 or (~held).sum() < 2:
        raise errors.UserError(
            f"--hold-out {args.hold_out} leaves {(~held).sum()} of {len(held)} views to fit and "
            f"{held.sum()} to score: two and one are needed"
        )
    return splatting.part(whole, ~held), splatting.part(whole, held)


def _stages(text: str) -> list[str]:
    return [stage.strip() for stage in text.split(",")]


def _check(args: ReconstructArgs) -> None:
    unknown = [stage for stage in _stages(args.stages) if stage not in STAGES]
    if unknown:
        raise errors.UserError(
            f"--stages: {unknown[0]!r} is not available; there is: {', '.join(STAGES)}"
        )
    if not 0 <= args.seed < 2**32:
        raise errors.UserError(f"--seed {args.seed}: a number from 0 to {2**32 - 1} is needed")
    if args.hold_out < 0 or args.hold_out == 1:
        raise errors.UserError(f"--hold-out {args.hold_out}: 0 or at least 2 is needed")
    if args.tolerated < 0:
        raise errors.UserError(f"--tolerated {args.tolerated}: at least 0 is needed")
    if args.max_side < splatting.MIN_SIDE:
        raise errors.UserError(f"--max-side {args.max_side}: at least {splatting.MIN_SIDE}")
    splatting.check(args.splats)
    surfacing.check(args.surface)
    meshing.check(args.mesh)
    out, source = args.out.resolve(), args.source.resolve()
    if out == source or out in source.parents:
        raise errors.UserError(f"--out {args.out} holds the source and would replace it")
    output.check_writable(args.out, [args.out])


if __name__ == "__main__":
    cli()
