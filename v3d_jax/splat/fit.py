"""Fitting a fixed budget of Gaussians to posed frames: one compiled program, repeatable to the bit.

A step renders some of the views, drawn so that every view comes equally often, takes one Adam step
on all parameters, lets means wander, and every so often moves the faint (`densify`). `advance` runs
many steps as one scan and can be a part of a larger program; `run` calls it chunk by chunk from the
host, to show progress and to give a chunk another try with more room where the rasterizer's
capacity was exceeded.

Axes: v view, i view of a step, h w image, n Gaussian, k spherical harmonic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from v3d_jax.errors import UserError
from v3d_jax.ops import camera, compiling
from v3d_jax.splat import densify, objective, rasterize, scene, silhouette
from v3d_jax.splat.densify import DensifyConfig
from v3d_jax.splat.gaussians import Gaussians, sh_degree
from v3d_jax.splat.objective import LossConfig, Perceptual
from v3d_jax.splat.rasterize import RasterConfig

_BACKGROUNDS = {"white": 1.0, "black": 0.0}
# Of a capacity that was exceeded: room costs memory and hardly time, compiling again half a minute.
_SLACK = 1.75


@dataclass(frozen=True)
class RateConfig:
    """Learning rates of one view a step, those of the reference 3DGS."""

    means: float = 1.6e-4  # times the scene's extent
    means_left: float = 0.01  # share of it at the last step, reached exponentially
    sh: float = 2.5e-3  # of the constant harmonic
    sh_rest: float = 1.25e-4  # of the others
    opacity_logits: float = 0.05
    log_scales: float = 5e-3
    rotations: float = 1e-3
    log_gain: float = 1e-3


@dataclass(frozen=True)
class FitConfig:
    """Everything static about a fit but the sizes of its images."""

    count: int = 100_000  # Gaussians, from first to last
    steps: int = 4_000
    views: int = 1  # a step; rates grow with its square root
    degree: int = 0  # of the colours' spherical harmonics
    degree_every: int = 1_000  # steps until the next degree joins in
    opacity: float = 0.5  # at the start
    scale: float = 1.0  # at the start, of the distance to neighbours
    background: Literal["white", "black", "random"] = "white"
    view_gain: bool = False  # a colour gain a view, for frames that disagree
    contract: bool = False  # lengths grow with the range: cameras are those of a `scene.Frame`
    loss: LossConfig = field(default_factory=LossConfig)
    rates: RateConfig = field(default_factory=RateConfig)
    densify: DensifyConfig = field(default_factory=DensifyConfig)


V3D = FitConfig()
# The release's losses and its means' rate, whose fall spans 30,000 steps of which 4,000 are run.
FAITHFUL = FitConfig(
    loss=LossConfig(l1=0.0, padded_ssim=True, unit_lpips=True, settled=1.0),
    rates=RateConfig(means_left=0.541),
)
# Minutes on two CPU cores, where VGG16 alone would take seconds a step.
MINI = FitConfig(
    count=6_000,
    steps=400,
    loss=LossConfig(dssim=0.2, lpips=0.0, opacity=0.01),
    rates=RateConfig(means=4.8e-4, sh=1e-2, log_scales=1e-2),
    densify=DensifyConfig(every=50, start=100, stop=350),
)


class Targets(NamedTuple):
    """Posed frames and, where the loss has a perceptual term, their features."""

    images: silhouette.Images  # straight colours; [0, 1] or 8 bits
    alpha: silhouette.Alpha | None  # None: opaque, as frames on the fit's background are
    cameras: camera.Camera
    features: objective.Features = None


class Parameters(NamedTuple):
    """What Adam moves."""

    gaussians: Gaussians
    log_gain: Float[Array, "v 3"]  # natural logarithms; only differences between views count


class State(NamedTuple):
    """A fit between two steps."""

    step: Int32[Array, ""]
    parameters: Parameters
    moments: Any  # Adam's
    slots: Int32[Array, ""]  # largest capacity that any step needed
    moved: Int32[Array, ""]  # Gaussians moved by densification, in all


def begin(gaussians: Gaussians, views: int) -> State:
    """The state before the first step."""
    # Strong types, or the second chunk would be compiled anew.
    fields = (jnp.asarray(part, jnp.float32) for part in gaussians)
    parameters = Parameters(Gaussians(*fields), jnp.zeros((views, 3)))
    zero = jnp.asarray(0, jnp.int32)
    return State(zero, parameters, _adam(1).init(parameters), zero, zero)


def extent(cameras: camera.Camera) -> Float[Array, ""]:
    """1.1 times the largest distance of a camera from their mean, world units, as 3DGS has it."""
    centres = camera.position(cameras)
    offset = centres - centres.mean(axis=0, keepdims=True)
    return 1.1 * jnp.sqrt(jnp.square(offset).sum(axis=1)).max()


def draw_views(
    key: Key[Array, ""], step: Int32[Array, ""], total: int, count: int
) -> Int32[Array, "i"]:
    """`count` of `total` views for a step: a deck that is shuffled anew when it is used up."""

    def one(place: Array) -> Array:
        deck = jax.random.permutation(jax.random.fold_in(key, place // total), total)
        return deck[place % total]

    return jax.vmap(one)(step * count + jnp.arange(count))


def gains(log_gain: Float[Array, "v 3"]) -> Float[Array, "v 3"]:
    """Colour gains of all views; their geometric mean is 1, as the Gaussians carry the rest."""
    return jnp.exp(log_gain - log_gain.mean(axis=0, keepdims=True))


def behind(config: FitConfig) -> Float[Array, "3"]:
    """What is behind all Gaussians in renders: the fit's background, black if that is random."""
    return jnp.full(3, _BACKGROUNDS.get(config.background, 0.0))


