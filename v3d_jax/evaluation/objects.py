"""A model's orbits of held-out objects, beside what they are measured by.

Every object is generated from its frame 0 and compared with its other frames. Beside the model
stand two baselines (the input repeated; the training orbit that looks most like the input) and the
ceiling that its autoencoder sets by encoding and decoding the true frames. Axes: b object, t frame,
h w picture.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from v3d_jax import pipeline
from v3d_jax.data import baselines, heldout, scores
from v3d_jax.diffusion import sampler
from v3d_jax.evaluation import measure
from v3d_jax.evaluation.measure import MODEL
from v3d_jax.nn import lpips
from v3d_jax.ops import compiling
from v3d_jax.ops import image as images

_, REPEATED, NEAREST, CEILING = ROWS = (
    MODEL,
    "input view, repeated",
    "nearest training orbit",
    "autoencoder (ceiling)",
)


class Prediction(NamedTuple):
    """One object's true frames, and frames and scores by every predictor of `ROWS`."""

    truth: UInt8[np.ndarray, "t h w 3"]
    frames: dict[str, np.ndarray]
    scores: dict[str, dict[str, float]]


def generate(
    config: pipeline.Settings,
    params: Any,
    inputs: Float[Array, "b h w 3"],
    keys: Key[Array, " b"],
) -> Float[Array, "b t h w 3"]:
    """`pipeline.image_to_orbit` of every input with its own key; the UNet sees them as one batch.

    Encoding and decoding go object by object, so that their memory does not grow with the batch.
    """
    condition_keys, noise_keys = jax.vmap(pipeline.split_key)(keys)

    def encode(entry):
        image, key = entry
        condition = pipeline.encode_condition(config, params, image[None], key)
        return jax.tree.map(lambda x: x[0], condition)

    def draw(key):
        return jax.random.normal(key, (1, *config.generator.latent_shape))[0]

    condition = jax.lax.map(encode, (inputs, condition_keys))
    levels = sampler.sigmas(config.sampling)
    start = sampler.begin(jax.vmap(draw)(noise_keys), levels[0])
    latents = pipeline.advance(config, params, condition, start, levels).x
    return jax.lax.map(lambda x: pipeline.decode(config, params, x[None])[0], latents)


def reconstruct(
    config: pipeline.Settings, params: Any, truth: Float[Array, "b t h w 3"]
) -> Float[Array, "b t h w 3"]:
    """True frames through the autoencoder: the decoded means of their posteriors."""

    def one(clip):
        autoencoder = pipeline.networks(config, params).autoencoder
        latents = autoencoder.encode(images.to_network(clip)).mean
        scaled = latents * config.generator.autoencoder.scale_factor
        return pipeline.decode(config, params, scaled[None])[0]

    return jax.lax.map(one, truth)


def score(
    perceptual: lpips.LPIPSParams | None,
    prediction: UInt8[Array, "b t h w 3"],
    truth: UInt8[Array, "b t h w 3"],
) -> dict[str, Float[Array, " b"]]:
    """Every object's metrics over its unseen frames (all but the first), without LPIPS if None."""
    one = lambda pair: measure.frames(perceptual, *(frames[1:] for frames in pair))  # noqa: E731
    return jax.lax.map(one, (prediction, truth))


def predict(
    config: pipeline.Settings,
    params: Any,
    perceptual: lpips.LPIPSParams | None,
    objects: heldout.Objects,
    known: heldout.Records,
    *,
    batch: int,
    seed: int,
) -> Iterator[Prediction]:
    """Predicts and scores the objects in their order, `batch` of them on the device together."""
    size, count = config.generator.frame_size[0], config.generator.num_frames
    nearest = heldout.neighbours(objects, known, size)
    told = {"compiler_options": compiling.OPTIONS}
    sample, rebuild = (
        jax.jit(stage, static_argnums=0, **told) for stage in (generate, reconstruct)
    )
    compare = jax.jit(score, **told)
    total = len(objects.places)
    for first in range(0, total, batch):
        # The last batch repeats its last object, so that every batch has the compiled shape.
        rows = np.minimum(np.arange(first, first + batch), total - 1)
        truth, near = _clips(objects, known, nearest, rows, size, count)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows))
        made = {
            MODEL: measure.to_bytes(sample(config, params, measure.from_bytes(truth[:, 0]), keys)),
            REPEATED: baselines.repeat(truth[:, 0], count),
            NEAREST: near,
            CEILING: measure.to_bytes(rebuild(config, params, measure.from_bytes(truth))),
        }
        marks = {
            name: jax.device_get(compare(perceptual, jnp.asarray(frames), jnp.asarray(truth)))
            for name, frames in made.items()
        }
        for i in range(min(batch, total - first)):
            yield Prediction(
                truth[i],
                {name: frames[i] for name, frames in made.items()},
                {name: {m: float(v[i]) for m, v in row.items()} for name, row in marks.items()},
            )


def _clips(
    objects: heldout.Objects,
    known: heldout.Records,
    nearest: baselines.Nearest,
    rows: np.ndarray,
    size: int,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """True orbits of some objects, and the training orbits nearest to them."""
    true = [heldout.orbit(objects.records, objects.places[row], 0, size, count) for row in rows]
    near = [
        heldout.orbit(known, int(nearest.orbit[row]), int(nearest.start[row]), size, count)
        for row in rows
    ]
    return np.stack(true), np.stack(near)


def evaluate(
    config: pipeline.Settings,
    params: Any,
    perceptual: lpips.LPIPSParams | None,
    data: tuple[heldout.Records, heldout.Records],
    about: dict[str, Any],
    *,
    batch: int,
    seed: int,
    limit: int | None,
) -> measure.Result:
    """The scores of the first `limit` objects of a split; `data` is it, and what to search.

    Raises `UserError` for data that do not suit the model, and for damaged records.
    """
    records, known = data
    size, count = config.generator.frame_size, config.generator.num_frames
    for one in data:
        heldout.check(one, size, count)
    objects = heldout.select(records, size[0], limit)
    made = predict(config, params, perceptual, objects, known, batch=batch, seed=seed)
    marks, sheets = [], []
    for prediction in tqdm(made, "evaluating", len(objects.names), unit="object", disable=None):
        marks.append(prediction.scores)
        if len(sheets) < measure.SHEETS:
            sheets.append(scores.sheet(prediction.frames[MODEL], prediction.truth))
    about = about | {"unseen_views": count - 1}
    return measure.Result(objects.names, measure.table(marks), sheets, about, (REPEATED, NEAREST))
