"""Clips of real scenes: frames chosen along the camera's path, cut out, and brought to one scale.

What `data.mvimgnet` and `data.co3d` share. Axes: t frame of a clip, n frame of a sequence, h w
image, s source view. Cameras are OpenCV's with pixel centres at half-integers, as `ops.camera`
says; arrays are numpy's, so that processes which only read start no accelerator. Where the world's
up is, neither set tells: both come from structure from motion.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8
from PIL import Image

from v3d_jax.data import paths, poses
from v3d_jax.errors import UserError
from v3d_jax.ops import camera

RADIUS = 1.5  # of an orbit about what it looks at, as V3D's `scale_pose` makes it

# skip(name, reason) is told of everything that is left out: `skips.Skips.add`, or any function.
Skip = Callable[[str, str], None]


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """What clips are made of.

    `num_frames` are evenly spaced in the order of the sequence, or with `arc_length` in the
    distance that the camera travelled. Pictures become `size` pixels a side. Between `min_sources`
    and `max_sources` frames, each number as likely, are input views.
    """

    num_frames: int = 24
    size: int = 256
    arc_length: bool = False
    min_sources: int = 1
    max_sources: int = 1

    def __post_init__(self):
        if self.num_frames < 2 or self.size < 1:
            raise ValueError(f"{self.num_frames} frames of {self.size} pixels make no clip")
        if not 1 <= self.min_sources <= self.max_sources <= self.num_frames:
            raise ValueError(
                f"between {self.min_sources} and {self.max_sources} source views cannot be taken "
                f"from {self.num_frames} frames"
            )


class Clip(NamedTuple):
    """One clip; every field is an array, so that clips of one `ClipConfig` can be batched.

    The world is that of `normalise`: a point or depth of the file becomes
    `scale * (point - centre)` or `scale * depth`.
    """

    images: UInt8[np.ndarray, "t h w 3"]  # sRGB as displayed, background kept
    mask: UInt8[np.ndarray, "t h w"]  # 255 is object; 255 everywhere without masks; 0 in padding
    world_to_camera: Float[np.ndarray, "t 4 4"]  # float32
    intrinsics: Float[np.ndarray, "t 3 3"]  # float32, pixels of `images`
    sizes: Int32[np.ndarray, "t 2"]  # width and height of the picture: padding is right and below
    sources: Int32[np.ndarray, " s"]  # frames of the clip: 0, then others; 0 where not valid
    valid: Bool[np.ndarray, " s"]
    scale: Float[np.ndarray, ""]  # our units in one of the file's, float32
    centre: Float[np.ndarray, "3"]  # in the file's world, float32
    frames: Int32[np.ndarray, " t"]  # place of each frame in the sequence
    names: np.ndarray  # of the pictures, str [t]
    name: np.ndarray  # of the sequence, str []


class Cut(NamedTuple):
    """A part of a picture at the size of a clip's, and where it lies in its own array."""

    rgb: UInt8[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]
    intrinsics: Float[np.ndarray, "3 3"]
    size: tuple[int, int]  # width and height


def cameras(clip: Clip) -> camera.Camera:
    """The cameras of a clip, or of a batch of clips, on the default device."""
    shape = clip.world_to_camera.shape[:-2]
    height, width = clip.images.shape[-3:-1]
    return camera.Camera(
        jnp.asarray(clip.world_to_camera),
        jnp.asarray(clip.intrinsics),
        jnp.full(shape, width, jnp.int32),
        jnp.full(shape, height, jnp.int32),
    )


def refusal(posed: Sequence[poses.Posed], config: ClipConfig) -> str | None:
    """Why views make no clip, if they do not: too few, or all from one place."""
    if len(posed) < config.num_frames:
        return f"has {len(posed)} frames, {config.num_frames} are needed"
    centres = positions([posed[index] for index in choose(positions(posed), config)])
    if np.ptp(centres, axis=0).max() <= 1e-6 * max(1.0, np.abs(centres).max()):
        return "was seen from one place only, which shows no depth"
    return None


def positions(posed: Sequence[poses.Posed]) -> Float[np.ndarray, "n 3"]:
    """Camera centres, float64."""
    return np.stack([poses.inverse(view.world_to_camera)[:3, 3] for view in posed])


def choose(centres: Float[np.ndarray, "n 3"], config: ClipConfig) -> Int32[np.ndarray, " t"]:
    """Frames evenly along a path of at least so many, ascending; the first and the last belong."""
    total, count = len(centres), config.num_frames
    places = np.arange(total, dtype=np.float64)
    if config.arc_length:
        steps = np.linalg.norm(np.diff(centres, axis=0), axis=-1)
        places = np.concatenate([[0.0], np.cumsum(steps)])
    targets = np.linspace(places[0], places[-1], count)
    nearest = np.abs(places[None, :] - targets[:, None]).argmin(axis=1)
    # Where the camera stands still or leaps, several targets have the same nearest frame: each
    # takes the next free one, but leaves enough for those after it.
    rank = np.arange(count)
    spread = np.maximum.accumulate(nearest - rank)
    return (np.minimum(spread, total - count) + rank).astype(np.int32)


