"""Pictures to orbit videos and splats: `python -m v3d_jax.sample IMAGE... --out DIR`.

Views of a place to new views of it: `python -m v3d_jax.sample --scene VIEWS --path orbit`.

Every picture gets a folder DIR/<stem>/ with input.png, frames/, orbit.mp4, transforms.json,
preview.png and report.json; with `--stages video,splats,mesh` also splats.ply, splats.mp4 and
mesh.glb (docs/method.md). Without a picture the packaged example is used. A scene gets the same
files of its frames, with path.mp4 for orbit.mp4.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import UInt8

from v3d_jax import (
    console,
    errors,
    meshing,
    pipeline,
    scene_pipeline,
    scenes,
    splatting,
    surfacing,
    unbounded,
)
from v3d_jax.data import output, preprocess
from v3d_jax.diffusion import sampler
from v3d_jax.ops import camera, compiling
from v3d_jax.weights import folder, packaged

STAGES = ("video", "splats", "mesh")
# Generated frames that may lack a part of the object before it is cut away.
TOLERATED = 2
EXAMPLE = packaged.ASSETS / "example.png"


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """Turns pictures of objects into orbit videos, 3D Gaussians and meshes, views into others."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Pictures, best with a transparent background; without any the packaged example."""
    out: Path = Path("out")
    """Folder that receives one folder a picture."""
    model: str | None = None
    """A packaged model's name, a model folder, or a published checkpoint (docs/weights.md); if none
    is named, mini, or with --scene scene_mini."""
    preset: Literal["fast"] | None = None
    """fast: few steps, less guidance (docs/method.md); the settings below still replace its own."""
    steps: int | None = None
    """Sampling steps, instead of the model's own."""
    sampler: Literal["euler", "heun", "dpmpp_2m"] | None = None
    """Solver, instead of the model's own."""
    schedule: Literal["edm", "ays"] | None = None
    """Noise levels: EDM's, or those of Align Your Steps, instead of the model's own."""
    guidance: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="MIN MAX")] = None
    """Smallest and largest guidance scale over the frames, instead of the model's own."""
    seed: int = 0
    """Of all noise; every picture starts from the same."""
    border: float = preprocess.BORDER
    """Empty share of the frame around the object."""
    stages: str = "video"
    """What to make, separated by commas: video, and of it splats, mesh or both."""
    tour: Annotated[scenes.SceneArgs, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=scenes.SceneArgs
    )
    splats: Annotated[splatting.SplatArgs, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=splatting.SplatArgs
    )
    surface: Annotated[surfacing.SurfaceArgs, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=surfacing.SurfaceArgs
    )
    mesh: Annotated[meshing.MeshArgs, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=meshing.MeshArgs
    )
    activations: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the networks' activations; auto is float32 on a CPU, else bfloat16."""
    low_memory: bool = False
    """Less memory and the same frames, more slowly."""
    devices: int = 1
    """Split guidance's branches and the frames over so many devices."""
    cache: bool = True
    """Keep compiled programs in the user's cache folder (~/.cache/v3d_jax)."""


def cli() -> None:
    """Entry point of `v3d-sample` and `python -m v3d_jax.sample`."""
    errors.run(main)


def main() -> None:
    """Parses the command line and runs it."""
    run(tyro.cli(SampleArgs, prog="python -m v3d_jax.sample"))


def run(args: SampleArgs) -> list[Path]:
    """Generates and writes every orbit; returns their folders.

    All pictures are read and all folders checked before the first is generated. Raises `UserError`.
    """
    _check(args)
    model = packaged.named(args.model, scenes=args.tour.scene is not None)
    args = dataclasses.replace(args, model=model)
    if args.tour.scene is not None:
        return [_run_scene(args)]
    pictures = list(args.images) or [EXAMPLE]
    folders = output.plan(pictures, args.out)
    if args.cache:
        console.enable_cache()
    wanted, seconds = stages(args.stages), dict[str, float]()
    unread = packaged.open_model(args.model)
    if unread.generator.pixelnerf is not None:
        raise errors.UserError(f"{args.model} is a scene model: give it views by --scene")
    settings = configure(args, unread)
    pipeline.device_mesh(settings)
    height, width = settings.generator.frame_size
    if height != width:
        raise errors.UserError(f"{args.model} makes {width} x {height} frames; orbits are square")
    with console.timed(seconds, "prepare"):
        prepared = [preprocess.prepare(picture, width, args.border) for picture in pictures]
    for note in dict.fromkeys(note for one in prepared for note in one.notes):
        console.note(note)
    with console.progress(seconds, "load", len(unread.tensors)) as bar:
        params = pipeline.read_params(settings, unread, bar.update)
    cameras = camera.orbit(settings.generator.num_frames, width=width, height=height)
    for picture, one, target in zip(pictures, prepared, folders, strict=True):
        spent = dict(seconds)
        frames = generate(settings, params, one.image, args.seed, spent)
        posed = splatting.Frames(frames, None, cameras, TOLERATED)
        splats, mesh, failure = None, None, None
        if "splats" in wanted:
            splats = splatting.reconstruct(args.splats, posed, args.seed, spent)
        if "mesh" in wanted:
            # What the mesh is made of is worth keeping where there can be none.
            try:
                fit = meshing.field_of(args.surface)
                mesh = meshing.reconstruct(args.mesh, posed, fit, args.seed, spent)
            except errors.UserError as error:
                failure = error
        report = describe(args, settings, picture, one.notes, spent)
        written: dict[str, Any] = {}
        if splats is not None:
            report["splats"] = splats.report
            written["splats"] = output.Splats(*splats[:3])
        if mesh is not None:
            report["mesh"] = mesh.report
            written["mesh"] = output.Mesh(mesh.painted, mesh.renders, meshing.formats(args.mesh))
        output.write(target, one.rgba, frames, cameras, report, **written)
        generated = sum(spent[stage] for stage in ("encode", "sample", "decode"))
        made = [f"{len(frames)} frames in {generated:.1f} s"]
        if splats is not None:
            made.append(splatting.told(splats, spent))
        if mesh is not None:
            made.append(meshing.told(mesh, spent))
        print(f"{target}: {', '.join(made)}")
        if failure is not None:
            raise errors.UserError(f"{target} has no mesh: {failure}")
    return folders


