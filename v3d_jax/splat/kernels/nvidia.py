"""Compositing on NVIDIA GPUs by the Triton kernels beside this module, with their gradient.

Takes and gives what `v3d_jax.splat.composite.composite` does, which is the plain twin. `missing`
says why these kernels, and those of `v3d_jax.splat.kernels.nvidia_bin`, cannot be used.
"""

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from v3d_jax.splat.bin import Bins, Tiling
from v3d_jax.splat.chunk import ALPHA_MAX, PIXELS, SHAPE
from v3d_jax.splat.kernels import launches, nvidia_bin
from v3d_jax.splat.kernels.launches import Launch, floats, ints
from v3d_jax.splat.project import Projection

LOG2E = math.log2(math.e)
CHANNELS = 4  # the kernels' number of them: three of colour, depth
FOUND = SHAPE + CHANNELS  # floats of a gradient
_OLDEST = 8.0  # compute capability of the first cards that multiply float32 in 19 bits, Ampere


class Settings(NamedTuple):
    """How the kernels are built; results do not depend on it but for rounding."""

    chunk: int = 16  # splats at a time, forward
    warps: int = 1  # of a tile
    chunk_back: int = 16  # splats at a time, backward; if `saved`, the same as forward
    warps_back: int = 1
    registers_back: int | None = 168  # most of a thread: half as many tiles again are under way
    saved: bool = False  # see `tiles.backward`
    owners: int = 16  # (view, Gaussian) of a program that adds up slots
    slots: int = 4  # of each at a time
    warps_gather: int = 4
    rows: int = 64  # of a program that puts them in the order of depth


class Drawn(NamedTuple):
    """What the forward kernel gives; the last two are next to nothing unless saved."""

    channels: Float[Array, "d g p"]
    left: Float[Array, "g p"]
    starts: Float[Array, "c p"]  # transmittance at the start of chunks
    live: Int32[Array, "g"]  # chunks gone through


def composite(
    tiles: Tiling,
    fields: tuple[Float[Array, "n"], ...],
    bins: Bins,
    settings: Settings | None = None,
) -> tuple[Float[Array, "d g p"], Float[Array, "g p"]]:
    """Channels, and the transmittance left behind them, of every pixel of every tile.

    As `v3d_jax.splat.composite.composite`; differentiable in the fields, of which there are ten.
    Raises ValueError for another number of channels.
    """
    settings = settings or Settings()
    if len(fields) != FOUND:
        raise ValueError(f"the kernels take {CHANNELS} channels, not {len(fields) - SHAPE}")
    if settings.saved and settings.chunk_back != settings.chunk:
        raise ValueError("saved starts of chunks are of use to chunks of the same size only")
    return _composite(tiles, settings, fields, bins)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _composite(
    tiles: Tiling, settings: Settings, fields: tuple[Array, ...], bins: Bins
) -> tuple[Array, Array]:
    rows = table(settings, fields, bins)
    drawn = Drawn(*launches.run(forward(tiles, settings, rows, bins, save=False)))
    return drawn.channels, drawn.left


def _forward(
    tiles: Tiling, settings: Settings, fields: tuple[Array, ...], bins: Bins
) -> tuple[Any, Any]:
    rows = table(settings, fields, bins)
    drawn = Drawn(*launches.run(forward(tiles, settings, rows, bins, save=settings.saved)))
    return (drawn.channels, drawn.left), (fields[2:5], rows, bins, drawn)


def _backward(
    tiles: Tiling, settings: Settings, saved: Any, cotangents: tuple[Array, Array]
) -> tuple[tuple[Array, ...], None]:
    conic, rows, bins, drawn = saved
    sums, place = launches.run(backward(tiles, settings, rows, bins, drawn, cotangents))
    (owners,) = launches.run(gather(settings, sums, place, bins))
    return to_fields(owners, conic), None


_composite.defvjp(_forward, _backward)


def to_fields(
    owners: Float[Array, "n f"], conic: tuple[Float[Array, "n"], ...]
) -> tuple[Float[Array, "n"], ...]:
    """Gradients in the fields of `composite`; `conic` are three of these, from the third on."""
    g, gx, gy, gxx, gxy, gyy = (owners[:, i] for i in range(SHAPE))
    half_xx, xy, half_yy = conic
    shape = (2 * half_xx * gx + xy * gy, xy * gx + 2 * half_yy * gy, -gxx, -gxy, -gyy, g)
    return (*shape, *(owners[:, i] for i in range(SHAPE, owners.shape[1])))


