"""What an image tower that does not learn makes of a data set's views, kept beside the latents.

n orbits, v views each, k tokens of d channels (one token for CLIP's pooled vector): float32
[n,v,k,d]. The tower sees whole frames, as it does when sampling, and need not run while training.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from v3d_jax.data import latents, orbits

# uint8 [b, h, w, 3] on white -> tokens [b, k, d]; always called with the same b.
Encode = Callable[[np.ndarray], Any]
Tokens = Float32[np.ndarray, "n v k d"]


def open_or_encode(
    source: orbits.Source,
    encode: Encode,
    weights: str,
    config: latents.CacheConfig,
    *,
    folder: str | os.PathLike,
    save: bool = True,
) -> Tokens:
    """The tokens of `source`: read from below `folder` if they lie there, else encoded and saved.

    `weights` is the fingerprint of the tower that `encode` applies. Errors are those of
    `latents.open_or_encode`.
    """
    key = {"data": source.digest, "split": source.split, "weights": weights}
    path = Path(folder) / f"tokens-{latents.short_digest(key)}"
    if path.is_dir():
        return latents.load_arrays(path, ("tokens",), key)[0]["tokens"]
    tokens, names = encode_orbits(source, encode, config)
    if save:
        latents.save_arrays(path, {"tokens": tokens}, key, names)
    return tokens


def encode_orbits(
    source: orbits.Source, encode: Encode, config: latents.CacheConfig
) -> tuple[Tokens, list[str]]:
    """Encodes every frame of every orbit, with a progress bar; raises FloatingPointError for NaN.

    Also returns the orbits' names.
    """
    from tqdm import tqdm

    made, names = [], []
    with tqdm(total=len(source), desc="image tower", unit="orbit", smoothing=0.05) as bar:
        for records, frames, _ in latents.decoded(source, config):
            tokens = np.asarray(encode(frames.reshape(-1, *frames.shape[2:])), np.float32)
            tokens = tokens.reshape(len(frames), -1, *tokens.shape[1:])[: len(records)]
            for record, values in zip(records, tokens, strict=True):
                if not np.isfinite(values).all():
                    raise FloatingPointError(f"the tokens of {record.name!r} are not finite")
            made.append(tokens)
            names += [record.name for record in records]
            bar.update(len(records))
    return np.concatenate(made), names
