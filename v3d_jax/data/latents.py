"""A data set's latents in memory, so that training a video model decodes no pictures unasked.

n orbits, v views each; latents float16 [n,v,h,w,c] as the video model denoises them (scaled),
input views uint8 [n,v,s,s,3] on white for the image tower. Encoding happens once, before training;
the result can lie beside the data under a name made from the data, the weights and the sizes, so a
stale one is never found.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float16, Float32, Int, UInt8

from v3d_jax import errors
from v3d_jax.data import orbits

# uint8 [b, h, w, 3] on white -> latents [b, h / 8, w / 8, c]; always called with the same b.
Encode = Callable[[np.ndarray], Any]

ARRAYS = ("latents", "images", "azimuths", "elevations")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Sizes of the cache and of the work that fills it."""

    image_size: int = 128
    orbits_per_call: int = 4
    threads: int = 8


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCache:
    """All orbits of a split as arrays, beside their source; `loader.PicturedClips`.

    `tokens` are what an image tower that does not learn makes of every view.
    """

    latents: Float16[np.ndarray, "n v h w c"]
    images: UInt8[np.ndarray, "n v s s 3"]
    azimuths: Float32[np.ndarray, "n v"]
    elevations: Float32[np.ndarray, " n"]
    names: list[str]
    source: orbits.Source
    tokens: Float32[np.ndarray, "n v k d"] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def views(self) -> int:
        """Frames of one orbit."""
        return self.latents.shape[1]

    def clip(self, index: int, order: Int[np.ndarray, " t"]) -> dict[str, np.ndarray]:
        """Latents and azimuths of frames `order` of orbit `index`, and the first one's picture.

        If there are tokens, the first one's as well.
        """
        tokens = {} if self.tokens is None else {"tokens": self.tokens[index, order[0]]}
        return {
            **tokens,
            "latents": self.latents[index, order],
            "image": self.images[index, order[0]],
            "azimuth": self.azimuths[index, order],
            "elevation": self.elevations[index],
            "index": np.int32(index),
        }

    def pictures(self, index: int, views: Int[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        """Views of orbit `index`, decoded on white."""
        return orbits.pixels(self.source[index], views)

    def name(self, index: int) -> str:
        """The object of orbit `index`."""
        return self.names[index]


def open_or_encode(
    source: orbits.Source,
    encode: Encode,
    weights: str,
    config: CacheConfig,
    *,
    folder: Path | None = None,
    save: bool = True,
) -> LatentCache:
    """The latents of `source`: read from below `folder` if they lie there, else encoded.

    `weights` is the fingerprint of the autoencoder that `encode` applies. What is encoded is
    saved below `folder` unless `save` is false (all hosts but one) or there is no folder.
    """
    key = {
        "data": source.digest,
        "split": source.split,
        "weights": weights,
        "image_size": config.image_size,
    }
    if folder is None:
        return encode_orbits(source, encode, config)
    path = folder / f"latents-{short_digest(key)}"
    if path.is_dir():
        return load(path, key, source)
    cache = encode_orbits(source, encode, config)
    if save:
        write(path, cache, key)
    return cache


def encode_orbits(source: orbits.Source, encode: Encode, config: CacheConfig) -> LatentCache:
    """Encodes every frame of every orbit, with a progress bar.

    `orbits_per_call` orbits go through `encode` at a time (the last call is filled up with white
    frames); threads decode the pictures meanwhile. Raises FloatingPointError, which names the
    orbit, when a latent is not finite in float16.
    """
    from tqdm import tqdm

    count, views = len(source), source.views
    images = np.empty((count, views, config.image_size, config.image_size, 3), np.uint8)
    azimuths, elevations = np.empty((count, views), np.float32), np.empty(count, np.float32)
    latents, names = None, []
    groups = range(0, count, config.orbits_per_call)
    with tqdm(total=count, desc="encoding", unit="orbit", smoothing=0.05) as bar:
        for first, (records, frames, small) in zip(groups, decoded(source, config), strict=True):
            result = encode(frames.reshape(-1, *frames.shape[2:]))
            part = slice(first, first + len(records))
            images[part] = small
            azimuths[part] = [record.azimuths for record in records]
            elevations[part] = [record.elevation for record in records]
            names += [record.name for record in records]
            with np.errstate(over="ignore"):
                result = np.asarray(result).astype(np.float16)
            result = result.reshape(-1, views, *result.shape[1:])[: len(records)]
            for record, values in zip(records, result, strict=True):
                if not np.isfinite(values).all():
                    raise FloatingPointError(f"the latents of {record.name!r} are not finite")
            if latents is None:
                latents = np.empty((count, *result.shape[1:]), np.float16)
            latents[part] = result
            bar.update(len(records))
    if latents is None:
        raise ValueError("there are no orbits to encode")
    return LatentCache(latents, images, azimuths, elevations, names, source)


def shrink(frames: UInt8[np.ndarray, "v h w 3"], size: int) -> UInt8[np.ndarray, "v s s 3"]:
    """Frames at `size` x `size`, with the antialiased filter of a tower's plain preprocessing."""
    from PIL import Image

    if frames.shape[1:3] == (size, size):
        return frames
    images = (Image.fromarray(frame) for frame in frames)
    small = [image.resize((size, size), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in small])


def fingerprint(params: Any) -> str:
    """A digest of a pytree of arrays: paths, types, shapes and every bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write(path: Path, cache: LatentCache, key: dict[str, Any]) -> None:
    """Saves a cache; `key` says what it was made from."""
    save_arrays(path, {name: getattr(cache, name) for name in ARRAYS}, key, cache.names)


def load(path: Path, key: dict[str, Any], source: orbits.Source) -> LatentCache:
    """Reads a saved cache of `source` into memory; errors as in `load_arrays`."""
    arrays, names = load_arrays(path, ARRAYS, key)
    return LatentCache(**arrays, names=names, source=source)


def save_arrays(
    path: Path, arrays: dict[str, np.ndarray], key: dict[str, Any], names: list[str]
) -> None:
    """Saves arrays of a row an orbit as a folder of .npy files, aside first.

    Where another process has saved the same meanwhile, its folder stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        (aside / "key.json").write_text(json.dumps({"key": key, "names": names}))
        aside.rename(path)
    except OSError as error:
        if path.is_dir():
            return
        raise errors.UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_arrays(
    path: Path, wanted: Iterable[str], key: dict[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What `save_arrays` saved: arrays and names of orbits.

    Raises UserError when it is damaged, or was not made from what `key` describes.
    """
    try:
        saved = json.loads((path / "key.json").read_text())
        arrays = {name: np.load(path / f"{name}.npy") for name in wanted}
        found, names = saved["key"], saved["names"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise errors.UserError(f"{path} is damaged ({error}); remove it and run again") from error
    if found != key or any(len(array) != len(names) for array in arrays.values()):
        raise errors.UserError(f"{path} belongs to other data or weights; remove it and run again")
    return arrays, names


def decoded(
    source: orbits.Source, config: CacheConfig
) -> Iterator[tuple[list[orbits.Orbit], np.ndarray, np.ndarray]]:
    """Groups of records, their frames [orbits_per_call, v, h, w, 3] and the records' small ones.

    Read a little ahead.
    """
    group, count = config.orbits_per_call, len(source)

    def read(index: int) -> tuple[orbits.Orbit, np.ndarray, np.ndarray]:
        record = source[index]
        frames = orbits.pixels(record, range(source.views))
        return record, frames, shrink(frames, config.image_size)

    with futures.ThreadPoolExecutor(config.threads) as pool:
        ahead = max(2 * group, config.threads)
        waiting = collections.deque(pool.submit(read, i) for i in range(min(ahead, count)))
        for first in range(0, count, group):
            done = []
            for index in range(first, min(first + group, count)):
                done.append(waiting.popleft().result())
                if index + ahead < count:
                    waiting.append(pool.submit(read, index + ahead))
            records, frames, small = zip(*done, strict=True)
            white = [np.full_like(frames[0], 255)] * (group - len(frames))
            yield list(records), np.stack([*frames, *white]), np.stack(small)


def short_digest(key: dict[str, Any]) -> str:
    """A name for what was made from `key`."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
