"""Models of ours in the layouts of PyTorch tools: one sgm file, or a diffusers folder.

Settings that those tools do not have are refused, because they would compute something else
without an error. Ours travel in the headers, so that `published.open_model` gives them back.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from v3d_jax.errors import UserError
from v3d_jax.nn.generator import GeneratorConfig
from v3d_jax.nn.layers import GROUPS
from v3d_jax.weights import clip, diffusers, folder, hub, keymap, settings, sgm
from v3d_jax.weights import tensors as tensor_files
from v3d_jax.weights.published import FOLDERS, SETTINGS
from v3d_jax.weights.tensors import FloatName, Progress

SHARD_BYTES = 10 * 10**9
# OpenCLIP's text tower: words and positions of a text.
_VOCABULARY, _CONTEXT = 49408, 77


def sgm_tensors(model: folder.Unread) -> dict[str, Any]:
    """All tensors of an SVD file by name; `UserError` for settings that sgm's code does not have.

    Three kinds are not ours but are asked for by loaders that want every name. The autoencoder of
    the conditioning gets our encoder, and for its decoder, which is never run, the spatial layers
    of ours. What OpenCLIP keeps of its text tower, never run either, is zero.
    """
    _check(model.generator, "sgm")
    found: dict[str, Any] = {}
    for network, prefix, rules in (
        ("unet", sgm.UNET, sgm.unet),
        ("autoencoder", sgm.AUTOENCODER, sgm.autoencoder),
        ("vision", clip.SVD + clip.OPEN_CLIP, clip.open_clip),
    ):
        ours = keymap.strip(model.tensors, f"{network}.")
        theirs = keymap.theirs(rules(getattr(model.generator, network)), ours)
        found |= {prefix + name: tensor for name, tensor in theirs.items()}
    autoencoder = keymap.strip(found, sgm.AUTOENCODER)
    return found | _conditioning(autoencoder) | _text(found, model.generator.vision.output_dim)


def diffusers_tensors(model: folder.Unread) -> dict[str, dict[str, Any]]:
    """The tensors of every network by its folder; `UserError` for settings diffusers has not."""
    _check(model.generator, "diffusers")
    rules = {
        "unet": diffusers.unet,
        "autoencoder": diffusers.autoencoder,
        "vision": clip.transformers,
    }
    found = {}
    for network, name in FOLDERS.items():
        ours = keymap.strip(model.tensors, f"{network}.")
        found[name] = keymap.theirs(rules[network](getattr(model.generator, network)), ours)
    found[FOLDERS["autoencoder"]] = diffusers.unfold_quant_conv(found[FOLDERS["autoencoder"]])
    return found


def write_sgm(
    path: Path,
    model: folder.Unread,
    dtype: FloatName | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes one safetensors file of SVD's names aside, then renames it.

    Raises `UserError` if `path` exists, the disk is too small, or sgm cannot run the model.
    """
    if path.exists():
        raise UserError(f"{path} exists: choose another name")
    tensors = tensor_files.cast(sgm_tensors(model), dtype)
    tensor_files.begin(path, tensors.values(), progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = tensor_files.aside(path)
    try:
        tensor_files.write(aside, tensors, _header(model), progress)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def write_diffusers(
    path: Path,
    model: folder.Unread,
    dtype: FloatName | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a folder for diffusers' `StableVideoDiffusionPipeline` aside, then renames it.

    Raises what `write_sgm` does.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists: choose another name")
    parts = {
        name: tensor_files.cast(tensors, dtype)
        for name, tensors in diffusers_tensors(model).items()
    }
    everything = [tensor for tensors in parts.values() for tensor in tensors.values()]
    tensor_files.begin(path, everything, progress)
    aside = tensor_files.aside(path)
    try:
        for name, content in hub.configs(model.generator, model.sampling).items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (aside / name).write_text(text, encoding="utf-8")
        for name, tensors in parts.items():
            stem = "model" if name == FOLDERS["vision"] else "diffusion_pytorch_model"
            tensor_files.write_shards(
                aside / name,
                stem,
                tensors,
                SHARD_BYTES,
                index=True,
                metadata=_header(model),
                progress=progress,
            )
        if path.exists():
            path.rmdir()
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _header(model: folder.Unread) -> dict[str, str]:
    # Transformers reads no file that does not say whose tensors these are.
    content = {
        "generator": settings.to_json(model.generator),
        "sampling": settings.to_json(model.sampling),
        "metadata": model.metadata,
    }
    return {"format": "pt", SETTINGS: json.dumps(content)}


def _check(config: GeneratorConfig, tool: str) -> None:
    """Refuses settings that are constants in the tools' code."""
    wanted = {
        "pixelnerf": (config.pixelnerf is not None, False),
        "unet.groups": (config.unet.groups, GROUPS),
        "autoencoder.groups": (config.autoencoder.groups, GROUPS),
        "autoencoder.frames_alone": (config.autoencoder.frames_alone, False),
        "vision.output": (config.vision.output, "pooled"),
        "vision.preprocess": (config.vision.preprocess, "clip"),
    }
    if tool == "diffusers":
        # Its decoder's middle has as many blocks as a level of the encoder, ours always two.
        wanted["autoencoder.num_res_blocks"] = (config.autoencoder.num_res_blocks, 2)
        scalars = ("fps_id", "motion_bucket_id", "cond_aug")
        # Its first convolution has the first level's width.
        wanted["unet.channel_mult[0]"] = (config.unet.channel_mult[0], 1)
        wanted["autoencoder.channel_mult[0]"] = (config.autoencoder.channel_mult[0], 1)
        wanted["conditioner.scalars"] = (config.conditioner.scalars, scalars)
    for name, (given, needed) in wanted.items():
        if given != needed:
            raise UserError(
                f"{tool} cannot run this model: its {name} is {given!r}, and {needed!r} there"
            )


def _conditioning(autoencoder: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder of images: ours without what runs across frames, and two identities."""
    spatial = {
        name: tensor
        for name, tensor in autoencoder.items()
        if not any(part in name for part in ("time_stack", "time_mix_conv", "mix_factor"))
    }
    dtype = autoencoder["encoder.conv_out.bias"].dtype
    for name, channels in (
        ("quant_conv", autoencoder["encoder.conv_out.bias"].shape[0]),
        ("post_quant_conv", autoencoder["decoder.conv_in.weight"].shape[1]),
    ):
        spatial[f"{name}.weight"] = np.eye(channels, dtype=dtype)[:, :, None, None]
        spatial[f"{name}.bias"] = np.zeros(channels, dtype)
    return {f"{sgm.CONDITIONING}encoder.{name}": tensor for name, tensor in spatial.items()}


def _text(tensors: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Zeros for the tensors of the text tower that stay in OpenCLIP's state dict."""
    dtype = tensors[f"{clip.SVD}{clip.OPEN_CLIP}proj"].dtype
    shapes = {
        "positional_embedding": (_CONTEXT, width),
        "token_embedding.weight": (_VOCABULARY, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    zero = np.zeros((), dtype)
    return {clip.SVD + name: np.broadcast_to(zero, shape) for name, shape in shapes.items()}