def draw_sources(
    rng: np.random.Generator, config: ClipConfig
) -> tuple[Int32[np.ndarray, " s"], Bool[np.ndarray, " s"]]:
    """The input views of a clip: frame 0, and a random number of others in random order.

    There are `max_sources` places; those beyond the number drawn are frame 0 and not valid.
    """
    number = int(rng.integers(config.min_sources, config.max_sources + 1))
    others = 1 + rng.permutation(config.num_frames - 1)[: number - 1]
    sources = np.zeros(config.max_sources, np.int32)
    sources[1:number] = others
    return sources, np.arange(config.max_sources) < number


def normalise(
    world_to_camera: Float[np.ndarray, "t 4 4"],
) -> tuple[Float[np.ndarray, "t 4 4"], float, Float[np.ndarray, "3"]]:
    """Cameras about the origin, what they look at `RADIUS` ahead of the first; scale and centre.

    A point x of the old world is `scale * (x - centre)` in the new one, and depths are multiplied
    by the scale; pixels stay where they are. The cameras must not all be at one place. Of orbits
    the radius becomes `RADIUS`, as in V3D's `scale_pose`, which puts the farthest camera there
    whatever the path: along one of four times the length the same room is at a quarter of the
    distance, and where one picture has its surfaces could not be learnt.
    """
    centres = paths.centres(world_to_camera)
    centre = centres.mean(axis=0)
    # No camera is farther from another than in an orbit.
    far = max(paths.depth(world_to_camera, 0), 0.5 * paths.width(world_to_camera))
    scale = RADIUS / far
    moved = world_to_camera.copy()
    moved[:, :3, 3] = -scale * np.einsum("tij,tj->ti", moved[:, :3, :3], centres - centre)
    return moved, scale, centre


def cut(
    rgb: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"] | None,
    intrinsics: Float[np.ndarray, "3 3"],
    box: tuple[int, int, int, int],
    side: int,
) -> Cut:
    """The box (left, top, right, bottom; pixels) with its longest side resized to `side`.

    The result is square, black and masked out right of and below the box, which keeps its shape.
    """
    left, top, right, bottom = box
    factor = side / max(right - left, bottom - top)
    width, height = (max(1, round(factor * length)) for length in (right - left, bottom - top))

    def resized(pixels: np.ndarray) -> np.ndarray:
        part = Image.fromarray(pixels[top:bottom, left:right])
        padded = np.zeros((side, side, *pixels.shape[2:]), np.uint8)
        # Pillow's filter averages where it shrinks, and maps edges to edges.
        padded[:height, :width] = part.resize((width, height), Image.Resampling.BILINEAR)
        return padded

    corner = np.asarray([[0.0, 0.0, left], [0.0, 0.0, top], [0.0, 0.0, 0.0]])
    # The shorter side was rounded, so the two scales differ a little.
    scale = np.asarray([[width / (right - left)], [height / (bottom - top)], [1.0]])
    alpha = np.full(rgb.shape[:2], 255, np.uint8) if mask is None else mask
    return Cut(resized(rgb), resized(alpha), (intrinsics - corner) * scale, (width, height))


def read(
    name: str,
    posed: Sequence[poses.Posed],
    cutter: Callable[[poses.Posed], Cut],
    config: ClipConfig,
    rng: np.random.Generator,
) -> Clip:
    """The clip of a sequence whose views lie in the order of the path; `cutter` reads one.

    Raises `UserError` for what `refusal` refuses.
    """
    if (reason := refusal(posed, config)) is not None:
        raise UserError(f"{name} {reason}: leave it out")
    frames = choose(positions(posed), config)
    chosen = [posed[index] for index in frames]
    cuts = [cutter(view) for view in chosen]
    moved, scale, centre = normalise(np.stack([view.world_to_camera for view in chosen]))
    sources, valid = draw_sources(rng, config)
    return Clip(
        images=np.stack([one.rgb for one in cuts]),
        mask=np.stack([one.mask for one in cuts]),
        world_to_camera=moved.astype(np.float32),
        intrinsics=np.stack([one.intrinsics for one in cuts]).astype(np.float32),
        sizes=np.asarray([one.size for one in cuts], np.int32),
        sources=sources,
        valid=valid,
        scale=np.asarray(scale, np.float32),
        centre=centre.astype(np.float32),
        frames=frames,
        names=np.asarray([view.name for view in chosen]),
        name=np.asarray(name),
    )