def with_features(
    config: FitConfig, targets: Targets, perceptual: Perceptual | None, params: Any
) -> Targets:
    """Targets with the features that `config.loss` compares, computed once for the whole fit.

    Raises ValueError where they would not stay the same: transparent targets on random backgrounds.
    """
    if perceptual is None or not config.loss.lpips:
        return targets._replace(features=None)
    if config.background == "random" and targets.alpha is not None:
        raise ValueError("random backgrounds change transparent targets: set loss.lpips to 0")
    images = _composited(targets.images, targets.alpha, behind(config))
    features = objective.target_features(config.loss, perceptual, params, images)
    return targets._replace(features=features)


def advance(
    config: FitConfig,
    raster: RasterConfig,
    perceptual: Perceptual | None,
    params: Any,
    targets: Targets,
    state: State,
    key: Key[Array, ""],
    steps: int,
) -> tuple[State, Float[Array, "s"]]:
    """Runs `steps` steps; the state after them and every step's loss.

    The key is that of the whole fit: what a step draws follows from it and the step's number, so
    that cutting a fit into chunks changes nothing. `params` are the perceptual network's.
    """
    size = extent(targets.cameras)
    if perceptual is not None:
        params = perceptual.prepare(params)

    def one(state: State, _: None) -> tuple[State, Array]:
        return _step(config, raster, perceptual, params, targets, size, state, key)

    return lax.scan(one, state, None, length=steps)


features_jit = jax.jit(with_features, static_argnums=(0, 2), compiler_options=compiling.OPTIONS)
advance_jit = jax.jit(advance, static_argnums=(0, 1, 2, 7), compiler_options=compiling.OPTIONS)


