"""Published checkpoints as models of ours, unread: V3D's, SVD's, diffusers', CLIP's beside them.

A layout is recognised by the names of its tensors and the networks' sizes by the shapes. Every
tensor is one of a network's or one of those that `layouts.find` knows to be none of ours; anything
else is refused by name.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.errors import UserError
from v3d_jax.nn.conditioner import ConditionerConfig
from v3d_jax.nn.generator import GeneratorConfig
from v3d_jax.weights import containers, diffusers, folder, keymap, layouts, settings, sgm, sizes
from v3d_jax.weights import tensors as tensor_files
from v3d_jax.weights.containers import Container
from v3d_jax.weights.layouts import Part

# Entry of a safetensors header under which our settings travel in the other layouts.
SETTINGS = "v3d_jax"
FOLDERS = {"unet": "unet", "autoencoder": "vae", "vision": "image_encoder"}
# What V3D's authors took the image tower from.
_RELEASE = "svd_xt.safetensors"
_SVD_SAMPLING = SamplingConfig(guidance_min=1.0, guidance_max=3.0)


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the tensors of a published checkpoint do not tell."""

    vision: Path | None = None
    """Checkpoint of CLIP's image tower, instead of the one in or beside the model."""
    frames: int | None = None
    """Frames of a clip, instead of 18 for V3D, 25 for SVD, or what a diffusers folder says."""
    size: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="HEIGHT WIDTH")] = None
    """A frame's pixels, instead of 512 512 for V3D and 576 1024 for SVD."""
    head_channels: int | None = None
    """Channels of a head of the UNet's attention, instead of 64 or what a diffusers folder says."""
    vision_heads: int | None = None
    """Heads of the image tower's attention, instead of 16 for ViT-H and width / 64 for others."""
    ema: bool = True
    """Take averaged weights where the file has them."""
    ignore: tuple[str, ...] = ()
    """Beginnings of the names of tensors to leave out."""


def is_published(path: Path) -> bool:
    """Whether `open_model` may read this path: a checkpoint, or a folder of them or of networks."""
    if path.is_dir():
        return not folder.is_model(path) and (_has_networks(path) or bool(containers.files(path)))
    return path.is_file() and (path.suffix in containers.SUFFIXES or path.suffix == ".json")


def open_model(path: Path, hints: Hints | None = None) -> folder.Unread:
    """Opens a published model without reading its weights.

    `path` is a checkpoint of Stability's or V3D's, an index of shards, a diffusers folder, or a
    folder that holds such files. V3D's has no image tower: it comes from `hints.vision`, else from
    a checkpoint beside. Raises `UserError` if a network is missing, and `KeyMismatch` with the
    names of all tensors that do not fit.
    """
    hints = hints or Hints()
    opened, donors = _open(path, hints)
    averages = 0
    parts: dict[str, Part] = {}
    unexpected: list[str] = []
    for container in opened:
        container, count = _without_averages(container, hints)
        found = layouts.find(container)
        averages += count
        parts = found.parts | parts
        unexpected += found.unexpected
    if "unet" not in parts:
        held = ", ".join(layouts.NETWORKS[name] for name in parts) or "no network that is known"
        raise UserError(f"{path} has no video UNet in the names of sgm or diffusers, but {held}")
    is_v3d = "vision" not in parts and parts["unet"].layout == "sgm UNet"
    parts |= _borrow(path, parts, donors, given=hints.vision is not None)
    if parts["autoencoder"].layout == "diffusers autoencoder":
        folded = diffusers.fold_quant_conv(parts["autoencoder"].tensors)
        parts["autoencoder"] = parts["autoencoder"]._replace(tensors=folded)
    config, sampling, metadata = _settings(parts, hints, is_v3d)
    tensors = _map(path, parts, config, unexpected)
    metadata["converted_from"] = sorted({part.container.path.name for part in parts.values()})
    if averages:
        metadata["averaged_tensors"] = averages
    return folder.Unread(config, sampling, tensors, metadata)


def _has_networks(path: Path) -> bool:
    return all((path / FOLDERS[name]).is_dir() for name in ("unet", "autoencoder"))


