"""Posed frames to Gaussians from the host: start, fit, renders and scores, with progress shown.

Axes: v view, t frame of the turn, h w image.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from v3d_jax import console, errors, pipeline, unbounded
from v3d_jax.data import views
from v3d_jax.nn import lpips
from v3d_jax.ops import camera, compiling, metrics
from v3d_jax.ops import image as images
from v3d_jax.splat import carve, cloud, fit, path, rasterize, recipe, scene, silhouette
from v3d_jax.splat.gaussians import MAX_DEGREE, Gaussians
from v3d_jax.weights import lpips as lpips_weights

MIN_SIDE = 16  # pixels: what SSIM's window and VGG16's pooling need
TURN_FRAMES = 90
STAGES = ("carve", "sweep", "fit", "render")  # names of the times spent, the first two in turn
_ALEXNET_SIDE = 31
_PRESETS = {"v3d": fit.V3D, "faithful": fit.FAITHFUL, "mini": fit.MINI}
_SCENE_PRESETS = {"v3d": recipe.SCENE, "mini": recipe.SCENE_MINI}
_CHUNKS = 20  # of a fit: how often progress is told


@dataclasses.dataclass(frozen=True)
class SplatArgs:
    """Settings of the splats that a command line offers."""

    fit: Literal["auto", "v3d", "faithful", "mini"] = "auto"
    """Recipe: V3D's with L1 added, exactly V3D's losses, or a small one; auto: mini on a CPU.
    Of unbounded scenes v3d is 3DGS-MCMC's, and there is no faithful one."""
    gaussians: int | None = None
    """How many Gaussians, instead of the recipe's own."""
    fit_steps: int | None = None
    """Steps of the fit, instead of the recipe's own."""
    fit_views: int | None = None
    """Views a step, instead of the recipe's own."""
    degree: int | None = None
    """Degree of the colours' spherical harmonics, 0 to 3, instead of the recipe's own."""
    view_gain: bool = False
    """Fit a colour gain for every frame, for frames that disagree in brightness."""


class Frames(NamedTuple):
    """Posed frames of one object, or of an unbounded scene."""

    images: UInt8[np.ndarray, "v h w 3"]
    alpha: UInt8[np.ndarray, "v h w"] | None  # None: opaque, the object on white
    cameras: camera.Camera
    tolerated: int = 0  # frames that may miss a part of the object, as generated ones do
    scene: unbounded.Scene | None = None  # None: of an object


def part(frames: Frames, chosen: np.ndarray) -> Frames:
    """Some of the frames, by their numbers or a mask."""
    return frames._replace(
        images=frames.images[chosen],
        alpha=None if frames.alpha is None else frames.alpha[chosen],
        cameras=camera.Camera(*(field[chosen] for field in frames.cameras)),
    )


class Result(NamedTuple):
    """Gaussians, what they look like (an object on white), and the report's entry."""

    gaussians: Gaussians
    renders: UInt8[np.ndarray, "v h w 3"]
    turn: UInt8[np.ndarray, "t h w 3"]
    report: dict[str, Any]


