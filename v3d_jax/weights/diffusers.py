"""Key maps of diffusers' `UNetSpatioTemporalConditionModel` and `AutoencoderKLTemporalDecoder`.

Names are those of the files in the `unet` and `vae` folders of a published SVD. The autoencoder
there has one layer that ours has not, a 1x1 convolution of the moments (`quant_conv`): fold it into
the encoder's last convolution with `fold_quant_conv` before reading, and add an identity with
`unfold_quant_conv` after writing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from v3d_jax.errors import UserError
from v3d_jax.nn.autoencoder import AutoencoderConfig
from v3d_jax.nn.unet import UNetConfig
from v3d_jax.weights import keymap
from v3d_jax.weights.keymap import CONV, LINEAR, POINTWISE, TEMPORAL, Rule, layer, norm, rule, under

_QUANT = "quant_conv"
_MOMENTS = "encoder.conv_out"
_MOMENTS_TENSORS = (f"{_MOMENTS}.weight", f"{_MOMENTS}.bias")


def unet(config: UNetConfig) -> list[Rule]:
    """The video UNet's tensors (1428 at the published size)."""
    rules = [
        *_mlp("time_embedding", "time_embed"),
        *_mlp("add_embedding", "label_embed"),
        *layer("conv_in", "conv_in", CONV),
    ]
    width = config.model_channels
    for level, outputs in enumerate(config.widths):
        source, target = f"down_blocks.{level}", f"down.{level}"
        for i in range(config.num_res_blocks):
            changes = width != outputs
            rules += _block(source, i, f"{target}.blocks.{i}", config, level, changes=changes)
            width = outputs
        if level < len(config.widths) - 1:
            rules += layer(f"{source}.downsamplers.0.conv", f"{target}.resample", CONV)
    rules += [
        *under("mid_block.resnets.0.", "mid1.res.", _res_block(embedded=True)),
        *under("mid_block.attentions.0.", "mid1.attn.", _transformer()),
        *under("mid_block.resnets.1.", "mid2.res.", _res_block(embedded=True)),
    ]
    for level in range(len(config.widths)):
        # Theirs are numbered in the order they run, from the lowest resolution.
        source, target = f"up_blocks.{len(config.widths) - 1 - level}", f"up.{level}"
        for i in range(config.num_res_blocks + 1):
            rules += _block(source, i, f"{target}.blocks.{i}", config, level, changes=True)
        if level > 0:
            rules += layer(f"{source}.upsamplers.0.conv", f"{target}.resample", CONV)
    return [*rules, *norm("conv_norm_out", "norm_out"), *layer("conv_out", "conv_out", CONV)]


def autoencoder(config: AutoencoderConfig) -> list[Rule]:
    """The tensors of encoder and temporal decoder, `quant_conv` folded (372 at published size)."""
    return [
        *under("encoder.", "encoder.", _encoder(config)),
        *under("decoder.", "decoder.", _decoder(config)),
    ]