def _run_scene(args: SampleArgs) -> Path:
    """Generates and writes the frames along a path through a scene; returns their folder."""
    seconds = dict[str, float]()
    scene = args.tour.scene.resolve()
    (target,) = output.plan([scene], args.out)
    if target.resolve() == scene or target.resolve() in scene.parents:
        raise errors.UserError(f"--out {args.out} holds the views and would replace them")
    unread = packaged.open_model(args.model)
    if unread.generator.pixelnerf is None:
        raise errors.UserError(
            f"{args.model} is no scene model: name one by --model, such as scene_mini"
        )
    if args.cache:
        console.enable_cache()
    settings = configure(args, unread)
    pipeline.device_mesh(settings)
    with console.timed(seconds, "prepare"):
        prepared = scenes.prepare(args.tour, settings.generator)
    for note in prepared.notes:
        console.note(note)
    with console.progress(seconds, "load", len(unread.tensors)) as bar:
        params = pipeline.read_params(settings, unread, bar.update)
    condition_key, noise_key = pipeline.split_key(jax.random.key(args.seed))
    with console.progress(seconds, "encode", 1) as bar:
        cameras = (prepared.views, prepared.targets)
        seen = jax.block_until_ready(_encode_scene(settings, params, *cameras, condition_key))
        bar.update()
    frames = draw(settings, params, seen.condition, noise_key, seconds, *cameras, seen.disparity)
    frames = frames[: len(prepared.cameras.width)]
    generated = sum(seconds[stage] for stage in ("encode", "sample", "decode"))
    made, splats, failure = [f"{len(frames)} frames in {generated:.1f} s"], None, None
    if "splats" in stages(args.stages):
        posed = splatting.Frames(frames, None, prepared.cameras, scene=unbounded.Scene())
        # What the splats are made of is worth keeping where there can be none.
        try:
            splats = splatting.reconstruct(args.splats, posed, args.seed, seconds)
        except errors.UserError as error:
            failure = error
    report = describe(args, settings, scene, prepared.notes, seconds)
    report |= scenes.describe(args.tour, prepared)
    written: dict[str, Any] = {}
    if splats is not None:
        report["splats"] = splats.report
        written["splats"] = output.Splats(*splats[:3])
        made.append(splatting.told(splats, seconds))
    output.write(
        target, prepared.picture, frames, prepared.cameras, report, video="path.mp4", **written
    )
    print(f"{target}: {', '.join(made)}")
    if failure is not None:
        raise errors.UserError(f"{target} has no splats: {failure}")
    return target


def stages(text: str) -> list[str]:
    """The stages of a list separated by commas."""
    return [stage.strip() for stage in text.split(",")]


def configure(args: SampleArgs, model: folder.Model | folder.Unread) -> pipeline.Settings:
    """The model's own sampling settings with those of the command line put in."""
    sampling = model.sampling
    if args.preset == "fast":
        if sampling.steps <= sampler.fast(sampling).steps:
            raise errors.UserError(
                f"--preset fast: {args.model} samples in {sampling.steps} steps already:"
                " leave the preset out"
            )
        sampling = sampler.fast(sampling)
    given = {"steps": args.steps, "sampler": args.sampler, "schedule": args.schedule}
    if args.guidance is not None:
        given["guidance_min"], given["guidance_max"] = args.guidance
    changes = {name: value for name, value in given.items() if value is not None}
    return pipeline.Settings(
        model.generator,
        dataclasses.replace(sampling, **changes),
        activations=args.activations,
        low_memory=args.low_memory,
        devices=args.devices,
    )