def check(args: SplatArgs) -> None:
    """Raises `UserError` for settings out of range."""
    least = {"gaussians": 4, "fit_steps": 1, "fit_views": 1, "degree": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            flag = name.replace("_", "-")
            raise errors.UserError(f"--{flag} {value}: at least {low} is needed")
    if args.degree is not None and args.degree > MAX_DEGREE:
        raise errors.UserError(f"--degree {args.degree}: at most {MAX_DEGREE} is possible")


def configure(args: SplatArgs, scene: unbounded.Scene | None = None) -> fit.FitConfig:
    """The recipe with the command line's settings put in; its schedule follows the steps.

    Raises `UserError` for a recipe that scenes do not have.
    """
    automatic = "mini" if jax.default_backend() == "cpu" else "v3d"
    presets, name = _PRESETS, automatic if args.fit == "auto" else args.fit
    if scene is not None:
        presets = {
            key: dataclasses.replace(preset, background=scene.background)
            for key, preset in _SCENE_PRESETS.items()
        }
    if name not in presets:
        raise errors.UserError(
            f"--fit {name} is for objects: give --fit {' or '.join(presets)} for a scene"
        )
    config = presets[name]
    schedule = config.densify
    if args.fit_steps is not None:
        part = args.fit_steps / config.steps
        schedule = dataclasses.replace(
            schedule, start=round(schedule.start * part), stop=round(schedule.stop * part)
        )
    given = {
        "count": args.gaussians,
        "steps": args.fit_steps,
        "views": args.fit_views,
        "degree": args.degree,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, densify=schedule, view_gain=args.view_gain, **changes)


def reconstruct(
    args: SplatArgs,
    frames: Frames,
    seed: int,
    seconds: dict[str, float],
    held: Frames | None = None,
) -> Result:
    """Fits Gaussians to frames; adds the stages' times to `seconds`, compilation included.

    `held` are frames that are not fitted, only scored. Raises `UserError` where the frames show
    nothing, are all alike, or are too small, and where a scene's do not overlap.
    """
    check_frames(frames)
    config = configure(args, frames.scene)
    network, params = None, None
    if config.loss.lpips and (params := load_lpips("vgg", "the fit goes on with L1 and DSSIM")):
        network = pipeline.perceptual(network_dtype())
    elif config.loss.lpips:
        loss = dataclasses.replace(config.loss, lpips=0.0, l1=config.loss.l1 or 0.8)
        config = dataclasses.replace(config, loss=loss)
    start_key, fit_key = jax.random.split(jax.random.key(seed))
    with console.progress(seconds, "carve" if frames.scene is None else "sweep", 1) as bar:
        begun = _begin(config, frames, start_key)
        bar.update()
    if begun.remark is not None:
        console.note(begun.remark)
    gaussians, cameras = begun.gaussians, begun.inside(frames.cameras)
    height, width = frames.images.shape[1:3]
    raster = rasterize.RasterConfig(width=width, height=height)
    needed = _needed(gaussians, cameras, raster)
    raster = rasterize.with_room(raster, min(int(needed) * config.views, 2**30), slack=1.5)
    targets = fit.Targets(
        jnp.asarray(frames.images),
        None if frames.alpha is None else jnp.asarray(frames.alpha),
        cameras,
    )
    with console.progress(seconds, "fit", config.steps) as bar:

        def told(done: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(done - bar.n)

        state, raster = fit.run(
            config,
            raster,
            targets,
            gaussians,
            fit_key,
            perceptual=network,
            params=params,
            chunk=max(1, config.steps // _CHUNKS),
            progress=told,
        )
    gaussians = state.parameters.gaussians
    back = fit.behind(config)
    filmed = (path.turn if frames.scene is None else path.along)(cameras, TURN_FRAMES)
    if held is not None:
        both = zip(cameras, begun.inside(held.cameras), strict=True)
        cameras = camera.Camera(*(jnp.concatenate(pair) for pair in both))
    with console.progress(seconds, "render", len(cameras.intrinsics) + TURN_FRAMES) as bar:
        drawn = _draw(gaussians, cameras, raster, back, bar)
        film = _draw(gaussians, filmed, raster, back, bar)
    renders, others = np.split(drawn, [len(frames.images)])
    report = {
        "fit": dataclasses.asdict(config),
        **begun.facts,
        "slots": raster.slots,
        "moved": int(state.moved),
        **scores(renders, views.on_white(frames.images, frames.alpha)),
    }
    if held is not None:
        truth = views.on_white(held.images, held.alpha)
        report["held_out"] = {"views": len(truth), **scores(others, truth)}
    return Result(begun.outside(gaussians), renders, film, report)


def told(result: Result, seconds: dict[str, float]) -> str:
    """A run's last line on it."""
    spent = sum(seconds.get(stage, 0.0) for stage in STAGES)
    count = result.gaussians.means.shape[0]
    held = result.report.get("held_out")
    more = "" if held is None else f", {held['psnr']:.2f} dB on {held['views']} views held out"
    return f"{count} Gaussians in {spent:.1f} s ({result.report['psnr']:.2f} dB{more})"


def check_frames(frames: Frames) -> None:
    """Raises `UserError` where frames show nothing, are all alike, or are too small."""
    height, width = frames.images.shape[1:3]
    if min(height, width) < MIN_SIDE:
        raise errors.UserError(
            f"the frames are {width} x {height}: at least {MIN_SIDE} pixels a side are needed"
        )
    if frames.alpha is None and (frames.images == frames.images[:1]).all():
        raise errors.UserError("all frames are identical: views from different sides are needed")
    if frames.scene is None and not masks(frames).any():
        raise errors.UserError(
            "the frames show no object: every one is empty, or white all over; give views of an "
            "object on white or with alpha"
        )


@jax.jit
def _from_white(pictures: Array) -> Array:
    return silhouette.from_white(pictures)


def masks(frames: Frames) -> np.ndarray:
    """Alpha, or what is not white; uint8 or bool."""
    if frames.alpha is not None:
        return frames.alpha
    return np.asarray(_from_white(jnp.asarray(frames.images)))


class _Begun(NamedTuple):
    """Where a fit starts, in which frame of measure, and what to tell of it."""

    gaussians: Gaussians
    place: scene.Frame | None  # None: the world
    remark: str | None
    facts: dict[str, Any]

    def inside(self, cameras: camera.Camera) -> camera.Camera:
        return cameras if self.place is None else scene.cameras_inside(self.place, cameras)

    def outside(self, gaussians: Gaussians) -> Gaussians:
        return gaussians if self.place is None else scene.gaussians_outside(self.place, gaussians)


def _begin(config: fit.FitConfig, frames: Frames, key: Array) -> _Begun:
    if frames.scene is not None:
        started = unbounded.begin(config, frames.images, frames.cameras, frames.scene.points, key)
        facts = {"extent": float(started.place.size), "given_points": started.given}
        return _Begun(started.gaussians, started.place, None, facts)
    tolerated = min(frames.tolerated, len(frames.images) - 1)
    whole = recipe.SplatConfig(config, carve.CarveConfig(tolerated=tolerated))
    begin = jax.jit(recipe.begin, static_argnums=0)
    pictures, silhouettes = jnp.asarray(frames.images), jnp.asarray(masks(frames))
    begun, gaussians = begin(whole, pictures, silhouettes, frames.cameras, key)
    gaussians = jax.block_until_ready(gaussians)
    return _Begun(gaussians, None, cloud.describe(begun), {"carved": bool(begun.carved)})


_needed = jax.jit(rasterize.needed_slots, static_argnums=2)
_render = jax.jit(rasterize.rasterize, static_argnums=2)


def _draw(
    gaussians: Gaussians,
    cameras: camera.Camera,
    raster: rasterize.RasterConfig,
    back: Float[Array, "3"],
    bar: Any,
) -> UInt8[np.ndarray, "v h w 3"]:
    """Renders on a background, a view at a time."""
    raster = rasterize.with_room(raster, _needed(gaussians, cameras, raster))
    frames = []
    for view in range(cameras.intrinsics.shape[0]):
        lens = camera.Camera(*(part[view : view + 1] for part in cameras))
        color = np.asarray(_render(gaussians, lens, raster, back).color[0])
        frames.append((np.clip(color, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))
        bar.update()
    return np.stack(frames)


def scores(
    renders: UInt8[np.ndarray, "v h w 3"], truth: Float[np.ndarray, "v h w 3"]
) -> dict[str, Any]:
    """Means over views of PSNR, SSIM and LPIPS (AlexNet, as papers report it)."""
    params = None
    if min(truth.shape[1:3]) >= _ALEXNET_SIDE:
        params = load_lpips("alex", "the report has no LPIPS")
    rows = []
    for render, frame in zip(renders, truth, strict=True):
        pair = jnp.asarray(render, jnp.float32) / 255.0, jnp.asarray(frame)
        rows.append([float(value) for value in score_jit(params, *pair)])
    means = np.mean(rows, axis=0)
    found = dict(zip(("psnr", "ssim", "lpips"), means.tolist(), strict=False))
    return {name: found.get(name) for name in ("psnr", "ssim", "lpips")}


def score(
    params: lpips.LPIPSParams | None, render: Float[Array, "h w 3"], frame: Float[Array, "h w 3"]
) -> list[Float[Array, ""]]:
    """PSNR and SSIM of a picture in [0, 1], and LPIPS where there are parameters."""
    a, b = render[None], frame[None]
    values = [metrics.psnr(a, b), metrics.ssim(a, b)]
    if params is not None:
        values.append(lpips.distance(params, images.to_network(a), images.to_network(b)))
    return [value[0] for value in values]


score_jit = jax.jit(score, compiler_options=compiling.OPTIONS)


def load_lpips(net: Literal["vgg", "alex"], otherwise: str) -> lpips.LPIPSParams | None:
    """The weights of a perceptual distance; without them None and a note of what that means."""
    try:
        return lpips_weights.load(net)
    except lpips_weights.LPIPSUnavailable as error:
        console.note(f"{error}; without them {otherwise}")
        return None


def network_dtype() -> Any:
    """What perceptual networks run in on this machine."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