def fold_quant_conv(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The autoencoder's tensors with `quant_conv` multiplied into the encoder's last convolution.

    Tensors without it come back as they are, and so do all others where it is the identity.
    """
    folded = dict(tensors)
    if not {f"{_QUANT}.weight", f"{_QUANT}.bias", *_MOMENTS_TENSORS} <= set(folded):
        return folded
    mix = np.asarray(folded.pop(f"{_QUANT}.weight"), np.float64)[:, :, 0, 0]
    offset = np.asarray(folded.pop(f"{_QUANT}.bias"), np.float64)
    if not offset.any() and np.array_equal(mix, np.eye(*mix.shape)):
        return folded
    kernel, bias = (np.asarray(folded[name], np.float64) for name in _MOMENTS_TENSORS)
    if mix.shape[1:] != kernel.shape[:1]:
        raise UserError(f"{_QUANT}.weight {mix.shape} does not fit {_MOMENTS} {kernel.shape}")
    mixed = np.einsum("om,mihw->oihw", mix, kernel), mix @ bias + offset
    return folded | dict(zip(_MOMENTS_TENSORS, (x.astype(np.float32) for x in mixed), strict=True))


def unfold_quant_conv(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the identity as `quant_conv`, which diffusers expects to find."""
    bias = tensors[_MOMENTS_TENSORS[1]]
    identity = np.eye(*bias.shape * 2, dtype=bias.dtype)[:, :, None, None]
    zero = np.zeros(bias.shape, bias.dtype)
    return {**tensors, f"{_QUANT}.weight": identity, f"{_QUANT}.bias": zero}


def _encoder(config: AutoencoderConfig) -> list[Rule]:
    rules = layer("conv_in", "conv_in", CONV)
    width = config.channels
    for level, outputs in enumerate(config.widths):
        source, target = f"down_blocks.{level}", f"down.{level}"
        for i in range(config.num_res_blocks):
            block = _spatial(embedded=False, changes=width != outputs)
            rules += under(f"{source}.resnets.{i}.", f"{target}.blocks.{i}.", block)
            width = outputs
        if level < len(config.widths) - 1:
            rules += layer(f"{source}.downsamplers.0.conv", f"{target}.resample", CONV)
    return [*rules, *_middle(_spatial(embedded=False)), *_last()]


def _decoder(config: AutoencoderConfig) -> list[Rule]:
    rules = [*layer("conv_in", "conv_in", CONV), *_middle(_res_block(embedded=False))]
    width = config.widths[-1]
    for level, outputs in reversed(list(enumerate(config.widths))):
        source, target = f"up_blocks.{len(config.widths) - 1 - level}", f"up.{level}"
        for i in range(config.num_res_blocks + 1):
            block = _res_block(embedded=False, changes=width != outputs)
            rules += under(f"{source}.resnets.{i}.", f"{target}.blocks.{i}.", block)
            width = outputs
        if level > 0:
            rules += layer(f"{source}.upsamplers.0.conv", f"{target}.resample", CONV)
    return [*rules, *_last(), *layer("time_conv_out", "time_mix_conv", TEMPORAL)]


def _middle(block: list[Rule]) -> list[Rule]:
    attention = [
        *norm("group_norm", "norm"),
        *layer("to_q", "to_q", LINEAR),
        *layer("to_k", "to_k", LINEAR),
        *layer("to_v", "to_v", LINEAR),
        *layer("to_out.0", "to_out", LINEAR),
    ]
    return [
        *under("mid_block.resnets.0.", "mid1.", block),
        *under("mid_block.attentions.0.", "attn.", attention),
        *under("mid_block.resnets.1.", "mid2.", block),
    ]


def _last() -> list[Rule]:
    return [*norm("conv_norm_out", "norm_out"), *layer("conv_out", "conv_out", CONV)]


def _block(
    source: str, index: int, target: str, config: UNetConfig, level: int, *, changes: bool
) -> list[Rule]:
    block = _res_block(embedded=True, changes=changes)
    rules = under(f"{source}.resnets.{index}.", f"{target}.res.", block)
    if config.has_attention(level):
        rules += under(f"{source}.attentions.{index}.", f"{target}.attn.", _transformer())
    return rules


def _res_block(*, embedded: bool, changes: bool = False) -> list[Rule]:
    """A residual block per frame, one across frames, and their blend."""
    return [
        *under("spatial_res_block.", "spatial.", _spatial(embedded=embedded, changes=changes)),
        *under("temporal_res_block.", "temporal.", _residual(TEMPORAL, embedded=embedded)),
        rule("time_mixer.mix_factor", "mix.mix_factor"),
    ]


def _spatial(*, embedded: bool, changes: bool = False) -> list[Rule]:
    return [
        *_residual(CONV, embedded=embedded),
        *(layer("conv_shortcut", "skip", POINTWISE) if changes else []),
    ]


def _residual(kernel: keymap.Transform, *, embedded: bool) -> list[Rule]:
    return [
        *norm("norm1", "norm1"),
        *layer("conv1", "conv1", kernel),
        *(layer("time_emb_proj", "emb", LINEAR) if embedded else []),
        *norm("norm2", "norm2"),
        *layer("conv2", "conv2", kernel),
    ]


def _transformer() -> list[Rule]:
    temporal = [
        *norm("norm_in", "norm_in"),
        *_feed_forward("ff_in", "ff_in"),
        *_transformer_block(),
    ]
    return [
        *norm("norm", "norm"),
        *layer("proj_in", "proj_in", LINEAR),
        *under("transformer_blocks.0.", "spatial.", _transformer_block()),
        *under("temporal_transformer_blocks.0.", "temporal.", temporal),
        *_mlp("time_pos_embed", "frame_embed"),
        rule("time_mixer.mix_factor", "mix.mix_factor"),
        *layer("proj_out", "proj_out", LINEAR),
    ]


def _transformer_block() -> list[Rule]:
    rules = _feed_forward("ff", "ff")
    for i in (1, 2, 3):
        rules += norm(f"norm{i}", f"norm{i}")
    for name in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v"):
            rules += layer(f"{name}.{projection}", f"{name}.{projection}", LINEAR, bias=False)
        rules += layer(f"{name}.to_out.0", f"{name}.to_out", LINEAR)
    return rules


def _feed_forward(source: str, target: str) -> list[Rule]:
    return [
        *layer(f"{source}.net.0.proj", f"{target}.proj", LINEAR),
        *layer(f"{source}.net.2", f"{target}.out", LINEAR),
    ]


def _mlp(source: str, target: str) -> list[Rule]:
    return [
        *layer(f"{source}.linear_1", f"{target}.linear1", LINEAR),
        *layer(f"{source}.linear_2", f"{target}.linear2", LINEAR),
    ]
