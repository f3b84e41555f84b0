"""Adding up slots' gradients by their owner on NVIDIA GPUs: the device code, in Triton.

The slots of a (view, Gaussian) lie side by side in the order of owners; where the gradient of each
lies in the order of tiles is looked up. The order of additions is fixed. Importing this module
needs `triton`; `v3d_jax.splat.kernels.nvidia` launches.
"""

from typing import no_type_check

import triton
import triton.language as tl

FOUND = tl.constexpr(10)  # floats of a slot's gradient, as `tiles.backward` writes them


@triton.jit
@no_type_check
def _slots(sums, place, start, end, at, column, J: tl.constexpr):
    """Sum over the J slots from `at` on of some (view, Gaussian) [b, 16]."""
    s = start[:, None] + at + tl.arange(0, J)[None, :]
    where = tl.load(place + s, mask=s < end[:, None], other=0) - 1
    source = sums + where.to(tl.int64)[:, :, None] * FOUND + column[None, None, :]
    used = (where >= 0)[:, :, None] & (column < FOUND)[None, None, :]
    return tl.sum(tl.load(source, mask=used, other=0.0), 1)


@triton.jit
@no_type_check
def gather(
    sums, place, run_start, run_end, order,
    count,
    out,
    B: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Sums over the slots of every (view, Gaussian), [count, 10], in the order of the fields.

    B of them a program, J slots of each at a time.
    """
    r = tl.program_id(0) * B + tl.arange(0, B)
    inside = r < count
    start = tl.load(run_start + r, mask=inside, other=0)
    end = tl.load(run_end + r, mask=inside, other=0)
    longest = tl.max(end - start, 0)
    column = tl.arange(0, 16)
    total = tl.zeros([B, 16], tl.float32)
    at = 0
    while at < longest:
        total += _slots(sums, place, start, end, at, column, J)
        at += J
    target = tl.load(order + r, mask=inside, other=0)
    target = out + target.to(tl.int64)[:, None] * FOUND + column[None, :]
    tl.store(target, total, mask=inside[:, None] & (column < FOUND)[None, :])
