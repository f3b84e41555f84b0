"""The train state and one step of training, both pure.

Parameters are plain nested dicts of arrays (`nnx.to_pure_dict` of a model's State, which
`nnx.merge` takes as it is): a State costs four times as much on its way into a compiled function.
They are float32, or matrices and kernels bfloat16 (`OptimConfig.params`), which a step rounds up or
down at random so that updates far below a digit add up; moments and average stay float32.
"""

import fnmatch
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import layout
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree

from v3d_jax import errors
from v3d_jax.ops import compiling, target
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import sharding

Params = PyTree  # of jax arrays; of numpy arrays or shapes where that is said
Metrics = dict[str, Float[Array, ""]]
Loss = Callable[[Params, Any, Any, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, a stable phase, decay, clipping, and an average of the weights.

    The rate rises linearly over `warmup` steps, stays at `lr`, and from `decay_start` (a fraction
    of all steps) falls to `final_lr` x `lr` at the last step: 0 with "cosine" is the usual cosine,
    0.8 with "linear" is warm-up, stable, decay. `faster` are shell patterns of weights' dotted
    paths and what their rate is multiplied by: new weights beside trained ones learn faster.
    """

    lr: float = 1e-4
    faster: tuple[tuple[str, float], ...] = ()
    warmup: int = 500
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    decay_start: float = 0.0
    final_lr: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # on matrices and kernels only
    clip: float = 1.0  # of the gradient's global norm
    ema: float = 0.9999
    accumulate: int = 1  # parts of a batch that are computed one after the other, in less memory
    params: Literal["float32", "bfloat16"] = "float32"  # bfloat16: matrices, rounded at random

    def __post_init__(self):
        if not 0.0 <= self.decay_start < 1.0:
            raise ValueError(f"decay_start is a fraction in [0, 1), not {self.decay_start}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate is a number of parts, not {self.accumulate}")


class TrainState(NamedTuple):
    """All that training carries from step to step; `step` counts the updates made."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params


def learning_rate(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """The rate of update number `count` (from 0) in a run of `steps` updates.

    Computed on the host, so that a longer run is the same compiled program.
    """
    first = config.decay_start * steps

    def schedule(count: int) -> float:
        rise = min(1.0, (count + 1) / max(config.warmup, 1))
        progress = min(max((count - first) / max(steps - 1 - first, 1.0), 0.0), 1.0)
        remaining = {
            "constant": 1.0,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "linear": 1.0 - progress,
        }[config.decay]
        return config.lr * rise * (config.final_lr + (1.0 - config.final_lr) * remaining)

    return schedule


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW at a rate of 1; biases, norms, scalars do not decay.

    Raises `UserError` as it begins if a pattern of `config.faster` matches no weight.
    """
    # Where none is faster, the state is as deep as it was: checkpoints of such runs stay readable.
    then = (_faster(config.faster),) if config.faster else ()
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            1.0,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
        ),
        *then,
    )


def _faster(factors: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies the updates of the weights whose dotted paths match; the first match counts."""

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator=".")

    def init(params: Params) -> optax.EmptyState:
        names = [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern, _ in factors:
            if not fnmatch.filter(names, pattern):
                raise errors.UserError(
                    f"--optim.faster {pattern} names no weight; they are called as {names[0]}"
                )
        return optax.EmptyState()

    def scaled(path: Any, update: Array) -> Array:
        for pattern, factor in factors:
            if fnmatch.fnmatchcase(name(path), pattern):
                return factor * update
        return update

    def update(updates: Params, state: optax.EmptyState, params: Params | None = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)


def ema_decay(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """The average's decay at update `count`: min(decay, (1 + n) / (10 + n)), short at first."""
    n = count.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def create(
    params: Params,
    optimizer: optax.GradientTransformation,
    held: Literal["float32", "bfloat16"] = "float32",
) -> TrainState:
    """The state before the first update; the average starts at the float32 parameters given.

    `held` is `OptimConfig.params`.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(lambda x: x.astype(held) if x.ndim >= 2 else x, params),
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
    )


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    decay: float,
    state: TrainState,
    frozen: Any,
    batch: Any,
    key: Key[Array, ""],
    rate: Float[Array, ""],
    *,
    accumulate: int = 1,
    placements: Any = None,
) -> tuple[TrainState, Metrics]:
    """One update of `rate` times what `optimizer` asks for.

    `key` is the run's: the step is folded in, so nothing else carries randomness. `frozen` are
    arrays that `loss(params, frozen, batch, key)` needs and training leaves alone. The metrics are
    the loss's, with `loss` and the gradient's norm before clipping. `accumulate` and `placements`
    are those of `gradients`.
    """
    step_key = jax.random.fold_in(key, state.step)
    value, metrics, grads = gradients(
        loss, state.params, frozen, batch, step_key, accumulate, placements
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, wide)
    wide = optax.apply_updates(wide, jax.tree.map(lambda u: rate * u, updates))
    keep = ema_decay(decay, state.step)
    ema = jax.tree.map(lambda old, new: keep * old + (1.0 - keep) * new, state.ema, wide)
    params = _narrowed(wide, state.params, jax.random.fold_in(step_key, 2**31))
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def stochastic_round(x: Float[Array, "*n"], key: Key[Array, ""]) -> Float[Array, "*n"]:
    """Float32 to bfloat16: to either neighbour, by chance, so that the mean is x.

    What bfloat16 holds already stays, and so do infinities and NaN.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # The lower half is the share of the way to the next value: it carries as often as that.
    upper = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _narrowed(wide: Params, held: Params, key: Key[Array, ""]) -> Params:
    """Float32 parameters in the types of those `held`."""
    leaves, structure = jax.tree.flatten(wide)
    types = [leaf.dtype for leaf in jax.tree.leaves(held)]
    made = [
        leaf if dtype == leaf.dtype else stochastic_round(leaf, jax.random.fold_in(key, number))
        for number, (leaf, dtype) in enumerate(zip(leaves, types, strict=True))
    ]
    return jax.tree.unflatten(structure, made)


def gradients(
    loss: Loss,
    params: Params,
    frozen: Any,
    batch: Any,
    key: Key[Array, ""],
    accumulate: int = 1,
    placements: Any = None,
) -> tuple[Float[Array, ""], Metrics, Params]:
    """The loss, its metrics and the float32 gradient: means over `accumulate` parts of the batch.

    Part i is every `accumulate`-th clip from the i-th on, so that a batch split over devices stays
    where it is, and draws with its own key. `placements` are shardings of the parameters, which
    gradients keep: each device sums and holds its own share.
    """
    grad = jax.value_and_grad(loss, has_aux=True)

    def pinned(grads: Params) -> Params:
        grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        if placements is not None:
            grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, placements)
        return _laid_out(grads, placements)

    if accumulate == 1:
        (value, metrics), grads = grad(params, frozen, batch, key)
        return value, metrics, pinned(grads)

    def part_of(leaf: Any) -> Any:
        return jnp.swapaxes(leaf.reshape(-1, accumulate, *leaf.shape[1:]), 0, 1)

    def add(total: Params, one: Any) -> tuple[Params, Any]:
        part, index = one
        found, grads = grad(params, frozen, part, jax.random.fold_in(key, index))
        return pinned(jax.tree.map(jnp.add, total, grads)), found

    zeros = pinned(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))
    parts = (jax.tree.map(part_of, batch), jnp.arange(accumulate))
    total, found = jax.lax.scan(add, zeros, parts)
    value, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), found)
    return value, metrics, jax.tree.map(lambda x: x / accumulate, total)


