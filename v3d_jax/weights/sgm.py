"""Key maps of the checkpoints in Stability's own naming: `svd_xt.safetensors` and `V3D_512.ckpt`.

Names are relative to the network: those of the UNet come without `UNET`, those of the autoencoder
without `AUTOENCODER`. Source: the state dicts of generative-models and of the V3D release.
"""

from collections.abc import Mapping
from typing import Any

from v3d_jax.errors import UserError
from v3d_jax.nn.autoencoder import AutoencoderConfig
from v3d_jax.nn.unet import UNetConfig
from v3d_jax.weights import keymap
from v3d_jax.weights.keymap import CONV, LINEAR, POINTWISE, TEMPORAL, Rule, layer, norm, under

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
# SVD's conditioning has an autoencoder of its own, without layers across frames; V3D's has not.
CONDITIONING = "conditioner.embedders.3."
EMA = "model_ema."
_EMA_COUNTERS = (f"{EMA}decay", f"{EMA}num_updates")


def unet(config: UNetConfig) -> list[Rule]:
    """The video UNet's tensors (1428 at the published size)."""
    rules = [
        *_mlp("time_embed", "time_embed"),
        *_mlp("label_emb.0", "label_embed"),
        *layer("input_blocks.0.0", "conv_in", CONV),
        *_down(config),
        *_block("middle_block", "mid1", changes=False, attend=True),
        *under("middle_block.2.", "mid2.res.", _video_res_block(changes=False)),
        *_up(config),
        *norm("out.0", "norm_out"),
        *layer("out.2", "conv_out", CONV),
    ]
    return rules


def autoencoder(config: AutoencoderConfig) -> list[Rule]:
    """The tensors of encoder and temporal decoder (372 at the published size)."""
    return [
        *under("encoder.", "encoder.", encoder(config)),
        *under("decoder.", "decoder.", decoder(config)),
    ]


def encoder(config: AutoencoderConfig) -> list[Rule]:
    """The image encoder's tensors (106 at the published size)."""
    rules = layer("conv_in", "conv_in", CONV)
    width = config.channels
    for level, outputs in enumerate(config.widths):
        for i in range(config.num_res_blocks):
            block = _image_res_block(changes=width != outputs)
            rules += under(f"down.{level}.block.{i}.", f"down.{level}.blocks.{i}.", block)
            width = outputs
        if level < len(config.widths) - 1:
            rules += layer(f"down.{level}.downsample.conv", f"down.{level}.resample", CONV)
    return [
        *rules,
        *under("mid.block_1.", "mid1.", _image_res_block(changes=False)),
        *under("mid.attn_1.", "attn.", _image_attention()),
        *under("mid.block_2.", "mid2.", _image_res_block(changes=False)),
        *norm("norm_out", "norm_out"),
        *layer("conv_out", "conv_out", CONV),
    ]


def decoder(config: AutoencoderConfig) -> list[Rule]:
    """The temporal decoder's tensors (266 at the published size)."""
    rules = [
        *layer("conv_in", "conv_in", CONV),
        *under("mid.block_1.", "mid1.", _temporal_res_block(changes=False)),
        *under("mid.attn_1.", "attn.", _image_attention()),
        *under("mid.block_2.", "mid2.", _temporal_res_block(changes=False)),
    ]
    width = config.widths[-1]
    for level, outputs in reversed(list(enumerate(config.widths))):
        for i in range(config.num_res_blocks + 1):
            block = _temporal_res_block(changes=width != outputs)
            rules += under(f"up.{level}.block.{i}.", f"up.{level}.blocks.{i}.", block)
            width = outputs
        if level > 0:
            rules += layer(f"up.{level}.upsample.conv", f"up.{level}.resample", CONV)
    return [
        *rules,
        *norm("norm_out", "norm_out"),
        *layer("conv_out", "conv_out", CONV),
        *layer("conv_out.time_mix_conv", "time_mix_conv", TEMPORAL),
    ]


def _down(config: UNetConfig) -> list[Rule]:
    """Numbered from 1 on: the blocks of a level, then its downsampling."""
    rules, index, width = [], 1, config.model_channels
    for level, outputs in enumerate(config.widths):
        for i in range(config.num_res_blocks):
            rules += _block(
                f"input_blocks.{index}",
                f"down.{level}.blocks.{i}",
                changes=width != outputs,
                attend=config.has_attention(level),
            )
            index, width = index + 1, outputs
        if level < len(config.widths) - 1:
            rules += layer(f"input_blocks.{index}.0.op", f"down.{level}.resample", CONV)
            index += 1
    return rules


