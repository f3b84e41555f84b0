"""Which of the video model's weights learn: whole networks, or chosen weights of them.

Parameters are nested dicts; a weight's dotted path is such as `unet.mid1.attn.temporal.ff.out.bias`
(lists count from 0). What does not learn has neither gradient nor optimiser state nor average.
"""

import fnmatch
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from v3d_jax import errors
from v3d_jax.nn import autoencoder, clip, generator, pixelnerf, unet
from v3d_jax.state import Params
from v3d_jax.weights import folder, packaged

Part = Literal["unet", "vision", "decoder", "pixelnerf"]
PARTS: tuple[Part, ...] = ("unet", "vision")
SCENE_PARTS: tuple[Part, ...] = (*PARTS, "pixelnerf")


def of(model: generator.GeneratorConfig) -> tuple[Part, ...]:
    """The networks of a model that a run either trains or takes from another model."""
    return PARTS if model.pixelnerf is None else SCENE_PARTS


def check(
    parts: tuple[Part, ...],
    train_only: tuple[str, ...],
    perceptual: bool,
    init_from: str | None,
    of_model: tuple[Part, ...] = PARTS,
) -> None:
    """Raises `UserError` unless `parts` can learn in a run that begins with `init_from`."""
    if not parts or len(set(parts)) != len(parts) or set(parts) - {*of_model, "decoder"}:
        named = ", ".join(of_model)
        raise errors.UserError(f"--parts: name {named} or decoder, each once")
    if "decoder" in parts and not perceptual:
        raise errors.UserError(
            "--parts decoder learns from decoded frames: set --perceptual.weight"
        )
    left = [name for name in of_model if name not in parts]
    if left and init_from is None:
        raise errors.UserError(
            f"--parts leaves out {' and '.join(left)}: name a model that has it in --run.init-from"
        )
    if train_only and init_from is None:
        raise errors.UserError(
            "--train-only leaves weights out: name a model that has them in --run.init-from"
        )


def random(
    model: generator.GeneratorConfig, dtype: Any, key: jax.Array, names: tuple[Part, ...]
) -> Params:
    """New weights of the named networks; activations are `dtype`."""
    rngs = nnx.Rngs(key)
    settings = {"dtype": dtype, "rngs": rngs}
    makers: dict[str, Callable[[], nnx.Module]] = {
        "unet": lambda: unet.VideoUNet(model.unet, **settings),
        "vision": lambda: clip.VisionTransformer(model.vision, **settings),
        "decoder": lambda: autoencoder.Autoencoder(model.autoencoder, **settings).decoder,
        "pixelnerf": lambda: pixelnerf.PixelNeRF(model.pixelnerf, **settings),
    }
    return {name: nnx.to_pure_dict(nnx.state(makers[name]())) for name in names}


def load(
    path: Path, names: tuple[Part, ...], model: generator.GeneratorConfig | None = None
) -> Params:
    """The named networks of an exported model, or of a packaged one by its name.

    Where `model` is a scene model and the exported one is not, the UNet is widened by channels that
    it ignores so far, and the PixelNeRF is new, the same at every call. Where it has latents of
    another number of channels, the UNet's first and last convolutions are new as well.
    """
    opened = folder.load(packaged.folder_of(path))
    found = nnx.to_pure_dict(opened.params)
    found["decoder"] = found["autoencoder"]["decoder"]
    if model is not None and model.pixelnerf is not None and opened.generator.pixelnerf is None:
        key = jax.random.key(0)
        found |= random(model, "float32", key, ("pixelnerf",))
        if model.unet.out_channels == opened.generator.unet.out_channels:
            found["unet"] = unet.widen(found["unet"], model.unet.in_channels)
        else:
            new = random(model, "float32", key, ("unet",))["unet"]
            found["unet"] |= {name: new[name] for name in ("conv_in", "conv_out")}
    return {name: found[name] for name in names}


def split(params: Params, train_only: tuple[str, ...]) -> tuple[Params, Params]:
    """The weights whose dotted paths match one of the shell patterns, and the others.

    Without patterns all match. Raises `UserError` for a pattern that no weight matches.
    """
    if not train_only:
        return params, {}
    names = list(_names(params))
    for pattern in train_only:
        if not fnmatch.filter(names, pattern):
            raise errors.UserError(
                f"--train-only {pattern} names no weight; they are called as {names[0]}"
            )

    def learns(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in train_only)

    return _select(params, learns), _select(params, lambda name: not learns(name))


def resting(params: Params, parts: tuple[Part, ...], train_only: tuple[str, ...]) -> Params:
    """Of networks by name, those that are not among `parts` and what of `parts` does not learn."""
    among = {name: params[name] for name in params if name in parts}
    others = {name: params[name] for name in params if name not in parts}
    return {**others, **split(among, train_only)[1]}


def join(one: Params, other: Params) -> Params:
    """One tree of two that share no weight."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        raise ValueError("two trees hold the same weight")
    shared = {name: join(one[name], other[name]) for name in one if name in other}
    return {**one, **other, **shared}


def _names(params: Params, prefix: str = "") -> Any:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _select(params: Params, chosen: Callable[[str], bool], prefix: str = "") -> Params:
    kept = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            below = _select(value, chosen, f"{prefix}{name}.")
            if below:
                kept[name] = below
        elif chosen(f"{prefix}{name}"):
            kept[name] = value
    return kept