def generate(
    settings: pipeline.Settings,
    params: Any,
    image: UInt8[np.ndarray, "h w 3"],
    seed: int,
    seconds: dict[str, float],
) -> UInt8[np.ndarray, "t h w 3"]:
    """`pipeline.image_to_orbit`, a stage and a step at a time so that progress can be shown.

    Adds each stage's time to `seconds`, compilation included.
    """
    condition_key, noise_key = pipeline.split_key(jax.random.key(seed))
    pixels = jnp.asarray(image, jnp.float32)[None] / 255.0
    with console.progress(seconds, "encode", 1) as bar:
        condition = _encode(settings, params, pixels, condition_key)
        jax.block_until_ready(condition)
        bar.update()
    return draw(settings, params, condition, noise_key, seconds)


def draw(
    settings: pipeline.Settings,
    params: Any,
    condition: Any,
    noise_key: Any,
    seconds: dict[str, float],
    *scene: Any,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Samples and decodes the frames of one condition; as `generate` in all else.

    Of a scene its views, the cameras of the frames and their disparity are given as well.
    """
    trajectory, levels = pipeline.begin(settings, 1, noise_key)
    with console.progress(seconds, "sample", len(levels) - 1) as bar:
        for step in range(len(levels) - 1):
            trajectory = _advance(settings, params, condition, trajectory, levels[step : step + 2])
            jax.block_until_ready(trajectory)
            bar.update()
    with console.progress(seconds, "decode", 1) as bar:
        decoded = _decode(settings, params, trajectory.x)
        if scene:
            decoded = _finish(settings, params, decoded, *scene)
        frames = np.asarray(decoded[0])
        bar.update()
    if not np.isfinite(frames).all():
        raise errors.UserError("the model gave NaN: try --activations float32, or another --seed")
    return (frames * 255.0 + 0.5).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0, compiler_options=compiling.OPTIONS)
def _encode(settings: pipeline.Settings, params: Any, *given: Any) -> Any:
    condition = pipeline.encode_condition(settings, params, *given)
    return pipeline.branch(settings, params, condition)


@functools.partial(jax.jit, static_argnums=0, compiler_options=compiling.OPTIONS)
def _encode_scene(settings: pipeline.Settings, params: Any, *given: Any) -> Any:
    made = scene_pipeline.scene_condition(settings, params, *given)
    return made._replace(condition=pipeline.branch(settings, params, made.condition))


_advance = jax.jit(pipeline.advance, static_argnums=0, compiler_options=compiling.OPTIONS)
_decode = jax.jit(pipeline.decode, static_argnums=0, compiler_options=compiling.OPTIONS)
_finish = jax.jit(scene_pipeline.finish, static_argnums=0, compiler_options=compiling.OPTIONS)


def describe(
    args: SampleArgs,
    settings: pipeline.Settings,
    picture: Path,
    notes: tuple[str, ...],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The report: settings, versions, device, seconds a stage and peak memory in bytes."""
    return {
        "image": str(picture),
        "notes": list(notes),
        "model": args.model,
        "seed": args.seed,
        "border": args.border,
        "sampling": dataclasses.asdict(settings.sampling),
        "conditioning": dataclasses.asdict(settings.conditioning),
        "generator": dataclasses.asdict(settings.generator),
        "activations": settings.dtype.name,
        "low_memory": settings.low_memory,
        "devices": settings.devices,
        **console.machine(seconds),
    }


def _check(args: SampleArgs) -> None:
    unknown = [stage for stage in stages(args.stages) if stage not in STAGES]
    if unknown:
        raise errors.UserError(
            f"--stages: {unknown[0]!r} is not available; there is: {', '.join(STAGES)}"
        )
    if "video" not in stages(args.stages):
        made = ",".join(stages(args.stages))
        raise errors.UserError(f"--stages: {made} needs the video: give video,{made}")
    if args.tour.scene is not None:
        scenes.check(args.tour)
        if args.images:
            raise errors.UserError("--scene takes its pictures from a folder: leave IMAGE out")
        if "mesh" in stages(args.stages):
            raise errors.UserError("--stages: a mesh is made of objects, and this is a scene")
        if "splats" in stages(args.stages):
            splatting.configure(args.splats, unbounded.Scene())
    elif args.tour != scenes.SceneArgs():
        raise errors.UserError(
            "--path, --arc and --fov are for a scene: name its folder by --scene"
        )
    splatting.check(args.splats)
    surfacing.check(args.surface)
    meshing.check(args.mesh)
    if args.steps is not None and args.steps < 1:
        raise errors.UserError(f"--steps {args.steps}: at least 1 is needed")
    if args.devices < 1:
        raise errors.UserError(f"--devices {args.devices}: at least 1 is needed")
    if args.low_memory and args.devices > 1:
        raise errors.UserError("--low-memory is for one device: leave it or --devices out")
    if not 0.0 <= args.border < 1.0:
        raise errors.UserError(f"--border {args.border}: a fraction from 0 to below 1 is needed")
    if not 0 <= args.seed < 2**32:
        raise errors.UserError(f"--seed {args.seed}: a number from 0 to {2**32 - 1} is needed")
    if args.guidance is not None and not np.isfinite(args.guidance).all():
        raise errors.UserError("--guidance: two finite numbers are needed")


if __name__ == "__main__":
    cli()