def _up(config: UNetConfig) -> list[Rule]:
    """Numbered from the lowest resolution; the last block of a level holds its upsampling.

    Every block changes its width, because it takes a skip connection beside its input.
    """
    rules, index = [], 0
    for level in reversed(range(len(config.widths))):
        attend = config.has_attention(level)
        for i in range(config.num_res_blocks + 1):
            target = f"up.{level}.blocks.{i}"
            rules += _block(f"output_blocks.{index}", target, changes=True, attend=attend)
            index += 1
        if level > 0:
            place = 2 if attend else 1
            source = f"output_blocks.{index - 1}.{place}.conv"
            rules += layer(source, f"up.{level}.resample", CONV)
    return rules


def averaged(tensors: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], list[str]]:
    """The tensors with the averages of the network below `prefix` put in their places.

    Averages have the names of the parameters, without `model.` and without dots. Returns also the
    names of the averages that were put in; parameters that were not trained have none.
    """
    kept = {name: x for name, x in tensors.items() if not name.startswith(EMA)}
    places: dict[str, str] = {}
    for name in kept:
        if name.startswith(prefix):
            average = EMA + name.removeprefix("model.").replace(".", "")
            if average in places:
                raise UserError(f"{average} may be {name} or {places[average]}: not used")
            places[average] = name
    used = [name for name in tensors if name in places]
    kept |= {places[name]: tensors[name] for name in used}
    lost = {name for name in tensors if name.startswith(EMA)} - set(used) - set(_EMA_COUNTERS)
    return {**kept, **{name: tensors[name] for name in tensors if name in lost}}, used


def _block(source: str, target: str, *, changes: bool, attend: bool) -> list[Rule]:
    rules = under(f"{source}.0.", f"{target}.res.", _video_res_block(changes=changes))
    if attend:
        rules += under(f"{source}.1.", f"{target}.attn.", _transformer())
    return rules


def _mlp(source: str, target: str) -> list[Rule]:
    return [
        *layer(f"{source}.0", f"{target}.linear1", LINEAR),
        *layer(f"{source}.2", f"{target}.linear2", LINEAR),
    ]


def _res_block(kernel: keymap.Transform, *, embedded: bool) -> list[Rule]:
    """The residual block of the UNet, per frame or across frames."""
    return [
        *norm("in_layers.0", "norm1"),
        *layer("in_layers.2", "conv1", kernel),
        *(layer("emb_layers.1", "emb", LINEAR) if embedded else []),
        *norm("out_layers.0", "norm2"),
        *layer("out_layers.3", "conv2", kernel),
    ]


def _video_res_block(*, changes: bool) -> list[Rule]:
    return [
        *under("", "spatial.", _res_block(CONV, embedded=True)),
        *(layer("skip_connection", "spatial.skip", POINTWISE) if changes else []),
        *under("time_stack.", "temporal.", _res_block(TEMPORAL, embedded=True)),
        keymap.rule("time_mixer.mix_factor", "mix.mix_factor"),
    ]


def _image_res_block(*, changes: bool) -> list[Rule]:
    """The residual block of the autoencoder's encoder."""
    return [
        *norm("norm1", "norm1"),
        *layer("conv1", "conv1", CONV),
        *norm("norm2", "norm2"),
        *layer("conv2", "conv2", CONV),
        *(layer("nin_shortcut", "skip", POINTWISE) if changes else []),
    ]


def _temporal_res_block(*, changes: bool) -> list[Rule]:
    """The residual block of the autoencoder's decoder: the encoder's, and one across frames."""
    return [
        *under("", "spatial.", _image_res_block(changes=changes)),
        *under("time_stack.", "temporal.", _res_block(TEMPORAL, embedded=False)),
        keymap.rule("mix_factor", "mix.mix_factor"),
    ]


def _image_attention() -> list[Rule]:
    return [
        *norm("norm", "norm"),
        *layer("q", "to_q", POINTWISE),
        *layer("k", "to_k", POINTWISE),
        *layer("v", "to_v", POINTWISE),
        *layer("proj_out", "to_out", POINTWISE),
    ]


def _transformer() -> list[Rule]:
    return [
        *norm("norm", "norm"),
        *layer("proj_in", "proj_in", LINEAR),
        *under("transformer_blocks.0.", "spatial.", _transformer_block()),
        *norm("time_stack.0.norm_in", "temporal.norm_in"),
        *_feed_forward("time_stack.0.ff_in", "temporal.ff_in"),
        *under("time_stack.0.", "temporal.", _transformer_block()),
        *_mlp("time_pos_embed", "frame_embed"),
        keymap.rule("time_mixer.mix_factor", "mix.mix_factor"),
        *layer("proj_out", "proj_out", LINEAR),
    ]


def _transformer_block() -> list[Rule]:
    rules = _feed_forward("ff", "ff")
    for name in ("norm1", "norm2", "norm3"):
        rules += norm(name, name)
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
