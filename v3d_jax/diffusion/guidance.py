"""What the denoiser is conditioned on, and classifier-free guidance with a scale a frame.

The network behind these functions is called as `network(x, c_noise, context, vector)`: `x`
[b, t, h, w, 2c] is the scaled noisy latent with the picture's latent behind it (and in scene
models, behind both, the features of the frames' cameras: 2c + f channels), `c_noise` [b, t],
`context` [b, 1, n, d] the tokens shared by all frames (or what the network made of them, a tuple
of arrays), `vector` [b, t, a].
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from v3d_jax.diffusion import precondition

Shape = Literal["constant", "linear", "triangle"]
ConditionalNetwork = Callable[
    [
        Float[Array, "b t h w c2"],
        Float[Array, "b t"],
        Float[Array, "b 1 n d"] | tuple[Any, ...],
        Float[Array, "b t a"],
    ],
    Float[Array, "b t h w c"],
]
DenoiseFn = Callable[[Float[Array, "b t h w c"], Float[Array, ""]], Float[Array, "b t h w c"]]


class Condition(NamedTuple):
    """Conditioning of a batch of clips: image tokens, the picture's latent, scalars a frame.

    In place of tokens stands whatever else the network takes as its context, as a tuple. A scene
    model has `features` of every frame besides, at the latents' resolution.
    """

    context: Float[Array, "b n d"] | tuple[Any, ...]
    latent: Float[Array, "b h w c"]
    vector: Float[Array, "b t a"]
    features: Float[Array, "b t h w f"] | None = None


def unconditional(condition: Condition) -> Condition:
    """The other branch of guidance: tokens and latent zero; vector and features, the cameras, kept.

    Guidance is then towards the picture, and both branches see it from the same places.
    """
    return condition._replace(
        context=jnp.zeros_like(condition.context), latent=jnp.zeros_like(condition.latent)
    )


def frame_scale(
    shape: Shape, minimum: float, maximum: float, num_frames: int
) -> Float[np.ndarray, " t"]:
    """The guidance scale of every frame.

    constant: `maximum` throughout; linear: from `minimum` at frame 0 to `maximum` at the last, as
    SVD and V3D; triangle: `minimum` at both ends and `maximum` half-way, as SV3D (2403.12008).
    """
    position = np.linspace(0.0, 1.0, num_frames, dtype=np.float32)
    ramp = {
        "constant": np.ones_like(position),
        "linear": position,
        "triangle": 2.0 * np.abs(position - np.floor(position + 0.5)),
    }[shape]
    return minimum + (maximum - minimum) * ramp


def guide(
    uncond: Float[Array, "b t h w c"],
    cond: Float[Array, "b t h w c"],
    scale: Float[Array, " t"] | Float[np.ndarray, " t"],
) -> Float[Array, "b t h w c"]:
    """Classifier-free guidance (arXiv 2207.12598): uncond + scale (cond - uncond), a frame each."""
    scale = jnp.asarray(scale, cond.dtype)[None, :, None, None, None]
    return uncond + scale * (cond - uncond)


def condition_network(network: ConditionalNetwork, condition: Condition) -> precondition.Network:
    """The network with its conditioning closed over.

    The latent is repeated for every frame and concatenated behind the noisy one, unscaled; behind
    it the features, if there are some.
    """

    def conditioned(
        x: Float[Array, "b t h w c"], c_noise: Float[Array, "b t"]
    ) -> Float[Array, "b t h w c"]:
        latent = jnp.broadcast_to(condition.latent[:, None], (*x.shape[:-1], _channels(condition)))
        behind = [latent] if condition.features is None else [latent, condition.features]
        x = jnp.concatenate([x, *(part.astype(x.dtype) for part in behind)], axis=-1)
        context = condition.context
        context = context if isinstance(context, tuple) else context[:, None]
        return network(x, c_noise, context, condition.vector)

    return conditioned


class Branches(NamedTuple):
    """The conditions of all branches of guidance as one batch, unconditional ones first."""

    condition: Condition


def branches(condition: Condition, scale: Float[np.ndarray, " t"]) -> Branches:
    """Both branches; one where `scale` is 1 for every frame, as the unconditional one cancels."""
    if np.all(scale == 1.0):
        return Branches(condition)
    both = unconditional(condition), condition
    return Branches(jax.tree.map(lambda *pair: jnp.concatenate(pair), *both))


def denoiser(
    network: ConditionalNetwork,
    branches: Branches,
    scale: Float[np.ndarray, " t"],
    *,
    interval: tuple[float, float] | None = None,
    in_turn: bool = False,
) -> DenoiseFn:
    """The denoiser a sampler calls, `(x, sigma) -> denoised`, guided by `scale`, which is static.

    Both branches run as one batch, or `in_turn` one after the other, in less memory. Beyond noise
    levels of `interval` (above the first, up to the second; arXiv 2404.07724) the conditional
    branch runs alone, for half the cost.
    """

    def evaluate(
        x: Float[Array, "b t h w c"], sigma: Float[Array, ""], condition: Condition
    ) -> Float[Array, "b t h w c"]:
        return precondition.denoise(condition_network(network, condition), x, sigma)

    if np.all(scale == 1.0):
        return lambda x, sigma: evaluate(x, sigma, branches.condition)
    halves = jax.tree.map(lambda y: y.reshape(2, -1, *y.shape[1:]), branches.condition)

    def guided(x: Float[Array, "b t h w c"], sigma: Float[Array, ""]) -> Float[Array, "b t h w c"]:
        if in_turn:
            both = jax.lax.map(lambda half: evaluate(x, sigma, half), halves)
        else:
            both = jnp.split(evaluate(jnp.concatenate([x, x]), sigma, branches.condition), 2)
        return guide(both[0], both[1], scale)

    if interval is None:
        return guided
    low, high = interval

    def alone(x: Float[Array, "b t h w c"], sigma: Float[Array, ""]) -> Float[Array, "b t h w c"]:
        return evaluate(x, sigma, jax.tree.map(lambda y: y[1], halves))

    return lambda x, sigma: jax.lax.cond((sigma > low) & (sigma <= high), guided, alone, x, sigma)


def guided_denoiser(
    network: ConditionalNetwork, condition: Condition, scale: Float[np.ndarray, " t"]
) -> DenoiseFn:
    """`denoiser` of a condition whose branches are yet to be made."""
    return denoiser(network, branches(condition, scale), scale)


def _channels(condition: Condition) -> int:
    return condition.latent.shape[-1]