def _laid_out(grads: Params, placements: Any) -> Params:
    """Gradients in the order of their axes, as parameters and moments lie.

    cuDNN wants kernels in another order, and XLA, left alone, brings everything that meets their
    gradients into it and back: 68 of the 443 GB that V3D's step moves by its program for an H200.
    """
    if target.platform() not in target.GPUS:
        return grads

    def lay_out(grads: Params) -> Params:
        return jax.tree.map(
            lambda x: layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim)))), grads
        )

    if placements is None:
        return lay_out(grads)
    # Every device its share: the compiler would gather whole gradients to lay them out.
    specs = jax.tree.map(lambda placement: placement.spec, placements)
    mesh = jax.tree.leaves(placements)[0].mesh
    mapped = jax.shard_map(lay_out, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
    return mapped(grads)


def sharded_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    config: OptimConfig,
    mesh: Mesh,
    placements: TrainState,
    frozen: Any,
) -> Any:
    """`train_step` compiled for a mesh: (state, frozen, batch, key, rate) to (state, metrics).

    `placements` and `frozen` are the shardings of state and frozen arrays. The state is donated.
    """
    step = functools.partial(
        train_step,
        loss,
        optimizer,
        config.ema,
        accumulate=config.accumulate,
        placements=placements.params,
    )
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        sharding.on_mesh(step, mesh),
        in_shardings=(placements, frozen, sharding.batch(mesh), everywhere, everywhere),
        out_shardings=(placements, everywhere),
        donate_argnums=0,
        # What a step does not read lies on the devices all the same, and a plan counts it.
        keep_unused=True,
        compiler_options=compiling.step(mesh.devices.flat[0].platform, mesh.shape[meshes.FSDP]),
    )
