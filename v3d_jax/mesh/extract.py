"""A field's zero level as triangles: blocks near the surface only, then marching cubes.

The field is negative inside, in world units, and roughly a distance. A coarse grid finds the blocks
of the fine one that the surface may pass; only those are evaluated, and wherever the surface turns
out to leave them their neighbours are too, until it nowhere does. Both grids are evaluated by one
compiled program of fixed shape, a batch of blocks a call. All other blocks are one sign throughout
and cost nothing.

Samples lie at cell centres. Outside the box the nearest sample counts with its sign made positive:
a surface that would leave the box is closed exactly on its border.

At 384 samples a side the shapes of the tests, half as wide as their box, take 8 calls of 512 blocks
for the coarse grid and 11 to 15 for the fine one: under 6 million points instead of 57 million.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from v3d_jax.errors import UserError
from v3d_jax.mesh import topology
from v3d_jax.mesh.topology import Triangles
from v3d_jax.ops import compiling

Sdf = Callable[[Float[Array, "n 3"]], Float[Array, "n"]]

BLOCK = 8
_LEAST = 1e-3  # of a cell: nearer to a sample than this the surface does not pass


class Box(NamedTuple):
    """A cube of the world."""

    corner: Float[np.ndarray, "3"]  # the lowest
    side: float


@dataclass(frozen=True)
class ExtractConfig:
    """Sizes of an extraction."""

    resolution: int = 384  # samples a side; a multiple of 8
    coarse: int = 128  # samples a side of the grid that looks for the surface; a multiple of 8
    batch: int = 512  # blocks a call
    trust: float = 0.5  # how small a gradient the field may have; smaller is slower and safer
    share: float = 0.1  # of the largest piece's volume: smaller pieces are floaters; 1 keeps one
    most_faces: int = 8_000_000  # above this the field is noise


def extract(sdf: Sdf, box: Box, config: ExtractConfig | None = None) -> Triangles:
    """The closed surface where `sdf` is zero inside `box`, without floaters and cavities.

    `sdf` is traced. Give a `jax.tree_util.Partial` of a function and its arrays: then another field
    of the same shapes does not compile anew.

    Raises `UserError` where the field crosses zero nowhere, is not finite or is nothing but noise;
    ValueError for sizes that are no multiples of 8.
    """
    config = config or ExtractConfig()
    if config.resolution % BLOCK or config.coarse % BLOCK:
        raise ValueError(f"{config.resolution} and {config.coarse} must be multiples of {BLOCK}")
    field = sdf if isinstance(sdf, jax.tree_util.Partial) else jax.tree_util.Partial(sdf)
    volume = _volume(field, box, config)
    return _triangles(volume, box, config)


def _volume(field: Sdf, box: Box, config: ExtractConfig) -> Float[np.ndarray, "n n n"]:
    """The fine grid, indexed x y z; blocks that the surface does not pass hold only its sign."""
    coarse = np.empty((config.coarse,) * 3, np.float32)
    everywhere = np.ones((config.coarse // BLOCK,) * 3, bool)
    _fill(coarse, field, box, everywhere, config)
    if not np.isfinite(coarse).all():
        raise UserError("the fitted field is not finite: lower its learning rates or fit it again")
    near, inside = _near(coarse, box, config)
    shape = (config.resolution,) * 3
    signs = np.where(inside, -1.0, 1.0).astype(np.float32) * box.side
    volume = np.broadcast_to(signs[:, None, :, None, :, None], _split(shape))
    volume = volume.reshape(shape)
    done = np.zeros_like(near)
    while near.any():
        _fill(volume, field, box, near, config)
        done |= near
        near = _left(volume, done)
    if (volume < 0).all() or (volume > 0).all():
        side = "inside" if (volume < 0).all() else "outside"
        raise UserError(
            f"the fitted field has no surface: all of its box is {side}; check that the masks show "
            "the object and that the cameras look at it"
        )
    return volume


def _split(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for side in shape for size in (side // BLOCK, BLOCK))


def _fill(
    volume: Float[np.ndarray, "n n n"],
    field: Sdf,
    box: Box,
    which: Bool[np.ndarray, "m m m"],
    config: ExtractConfig,
) -> None:
    """Evaluates the blocks chosen into `volume`, which covers the box."""
    chosen = np.argwhere(which).astype(np.int32)
    cell = np.float32(box.side / len(volume))
    blocks = volume.reshape(_split(volume.shape))
    corner = jnp.asarray(box.corner, jnp.float32)
    for first in range(0, len(chosen), config.batch):
        part = chosen[first : first + config.batch]
        padded = np.pad(part, ((0, config.batch - len(part)), (0, 0)), mode="edge")
        values = np.asarray(_evaluate(field, jnp.asarray(padded), corner, cell))[: len(part)]
        # A sample on the surface would give faces without area.
        least = _LEAST * cell
        small = np.abs(values) < least
        x, y, z = part.T
        blocks[x, :, y, :, z, :] = np.where(small, np.where(values < 0, -least, least), values)


@partial(jax.jit, compiler_options=compiling.OPTIONS)
def _evaluate(
    field: Sdf, blocks: Int[Array, "k 3"], corner: Float[Array, "3"], cell: Float[Array, ""]
) -> Float[Array, "k 8 8 8"]:
    steps = jnp.stack(jnp.meshgrid(*3 * [jnp.arange(BLOCK)], indexing="ij"), axis=-1)
    index = blocks[:, None, :] * BLOCK + steps.reshape(1, -1, 3)
    points = corner.reshape(1, 3) + (index.reshape(-1, 3) + 0.5) * cell
    return field(points).astype(jnp.float32).reshape(-1, BLOCK, BLOCK, BLOCK)


def _near(
    coarse: Float[np.ndarray, "c c c"], box: Box, config: ExtractConfig
) -> tuple[Bool[np.ndarray, "m m m"], Bool[np.ndarray, "m m m"]]:
    """Which fine blocks the surface may pass, and which others lie inside.

    A block asks the coarse samples in it and one around it. Where they differ in sign, or one of
    them is nearer to zero than half their spacing's diagonal, the surface may pass.
    """
    from scipy import ndimage

    blocks = config.resolution // BLOCK
    reach = 0.5 * np.sqrt(3.0) * box.side / config.coarse / config.trust
    # Coarse samples that a block spans, one more at each side.
    edge = np.arange(blocks + 1) * config.coarse / blocks
    first = np.maximum(np.floor(edge[:-1] - 0.5).astype(int), 0)
    last = np.minimum(np.ceil(edge[1:] - 0.5).astype(int), config.coarse - 1)
    width = int((last - first).max()) + 1
    start = np.minimum(first, config.coarse - width)
    origin = -(width // 2)  # a window that begins at its sample
    low, high, least = (
        found[np.ix_(start, start, start)]
        for found in (
            ndimage.minimum_filter(coarse, width, mode="nearest", origin=origin),
            ndimage.maximum_filter(coarse, width, mode="nearest", origin=origin),
            ndimage.minimum_filter(np.abs(coarse), width, mode="nearest", origin=origin),
        )
    )
    return (low < 0) & (high > 0) | (least < reach), high < 0


def _left(
    volume: Float[np.ndarray, "n n n"], done: Bool[np.ndarray, "m m m"]
) -> Bool[np.ndarray, "m m m"]:
    """Blocks not yet evaluated into which the surface runs from one that is."""
    wanted = np.zeros_like(done)
    for axis in range(3):
        inside = np.moveaxis(volume, axis, 0) < 0
        ends = inside[BLOCK - 1 : -1 : BLOCK] != inside[BLOCK::BLOCK]
        faces, rows, columns = ends.shape
        ends = ends.reshape(faces, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).any(axis=(2, 4))
        known, new = np.moveaxis(done, axis, 0), np.moveaxis(wanted, axis, 0)
        new[1:] |= ends & known[:-1]
        new[:-1] |= ends & known[1:]
    return wanted & ~done


def _triangles(volume: Float[np.ndarray, "n n n"], box: Box, config: ExtractConfig) -> Triangles:
    """Marching cubes, without floaters."""
    from skimage import measure

    closed = np.abs(np.pad(volume, 1, mode="edge"))
    closed[1:-1, 1:-1, 1:-1] = volume
    points, faces, _, _ = measure.marching_cubes(closed, 0.0)
    if len(faces) > config.most_faces:
        raise UserError(
            f"the fitted field has {len(faces):,} faces, more than any surface: it is noise; fit "
            "it longer, or give views with masks"
        )
    cell = box.side / config.resolution
    vertices = np.asarray(box.corner, np.float64) + (points.astype(np.float64) - 0.5) * cell
    whole = Triangles(vertices.astype(np.float32), faces.astype(np.int32))
    return topology.largest(whole, config.share)
