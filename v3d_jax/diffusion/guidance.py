"""What the denoiser is conditioned on, and classifier-free guidance with a scale a frame.

The network behind these functions is called as `network(x, c_noise, context, vector)`: `x`
[b, t, h, w, 2c] is the scaled noisy latent with the picture's latent behind it, `c_noise` [b, t],
`context` [b, 1, n, d] the tokens shared by all frames, `vector` [b, t, a].
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from v3d_jax.diffusion import precondition

Shape = Literal["constant", "linear", "triangle"]
ConditionalNetwork = Callable[
    [
        Float[Array, "b t h w c2"],
        Float[Array, "b t"],
        Float[Array, "b 1 n d"],
        Float[Array, "b t a"],
    ],
    Float[Array, "b t h w c"],
]
DenoiseFn = Callable[[Float[Array, "b t h w c"], Float[Array, ""]], Float[Array, "b t h w c"]]


class Condition(NamedTuple):
    """Conditioning of a batch of clips: image tokens, the picture's latent, scalars a frame."""

    context: Float[Array, "b n d"]
    latent: Float[Array, "b h w c"]
    vector: Float[Array, "b t a"]


def unconditional(condition: Condition) -> Condition:
    """The other branch of guidance: tokens and latent zero, the vector kept."""
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

    The latent is repeated for every frame and concatenated behind the noisy one, unscaled.
    """

    def conditioned(
        x: Float[Array, "b t h w c"], c_noise: Float[Array, "b t"]
    ) -> Float[Array, "b t h w c"]:
        latent = jnp.broadcast_to(condition.latent[:, None], (*x.shape[:-1], _channels(condition)))
        x = jnp.concatenate([x, latent.astype(x.dtype)], axis=-1)
        return network(x, c_noise, condition.context[:, None], condition.vector)

    return conditioned


def guided_denoiser(
    network: ConditionalNetwork,
    condition: Condition,
    scale: Float[np.ndarray, " t"],
) -> DenoiseFn:
    """The denoiser a sampler calls, `(x, sigma) -> denoised`, guided by `scale`.

    Both branches run as one batch, unconditional first. `scale` is static: where it is 1 for every
    frame the unconditional branch cancels and is left out, which halves the cost.
    """
    if np.all(scale == 1.0):
        conditioned = condition_network(network, condition)
        return lambda x, sigma: precondition.denoise(conditioned, x, sigma)

    pair = Condition(
        *(
            jnp.concatenate(branches)
            for branches in zip(unconditional(condition), condition, strict=True)
        )
    )
    both = condition_network(network, pair)

    def denoise(x: Float[Array, "b t h w c"], sigma: Float[Array, ""]) -> Float[Array, "b t h w c"]:
        denoised = precondition.denoise(both, jnp.concatenate([x, x]), sigma)
        return guide(*jnp.split(denoised, 2), scale)

    return denoise


def _channels(condition: Condition) -> int:
    return condition.latent.shape[-1]
