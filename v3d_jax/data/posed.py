"""Training clips of scenes: latents of frames along a path, source pictures, and all cameras.

Scenes are records of an orbit data set whose cameras are what they are and whose azimuths are 0:
rooms by `python -m v3d_jax.render --scenes`, or clips of real places by `record`. Axes: t frame, s
source view, h w picture.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from v3d_jax.data import clips, latents, loader, orbits, png


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Between `min_sources` and `max_sources` frames of a clip are source views, as likely each.

    Frame 0 is always one, and the first. The others are any.
    """

    min_sources: int = 1
    max_sources: int = 5

    def __post_init__(self):
        if not 1 <= self.min_sources <= self.max_sources:
            raise ValueError(f"{self.min_sources} to {self.max_sources} source views are no range")


class PosedClips:
    """Scenes with their latents in memory; `loader.PathClips` and `loader.PicturedClips`.

    A clip has what `latents.LatentCache.clip` gives and besides: "small" uint8 [t,i,i,3], all
    frames as the image tower has them; "sources" uint8 [s,h,w,3] with "source_places", frames of
    the clip, and "valid" [s]; "world_to_camera" [t,4,4], normalised as in `clips.Clip`, and
    "intrinsics" [t,3,3] in pixels of the sources.
    """

    def __init__(self, parts: Sequence[latents.LatentCache], config: SourceConfig):
        self._joined = loader.JoinedClips(parts)
        self._config = config
        self.views = self._joined.views

    def __len__(self) -> int:
        return len(self._joined)

    def name(self, index: int) -> str:
        """The scene of clip `index`."""
        return self._joined.name(index)

    def pictures(self, index: int, views: Int[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """Frames of scene `index`, decoded."""
        return self._joined.pictures(index, views)

    def path(self, num_frames: int, rng: np.random.Generator) -> Int[np.ndarray, " t"]:
        """Evenly spaced frames along a random part of the path, in either direction."""
        most = (self.views - 1) // (num_frames - 1) if num_frames > 1 else 1
        step = int(rng.integers(1, most + 1))
        start = int(rng.integers(self.views - step * (num_frames - 1)))
        order = start + step * np.arange(num_frames)
        return order if rng.random() < 0.5 else order[::-1]

    def draw(
        self, index: int, order: Int[np.ndarray, " t"], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Frames `order` of scene `index` with random source views."""
        config = clips.ClipConfig(
            num_frames=len(order),
            min_sources=self._config.min_sources,
            max_sources=self._config.max_sources,
        )
        return self._clip(index, order, *clips.draw_sources(rng, config))

    def clip(self, index: int, order: Int[np.ndarray, " t"]) -> dict[str, np.ndarray]:
        """Frames `order` of scene `index`, the first of them the only source view."""
        most = self._config.max_sources
        return self._clip(index, order, np.zeros(most, np.int32), np.arange(most) < 1)

    def _clip(
        self, index: int, order: np.ndarray, places: np.ndarray, valid: np.ndarray
    ) -> dict[str, np.ndarray]:
        part, place = self._joined.locate(index)
        record = part.source[place]
        # Padding repeats frame 0, which need not be decoded again.
        frames = orbits.pixels(record, order[places[valid]])
        sources = np.concatenate([frames, np.repeat(frames[:1], np.sum(~valid), axis=0)])
        moved, _, _ = clips.normalise(record.world_to_camera[order].astype(np.float64))
        return {
            **self._joined.clip(index, order),
            "small": part.images[place, order],
            "sources": sources,
            "source_places": places,
            "valid": valid,
            "world_to_camera": moved.astype(np.float32),
            "intrinsics": record.intrinsics[order],
        }


def record(clip: clips.Clip) -> orbits.Orbit:
    """A clip of a real place as a record of a data set; padding beside its pictures is empty."""
    count, height, width = clip.images.shape[:3]
    inside = (np.arange(width) < clip.sizes[:, None, :1]) & (
        np.arange(height)[:, None] < clip.sizes[:, 1:, None]
    )
    alpha = np.where(inside, 255, 0).astype(np.uint8)
    rgba = np.concatenate([clip.images, alpha[..., None]], axis=-1)
    return orbits.Orbit(
        name=str(clip.name),
        variant=0,
        frames=[png.encode(frame) for frame in rgba],
        world_to_camera=clip.world_to_camera,
        intrinsics=clip.intrinsics,
        azimuths=np.zeros(count, np.float32),
        elevation=0.0,
    )
