"""Key maps of CLIP's image tower, as OpenCLIP and as Hugging Face transformers name it.

An SVD file has OpenCLIP's names below `SVD`, a diffusers folder has transformers' in
`image_encoder`. The text tower's tensors, which OpenCLIP files also hold, are left out with
`keymap.strip(tensors, OPEN_CLIP)`, to which our OpenCLIP names are relative.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from v3d_jax.nn.clip import VisionConfig
from v3d_jax.weights import keymap
from v3d_jax.weights.keymap import LINEAR, SAME, Rule, layer, norm, rule, stacked, under

SVD = "conditioner.embedders.0.open_clip.model."
OPEN_CLIP = "visual."
# Beginnings of the names of what is not the image tower, in files of either kind.
TEXT_OPEN_CLIP = (
    *("attn_mask", "ln_final.", "logit_bias", "logit_scale", "positional_embedding"),
    *("text_projection", "token_embedding.", "transformer."),
)
TEXT_TRANSFORMERS = ("logit_scale", "text_model.", "text_projection.")


def _read_patches(x: np.ndarray) -> keymap.Arrays:
    return (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),)


def _write_patches(xs: keymap.Arrays) -> np.ndarray:
    pixels, width = xs[0].shape
    patch = math.isqrt(pixels // 3)
    return xs[0].reshape(patch, patch, 3, width).transpose(3, 2, 0, 1)


# A convolution whose stride is its size, [O, I, P, P], and our layer on rows of pixels, [P P I, O].
PATCHES = keymap.Transform(_read_patches, _write_patches)


def open_clip(config: VisionConfig) -> list[Rule]:
    """OpenCLIP's tensors below `visual.` (392 at the published size)."""
    rules = [
        rule("class_embedding", "class_embedding"),
        rule("positional_embedding", "position_embedding"),
        # Stored as a matrix to multiply by, not as a layer.
        rule("proj", "proj.kernel", SAME),
        rule("conv1.weight", "patch_embed.kernel", PATCHES),
        *norm("ln_pre", "norm_pre"),
        *norm("ln_post", "norm_post"),
    ]
    block = [
        *norm("ln_1", "norm1"),
        *norm("ln_2", "norm2"),
        rule("attn.in_proj_weight", _heads("kernel"), stacked(LINEAR, 3)),
        rule("attn.in_proj_bias", _heads("bias"), stacked(SAME, 3)),
        *layer("attn.out_proj", "attn.to_out", LINEAR),
        *layer("mlp.c_fc", "linear1", LINEAR),
        *layer("mlp.c_proj", "linear2", LINEAR),
    ]
    for i in range(config.layers):
        rules += under(f"transformer.resblocks.{i}.", f"blocks.{i}.", block)
    return rules


def transformers(config: VisionConfig) -> list[Rule]:
    """The tensors of `CLIPVisionModelWithProjection` (520 at the published size)."""
    rules = [
        rule("embeddings.class_embedding", "class_embedding"),
        rule("embeddings.position_embedding.weight", "position_embedding"),
        rule("embeddings.patch_embedding.weight", "patch_embed.kernel", PATCHES),
        *norm("pre_layrnorm", "norm_pre"),
        *norm("post_layernorm", "norm_post"),
    ]
    block = [
        *norm("layer_norm1", "norm1"),
        *norm("layer_norm2", "norm2"),
        *layer("self_attn.q_proj", "attn.to_q", LINEAR),
        *layer("self_attn.k_proj", "attn.to_k", LINEAR),
        *layer("self_attn.v_proj", "attn.to_v", LINEAR),
        *layer("self_attn.out_proj", "attn.to_out", LINEAR),
        *layer("mlp.fc1", "linear1", LINEAR),
        *layer("mlp.fc2", "linear2", LINEAR),
    ]
    for i in range(config.layers):
        rules += under(f"encoder.layers.{i}.", f"blocks.{i}.", block)
    return [
        *under("vision_model.", "", rules),
        *layer("visual_projection", "proj", LINEAR, bias=False),
    ]


def without_buffers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers' tensors without the index buffer that its older files carry."""
    return {name: x for name, x in tensors.items() if not name.endswith(".position_ids")}


def _heads(name: str) -> tuple[str, str, str]:
    return (f"attn.to_q.{name}", f"attn.to_k.{name}", f"attn.to_v.{name}")