def _open(path: Path, hints: Hints) -> tuple[list[Container], Callable[[], list[Path]]]:
    """The checkpoints that are the model, and those that a missing network may come from."""
    given = [hints.vision] if hints.vision else None
    if path.is_dir() and _has_networks(path):
        there = [path / name for name in FOLDERS.values() if (path / name).is_dir()]
        return [containers.open_folder(one) for one in there], lambda: given or []
    if path.is_file():
        return [containers.open_file(path)], lambda: given or _beside(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    found = {file: containers.open_file(file) for file in containers.files(path)}
    parts = {file: layouts.find(container).parts for file, container in found.items()}
    models = [file for file in found if "unet" in parts[file]]
    # Of V3D's pair the file without an image tower is the model, and the other lends its own.
    bare = [file for file in models if "vision" not in parts[file]]
    chosen = bare if len(bare) == 1 else models
    if len(chosen) != 1:
        names = ", ".join(file.name for file in models) or "none"
        raise UserError(f"{path} should hold one model and holds {names}: name the file")
    return [found[chosen[0]]], lambda: given or [file for file in found if file != chosen[0]]


def _beside(path: Path) -> list[Path]:
    # Pickles are read whole unless PyTorch wrote them: not without being asked.
    return [
        other
        for other in containers.files(path.parent)
        if other != path
        and (other.suffix in (".safetensors", ".json") or other.name.startswith("open_clip"))
    ]


def _without_averages(container: Container, hints: Hints) -> tuple[Container, int]:
    """The checkpoint with averages in the weights' places, or without them; and their number."""
    tensors = {
        name: tensor
        for name, tensor in container.tensors.items()
        if not name.startswith(hints.ignore)
    }
    used: list[str] = []
    if hints.ema:
        tensors, used = sgm.averaged(tensors, sgm.UNET)
    else:
        tensors = {name: x for name, x in tensors.items() if not name.startswith(sgm.EMA)}
    return container._replace(tensors=tensors), len(used)


def _borrow(
    path: Path, parts: Mapping[str, Part], donors: Callable[[], list[Path]], *, given: bool
) -> dict[str, Part]:
    """The networks that the model lacks, from other checkpoints."""
    missing = [name for name in layouts.NETWORKS if name not in parts]
    if given:
        missing = sorted({*missing, "vision"})
    borrowed: dict[str, list[Part]] = {name: [] for name in missing}
    for donor in donors() if missing else ():
        opened = containers.open_path(donor)
        for name, part in layouts.find(opened).parts.items():
            if name in borrowed:
                borrowed[name].append(part)
    for name, candidates in borrowed.items():
        released = [part for part in candidates if part.container.path.name == _RELEASE]
        candidates[:] = released or candidates
        if len(candidates) == 1:
            continue
        what, where = layouts.NETWORKS[name], donors()[0] if given else path
        if candidates:
            names = ", ".join(part.container.path.name for part in candidates)
            raise UserError(f"{path} has no {what}, but there are several beside it: {names}")
        hint = f": put {_RELEASE} beside it, or convert it with --vision" if not given else ""
        raise UserError(f"{where} has no {what}{hint if name == 'vision' else ''}")
    return {name: candidates[0] for name, candidates in borrowed.items()}


def _settings(
    parts: Mapping[str, Part], hints: Hints, is_v3d: bool
) -> tuple[GeneratorConfig, SamplingConfig, dict[str, Any]]:
    """The model's settings: those that travel in the header, or what sizes and hints tell."""
    stored = parts["unet"].container.metadata.get(SETTINGS)
    size = hints.size and (hints.size[0] if len(set(hints.size)) == 1 else hints.size)
    if stored is not None:
        config, sampling, metadata = _stored(stored, str(parts["unet"].container.path))
        changes = {"num_frames": hints.frames, "image_size": size}
        changes = {name: value for name, value in changes.items() if value is not None}
    else:
        config, sampling, metadata = None, SamplingConfig() if is_v3d else _SVD_SAMPLING, {}
        unet = _unet(parts["unet"], hints)
        frames = hints.frames or _number(parts["unet"], "num_frames") or (18 if is_v3d else 25)
        changes = {
            "unet": unet,
            "autoencoder": _autoencoder(parts["autoencoder"]),
            "vision": _vision(parts["vision"], hints),
            # SVD's three scalars, of as many channels each.
            "conditioner": ConditionerConfig(dim=unet.vector_dim // 3),
            "num_frames": frames,
            "image_size": size or (512 if is_v3d else (576, 1024)),
        }
    try:
        config = dataclasses.replace(config, **changes) if config else GeneratorConfig(**changes)
    except ValueError as error:
        raise UserError(f"{parts['unet'].container.path}: {error}") from None
    return config, sampling, metadata


def _stored(text: str, where: str) -> tuple[GeneratorConfig, SamplingConfig, dict[str, Any]]:
    try:
        content = json.loads(text)
        generator, sampling = content["generator"], content["sampling"]
        metadata = dict(content.get("metadata", {}))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{where}: the settings in its header cannot be read") from None
    return (
        settings.from_json(GeneratorConfig, generator, f"{where}: generator"),
        settings.from_json(SamplingConfig, sampling, f"{where}: sampling"),
        metadata,
    )


def _unet(part: Part, hints: Hints) -> Any:
    where = str(part.container.path)
    if part.layout == "sgm UNet":
        return sizes.sgm_unet(part.tensors, where, hints.head_channels or 64)
    given = hints.head_channels or _head_channels(part)
    return sizes.diffusers_unet(part.tensors, where, given)


def _head_channels(part: Part) -> int:
    """The one size of the heads on the levels that have attention; the middle has the last's."""
    config = part.container.config
    heads = config.get("num_attention_heads", (5, 10, 20, 20))
    widths = config.get("block_out_channels", (320, 640, 1280, 1280))
    kinds = config.get("down_block_types", ("CrossAttn",) * 3 + ("",))
    try:
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        levels = list(zip(widths, heads, kinds, strict=True))
        sizes_there = {width // number for width, number, kind in levels if "CrossAttn" in kind}
        (size,) = sizes_there | {levels[-1][0] // levels[-1][1]}
        return int(size)
    except (TypeError, ValueError, ZeroDivisionError, IndexError):
        raise UserError(
            f"{part.container.path}: {widths} channels and {heads} heads give no one size of heads"
        ) from None


def _autoencoder(part: Part) -> Any:
    where = str(part.container.path)
    if part.layout == "sgm autoencoder":
        return sizes.sgm_autoencoder(part.tensors, where)
    config = sizes.diffusers_autoencoder(part.tensors, where)
    factor = part.container.config.get("scaling_factor", config.scale_factor)
    if not isinstance(factor, int | float) or factor <= 0:
        raise UserError(f"{where}: its scaling_factor is {factor!r}")
    return dataclasses.replace(config, scale_factor=float(factor))


def _vision(part: Part, hints: Hints) -> Any:
    where, heads = str(part.container.path), hints.vision_heads
    if part.layout == "OpenCLIP image tower":
        return sizes.open_clip(part.tensors, where, heads)
    config = part.container.config.get("vision_config", part.container.config)
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(f"{where}: its activation is {activation!r}, not SVD's gelu")
    return sizes.transformers(part.tensors, where, heads or config.get("num_attention_heads"))


def _number(part: Part, name: str) -> int | None:
    value = part.container.config.get(name)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UserError(f"{part.container.path}: its {name} is {value!r}")
    return value


def _map(
    path: Path, parts: Mapping[str, Part], config: GeneratorConfig, unexpected: list[str]
) -> dict[str, Any]:
    """Our tensors by name, after holding every tensor of every network to its key map."""
    abstract = folder.flatten(folder.abstract_params(config))
    tensors: dict[str, Any] = {}
    missing, misshapen = [], []
    for name, part in parts.items():
        params = keymap.strip(abstract, f"{name}.")
        rules = keymap.under(part.prefix, "", part.rules(getattr(config, name)))
        given = {part.prefix + source: tensor for source, tensor in part.tensors.items()}
        try:
            keymap.check(rules, given, params)
        except keymap.KeyMismatch as error:
            missing += error.missing
            misshapen += error.misshapen
            unexpected = unexpected + error.unexpected
            continue
        tensors |= {f"{name}.{ours}": x for ours, x in keymap.ours(rules, given).items()}
    if missing or unexpected or misshapen:
        raise keymap.KeyMismatch(str(path), missing, unexpected, misshapen)
    for name, tensor in tensors.items():
        if tensor.dtype not in (*tensor_files.FLOATS.values(), np.float64):
            raise UserError(f"{path}: the tensor of {name} has the type {tensor.dtype}")
    return {name: tensors[name] for name in abstract}
