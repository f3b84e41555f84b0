"""Networks' settings from the names and shapes of a checkpoint's tensors.

Widths, depths and where there is attention show in the tensors; how many heads a width has does not
and is passed in. A part that is missing some tensors still tells its size, so that the key map can
name those. Names are relative to the network, as in its key map; `where` names the file in errors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from v3d_jax.errors import UserError
from v3d_jax.nn.autoencoder import AutoencoderConfig
from v3d_jax.nn.clip import VisionConfig
from v3d_jax.nn.unet import UNetConfig

# OpenCLIP ViT-H/14 has heads of 80 channels; most other towers have 64.
_VISION_HEADS = {1280: 16}


class _Level(NamedTuple):
    """A level on the way down: the width of each block, and whether it has a transformer."""

    widths: tuple[int, ...]
    attend: tuple[bool, ...]


class _Tensors:
    """Shapes by name, with errors that name the file."""

    def __init__(self, tensors: Mapping[str, Any], where: str):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.where = where

    def size(self, places: Iterable[tuple[str, int]]) -> int:
        """A size that any of the tensors tells at its axis (from the end if negative)."""
        places = list(places)
        for name, axis in places:
            shape = self.shapes.get(name, ())
            if -len(shape) <= axis < len(shape):
                return shape[axis]
        names = ", ".join(name for name, _ in places)
        raise UserError(f"{self.where}: its size is unknown without a tensor {names}")

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group takes; 0 without any."""
        found = (re.match(pattern, name) for name in self.shapes)
        return max((int(match[1]) for match in found if match), default=-1) + 1

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    def refuse(self, reason: str) -> UserError:
        return UserError(f"{self.where}: {reason}")


def sgm_unet(tensors: Mapping[str, Any], where: str, head_channels: int) -> UNetConfig:
    """The UNet of a checkpoint in sgm's names."""
    found = _Tensors(tensors, where)
    levels: list[list[int]] = [[]]
    for i in range(1, found.count(r"input_blocks\.(\d+)\.")):
        if found.has(f"input_blocks.{i}.0.op."):
            levels.append([])
        else:
            levels[-1].append(i)
    return _unet(
        found,
        [
            _Level(
                tuple(_width(found, f"input_blocks.{i}.0.", _SGM_BLOCK) for i in level),
                tuple(found.has(f"input_blocks.{i}.1.") for i in level),
            )
            for level in levels
        ],
        first="input_blocks.0.0",
        last="out.2",
        vector="label_emb.0.0.weight",
        context=[f"middle_block.1.{block}.0" for block in ("transformer_blocks", "time_stack")],
        head_channels=head_channels,
    )


def diffusers_unet(tensors: Mapping[str, Any], where: str, head_channels: int) -> UNetConfig:
    """The UNet of a checkpoint in diffusers' names."""
    found = _Tensors(tensors, where)
    levels = []
    for level in range(found.count(r"down_blocks\.(\d+)\.")):
        source = f"down_blocks.{level}"
        blocks = range(found.count(rf"{re.escape(source)}\.resnets\.(\d+)\."))
        widths = (
            _width(found, f"{source}.resnets.{i}.spatial_res_block.", _DIFFUSERS_BLOCK)
            for i in blocks
        )
        attend = tuple(found.has(f"{source}.attentions.{i}.") for i in blocks)
        levels.append(_Level(tuple(widths), attend))
    middle = "mid_block.attentions.0"
    return _unet(
        found,
        levels,
        first="conv_in",
        last="conv_out",
        vector="add_embedding.linear_1.weight",
        context=[f"{middle}.{x}transformer_blocks.0" for x in ("", "temporal_")],
        head_channels=head_channels,
    )


_SGM_BLOCK = ("out_layers.3.weight", "in_layers.2.weight", "out_layers.0.weight")
_DIFFUSERS_BLOCK = ("conv2.weight", "conv1.weight", "norm2.weight")


def _width(found: _Tensors, block: str, layers: tuple[str, ...]) -> int:
    return found.size((block + name, 0) for name in layers)


def _unet(
    found: _Tensors,
    levels: list[_Level],
    *,
    first: str,
    last: str,
    vector: str,
    context: list[str],
    head_channels: int,
) -> UNetConfig:
    base = found.size([(f"{first}.weight", 0), (f"{first}.bias", 0)])
    widths, blocks = _uniform(found, [level.widths for level in levels], base)
    if any(len(set(level.attend)) != 1 for level in levels):
        raise found.refuse("its levels have transformers in some of their blocks only")
    attending = [2**i for i, level in enumerate(levels) if level.attend[0]]
    cross = [f"{block}.attn2.{name}.weight" for block in context for name in ("to_k", "to_v")]
    config = UNetConfig(
        in_channels=found.size([(f"{first}.weight", 1)]),
        out_channels=found.size([(f"{last}.weight", 0), (f"{last}.bias", 0)]),
        model_channels=base,
        channel_mult=widths,
        num_res_blocks=blocks,
        attention_resolutions=tuple(reversed(attending)),
        head_channels=head_channels,
        context_dim=found.size((name, 1) for name in cross),
        vector_dim=found.size([(vector, 1)]),
    )
    # The middle block has a transformer of the last width.
    attended = {base * mult for mult, level in zip(widths, levels, strict=True) if level.attend[0]}
    for width in sorted(attended | {config.widths[-1]}):
        if width % head_channels:
            raise found.refuse(
                f"{width} channels do not divide into heads of {head_channels}:"
                " say how many a head has with --head-channels"
            )
    _check_groups(found, (base, *config.widths), config.groups)
    return config


