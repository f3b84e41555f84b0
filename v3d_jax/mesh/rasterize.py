"""A z-buffer for batches of views of one mesh, in static shapes and bitwise deterministic.

Axes: i view, v vertex, f face, s slot, p the 64 samples of a block. Positions on the screen are
in samples (supersample x supersample of them a pixel) from the image centre, x right, y down.

Every (view, face) is expanded into the rows of 8 x 8 blocks it touches, every row into the blocks
of that row (exact spans, so a thin diagonal face costs its length and not its bounding box). A
slot evaluates its face's three edge functions and 1/depth at the 64 samples of its block, and two
integer scatters resolve them: the largest 1/depth, then among equals the faces that run
counter-clockwise for the viewer, then the lowest face index.

Arithmetic (benchmarks/mesh_raster.py: 5,000 faces that fill the image, 36 views, 512 x 512
samples): 180,000 (view, face) pairs make 0.7 M slots. Tables: 16 floats a pair, gathered once a
slot, 45 MB. Depth keys: 0.7 M x 64 x 4 B = 180 MB, written once and read twice; the two scatters
touch as much again. About 1 GB, that is 0.25 ms at the 4.3 TB/s of an H200; 2 x 45 M integer
atomics are 2 ms at 47 G/s.

Faces are two-sided. A face with a vertex nearer than `near` is dropped, not clipped, and counted.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from v3d_jax.mesh import projection
from v3d_jax.mesh.projection import Screen
from v3d_jax.mesh.surface import Mesh
from v3d_jax.ops import binning
from v3d_jax.ops.camera import Camera

BLOCK = 8
MARGIN = 1e-2  # samples added around spans: far above the rounding of float32 positions

# keep(view [s,1], face [s,1], column [s,p], row [s,p]) -> whether that sample of the face is there
Keep = Callable[[Array, Array, Array, Array], Bool[Array, "s p"]]


@dataclass(frozen=True)
class RasterConfig:
    """Sizes of a rasterization: all of them are static in the compiled program."""

    width: int = 256  # pixels
    height: int = 256
    supersample: int = 2  # samples a pixel along each axis
    rows: int = 1 << 19  # capacity: (view, face, row of blocks), all views together
    slots: int = 1 << 20  # capacity: (view, face, block), all views together
    near: float = 1e-2  # world units

    @property
    def samples(self) -> tuple[int, int]:
        """Of a view: height and width."""
        return self.height * self.supersample, self.width * self.supersample


class Visibility(NamedTuple):
    """What every sample sees; `i` views of `h` x `w` samples."""

    face: Int32[Array, "i h w"]  # -1: nothing
    inverse_depth: Float[Array, "i h w"]  # 1 / camera z; 0: nothing
    rows: Int32[Array, ""]  # capacity needed; above the configured one, faces are missing
    slots: Int32[Array, ""]
    near_faces: Int32[Array, ""]  # (view, face) pairs dropped at the near plane

    def overflow(self, config: RasterConfig) -> Bool[Array, ""]:
        """Whether a capacity was too small, so that faces are missing."""
        return (self.rows > config.rows) | (self.slots > config.slots)


class _Spans(NamedTuple):
    """The rows of blocks of every pair, and the blocks of every such row."""

    rows: binning.Runs
    row: Int32[Array, "r"]  # row of blocks
    first: Int32[Array, "r"]  # first column of blocks
    count: Int32[Array, "r"]


def rasterize(
    mesh: Mesh, camera: Camera, config: RasterConfig, keep: Keep | None = None
) -> Visibility:
    """The nearest face of every sample, for a batch of views [i] of one mesh.

    `keep` decides sample by sample whether a face has a hole there (see `shade.alpha_test`); what
    lies behind a hole shows. The cameras' own width and height are not read: `config` has them.
    """
    blocks = _blocks(config)
    screen = _project(mesh, camera, config)
    with jax.named_scope("binning"):
        spans = _spans(screen, config)
        runs = binning.expand(spans.count, config.slots)
        pair = spans.rows.owner[runs.owner]
        column = spans.first[runs.owner] + runs.rank
        row = spans.row[runs.owner]
    num_faces = mesh.faces.shape[0]
    view, face = pair // num_faces, pair % num_faces

    key = _depth_keys(screen, pair, column, row, config)
    if keep is not None:
        dx, dy = _block_samples()
        there = keep(
            view[:, None], face[:, None], column[:, None] * BLOCK + dx, row[:, None] * BLOCK + dy
        )
        key = jnp.where(there, key, 0)
    # Both scatters must see the same bits: recomputing the keys in two differently fused kernels
    # could round them differently.
    key = lax.optimization_barrier(jnp.where(runs.valid[:, None], key, 0))
    num_blocks = camera.intrinsics.shape[0] * blocks[0] * blocks[1]
    block = jnp.where(runs.valid, (view * blocks[0] + row) * blocks[1] + column, num_blocks)
    nearest = binning.scatter_rows_max(block, key, num_blocks)
    hit = (key > 0) & (key == nearest[jnp.minimum(block, num_blocks - 1)])
    rank = jnp.where(screen.front[pair], face, face + num_faces)
    winner = jnp.where(hit, rank[:, None], binning.INT32_MAX)
    winner = binning.scatter_rows_min(block, winner, num_blocks) % num_faces
    return Visibility(
        _to_image(jnp.where(nearest > 0, winner, -1), config),
        _to_image(lax.bitcast_convert_type(nearest, jnp.float32), config),
        spans.rows.total,
        runs.total,
        jnp.sum(screen.near).astype(jnp.int32),
    )


def see(mesh: Mesh, camera: Camera, config: RasterConfig) -> Visibility:
    """`rasterize` from the host, a view at a time, with the capacities that these views need."""
    config = fit(mesh, camera, config, views_per_pass=1)
    passes = split_views(camera, 1)
    seen = [
        _rasterize(mesh, jax.tree.map(lambda leaf: leaf[view], passes), config)  # noqa: B023
        for view in range(len(passes.intrinsics))
    ]
    face, inverse_depth = (jnp.concatenate(parts) for parts in list(zip(*seen, strict=True))[:2])
    rows, slots, near = (jnp.stack([view[k] for view in seen]) for k in (2, 3, 4))
    return Visibility(face, inverse_depth, rows.max(), slots.max(), near.sum())


def fit(
    mesh: Mesh,
    camera: Camera,
    config: RasterConfig,
    *,
    views_per_pass: int | None = None,
    slack: float = 1.0,
    steps: int = 4,
) -> RasterConfig:
    """The configuration with capacities that just hold these views, in `steps` sizes an octave.

    Runs counting programs (no samples) and reads their results, so it belongs outside compiled
    code. `views_per_pass` as in `shade.render`. For several meshes in one program take the
    largest capacities of all (`largest`).
    """
    passes = split_views(camera, views_per_pass)
    bare = replace(config, rows=1, slots=1)
    # Nothing but vertices and faces, so that no other size of the mesh makes a program; at least
    # as many rows as blocks in a row of views, for the same reason.
    mesh = Mesh(*(array[:0] for array in mesh))._replace(vertices=mesh.vertices, faces=mesh.faces)
    rows = binning.next_size(_count_rows(mesh, passes, bare), slack=slack, steps=steps)
    least = binning.next_size(passes.intrinsics.shape[1] * _blocks(config)[0] ** 2, steps=1)
    slots = _count_slots(mesh, passes, replace(bare, rows=max(rows, least)))
    slots = binning.next_size(slots, slack=slack, steps=steps)
    return replace(config, rows=rows, slots=slots)


def split_views(camera: Camera, views_per_pass: int | None) -> Camera:
    """Cameras [i] as [passes, views_per_pass]; None: one pass. Raises ValueError if uneven."""
    count = camera.intrinsics.shape[0]
    if count % (views_per_pass or count):
        raise ValueError(f"{views_per_pass} views a pass do not divide {count} views")
    passes = count // (views_per_pass or count)
    return jax.tree.map(lambda x: x.reshape(passes, -1, *x.shape[1:]), camera)


def largest(*configs: RasterConfig) -> RasterConfig:
    """The first configuration with the largest capacities of all."""
    rows, slots = max(c.rows for c in configs), max(c.slots for c in configs)
    return replace(configs[0], rows=rows, slots=slots)


def _blocks(config: RasterConfig) -> tuple[int, int]:
    """Rows and columns of blocks that cover the image."""
    height, width = config.samples
    return -(-height // BLOCK), -(-width // BLOCK)


def _block_samples() -> tuple[np.ndarray, np.ndarray]:
    """Column and row inside its block of each of the 64 samples, each [1, p]."""
    dy, dx = np.divmod(np.arange(BLOCK * BLOCK, dtype=np.int32), BLOCK)
    return dx[None], dy[None]


def _to_image(blocks: Array, config: RasterConfig) -> Array:
    """[i * block rows * block columns, p] -> [i, h, w] samples."""
    rows, columns = _blocks(config)
    image = blocks.reshape(-1, rows, columns, BLOCK, BLOCK).swapaxes(2, 3)
    image = image.reshape(-1, rows * BLOCK, columns * BLOCK)
    height, width = config.samples
    return image[:, :height, :width]


def _project(mesh: Mesh, camera: Camera, config: RasterConfig) -> Screen:
    return projection.project(mesh, camera, config.samples, config.supersample, config.near)


def _sample_range(low: Array, high: Array, size: int) -> tuple[Array, Array]:
    """First and last sample of [0, size) whose centre lies in [low, high] (centred, margined)."""
    margin = MARGIN + 1e-6 * jnp.maximum(jnp.abs(low), jnp.abs(high))
    first = jnp.clip(jnp.ceil(low - margin + (0.5 * size - 0.5)), 0, size)
    last = jnp.clip(jnp.floor(high + margin + (0.5 * size - 0.5)), -1, size - 1)
    return first.astype(jnp.int32), last.astype(jnp.int32)


def _spans(screen: Screen, config: RasterConfig) -> _Spans:
    """Which blocks hold a sample that the face may cover."""
    height, width = config.samples
    x, y = screen.x.hi, screen.y.hi
    left, right = _sample_range(x.min(axis=1), x.max(axis=1), width)
    top, bottom = _sample_range(y.min(axis=1), y.max(axis=1), height)
    seen = (screen.area != 0) & (left <= right) & (top <= bottom)
    top = top // BLOCK
    count = jnp.where(seen, bottom // BLOCK - top + 1, 0)
    rows = binning.expand(count, config.rows)
    row = top[rows.owner] + rows.rank
    low = row * BLOCK + (0.5 - 0.5 * height)
    xmin, xmax = _clip_to_band(x[rows.owner], y[rows.owner], low, low + (BLOCK - 1))
    left, right = _sample_range(xmin, xmax, width)
    seen = rows.valid & (xmin <= xmax) & (left <= right)
    left = left // BLOCK
    return _Spans(rows, row, left, jnp.where(seen, right // BLOCK - left + 1, 0))


def _clip_to_band(
    x: Float[Array, "r 3"], y: Float[Array, "r 3"], low: Float[Array, "r"], high: Float[Array, "r"]
) -> tuple[Float[Array, "r"], Float[Array, "r"]]:
    """Extent in x of the triangles between two heights (with a margin); (inf, -inf) if none."""
    margin = MARGIN + 1e-6 * jnp.abs(y).max(axis=1)
    low, high = (low - margin)[:, None], (high + margin)[:, None]
    x1, y1 = jnp.roll(x, -1, axis=1), jnp.roll(y, -1, axis=1)
    crosses = (jnp.minimum(y, y1) <= high) & (jnp.maximum(y, y1) >= low)
    rise = jnp.where(y1 == y, 1.0, y1 - y)

    def at(height: Array) -> Array:
        part = jnp.clip((height - y) / rise, 0.0, 1.0)
        return x + part * (x1 - x)

    ends = at(jnp.clip(y, low, high)), at(jnp.clip(y1, low, high))
    flat = y1 == y
    ends = jnp.where(flat, x, ends[0]), jnp.where(flat, x1, ends[1])
    smallest = jnp.where(crosses, jnp.minimum(*ends), jnp.inf).min(axis=1)
    return smallest, jnp.where(crosses, jnp.maximum(*ends), -jnp.inf).max(axis=1)


def _depth_keys(
    screen: Screen, pair: Array, column: Array, row: Array, config: RasterConfig
) -> Array:
    """1/depth of every slot's face at its 64 samples as ordered bits; 0 outside the face."""
    height, width = config.samples
    cx, cy = column * BLOCK + 0.5 * (BLOCK - width), row * BLOCK + 0.5 * (BLOCK - height)
    edges = projection.edges(screen, pair, cx, cy)
    inverse = screen.inverse_depth[pair]
    steps = (inverse[:, 1:] - inverse[:, :1]) / jnp.abs(screen.area[pair])[:, None]
    slope = [jnp.sum(edge[:, 1:] * steps, axis=1) for edge in edges]
    slope[2] = slope[2] + inverse[:, 0]
    # Without the barrier a compiler may fuse all of the above into the loop over samples and
    # repeat its gathers and two-float arithmetic 64 times.
    edges, slope, low, high = lax.optimization_barrier(
        (edges, slope, inverse.min(axis=1), inverse.max(axis=1))
    )

    column, row = _block_samples()
    dx, dy = (np.float32(v) - (0.5 * BLOCK - 0.5) for v in (column, row))

    def at(a: Array, b: Array, c: Array) -> Array:
        return a[:, None] * dx + (b[:, None] * dy + c[:, None])

    inside = functools.reduce(
        jnp.logical_and, (at(*(e[:, k] for e in edges)) >= 0 for k in range(3))
    )
    # a sliver's plane is steep: keep its depth between those of its corners
    depth = jnp.clip(at(*slope), low[:, None], high[:, None])
    return jnp.where(inside, binning.positive_bits(depth), 0)


_rasterize = jax.jit(rasterize, static_argnums=2)


@functools.partial(jax.jit, static_argnames="config")
def _count_rows(mesh: Mesh, passes: Camera, config: RasterConfig) -> Array:
    return lax.map(lambda c: _spans(_project(mesh, c, config), config).rows.total, passes).max()


@functools.partial(jax.jit, static_argnames="config")
def _count_slots(mesh: Mesh, passes: Camera, config: RasterConfig) -> Array:
    def one_pass(camera: Camera) -> Array:
        return binning.saturating_sum(_spans(_project(mesh, camera, config), config).count)

    return lax.map(one_pass, passes).max()
