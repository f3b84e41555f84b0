"""Scores models and the frames that they make: `python -m v3d_jax.evaluate --protocol NAME`.

| protocol | what is scored |
|---|---|
| orbits | orbits of held-out objects, made from one view of each (`evaluation.objects`) |
| scenes | unseen views of held-out scenes, with one and three input views (`evaluation.scenes`) |
| co3d DIR | the same on CO3D's sequences, with two and three (`data.co3d_protocol`) |
| rotation | how a scene model's picture moves as the camera turns (`evaluation.rotation`) |
| points [GENERATED REAL] | COLMAP's points on generated and on real frames (`evaluation.points`) |

Metrics are PSNR, SSIM and LPIPS, averaged over the unseen views, then over the objects. Beside the
model stand baselines that need none. docs/evaluation.md says what each protocol is, and how its
figures compare with published ones.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from v3d_jax import __version__, console, errors, pipeline
from v3d_jax.data import co3d_protocol, orbits, sparse
from v3d_jax.evaluation import measure, objects, points, rotation, scenes
from v3d_jax.weights import folder, packaged, settings

Protocol = Literal["orbits", "scenes", "co3d", "rotation", "points"]
VIEWS: dict[Protocol, tuple[int, ...]] = {"scenes": (1, 3), "co3d": (2, 3)}
SCENE_MODELS = (*VIEWS, "rotation")


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    """Prints a table of scores over views that a model has not seen."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """co3d: the folder of CO3D. points: one of generated frames and one of real ones, or none."""
    protocol: Protocol = "orbits"
    """What is scored; docs/evaluation.md describes each."""
    model: str | None = None
    """A packaged model's name, or a model folder; if none is named, mini, or of scenes
    scene_mini."""
    data: str = "heldout"
    """Split of the data set to score on; augmented copies in it are left out."""
    data_dir: Path = Path("data/orbits")
    """Data set with this split, made by python -m v3d_jax.render; orbits need a split "train"."""
    views: tuple[int, ...] = ()
    """scenes and co3d: numbers of input views, instead of the protocol's own."""
    steps: int | None = None
    """Sampling steps, instead of the model's own."""
    guidance: tuple[float, float] | None = None
    """Smallest and largest guidance scale, instead of the model's own."""
    seed: int = 0
    """Of the noise; an object's frames depend on it and on the object's place, on nothing else."""
    batch: int = 4
    """orbits: objects generated together."""
    limit: int | None = None
    """Score only so many objects or scenes, the first of them."""
    lpips: measure.Net | None = None
    """Network of LPIPS; alex unless said otherwise, and vgg with co3d, as SparseFusion has it."""
    out: Path | None = None
    """Folder to make, with the table, every score and contact sheets."""
    co3d: Annotated[co3d_protocol.Co3dArgs, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=co3d_protocol.Co3dArgs
    )
    colmap: Annotated[sparse.SparseConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=sparse.SparseConfig
    )


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, scores, prints the tables and writes the files."""
    args = _named(tyro.cli(EvaluateArgs, args=argv, prog="python -m v3d_jax.evaluate"))
    _check(args)
    console.enable_cache()
    if args.out is not None:
        orbits.check_destination(args.out)
    if args.protocol == "points":
        _points(args)
        return
    if args.protocol == "rotation":
        _rotation(args)
        return
    results = evaluate(args)
    for result in results.values():
        print(_heading(args, result))
        print(measure.report(result))
    if args.out is not None:
        measure.write(args.out, results)
        print(f"written: {args.out}")


def evaluate(args: EvaluateArgs) -> dict[str, measure.Result]:
    """Scores the model that the arguments name; reads everything, writes nothing.

    Results are named by their folders below `--out`, an orbits' result by nothing.
    """
    args = _named(args)
    model, config = load(args)
    net = args.lpips or ("vgg" if args.protocol == "co3d" else "alex")
    if args.protocol == "orbits":
        data = (orbits.source(args.data_dir, args.data), orbits.source(args.data_dir, "train"))
        perceptual = measure.load_lpips(net)
        about = describe(args, model, config, None if perceptual is None else net)
        told = {"batch": args.batch, "seed": args.seed, "limit": args.limit}
        return {"": objects.evaluate(config, model.params, perceptual, data, about, **told)}
    sources = _sources(args, config)
    perceptual = measure.load_lpips(net)
    about = describe(args, model, config, None if perceptual is None else net)
    return {
        f"views_{views}": scenes.evaluate(
            config, model.params, perceptual, sources, views, about, args.seed
        )
        for views in args.views or VIEWS[args.protocol]
    }


def _named(args: EvaluateArgs) -> EvaluateArgs:
    """The arguments with a model, if none was named that of the protocol."""
    model = packaged.named(args.model, scenes=args.protocol in SCENE_MODELS)
    return dataclasses.replace(args, model=model)


def load(args: EvaluateArgs) -> tuple[folder.Model, pipeline.Settings]:
    """The model, if it is of the protocol's kind, and the run's settings."""
    model = packaged.load(args.model)
    is_scene = model.generator.pixelnerf is not None
    if args.protocol == "orbits" and is_scene:
        raise errors.UserError(
            f"{args.model} is a scene model: name a model of objects, or add --protocol scenes"
        )
    if args.protocol in SCENE_MODELS and not is_scene:
        raise errors.UserError(
            f"{args.model} is no scene model: name one by --model, such as scene_mini"
        )
    height, width = model.generator.frame_size
    if is_scene and height != width:
        raise errors.UserError(f"the model makes {width} x {height} frames; scenes are square")
    return model, configure(args, model)


def configure(args: EvaluateArgs, model: folder.Model) -> pipeline.Settings:
    """The run's settings: the model's own sampling, changed as the arguments say."""
    changes: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    if args.guidance is not None:
        changes |= dict(zip(("guidance_min", "guidance_max"), args.guidance, strict=True))
    sampling = dataclasses.replace(model.sampling, **changes)
    return pipeline.Settings(model.generator, sampling)


def describe(
    args: EvaluateArgs, model: folder.Model, config: pipeline.Settings, net: str | None
) -> dict[str, Any]:
    """What was run, for scores.json."""
    told = {
        "protocol": args.protocol,
        "model": args.model,
        "model_metadata": model.metadata,
        "sampling": settings.to_json(config.sampling),
        "data": str(args.data_dir),
        "split": args.data,
        "seed": args.seed,
        "lpips": net,
        "version": __version__,
        "device": jax.devices()[0].device_kind,
    }
    if args.protocol == "co3d":
        split = f"{co3d_protocol.SUBSET}/{co3d_protocol.SPLIT}"
        told |= {"data": str(args.folders[0]), "split": split}
        told |= {"co3d": dataclasses.asdict(args.co3d)}
    return told


def _sources(args: EvaluateArgs, config: pipeline.Settings) -> list[scenes.Source]:
    """The sequences that a scene model is scored on."""
    size = config.generator.frame_size[0]
    if args.protocol != "co3d":
        return scenes.of_records(orbits.source(args.data_dir, args.data), size, args.limit)
    left_out: dict[str, str] = {}
    found = co3d_protocol.find(args.folders[0], args.co3d, left_out.__setitem__)
    for name, reason in left_out.items():
        console.note(f"left out: {name} {reason}")
    if size != co3d_protocol.SIZE:
        console.note(
            f"the protocol's pictures have {co3d_protocol.SIZE} pixels a side, the model's frames "
            f"{size}: figures do not compare with published ones"
        )
    return scenes.of_co3d(found, size, args.co3d.background, args.limit)


def _points(args: EvaluateArgs) -> None:
    """Compares clouds, prints them and writes the files."""
    sparse.check()
    about: dict[str, Any] = {"protocol": "points", **dataclasses.asdict(args.colmap)}
    if args.folders:
        pairs = points.of_folders(args.folders)
        about |= {"folders": [str(path) for path in args.folders]}
    else:
        model, config = load(args)
        about |= describe(args, model, config, None)
        records = orbits.source(args.data_dir, args.data)
        if config.generator.pixelnerf is None:
            pairs = points.of_objects(config, model.params, records, args.seed, args.limit)
        else:
            sources = scenes.of_records(records, config.generator.frame_size[0], args.limit)
            pairs = points.of_scenes(config, model.params, sources, args.seed)
    found = points.evaluate(pairs, args.colmap)
    print(points.report(found))
    if args.out is not None:
        points.write(args.out, found, about)
        print(f"written: {args.out}")


def _rotation(args: EvaluateArgs) -> None:
    """Follows corners as cameras turn, prints how far off they are and writes the files."""
    model, config = load(args)
    sources = _sources(args, config)
    result = rotation.evaluate(config, model.params, sources, args.seed)
    where = f"{args.model} on {args.data_dir}, {args.data}: {len(sources)} scenes"
    print(f"{where}, cameras turned by {rotation.DEGREES:g} degrees")
    print(rotation.report(result))
    if args.out is not None:
        rotation.write(args.out, result, describe(args, model, config, None))
        print(f"written: {args.out}")


def _heading(args: EvaluateArgs, result: measure.Result) -> str:
    about = result.about
    what = f"{args.model} on {about['data']}, {about['split']}: {len(result.names)}"
    if args.protocol == "orbits":
        return f"{what} objects, {about['unseen_views']} unseen views each"
    lacking = f", {len(about['left_out'])} left out" if about["left_out"] else ""
    return f"{what} scenes, {about['input_views']} input views{lacking}"


def _check(args: EvaluateArgs) -> None:
    for name in ("steps", "batch", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise errors.UserError(f"--{name} must be at least 1")
    if args.views and (args.protocol not in VIEWS or min(args.views) < 1):
        raise errors.UserError("--views are numbers from 1, for --protocol scenes and co3d")
    if args.protocol == "co3d" and len(args.folders) != 1:
        raise errors.UserError("--protocol co3d DIR: give the folder of CO3D's categories")
    if args.protocol in ("orbits", "scenes", "rotation") and args.folders:
        raise errors.UserError(
            f"--protocol {args.protocol} takes a data set: name it by --data-dir, not as a folder"
        )
    if args.co3d.sequences < 0 or not args.co3d.categories:
        raise errors.UserError("--sequences must be at least 0, and --categories name at least one")
    if args.protocol != "co3d" and args.co3d != co3d_protocol.Co3dArgs():
        raise errors.UserError("--categories, --sequences and --background are for --protocol co3d")
    if args.protocol != "points" and args.colmap != sparse.SparseConfig():
        raise errors.UserError("--two-view-tracks is for --protocol points")


def cli() -> None:
    """The command `v3d-evaluate`."""
    errors.run(main)


if __name__ == "__main__":
    cli()
