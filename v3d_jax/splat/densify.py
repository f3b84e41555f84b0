"""Densification at a fixed budget: 3D Gaussian splatting as Markov chain Monte Carlo.

Kheradmand et al. 2024 (arXiv 2404.09591). Nothing is created or removed: Gaussians too faint to
show move onto ones that do, drawn by opacity, which share their opacity and size so that the image
stays (section 3.3, eq. 9); and means take a random step that grows as a Gaussian fades (eq. 8), so
that the unused explore. All shapes are static.

Copies in one place have nearly the same gradient, and the random step is for what is faint. Where
`split` says so they are drawn apart, from the Gaussian that they were, as 3DGS splits one (section
5.2).

Axes: n Gaussian, q point of a quadrature.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from v3d_jax.splat.gaussians import Gaussians
from v3d_jax.splat.project import Rows, rotation_rows

# Midpoint rule for the integral in `share`: at this spacing it is exact to float32.
_SPACING, _POINTS = 0.125, 40
_MAX_OPACITY = 1.0 - 1e-6
_MAX_WEIGHT = 1 << 20
_PARTS, _LEAST = 1 << 30, 1e-20  # of all weights together, where those have no largest


@dataclass(frozen=True)
class DensifyConfig:
    """When faint Gaussians move, and how far means wander.

    The paper's settings, but for `stop`: 25,000 of 30,000 steps there, in proportion here.
    """

    every: int = 100  # steps
    start: int = 500  # first step with a move
    stop: int = 3_400  # no move from this step on
    min_opacity: float = 0.005  # at or below it a Gaussian is dead
    noise: float = 5e5  # times the means' learning rate
    split: float = 0.0  # how far copies are drawn apart, in deviations
    pull: float = 0.0  # power of the means' gradient in the draw, beside the opacity


class Relocation(NamedTuple):
    """Gaussians after a move, and which of them changed: their moments mean nothing any more."""

    gaussians: Gaussians
    changed: Bool[Array, "n"]
    moved: Int32[Array, ""]  # dead Gaussians that were given a new place


def share(
    opacity: Float[Array, "n"], copies: Int32[Array, "n"]
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """Opacity of each of `copies` Gaussians in place of one, and a factor on their scales (eq. 9).

    The paper's double sum is sum_j C(N, j) (-1)^(j-1) o^j / sqrt(j), an alternating one that
    float32 loses for many copies. With 1 / sqrt(j) = 2 / sqrt(pi) int exp(-j s^2) ds it becomes
    2 / sqrt(pi) int 1 - (1 - o exp(-s^2))^N ds, s > 0: what the copies hide along a line, all of
    it positive, for any number of copies.
    """
    number = copies.astype(opacity.dtype)
    new = -jnp.expm1(jnp.log1p(-opacity) / number)
    points = (np.arange(_POINTS) + 0.5) * _SPACING
    fall = jnp.asarray(np.exp(-(points**2)), opacity.dtype)[:, None]
    hidden = -jnp.expm1(number[None] * jnp.log1p(-new[None] * fall))
    integral = hidden.sum(axis=0) * (_SPACING * 2.0 / math.sqrt(math.pi))
    return new, opacity / integral


def relocate(
    key: Key[Array, ""],
    gaussians: Gaussians,
    min_opacity: float,
    split: float = 0.0,
    pull: Float[Array, "n"] | None = None,
) -> Relocation:
    """Moves dead Gaussians onto live ones drawn by opacity; nothing moves where none is live.

    A live Gaussian drawn c times becomes c + 1 equal ones, `split` times its deviations apart.
    `pull` is a factor on the opacities by which they are drawn.
    """
    opacity = jnp.minimum(gaussians.opacities, _MAX_OPACITY)
    dead = opacity <= min_opacity
    # Whole numbers, whose running sum is exact and never falls.
    count = opacity.shape[0]
    scale = min(_MAX_WEIGHT, (2**31 - 1) // count)
    wanted = opacity
    if pull is not None:
        wanted = opacity * pull
        scale = _PARTS / jnp.maximum(jnp.where(dead, 0.0, wanted).sum(), _LEAST)
    weight = jnp.where(dead, 0, jnp.maximum(jnp.floor(wanted * scale), 1.0)).astype(jnp.int32)
    total = jnp.cumsum(weight)
    rank = jax.random.randint(key, (count,), 0, jnp.maximum(total[-1], 1))
    source = jnp.searchsorted(total, rank, side="right")
    source = jnp.where(dead & (total[-1] > 0), source, jnp.arange(count))
    moving = source != jnp.arange(count)
    drawn = jnp.zeros(count, jnp.int32).at[source].add(moving.astype(jnp.int32))  # exact
    new, factor = share(opacity, drawn + 1)
    new = jnp.clip(new, min_opacity, _MAX_OPACITY)  # as the authors' code
    chosen = drawn > 0
    shared = gaussians._replace(
        opacity_logits=jnp.where(chosen, jnp.log(new) - jnp.log1p(-new), gaussians.opacity_logits),
        log_scales=gaussians.log_scales + jnp.where(chosen, jnp.log(factor), 0.0)[:, None],
    )
    placed = Gaussians(*(field[source] for field in shared))
    changed = chosen | moving
    if split:
        noise = jax.random.normal(jax.random.fold_in(key, 1), placed.means.shape)
        apart = _turned(rotation_rows(placed.rotations), split * placed.scales * noise)
        means = placed.means + jnp.where(changed[:, None], apart, 0.0)
        placed = placed._replace(means=means)
    return Relocation(placed, changed, moving.sum(dtype=jnp.int32))


def exploration(
    key: Key[Array, ""], gaussians: Gaussians, size: Float[Array, ""] | Float[Array, "n"]
) -> Float[Array, "n 3"]:
    """A random step of the means, world units: covariance times normal noise times `size` (eq. 8).

    `size` is one for all, or one for each.
    Gated by opacity: half of it at 0.005, next to nothing for what is seen.
    """
    gate = jax.nn.sigmoid(-100.0 * (gaussians.opacities - 0.005))
    noise = jax.random.normal(key, gaussians.means.shape) * (size * gate)[:, None]
    rows = rotation_rows(gaussians.rotations)
    # R S^2 R^T noise, a component at a time: no matrix unit rounds it.
    along = [sum(rows[i][j] * noise[:, i] for i in range(3)) for j in range(3)]
    return _turned(rows, jnp.square(gaussians.scales) * jnp.stack(along, axis=1))


def _turned(rows: Rows, along: Float[Array, "n 3"]) -> Float[Array, "n 3"]:
    """Offsets along the Gaussians' axes as offsets in the world."""
    return jnp.stack([sum(rows[i][j] * along[:, j] for j in range(3)) for i in range(3)], axis=1)
