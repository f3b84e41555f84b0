"""Fitting a signed distance field to posed frames: one compiled program, as `splat.fit` is.

A step renders rays through random pixels of all views, most of them around the object, evaluates
random points of the box, and takes one AdamW step. Grid levels open one after the other, the last
at `open_by` of the steps, and NeuS's cosine annealing ends inside the run (the release's schedules
end long after its 3,000 steps). `advance` runs many steps as one scan and can be a part of a larger
program; `run` calls it chunk by chunk from the host, to show progress.

Axes: v view, h w image, r ray, s step, n cells a side of the occupancy grid.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from v3d_jax.errors import UserError
from v3d_jax.ops import compiling
from v3d_jax.ops.rays import Rays
from v3d_jax.sdf import field as fields
from v3d_jax.sdf import losses, occupancy, render, start, targets, volume
from v3d_jax.sdf.field import Field, FieldConfig
from v3d_jax.sdf.hashgrid import GridConfig
from v3d_jax.sdf.losses import LossConfig, Perceptual
from v3d_jax.sdf.render import RenderConfig, Rendering
from v3d_jax.sdf.start import StartConfig
from v3d_jax.sdf.targets import Background, Targets
from v3d_jax.sdf.volume import Volume

_BACKGROUNDS = {"white": 1.0, "black": 0.0}


@dataclasses.dataclass(frozen=True)
class RateConfig:
    """AdamW's settings, the release's."""

    geometry: float = 1e-3  # grid and geometry network
    color: float = 1e-2
    sharpness: float = 1e-3
    decay: float = 0.01
    hold: float = 1 / 6  # share of the steps at full rates
    left: float = 0.1  # share of the rates at the last step, reached exponentially


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Everything static about a fit but the sizes of its frames."""

    steps: int = 3_000
    rays: int = 8_192
    share: float = 0.8  # of the rays that go around the object
    open_first: int = 4  # grid levels at the first step
    open_by: float = 0.6  # share of the steps after which all are open
    anneal: float = 0.5  # share of the steps over which NeuS's cosine annealing ends
    refresh: int = 16  # steps between updates of the occupancy grid, a part at a time
    refresh_all: int = 256  # first steps, in which all of it is updated
    background: Background = "black"
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    render: RenderConfig = dataclasses.field(default_factory=RenderConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    rates: RateConfig = dataclasses.field(default_factory=RateConfig)
    start: StartConfig = dataclasses.field(default_factory=StartConfig)


V3D = FitConfig()
# A minute or so on two CPU cores. Few steps: colour counts for more, and needs no way through the
# geometry's outputs, or it lags behind the shape and says nothing about it.
PREVIEW = FitConfig(
    steps=1_200,
    rays=512,
    open_first=2,
    refresh_all=64,
    field=FieldConfig(grid=GridConfig(levels=4, base=16, growth=1.587), color_sees_grid=True),
    render=RenderConfig(samples=24, coarse=128, occupancy=64),
    loss=LossConfig(color=10.0, points=512),
    rates=RateConfig(geometry=3e-3, sharpness=3e-3),
    start=StartConfig(steps=150, points=4096),
)


class State(NamedTuple):
    """A fit between two steps."""

    step: Int32[Array, ""]
    parameters: Field
    moments: Any  # Adam's
    occupancy: Float[Array, "n n n"]


def begin(config: FitConfig, key: Key[Array, ""], solid: Volume | None = None) -> State:
    """The state before the first step: a sphere, or `solid` where that is usable."""
    field_key, point_key = jax.random.split(key)
    parameters = fields.initial(config.field, field_key)
    zero = jnp.asarray(0, jnp.int32)
    level = open_levels(config, zero)
    if solid is not None:
        shaped = start.shape_as(config.field, config.start, parameters, solid, point_key, level)
        use = volume.usable(config.field, solid)
        parameters = jax.tree.map(lambda a, b: jnp.where(use, a, b), shaped, parameters)
    first = occupancy.initial(config.field, parameters, config.render.occupancy, level)
    return State(zero, parameters, _adam().init(parameters), first)


def open_levels(config: FitConfig, step: Int32[Array, ""]) -> Int32[Array, ""]:
    """How many of the grid's levels a step uses."""
    levels = config.field.grid.levels
    first = min(config.open_first, levels)
    part = step.astype(jnp.float32) / max(config.open_by * config.steps, 1.0)
    more = jnp.floor((levels - first) * part).astype(jnp.int32)
    return jnp.minimum(first + more, levels)


def advance(
    config: FitConfig,
    perceptual: Perceptual | None,
    params: Any,
    seen: Targets,
    state: State,
    key: Key[Array, ""],
    steps: int,
) -> tuple[State, Float[Array, "s"]]:
    """Runs `steps` steps; the state after them and every step's loss.

    `seen` are targets `with_pixels`. The key is that of the whole fit: cutting it into chunks
    changes nothing. `params` are the perceptual network's.
    """

    def one(state: State, _: None) -> tuple[State, Array]:
        return _step(config, perceptual, params, seen, state, key)

    return lax.scan(one, state, None, length=steps)


begin_jit = jax.jit(begin, static_argnums=0, compiler_options=compiling.OPTIONS)
advance_jit = jax.jit(advance, static_argnums=(0, 1, 6), compiler_options=compiling.OPTIONS)


def run(
    config: FitConfig,
    seen: Targets,
    key: Key[Array, ""],
    *,
    solid: Volume | None = None,
    perceptual: Perceptual | None = None,
    params: Any = None,
    chunk: int = 100,
    progress: Callable[[int, float], None] | None = None,
) -> State:
    """The whole fit from the host; `progress` is told the steps done and the loss.

    Raises `UserError` for frames without an object or with values that are not numbers, when the
    loss is no longer a number, and when the fitted field has no surface.
    """
    targets.check(seen)
    begin_key, fit_key = jax.random.split(key)
    seen = jax.jit(targets.with_pixels)(seen)
    state, done = begin_jit(config, begin_key, solid), 0
    while done < config.steps:
        steps = min(chunk, config.steps - done)
        state, found = advance_jit(config, perceptual, params, seen, state, fit_key, steps)
        done += steps
        if not bool(jnp.isfinite(found).all()):
            raise UserError(
                f"the fit's loss is not a number after {done} steps: lower the learning rates"
            )
        if progress is not None:
            progress(done, float(found[-1]))
    if not bool(occupancy.crosses(state.occupancy)):
        raise UserError(
            "the fitted field has no surface: check that the cameras look at the object and that "
            "the masks show it"
        )
    return state


def _step(
    config: FitConfig,
    perceptual: Perceptual | None,
    params: Any,
    seen: Targets,
    state: State,
    key: Key[Array, ""],
) -> tuple[State, Float[Array, ""]]:
    keys = jax.random.split(jax.random.fold_in(key, state.step), 6)
    level = open_levels(config, state.step)
    part = state.step.astype(jnp.float32) / max(config.anneal * config.steps, 1.0)
    anneal = jnp.minimum(part, 1.0)
    if config.background == "random":
        back = jax.random.uniform(keys[0], (3,))
    else:
        back = jnp.full(3, _BACKGROUNDS[config.background])

    def see(key: Array, parameters: Field, view: Array, pixels: Array) -> tuple[Rays, Rendering]:
        rays = render.pixel_rays(seen.cameras, view, pixels)
        offset = jax.random.uniform(key, view.shape)
        rendering = render.render(
            config.field,
            config.render,
            parameters,
            state.occupancy,
            rays,
            offset,
            anneal=anneal,
            level=level,
        )
        return rays, rendering

    def patch(parameters: Field) -> Array:
        view, pixels = targets.draw_patch(keys[4], seen, config.loss.patch)
        _, found = see(keys[5], parameters, view, pixels)
        wanted = targets.look(seen, view, pixels, back).color
        shape = (1, config.loss.patch, config.loss.patch, 3)
        pair = [2.0 * x.reshape(shape) - 1.0 for x in (_on(found, back), wanted)]
        assert perceptual is not None
        return jnp.mean(perceptual(params, *pair))

    def loss(parameters: Field) -> Array:
        view, pixels = targets.draw(keys[1], seen, config.rays, config.share)
        rays, found = see(keys[2], parameters, view, pixels)
        wanted = targets.look(seen, view, pixels, back)
        value = _ray_loss(config.loss, rays, found, wanted, back, seen.alpha is not None)
        value = value + _point_loss(config, parameters, found, level, keys[3])
        if config.loss.lpips and perceptual is not None:
            late = state.step >= config.loss.patch_from * config.steps
            nothing = jnp.zeros(())
            more = lax.cond(late, patch, lambda _: nothing, parameters)
            value = value + config.loss.lpips * more
        return value

    value, gradient = jax.value_and_grad(loss)(state.parameters)
    update, moments = _adam().update(gradient, state.moments)
    parameters = jax.tree.map(
        lambda p, u, rate: p - rate * (u + config.rates.decay * p),
        state.parameters,
        update,
        _rates(config, state),
    )
    occupied = _refresh(config, parameters, state, level)
    return State(state.step + 1, parameters, moments, occupied), value


def _ray_loss(
    config: LossConfig,
    rays: Rays,
    found: Rendering,
    wanted: targets.Seen,
    back: Float[Array, "3"],
    masked: bool,
) -> Float[Array, ""]:
    shown = wanted.alpha > 0
    total = config.color * losses.color(_on(found, back), wanted.color, shown)
    if config.mask and masked:
        total = total + config.mask * losses.mask(found.opacity, wanted.alpha)
    if config.normal and wanted.normal is not None:
        apart = losses.normal(found.normal, wanted.normal, rays.directions, shown)
        total = total + config.normal * apart
    return total


def _point_loss(
    config: FitConfig, parameters: Field, found: Rendering, level: Array, key: Key[Array, ""]
) -> Float[Array, ""]:
    """Terms that ask for a signed distance, on the rays' samples and on random points."""
    told, radius = config.loss, config.field.radius
    place_key, nudge_key = jax.random.split(key)
    places = jax.random.uniform(place_key, (told.points, 3), minval=-radius, maxval=radius)
    nearby = places + told.nudge * radius * jax.random.normal(nudge_key, places.shape)
    both = jnp.concatenate([places, jnp.clip(nearby, -radius, radius)])
    random = fields.evaluate(config.field, parameters, both, level)
    at, by = jnp.split(random.gradient, 2)
    sampled = jnp.repeat(found.samples.valid, found.samples.distance.shape[1])
    counts = jnp.concatenate([sampled, jnp.ones(told.points, bool)])
    total = told.eikonal * losses.eikonal(jnp.concatenate([found.found.gradient, at]), counts)
    if told.smooth:
        total = total + told.smooth * losses.smoothness(at, by)
    if told.sparsity:
        total = total + told.sparsity * losses.sparsity(random.sdf[: told.points], radius)
    return total


def _on(found: Rendering, back: Float[Array, "3"]) -> Float[Array, "r 3"]:
    return found.color + (1.0 - found.opacity)[:, None] * back[None]


def _refresh(
    config: FitConfig, parameters: Field, state: State, level: Array
) -> Float[Array, "n n n"]:
    """The occupancy grid, brought up to date where the schedule says so."""
    turn = state.step // config.refresh
    count = jnp.where(state.step < config.refresh_all, occupancy.PARTS, 1)

    def anew(values: Array) -> Array:
        return occupancy.refresh(config.field, parameters, values, turn, count, level)

    due = state.step % config.refresh == config.refresh - 1
    return lax.cond(due, anew, lambda values: values, state.occupancy)


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(0.9, 0.99, eps=1e-15)


def _rates(config: FitConfig, state: State) -> Field:
    """Learning rates at a step, in the shape of the parameters."""
    rates = config.rates
    part = (state.step.astype(jnp.float32) / config.steps - rates.hold) / (1.0 - rates.hold)
    fall = jnp.power(rates.left, jnp.maximum(part, 0.0))
    given = state.parameters
    return Field(
        fall * rates.geometry,
        jax.tree.map(lambda _: fall * rates.geometry, given.geometry),
        jax.tree.map(lambda _: fall * rates.color, given.color),
        fall * rates.sharpness,
    )
