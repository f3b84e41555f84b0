"""Rasterizing 3D Gaussians for a batch of views: projection, binning, compositing.

The semantics are gsplat's: 0.3 px^2 of blur, contributions below 1/255 dropped, alpha capped at
0.99, and a pixel finished before its transmittance would fall to 1e-4. The slow twin is `dense`.
Everything has a static shape; one number, the capacity in slots (tile, Gaussian), is chosen by
the caller, and a result says whether it was enough.

All of it exists in plain XLA and runs on CPU, GPU and TPU. On NVIDIA GPUs fused kernels make slots
and composite instead, where they can be used; on TPUs some composite on demand (docs/kernels.md).
"""

import functools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from v3d_jax.ops import binning, target
from v3d_jax.ops import camera as cameras
from v3d_jax.ops.camera import Camera
from v3d_jax.splat import gaussians as splats
from v3d_jax.splat.bin import TILE, Bins, Tiling, bin_splats, tiling
from v3d_jax.splat.composite import Layout, composite
from v3d_jax.splat.gaussians import Gaussians
from v3d_jax.splat.kernels import nvidia, nvidia_bin
from v3d_jax.splat.project import NEAR, Projection, project

DEPTH_FLOOR = 1e-10  # of the alpha that an expected depth is divided by
# "triton": NVIDIA only. "pallas": TPUs, interpreted on a CPU. "auto": "triton" where that works and
# not "pallas", as long as no TPU has run it.
Compositing = Literal["xla", "triton", "pallas", "auto"]

_BLOCKS = 6  # about, in a full capacity
_SMALLEST, _LARGEST = 1 << 10, 1 << 16  # chunks


@dataclass(frozen=True)
class RasterConfig:
    """Sizes of a rasterization: all of them are static in the compiled program."""

    width: int = 512  # pixels
    height: int = 512
    slots: int = 1 << 20  # capacity: (tile, Gaussian), all views together
    near: float = NEAR  # world units
    block: int | None = None  # chunks of 16 splats computed at a time; None: by the capacity
    unroll: bool | None = None  # chains of 16 splats in one kernel; None: on NVIDIA
    compositing: Compositing = "auto"


class Render(NamedTuple):
    """Views of a set of Gaussians; `i` views of `h` x `w` pixels."""

    color: Float[Array, "i h w 3"]  # over the background
    alpha: Float[Array, "i h w"]
    depth: Float[Array, "i h w"]  # expected camera z, world units; 0 where alpha is 0
    slots: Int32[Array, ""]  # capacity needed; above the configured one, Gaussians are missing

    def overflow(self, config: RasterConfig) -> Bool[Array, ""]:
        """Whether the capacity was too small, so that the farthest Gaussians are missing."""
        return self.slots > config.slots


def rasterize(
    gaussians: Gaussians,
    camera: Camera,
    config: RasterConfig,
    background: Float[Array, "3"] | None = None,
) -> Render:
    """Colour, alpha and expected depth of a batch of views [i]; no background is black.

    Differentiable in every field of the Gaussians and in the background, not in the cameras' part
    of visibility; gradients are the same to the bit in every run. Colours follow the direction from
    the camera (`gaussians.color`). The cameras' own width and height are not read.
    """
    projection = project_gaussians(gaussians, camera, config)
    fields = composited_fields(gaussians, camera, projection)
    bins = bin_gaussians(gaussians, projection, config)
    tiles = tiling(len(camera.intrinsics), config.width, config.height)
    chosen = compositing(config)
    if chosen == "triton":
        channels, left = nvidia.composite(tiles, fields, bins)
    elif chosen == "pallas":
        from v3d_jax.splat.kernels import tpu  # imports Pallas: half a second

        channels, left = tpu.composite(tiles, fields, bins)
    else:
        layout = Layout(tiles, _block(config, tiles), config.unroll)
        channels, left = composite(layout, fields, bins)
    planes = jnp.concatenate([channels, left[None]])
    if chosen == "pallas":
        # A TPU pads rows of 8 pixels to 128: one plane at a time.
        image = lax.map(lambda plane: _to_image(plane[None], tiles)[..., 0], planes)
        image = jnp.moveaxis(image, 0, -1)
    else:
        image = _to_image(planes, tiles)
    image = image[: len(camera.intrinsics), : config.height, : config.width]
    color, depth, left = image[..., :3], image[..., 3], image[..., 4]
    alpha = 1.0 - left
    if background is not None:
        color = color + left[..., None] * background[None, None, None]
    return Render(color, alpha, depth / jnp.maximum(alpha, DEPTH_FLOOR), bins.total)


