"""Fitting the colours of a fixed mesh to posed frames: one compiled program, repeatable to the bit.

Every step draws one view and takes an Adam step on mean squared error and a perceptual distance,
with `operator` as renderer. V3D (release: recon/refine.py) moves vertex colours only, and divides
its frames by 255 twice.

Axes: v view, h w image, m values (side * side texels, or vertices). Colours are sRGB in [0, 1].
Pixels that a frame calls background teach nothing: surface that overlaps it by part of a pixel
would take on its white. Nor do those that see surface at a grazing angle.

A perceptual distance wants small steps from a good start: its gradient, hundreds of times that of
the squared error, does not fade near the frames, and Adam at the larger rate draws grain by it.

Where texels are finer than pixels the frames leave much open, and Adam would fill it with grain.
So changes are held smooth: half the squared differences between neighbouring texels' changes since
the start join the loss. Against a texel that weighs a whole pixel in a view they count little.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8

from v3d_jax.mesh import operator
from v3d_jax.mesh.operator import Operator, Sizes
from v3d_jax.ops import compiling
from v3d_jax.ops.camera import Camera

Features = Any  # a tree of arrays with the view as first axis


@runtime_checkable
class Perceptual(Protocol):
    """A perceptual distance as two functions of its parameters, as in `splat.objective`."""

    @property
    def features(self) -> Callable[[Any, Float[Array, "i h w 3"]], Features]:
        """Of images in [-1, 1]."""
        ...

    @property
    def distance(self) -> Callable[[Any, Float[Array, "i h w 3"], Features], Float[Array, "i"]]:
        """From images to those of which the features are, one number a view."""
        ...


@dataclass(frozen=True)
class TextureConfig:
    """Everything static about a fit of colours but the sizes of its images."""

    side: int = 1024  # texels
    supersample: int = 2  # samples a pixel along each axis
    steps: int = 500
    rate: float = 0.02
    perceptual_rate: float = 0.002  # instead of it, with a perceptual distance
    rate_left: float = 0.05  # share of it at the last step, reached exponentially
    damping: float = 1e-2  # added to Adam's denominator: what views hardly see hardly moves
    lpips: float = 1.0
    smooth: float = 0.05  # weight of differences between neighbouring texels' changes
    near: float = 1e-2  # world units


class Targets(NamedTuple):
    """Posed frames on white."""

    images: Float[Array, "v h w 3"] | UInt8[Array, "v h w 3"]
    inside: Bool[Array, "v h w"]  # where a frame shows the object
    cameras: Camera


class State(NamedTuple):
    """A fit between two steps."""

    step: Int32[Array, ""]
    values: Float[Array, "m 3"]
    start: Float[Array, "m 3"]
    moments: Any  # Adam's


def advance(
    config: TextureConfig,
    sizes: Sizes,
    perceptual: Perceptual | None,
    params: Any,
    matrix: Operator,
    targets: Targets,
    features: Features,
    state: State,
    key: Key[Array, ""],
    steps: int,
) -> tuple[State, Float[Array, "s"]]:
    """Runs `steps` steps as one scan; the state after them and every step's loss.

    The key is that of the whole fit: cutting a fit into chunks changes nothing. `params` are the
    perceptual network's, `features` what `target_features` gave.
    """

    def one(state: State, _: None) -> tuple[State, Array]:
        view = draw_view(key, state.step, len(targets.images))
        return _step(config, sizes, perceptual, params, matrix, targets, features, state, view)

    return lax.scan(one, state, None, length=steps)


advance_jit = jax.jit(advance, static_argnums=(0, 1, 2, 9), compiler_options=compiling.OPTIONS)


def draw_view(key: Key[Array, ""], step: Int32[Array, ""], total: int) -> Int32[Array, ""]:
    """A step's view, from a deck that is shuffled anew when it is used up."""
    deck = jax.random.permutation(jax.random.fold_in(key, step // total), total)
    return deck[step % total]


@partial(jax.jit, static_argnums=0, compiler_options=compiling.OPTIONS)
def target_features(perceptual: Perceptual, params: Any, images: Array) -> Features:
    """Features of all frames, which stay the same; one view at a time."""

    def one(image: Array) -> Features:
        tree = perceptual.features(params, 2.0 * _unit(image[None]) - 1.0)
        return jax.tree.map(lambda leaf: leaf[0], tree)

    return lax.map(one, images)


def run(
    config: TextureConfig,
    sizes: Sizes,
    matrix: Operator,
    targets: Targets,
    values: Float[Array, "m 3"],
    key: Key[Array, ""],
    *,
    perceptual: Perceptual | None = None,
    params: Any = None,
    chunk: int = 100,
    progress: Callable[[int, float], None] | None = None,
) -> Float[Array, "m 3"]:
    """The whole fit from the host, from the start `values`; `progress` is told steps and loss."""
    features = None
    if perceptual is not None and config.lpips:
        features = target_features(perceptual, params, targets.images)
    step = jnp.asarray(0, jnp.int32)
    state = State(step, values, values, _adam(config).init(values))
    while (done := int(state.step)) < config.steps:
        steps = min(chunk, config.steps - done)
        given = (perceptual, params, matrix, targets, features, state, key, steps)
        state, losses = advance_jit(config, sizes, *given)
        if progress is not None:
            progress(done + steps, float(losses[-1]))
    return state.values


def _step(
    config: TextureConfig,
    sizes: Sizes,
    perceptual: Perceptual | None,
    params: Any,
    matrix: Operator,
    targets: Targets,
    features: Features,
    state: State,
    view: Int32[Array, ""],
) -> tuple[State, Float[Array, ""]]:
    seen, wanted = jax.tree.map(lambda leaf: leaf[view], (matrix, features))
    target, inside = _unit(targets.images[view]), targets.inside[view]

    def loss(image: Array) -> Array:
        image = jnp.where(inside[..., None], image, target)
        value = jnp.mean(jnp.square(image - target))
        if features is not None:
            assert perceptual is not None
            batched = jax.tree.map(lambda leaf: leaf[None], wanted)
            distance = perceptual.distance(params, 2.0 * image[None] - 1.0, batched)
            value = value + config.lpips * distance[0]
        return value

    inside = inside & seen.trusted
    image = operator.apply(seen, state.values)
    value, gradient = jax.value_and_grad(loss)(image)
    # Of a sum over pixels, so that the damping does not depend on their number.
    gradient = operator.transpose(seen, sizes, gradient * target.size)
    if config.smooth and sizes.side is not None:
        gradient = gradient + config.smooth * _roughness(state.values - state.start, sizes.side)
    update, moments = _adam(config).update(gradient, state.moments)
    part = state.step.astype(jnp.float32) / max(config.steps - 1, 1)
    full = config.rate if features is None else config.perceptual_rate
    rate = full * jnp.power(config.rate_left, part)
    values = jnp.clip(state.values - rate * update, 0.0, 1.0)
    return state._replace(step=state.step + 1, values=values, moments=moments), value


def _roughness(values: Float[Array, "m 3"], side: int) -> Float[Array, "m 3"]:
    """The gradient of half the sum of squared differences between neighbouring texels."""
    grid = values.reshape(side, side, 3)
    edge = jnp.pad(grid, ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = edge[:-2, 1:-1] + edge[2:, 1:-1] + edge[1:-1, :-2] + edge[1:-1, 2:]
    return (4.0 * grid - around).reshape(-1, 3)


def _adam(config: TextureConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(eps=config.damping)


def _unit(images: Array) -> Float[Array, "..."]:
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    return images.astype(jnp.float32) / scale