def sgm_autoencoder(tensors: Mapping[str, Any], where: str) -> AutoencoderConfig:
    """The autoencoder of a checkpoint in sgm's names."""
    found = _Tensors(tensors, where)
    names = ("conv2.weight", "conv1.weight", "norm2.weight")
    return _autoencoder(found, "encoder.down.{}.block.{}.", names)


def diffusers_autoencoder(tensors: Mapping[str, Any], where: str) -> AutoencoderConfig:
    """The autoencoder of a checkpoint in diffusers' names."""
    return _autoencoder(
        _Tensors(tensors, where), "encoder.down_blocks.{}.resnets.{}.", _DIFFUSERS_BLOCK
    )


def _autoencoder(found: _Tensors, block: str, layers: tuple[str, ...]) -> AutoencoderConfig:
    def numbered(level: str, index: str) -> str:
        return re.escape(block).replace(r"\{\}", "{}").format(level, index)

    widths = []
    for level in range(found.count(numbered(r"(\d+)", r"\d+"))):
        blocks = range(found.count(numbered(str(level), r"(\d+)")))
        widths.append(tuple(_width(found, block.format(level, i), layers) for i in blocks))
    base = found.size([("encoder.conv_in.weight", 0), ("encoder.conv_in.bias", 0)])
    mult, number = _uniform(found, widths, base)
    latent = found.size([("decoder.conv_in.weight", 1)])
    config = AutoencoderConfig(
        channels=base, channel_mult=mult, num_res_blocks=number, latent_channels=latent
    )
    _check_groups(found, config.widths, config.groups)
    return config


def open_clip(tensors: Mapping[str, Any], where: str, heads: int | None) -> VisionConfig:
    """The image tower of a checkpoint in OpenCLIP's names."""
    found = _Tensors(tensors, where)
    width = found.size([("class_embedding", 0), ("positional_embedding", 1)])
    block = "transformer.resblocks."
    return _vision(
        found,
        width=width,
        patch=("conv1.weight", -1),
        positions=("positional_embedding", 0),
        layers=found.count(re.escape(block) + r"(\d+)\."),
        mlp=[(f"{block}0.mlp.c_fc.weight", 0), (f"{block}0.mlp.c_proj.weight", 1)],
        output=("proj", 1),
        heads=heads,
    )


def transformers(tensors: Mapping[str, Any], where: str, heads: int | None) -> VisionConfig:
    """The image tower of a checkpoint in transformers' names."""
    found = _Tensors(tensors, where)
    start, block = "vision_model.embeddings.", "vision_model.encoder.layers."
    positions = f"{start}position_embedding.weight"
    return _vision(
        found,
        width=found.size([(f"{start}class_embedding", 0), (positions, 1)]),
        patch=(f"{start}patch_embedding.weight", -1),
        positions=(positions, 0),
        layers=found.count(re.escape(block) + r"(\d+)\."),
        mlp=[(f"{block}0.mlp.fc1.weight", 0), (f"{block}0.mlp.fc2.weight", 1)],
        output=("visual_projection.weight", 0),
        heads=heads,
    )


def _vision(
    found: _Tensors,
    *,
    width: int,
    patch: tuple[str, int],
    positions: tuple[str, int],
    layers: int,
    mlp: list[tuple[str, int]],
    output: tuple[str, int],
    heads: int | None,
) -> VisionConfig:
    number = heads or _VISION_HEADS.get(width, width // 64)
    if not number or width % number:
        raise found.refuse(
            f"the image tower's {width} channels do not divide into {number} heads:"
            " say how many there are with --vision-heads"
        )
    side = round((found.size([positions]) - 1) ** 0.5)
    size = found.size([patch])
    if side**2 + 1 != found.size([positions]):
        raise found.refuse("the image tower's positions are not those of a square and a class")
    return VisionConfig(
        image_size=side * size,
        patch=size,
        width=width,
        layers=layers,
        heads=number,
        mlp=found.size(mlp),
        output_dim=found.size([output]),
    )


def _uniform(
    found: _Tensors, widths: list[tuple[int, ...]], base: int
) -> tuple[tuple[int, ...], int]:
    """Multiples of the first width a level, and blocks a level, where all levels are alike."""
    counts = {len(level) for level in widths}
    if len(counts) != 1 or 0 in counts:
        numbers = ", ".join(str(len(level)) for level in widths) or "0"
        raise found.refuse(f"its levels have {numbers} blocks, but all must have as many")
    if any(len(set(level)) != 1 or level[0] % base for level in widths):
        raise found.refuse(f"its levels' widths are not multiples of {base}, one a level")
    return tuple(level[0] // base for level in widths), counts.pop()


def _check_groups(found: _Tensors, widths: Iterable[int], groups: int) -> None:
    for width in widths:
        if width % groups:
            raise found.refuse(f"{width} channels do not divide into {groups} groups")