def compositing(config: RasterConfig) -> Compositing:
    """What the configuration names; "auto" is by the platform (`v3d_jax.ops.target`) at trace time.

    On a GPU where the kernels cannot be used, a warning says why, once in a process.
    """
    if config.compositing != "auto":
        return config.compositing
    if target.platform() not in target.GPUS:
        return "xla"
    reason = nvidia.missing()
    if reason is None:
        return "triton"
    _warn(reason)
    return "xla"


@functools.cache
def _warn(reason: str) -> None:
    message = f"splats are rasterized by XLA, not by the fused kernels: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def project_gaussians(gaussians: Gaussians, camera: Camera, config: RasterConfig) -> Projection:
    """The first stage of `rasterize`: Gaussians on the screens of all views."""
    return project(
        gaussians.means,
        gaussians.rotations,
        gaussians.scales,
        camera,
        width=config.width,
        height=config.height,
        near=config.near,
    )


def composited_fields(
    gaussians: Gaussians, camera: Camera, projection: Projection
) -> tuple[Float[Array, "n"], ...]:
    """What `composite` takes of every (view, Gaussian); the channels are colour and depth."""
    p = projection
    shown = splats.color(gaussians.sh, gaussians.means, cameras.position(camera))
    log_opacity = jax.nn.log_sigmoid(gaussians.opacity_logits)
    fields = [p.mean_x, p.mean_y, 0.5 * p.conic_xx, p.conic_xy, 0.5 * p.conic_yy]
    fields += [jnp.broadcast_to(log_opacity, p.depth.shape)]
    fields += [*(shown[..., i] for i in range(3)), p.depth]
    return tuple(field.reshape(-1) for field in fields)


def bin_gaussians(gaussians: Gaussians, projection: Projection, config: RasterConfig) -> Bins:
    """The second stage of `rasterize`, which has no gradient: slots of all tiles, by depth."""
    log_opacity = jax.nn.log_sigmoid(gaussians.opacity_logits)
    fixed = lax.stop_gradient((projection, log_opacity))
    put = nvidia_bin.bin_splats if compositing(config) == "triton" else bin_splats
    return put(*fixed, (config.width, config.height), config.slots)


def needed_slots(gaussians: Gaussians, views: Camera, config: RasterConfig) -> Int32[Array, ""]:
    """Capacity that the most demanding of the views needs, binned one at a time."""

    def one(lens: Camera) -> Array:
        lens = Camera(*(part[None] for part in lens))
        projection = project_gaussians(gaussians, lens, config)
        return bin_gaussians(gaussians, projection, config).total

    return lax.map(one, views).max()


def with_room(
    config: RasterConfig, slots: int | Int32[Array, ""], slack: float = 1.1
) -> RasterConfig:
    """The configuration with a capacity for `slots` times `slack`, in few distinct sizes."""
    return replace(config, slots=binning.next_size(slots, slack=slack, steps=8))


def rasterize_growing(
    gaussians: Gaussians,
    camera: Camera,
    config: RasterConfig,
    background: Float[Array, "3"] | None = None,
) -> tuple[Render, RasterConfig]:
    """`rasterize`, again with a larger capacity if it was too small; and the configuration used.

    Reads a result on the host, so it belongs outside compiled code. One retry always suffices: the
    first try counts what is needed.
    """
    draw = jax.jit(rasterize, static_argnums=2)
    result = draw(gaussians, camera, config, background)
    if bool(result.overflow(config)):
        config = with_room(config, result.slots)
        result = draw(gaussians, camera, config, background)
    return result, config


def _block(config: RasterConfig, tiles: Tiling) -> int:
    """Chunks a block, no more than there can be.

    Few blocks keep a GPU busy, but the last one is computed whole and a block takes 8 KiB a chunk
    in the gradient.
    """
    most = config.slots // 16 + tiles.tiles
    if config.block is not None:
        return min(config.block, most)
    return min(max(1 << round(math.log2(most / _BLOCKS)), _SMALLEST), _LARGEST, most)


def _to_image(channels: Float[Array, "d g p"], tiles: Tiling) -> Float[Array, "i h w d"]:
    """Channels of tiles as images with the channels last."""
    parts, views, rows, columns = tiles
    image = channels.reshape(-1, views, rows, columns, parts, TILE, TILE)
    image = image.transpose(4, 1, 2, 5, 3, 6, 0)
    return image.reshape(parts * views, rows * TILE, columns * TILE, -1)
