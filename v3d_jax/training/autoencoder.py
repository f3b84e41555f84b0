"""Training the autoencoder on clips: encoder a frame, decoder over the clip.

Axes: `b` clip, `t` frame, `h w` image, `c` channel; images are in [-1, 1]. The loss is L1 with a
little squared error, LPIPS where its weights are installed, and a slight pull of the posterior
towards the standard normal (arXiv 2112.10752, appendix G, without the adversary).
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8
from safetensors import numpy as safetensors_numpy

from v3d_jax import errors
from v3d_jax.data import loader
from v3d_jax.nn import autoencoder, lpips
from v3d_jax.ops import image, metrics
from v3d_jax.state import Metrics, Params
from v3d_jax.training import objective
from v3d_jax.weights import folder as model_folder
from v3d_jax.weights import lpips as lpips_weights
from v3d_jax.weights import packaged, settings
from v3d_jax.weights import tensors as tensor_files
from v3d_jax.weights.tensors import FloatName

FORMAT = "v3d_jax autoencoder 1"
SHARD_BYTES = 12 * 2**20


@dataclasses.dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the terms, each a mean: over pixels, over frames (LPIPS), over latents (KL).

    `frames` > 0 trains on so many consecutive frames of each clip, from a random place of its
    orbit. `scale_orbits` orbits are enough to measure the standard deviation of the latents.
    """

    mse: float = 0.5
    lpips: float = 0.7
    kl: float = 1e-5
    frames: int = 0
    scale_orbits: int = 200


def build(
    model: autoencoder.AutoencoderConfig,
    config: AutoencoderLossConfig,
    data: objective.DataConfig,
    dtype: Any,
) -> objective.Objective:
    """The objective over an orbit data set; activations are `dtype`.

    Prints one line and goes on without LPIPS where its weights are not installed.
    """
    sources = objective.train_sources(data)
    clips = loader.JoinedClips([loader.FrameClips(one, config.frames) for one in sources])
    whole = loader.JoinedClips([loader.FrameClips(one) for one in sources])
    heldout = objective.heldout_source(data)
    graphdef = nnx.split(
        nnx.eval_shape(lambda: autoencoder.Autoencoder(model, dtype=dtype, rngs=nnx.Rngs(0)))
    )[0]
    perceptual = _perceptual(config)
    if perceptual is None:
        config = dataclasses.replace(config, lpips=0.0)
    unseen = None if heldout is None else loader.FrameClips(heldout)
    batch, held = objective.preview_batch(data, whole, unseen)

    def init(key: jax.Array) -> Params:
        module = autoencoder.Autoencoder(model, dtype=dtype, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module))

    def loss(params: Params, frozen: Any, batch: Any, key: jax.Array):
        return autoencoder_loss(
            nnx.merge(graphdef, params), frozen, batch["frames"], key, config, dtype
        )

    def preview(params: Params, frozen: Any, batch: Any, key: jax.Array):
        del frozen, key
        return reconstructions(nnx.merge(graphdef, params), batch["frames"])

    def export(path: Path, params: Params, metadata: dict[str, Any], dtype: FloatName) -> None:
        deviation = latent_deviation(
            nnx.merge(graphdef, params), whole, config.scale_orbits, data.loader.num_frames
        )
        scaled = dataclasses.replace(model, scale_factor=1.0 / deviation)
        save(path, scaled, params, {**metadata, "latent_deviation": deviation}, dtype)

    return objective.Objective(
        init=init,
        load=lambda path: load(path)[1],
        loss=loss,
        frozen=perceptual,
        clips=clips,
        preview=preview,
        preview_batch=batch,
        heldout=held,
        export=export,
    )


def autoencoder_loss(
    model: autoencoder.Autoencoder,
    perceptual: lpips.LPIPSParams | None,
    frames: UInt8[Array, "b t h w 3"],
    key: Key[Array, ""],
    config: AutoencoderLossConfig,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, ""], Metrics]:
    """Reconstruction of clips through a sample of the posterior; `dtype` is that of LPIPS."""
    target = image.to_network(frames.astype(jnp.float32) / 255.0)
    posterior = _encode(model, target)
    decoded = model.decode(posterior.sample(key))
    l1 = jnp.mean(jnp.abs(decoded - target))
    mse = jnp.mean(jnp.square(decoded - target))
    kl = jnp.mean(posterior.kl()) / np.prod(posterior.mean.shape[2:])
    total = l1 + config.mse * mse + config.kl * kl
    found = {"l1": l1, "mse": mse, "kl": kl}
    if perceptual is not None and config.lpips > 0.0:
        flat = (x.reshape(-1, *x.shape[2:]) for x in (decoded, target))
        distance = jnp.mean(lpips.distance(perceptual, *flat, dtype=dtype))
        total = total + config.lpips * distance
        found["lpips"] = distance
    return total, found


