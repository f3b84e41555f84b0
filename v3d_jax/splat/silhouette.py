"""Silhouettes: masks of frames on white, and how far every pixel is from a mask's outline.

Axes: v view, h w image. Masks are true where the object is.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

Images = Float[Array, "v h w 3"] | UInt8[Array, "v h w 3"]
Alpha = Float[Array, "v h w"] | UInt8[Array, "v h w"] | Bool[Array, "v h w"]


def to_unit(values: Array) -> Float[Array, "..."]:
    """8-bit values to [0, 1], booleans to 0 and 1, others as they are; float32."""
    scale = 255.0 if values.dtype == jnp.uint8 else 1.0
    return values.astype(jnp.float32) / scale


def from_white(
    images: Images, tolerance: float = 0.05, *, open_holes: bool = False
) -> Bool[Array, "v h w"]:
    """Masks of objects on white, such as V3D's frames.

    Background is what differs from white by at most `tolerance` in every channel and joins the
    image's border (4-neighbours). White that the object encloses is highlight or a white part far
    more often than a hole, and a hull cut there in one view is lost; `open_holes` makes it
    background.
    """
    white = jax.vmap(lambda image: (1.0 - to_unit(image)).max(axis=-1) <= tolerance)(images)
    return ~white if open_holes else ~lax.map(_joined_to_border, white)


def _joined_to_border(candidate: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    """Candidates that 4-connect to the border, a sweep along rows and columns at a time."""
    border = jnp.pad(jnp.zeros_like(candidate)[1:-1, 1:-1], 1, constant_values=True)
    start = candidate & border

    def sweep(state: tuple[Array, Array]) -> tuple[Array, Array]:
        reached, _ = state
        grown = reached
        for axis in (0, 1):
            for reverse in (False, True):
                grown = _spread(candidate, grown, axis, reverse)
        return grown, (grown != reached).any()

    return lax.while_loop(lambda state: state[1], sweep, (start, start.any()))[0]


def _spread(candidate: Array, reached: Array, axis: int, reverse: bool) -> Array:
    """Extends `reached` one way along an axis through runs of candidates.

    Pixel i maps what arrives, x, to candidate_i & (reached_i | x); such maps compose associatively.
    """

    def compose(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] & then[0], then[1] | (then[0] & first[1])

    passes = (candidate, candidate & reached)
    return lax.associative_scan(compose, passes, axis=axis, reverse=reverse)[1]


def signed_distance(mask: Bool[Array, "h w"], reach: int) -> Float[Array, "h w"]:
    """Euclidean distance in pixels to the mask's outline, positive inside, cut off at +-`reach`.

    The outline runs half way between a pixel of the mask and a neighbour outside it. The border of
    the image is no outline.
    """
    inside = _distance_to(~mask, reach)
    outside = _distance_to(mask, reach)
    signed = jnp.where(mask, inside - 0.5, 0.5 - outside)
    return jnp.clip(signed, -reach, reach)


def _distance_to(seeds: Bool[Array, "h w"], reach: int) -> Float[Array, "h w"]:
    """Distance to the nearest seed, at most `reach` + 1: along rows, then the least of columns."""
    far = reach + 1
    width = seeds.shape[1]
    column = jnp.broadcast_to(jnp.arange(width)[None], seeds.shape)
    before = lax.cummax(jnp.where(seeds, column, -far), axis=1)
    after = lax.cummin(jnp.where(seeds, column, width + far), axis=1, reverse=True)
    along = jnp.minimum(jnp.minimum(column - before, after - column), far)
    squares = jnp.pad(along**2, ((reach, reach), (0, 0)), constant_values=far**2)

    def nearer(offset: Array, best: Array) -> Array:
        row = lax.dynamic_slice_in_dim(squares, offset, seeds.shape[0], axis=0)
        return jnp.minimum(best, row + (offset - reach) ** 2)

    best = lax.fori_loop(0, 2 * reach + 1, nearer, jnp.full(seeds.shape, far**2, along.dtype))
    return jnp.sqrt(best.astype(jnp.float32))
