"""Source pictures in frames: what a source view shows need not be made.

Latents keep little of a picture's detail, and less of it once a UNet has moved them. The PixelNeRF
knows how far away is what a pixel shows, so every source picture is seen from a frame's camera by
that distance, and what is hidden from the source view by that of its own pixels. A network gives
the decoded frame and each of these pictures a weight at every pixel. Not in V3D; image-based
rendering with learnt weights as in Deep Blending (Hedman et al. 2018, section 5), the source views
taken alike and as many as there are, as in IBRNet (arXiv 2102.13090, section 3).

Axes: `b` clip, `v` source view, `k` frame, `i j` latents, `h w` image, `p` picture: the decoded
frame, then the views. Images are in [-1, 1]. Geometry is float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from v3d_jax.nn import layers
from v3d_jax.ops import image, rays
from v3d_jax.ops.camera import Camera

KNOWN = 10  # of a pixel of a picture: see `Blend.__call__`
_FARTHEST = 1e-3  # disparity, which may not fall to 0 at a border either


class Disparity(NamedTuple):
    """1 / depth along the axes of the cameras, at the resolution of latents."""

    frames: Float[Array, "b k i j"]
    views: Float[Array, "b v i j"] | None  # none where no pictures are blended


class Warped(NamedTuple):
    """Source views seen from the cameras of frames."""

    pictures: Float[Array, "b k v h w 3"]
    seen: Bool[Array, "b k v h w"]  # whether the view has the point in its picture
    turned: Float[Array, "b k v h w"]  # how far apart the two lines of sight are, 0 to 2
    hidden: Float[Array, "b k v h w"]  # > 0 behind what the view sees there: log depth, -1 to 1


class Blend(nnx.Module):
    """Weights of pictures at every pixel, and what they give together."""

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        settings = {"dtype": dtype, "rngs": rngs}
        self.conv1 = layers.conv(KNOWN, channels, **settings)
        self.conv2 = layers.conv(2 * channels, channels, **settings)
        self.conv3 = layers.conv(channels, channels, **settings)
        self.conv4 = layers.conv(channels, 1, zero=True, **settings)
        self.dtype = dtype

    def __call__(
        self, decoded: Float[Array, "b k h w 3"], warped: Warped
    ) -> Float[Array, "b k h w 3"]:
        """Frames as decoded, with the pictures' colours where these fit."""
        b, k, h, w, _ = decoded.shape
        flat = jax.tree.map(lambda x: x.reshape(b * k, *x.shape[2:]), warped)
        frames = decoded.reshape(b * k, 1, h, w, 3).astype(jnp.float32)
        pictures = jnp.concatenate([frames, flat.pictures], axis=1)
        seen = jnp.pad(flat.seen, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=True)
        turned, hidden = (
            jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))) for x in (flat.turned, flat.hidden)
        )
        made = jnp.arange(turned.shape[1]).reshape(1, -1, 1, 1) == 0
        known = jnp.concatenate(
            [
                pictures,
                jnp.broadcast_to(frames, pictures.shape),
                jnp.stack(jnp.broadcast_arrays(seen, made, turned, hidden), axis=-1),
            ],
            axis=-1,
        )
        counts = seen[..., None].astype(self.dtype)
        x = nnx.relu(self.conv1(known.astype(self.dtype)))
        mean = jnp.sum(x * counts, axis=1, keepdims=True) / jnp.sum(counts, axis=1, keepdims=True)
        x = jnp.concatenate([x, jnp.broadcast_to(mean, x.shape)], axis=-1)
        x = nnx.relu(taps_apart(self.conv2, x, 2))
        x = nnx.relu(taps_apart(self.conv3, x, 4))
        score = jnp.where(seen, self.conv4(x)[..., 0].astype(jnp.float32), -jnp.inf)
        weight = nnx.softmax(score, axis=1)
        return jnp.sum(weight[..., None] * pictures, axis=1).reshape(decoded.shape)