def table(settings: Settings, fields: tuple[Array, ...], bins: Bins) -> Float[Array, "n f"]:
    """Rows of `tiles.FIELDS` floats in the order of depth."""
    x, y, *form, log_opacity = fields[:SHAPE]
    form = [part * LOG2E for part in form]
    opacity = log_opacity * LOG2E
    most = jnp.minimum(opacity, math.log2(ALPHA_MAX))
    columns = (x, y, *form, opacity, most, *fields[SHAPE:], jnp.zeros_like(x))
    # The barrier is that of `v3d_jax.splat.composite`.
    rows = jnp.stack(lax.optimization_barrier(columns), axis=1)
    (found,) = launches.run(ordered(settings, rows, bins.order))
    return found


def ordered(settings: Settings, rows: Float[Array, "n f"], order: Int32[Array, "n"]) -> Launch:
    """What puts rows in an order: XLA's gather fetches float by float, this one row by row."""
    number = order.shape[0]
    return Launch(
        "tiles",
        "ordered",
        (rows, order),
        (number,),
        (floats(*rows.shape),),
        {"B": settings.rows},
        -(-number // settings.rows),
        1,
    )


def forward(
    tiles: Tiling, settings: Settings, rows: Float[Array, "n f"], bins: Bins, *, save: bool
) -> Launch:
    """What gives a `Drawn`."""
    starts = bins.slot.shape[0] // settings.chunk + tiles.tiles
    return Launch(
        "tiles",
        "forward",
        (rows, bins.rank, bins.offsets),
        _numbers(tiles),
        (
            floats(CHANNELS, tiles.tiles, PIXELS),
            floats(tiles.tiles, PIXELS),
            floats(starts if save else 1, PIXELS),
            ints(tiles.tiles if save else 1),
        ),
        {"K": settings.chunk, "SAVE": save},
        tiles.tiles,
        settings.warps,
    )


def backward(
    tiles: Tiling,
    settings: Settings,
    rows: Float[Array, "n f"],
    bins: Bins,
    drawn: Drawn,
    cotangents: tuple[Array, Array],
) -> Launch:
    """What gives the gradients of slots, and for every slot in order of owner where its is."""
    capacity = bins.slot.shape[0]
    of_bins = (bins.rank, bins.slot, bins.offsets)
    return Launch(
        "tiles",
        "backward",
        (rows, *of_bins, drawn.starts, drawn.live, drawn.channels, drawn.left, *cotangents),
        _numbers(tiles),
        (floats(capacity, FOUND), ints(capacity)),
        {"K": settings.chunk_back, "SAVED": settings.saved},
        tiles.tiles,
        settings.warps_back,
        zeroed=(1,),
        registers=settings.registers_back,
    )


def gather(settings: Settings, sums: Array, place: Array, bins: Bins) -> Launch:
    """What adds up the gradients of the slots of every (view, Gaussian)."""
    count = bins.order.shape[0]
    return Launch(
        "owners",
        "gather",
        (sums, place, bins.run_start, bins.run_end, bins.order),
        (count,),
        (floats(count, FOUND),),
        {"B": settings.owners, "J": settings.slots},
        -(-count // settings.owners),
        settings.warps_gather,
    )


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be used by this process, or None; compiles small programs of them."""
    for name in ("triton", "jax_triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (extra `cuda`)"
    try:
        card = jax.devices("gpu")[0]
        if float(card.compute_capability) < _OLDEST:
            return f"{card.device_kind} is older than Ampere"
        jax.jit(_smallest).lower().compile()
    except Exception as error:  # whatever versions raise that do not fit each other
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _smallest() -> tuple[tuple[Array, ...], Bins]:
    one = jnp.zeros(1, jnp.int32)
    bins = Bins(one, one, one, one, one, jnp.zeros(2, jnp.int32), jnp.int32(0))
    owners = launches.run(gather(Settings(), jnp.zeros((1, FOUND)), one, bins))
    nothing = jnp.zeros((1, 1))
    projection = Projection(*[nothing] * 8, visible=nothing > 0)
    return owners, nvidia_bin.bin_splats(projection, jnp.zeros(1), (8, 8), 1)


def _numbers(tiles: Tiling) -> tuple[int, ...]:
    return tiles.columns, tiles.rows, tiles.parts, tiles.tiles