def reconstructions(
    model: autoencoder.Autoencoder, frames: UInt8[Array, "b t h w 3"]
) -> tuple[Float[Array, "r n h w 3"], dict[str, Float[Array, " b"]]]:
    """Rows of clips, each above its reconstruction from the posterior's mode; PSNR in dB."""
    unit = frames.astype(jnp.float32) / 255.0

    def reconstruct(clip: Float[Array, "t h w 3"]) -> Float[Array, "t h w 3"]:
        posterior = _encode(model, image.to_network(clip)[None])
        return image.from_network(model.decode(posterior.mean))[0]

    decoded = jax.lax.map(reconstruct, unit)
    rows = jnp.stack([unit, decoded], axis=1).reshape(-1, *unit.shape[1:])
    return rows, {"psnr": jnp.mean(metrics.psnr(decoded, unit), axis=1)}


def latent_deviation(
    model: autoencoder.Autoencoder, clips: loader.Clips, count: int, num_frames: int
) -> float:
    """Standard deviation over all values of the posterior's mode, over `count` orbits.

    The orbits are spread evenly over the data set; the mean is subtracted.
    """
    graphdef, params = nnx.split(model)

    @jax.jit
    def moments(params: Any, frames: UInt8[Array, "t h w 3"]) -> Float[Array, "2"]:
        clip = image.to_network(frames.astype(jnp.float32) / 255.0)
        mean = nnx.merge(graphdef, params).encode(clip).mean
        return jnp.stack([jnp.mean(mean), jnp.mean(jnp.square(mean))])

    order = loader.turn(0, num_frames, clips.views)
    chosen = np.unique(np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int))
    found = np.stack([moments(params, clips.clip(int(i), order)["frames"]) for i in chosen])
    mean, square = np.mean(found.astype(np.float64), axis=0)
    return float(np.sqrt(square - mean**2))


def save(
    path: Path,
    config: autoencoder.AutoencoderConfig,
    params: Params,
    metadata: dict[str, Any],
    dtype: FloatName = "float32",
) -> None:
    """Writes config.json and safetensors of at most 12 MiB each, unless one tensor is more.

    Replaces a model's folder. Raises `UserError` if `path` is anything else.
    """
    if path.exists() and not (path / "config.json").is_file():
        raise errors.UserError(f"{path} exists and is no model: choose another export folder")
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, leaf in model_folder.flatten(params).items():
        tensor = np.ascontiguousarray(leaf, tensor_files.FLOATS[dtype])
        held = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and held + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    for index, shard in enumerate(shards):
        tensor_files.write(aside / f"autoencoder-{index:05d}.safetensors", shard)
    described = {"format": FORMAT, "autoencoder": settings.to_json(config), "metadata": metadata}
    (aside / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    # A folder cannot be renamed over another one.
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)


def load(path: Path) -> tuple[autoencoder.AutoencoderConfig, Params]:
    """Settings and weights (nested dicts, numpy) of a folder of `save`, or of a generator's.

    A packaged generator may be named instead. Raises `UserError` if it is none of them, or if
    tensors are missing, unexpected or misshapen.
    """
    path = packaged.folder_of(path)
    described = _read_config(path)
    if described.get("format") == model_folder.FORMAT:
        model = model_folder.load(path)
        whole = jax.tree.map(np.asarray, nnx.to_pure_dict(model.params))
        return model.generator.autoencoder, whole["autoencoder"]
    if described.get("format") != FORMAT:
        raise errors.UserError(f"{path} is no autoencoder: its config.json has another format")
    config = settings.from_json(
        autoencoder.AutoencoderConfig, described.get("autoencoder"), f"{path}/config.json"
    )
    module = nnx.eval_shape(lambda: autoencoder.Autoencoder(config, rngs=nnx.Rngs(0)))
    abstract = nnx.to_pure_dict(nnx.state(module))
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(path.glob("*.safetensors")):
        loaded = safetensors_numpy.load_file(shard)
        tensors |= {name: tensor.astype(np.float32) for name, tensor in loaded.items()}
    wanted = {name: leaf.shape for name, leaf in model_folder.flatten(abstract).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if differing:
        raise errors.UserError(f"{path}: {len(differing)} tensors do not fit, first {differing[0]}")
    leaves = [tensors[name] for name in wanted]
    return config, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def is_generator(path: Path) -> bool:
    """Whether a folder that `load` reads holds a whole generator."""
    return _read_config(path).get("format") == model_folder.FORMAT


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise errors.UserError(
            f"{path} is no autoencoder: train one with configs/mini_vae.py, then name its folder"
        ) from None
    except ValueError as error:
        raise errors.UserError(f"{path}/config.json cannot be read: {error}") from None


def _perceptual(config: AutoencoderLossConfig) -> lpips.LPIPSParams | None:
    if config.lpips <= 0.0:
        return None
    try:
        return lpips_weights.load("vgg")
    except lpips_weights.LPIPSUnavailable as error:
        print(f"training without LPIPS: {error}")
        return None


def _encode(
    model: autoencoder.Autoencoder, clips: Float[Array, "b t h w 3"]
) -> autoencoder.Posterior:
    """The posterior of every frame, as [b, t, h, w, c]."""
    posterior = model.encode(clips.reshape(-1, *clips.shape[2:]))
    leading = clips.shape[:2]
    return autoencoder.Posterior(*(x.reshape(*leading, *x.shape[1:]) for x in posterior))