def taps_apart(
    conv: layers.Conv, x: Float[Array, "n p h w c"], step: int
) -> Float[Array, "n p h w o"]:
    """The convolution with its taps `step` pixels apart, which divides height and width.

    Every `step`-th pixel goes into a picture of its own. A dilated kernel would do, but for its
    gradient cuDNN has nothing better than a convolution with a kernel as large as the picture.
    """
    n, p, h, w, c = x.shape
    x = jnp.moveaxis(x.reshape(n, p, h // step, step, w // step, step, c), (3, 5), (2, 3))
    apart = x.shape[:-1]
    x = conv(x.reshape(n, -1, *apart[-2:], c))
    return jnp.moveaxis(x.reshape(*apart, -1), (2, 3), (3, 5)).reshape(n, p, h, w, -1)


def warp(
    images: Float[Array, "b v h w 3"],
    cameras: Camera,  # [b, v]
    valid: Bool[Array, "b v"],
    targets: Camera,  # [b, k]
    disparity: Disparity,
) -> Warped:
    """The views' pictures from the target cameras, at the size of the pictures.

    On a plane disparity is linear in the picture, so that enlarging it keeps planes; its resolution
    divides the pictures'. What is hidden from a view is shown all the same, and said.
    """
    size = images.shape[2:4]
    images, cameras = jnp.where(valid[..., None, None, None], images, 0.0), filled(cameras, valid)
    near = _enlarge(disparity.frames, size)
    own = rays.pixel_rays(targets, size)
    axis = targets.world_to_camera[..., 2, :3]
    ahead = jnp.einsum("bkhwi,bki->bkhw", own.directions, axis, precision="highest")
    points = own.origins + own.directions / (near * ahead)[..., None]

    def one_clip(images, cameras, valid, surfaces, points, directions):
        shape = points.shape[:-1]
        pixels, seen = rays.project(cameras, points.reshape(-1, 3))
        scale = jnp.stack([cameras.width / size[1], cameras.height / size[0]], axis=-1)
        pictures = jax.vmap(rays.bilinear)(images, pixels / scale[:, None])
        pose = cameras.world_to_camera
        depth = jnp.einsum("vj,...j->v...", pose[:, 2, :3], points, precision="highest")
        depth = depth + pose[:, 2, 3][:, None, None, None]
        cells = jnp.asarray(surfaces.shape[:0:-1]) / jnp.asarray(size[::-1])
        surface = jax.vmap(rays.bilinear)(surfaces, pixels / scale[:, None] * cells[None, None])
        behind = jnp.maximum(depth, rays.NEAREST).reshape(surface.shape) * surface
        hidden = jnp.clip(jnp.log(jnp.maximum(behind, _FARTHEST)), -1.0, 1.0)
        centres = -jnp.einsum("vji,vj->vi", pose[:, :3, :3], pose[:, :3, 3])
        sight = jax.lax.stop_gradient(points)[None] - centres[:, None, None, None]
        sight = sight / jnp.maximum(jnp.linalg.norm(sight, axis=-1, keepdims=True), rays.NEAREST)
        turned = jnp.linalg.norm(sight - directions[None], axis=-1)
        pictures, seen, hidden = (
            x.reshape(-1, *shape, *x.shape[2:]) for x in (pictures, seen, hidden)
        )
        seen = seen & valid[:, None, None, None]
        pictures = jnp.where(seen[..., None], pictures, 0.0)
        found = (pictures, seen, turned * seen, hidden * seen)
        return Warped(*(jnp.moveaxis(x, 0, 1) for x in found))

    given = (images, cameras, valid, disparity.views, points, own.directions)
    return jax.vmap(one_clip)(*given)


def filled(cameras: Camera, valid: Bool[Array, "b v"]) -> Camera:
    """The first of a clip's cameras in the place of padding: NaN there would reach gradients."""

    def one(x: Array) -> Array:
        return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, x[:, :1])

    return jax.tree.map(one, cameras)


def _enlarge(disparity: Float[Array, "b k i j"], size: tuple[int, int]) -> Float[Array, "b k h w"]:
    """Linear between cells' centres and as far beyond the outermost as the picture goes."""
    rows, columns = disparity.shape[2:]
    border = ((0, 0), (0, 0), (1, 1), (1, 1))
    wider = jnp.pad(disparity, border, mode="reflect", reflect_type="odd")[..., None]
    down, across = size[0] // rows, size[1] // columns
    large = image.resize(wider, ((rows + 2) * down, (columns + 2) * across))[..., 0]
    return jnp.maximum(large[..., down:-down, across:-across], _FARTHEST)