def run(
    config: FitConfig,
    raster: RasterConfig,
    targets: Targets,
    gaussians: Gaussians,
    key: Key[Array, ""],
    *,
    perceptual: Perceptual | None = None,
    params: Any = None,
    chunk: int = 100,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[State, RasterConfig]:
    """The whole fit from the host; the last state and the rasterizer's configuration used.

    `raster.slots` is a first guess. A chunk that needed more is run again from the state before
    it, so the result is that of a run with enough room from the start. `progress` is told the steps
    done and the loss. Raises `UserError` when the loss is no longer a number.
    """
    targets = features_jit(config, targets, perceptual, params)
    state, done = begin(gaussians, len(targets.images)), 0
    while done < config.steps:
        steps = min(chunk, config.steps - done)
        arguments = (perceptual, params, targets, state, key, steps)
        after, losses = advance_jit(config, raster, *arguments)
        if int(after.slots) > raster.slots:
            raster = rasterize.with_room(raster, after.slots, slack=_SLACK)
            continue
        state, done = after, done + steps
        loss = float(losses[-1])
        if not bool(jnp.isfinite(losses).all()):
            raise UserError(
                f"the fit's loss is not a number after {done} steps: check that the frames hold no "
                "NaN, or lower the learning rates"
            )
        if progress is not None:
            progress(done, loss)
    return state, raster


def _step(
    config: FitConfig,
    raster: RasterConfig,
    perceptual: Perceptual | None,
    params: Any,
    targets: Targets,
    size: Float[Array, ""],
    state: State,
    key: Key[Array, ""],
) -> tuple[State, Float[Array, ""]]:
    view_key, step_key = jax.random.split(key)
    step_key = jax.random.fold_in(step_key, state.step)
    background_key, noise_key, move_key = jax.random.split(step_key, 3)
    total = targets.cameras.intrinsics.shape[0]
    chosen = draw_views(view_key, state.step, total, config.views)
    seen = jax.tree.map(lambda leaf: leaf[chosen], targets)
    if config.background == "random":
        back = jax.random.uniform(background_key, (3,))
    else:
        back = behind(config)
    wanted = _composited(seen.images, seen.alpha, back)

    def loss(parameters: Parameters) -> tuple[Array, Array]:
        gaussians = _with_degree(config, parameters.gaussians, state.step)
        render = rasterize.rasterize(gaussians, seen.cameras, raster)
        color = render.color
        if config.view_gain:
            color = color * gains(parameters.log_gain)[chosen][:, None, None]
        color = color + (1.0 - render.alpha)[..., None] * back.reshape(1, 1, 1, 3)
        value = objective.image_loss(config.loss, color, wanted)
        if seen.features is not None:
            assert perceptual is not None
            given = objective.perceptual_input(config.loss, color)
            distance = perceptual.distance(params, given, seen.features)
            value = value + config.loss.lpips * jnp.mean(distance)
        moving = state.step < config.densify.stop
        unit = size
        if config.contract:
            unit = lax.stop_gradient(size * scene.unit(gaussians.means))
        value = value + objective.regularization(config.loss, gaussians, unit, moving)
        return value, render.slots

    (value, slots), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
    update, moments = _adam(config.views).update(gradient, state.moments)
    rates = _rates(config, state, size)
    moved_to = jax.tree.map(lambda p, u, rate: p - rate * u, state.parameters, update, rates)
    gaussians, wander = moved_to.gaussians, config.densify.noise * rates.gaussians.means
    if config.contract:
        # Equation 8 in units: a variance is divided by two of them and a step multiplied by one.
        wander = wander[:, 0] / jnp.square(scene.unit(gaussians.means))
    step = densify.exploration(noise_key, gaussians, wander)
    gaussians = gaussians._replace(means=gaussians.means + step)
    gaussians, moments, moved = _densify(config, move_key, state.step + 1, gaussians, moments)
    after = State(
        state.step + 1,
        Parameters(gaussians, moved_to.log_gain),
        moments,
        jnp.maximum(state.slots, slots),
        state.moved + moved,
    )
    return after, value


def _densify(
    config: FitConfig, key: Key[Array, ""], step: Array, gaussians: Gaussians, moments: Any
) -> tuple[Gaussians, Any, Array]:
    """Moves dead Gaussians where the schedule says so, and forgets the moments of what changed."""
    schedule = config.densify

    def move(gaussians: Gaussians, moments: Any) -> tuple[Gaussians, Any, Array]:
        pull = None
        if schedule.pull:
            # Adam's mean of squares; in units, as means' rates are.
            square = moments.nu.gaussians.means.sum(axis=1)
            if config.contract:
                square = square * jnp.square(scene.unit(gaussians.means))
            pull = jnp.power(square, 0.5 * schedule.pull)
        told = densify.relocate(key, gaussians, schedule.min_opacity, schedule.split, pull)

        def forget(leaf: Array) -> Array:
            shape = (-1,) + (1,) * (leaf.ndim - 1)
            return jnp.where(told.changed.reshape(shape), 0.0, leaf)

        kept = [
            tree._replace(gaussians=jax.tree.map(forget, tree.gaussians))
            for tree in (moments.mu, moments.nu)
        ]
        return told.gaussians, moments._replace(mu=kept[0], nu=kept[1]), told.moved

    def stay(gaussians: Gaussians, moments: Any) -> tuple[Gaussians, Any, Array]:
        return gaussians, moments, jnp.asarray(0, jnp.int32)

    due = (step % schedule.every == 0) & (step >= schedule.start) & (step < schedule.stop)
    return lax.cond(due, move, stay, gaussians, moments)


def _adam(views: int) -> optax.GradientTransformation:
    """Adam of the reference 3DGS, its averages as long in views whatever the views a step."""
    return optax.scale_by_adam(
        max(0.0, 1.0 - views * 0.1), max(0.0, 1.0 - views * 1e-3), eps=1e-15 / math.sqrt(views)
    )


def _rates(config: FitConfig, state: State, size: Float[Array, ""]) -> Parameters:
    """Learning rates at a step, in the shape of the parameters."""
    rates, more = config.rates, math.sqrt(config.views)
    part = state.step.astype(jnp.float32) / max(config.steps - 1, 1)
    means = rates.means * more * size * jnp.power(rates.means_left, part)
    if config.contract:
        means = means * scene.unit(state.parameters.gaussians.means)[:, None]
    coefficients = state.parameters.gaussians.sh.shape[1]
    sh = [rates.sh] + [rates.sh_rest] * (coefficients - 1)
    gaussians = Gaussians(
        means,
        jnp.asarray(more * rates.rotations),
        jnp.asarray(more * rates.log_scales),
        jnp.asarray(more * rates.opacity_logits),
        jnp.asarray([more * rate for rate in sh]).reshape(1, -1, 1),
    )
    return Parameters(gaussians, jnp.asarray(more * rates.log_gain))


def _with_degree(config: FitConfig, gaussians: Gaussians, step: Array) -> Gaussians:
    """Gaussians without the harmonics of degrees that have not joined in yet."""
    count = gaussians.sh.shape[1]
    if sh_degree(count) == 0:
        return gaussians
    degree = jnp.floor(jnp.sqrt(jnp.arange(count) + 0.5)).astype(jnp.int32)
    joined = degree <= step // config.degree_every
    return gaussians._replace(sh=jnp.where(joined.reshape(1, -1, 1), gaussians.sh, 0.0))


def _composited(
    images: silhouette.Images, alpha: silhouette.Alpha | None, back: Float[Array, "3"]
) -> Float[Array, "i h w 3"]:
    color = silhouette.to_unit(images)
    if alpha is None:
        return color
    cover = silhouette.to_unit(alpha)[..., None]
    return color * cover + (1.0 - cover) * back.reshape(1, 1, 1, 3)
