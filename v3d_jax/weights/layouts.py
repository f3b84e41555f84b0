"""Which networks a checkpoint holds, and in whose names, by the names of its tensors.

A network is found by a tensor that only its layout has; what stands before that name is the prefix
of all its tensors, so bare state dicts and whole pipelines are recognised alike.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from v3d_jax.errors import UserError
from v3d_jax.weights import clip, diffusers, sgm
from v3d_jax.weights.containers import Container
from v3d_jax.weights.keymap import Rule

NETWORKS = {"unet": "video UNet", "autoencoder": "temporal autoencoder", "vision": "image tower"}


class Layout(NamedTuple):
    """A network's names: those that give it away, what precedes them, and its key map.

    The names of `text` begin tensors beside it that belong to no network of ours.
    """

    network: str
    markers: tuple[str, ...]
    root: str
    rules: Callable[[Any], list[Rule]]
    text: tuple[str, ...] = ()


# Two markers each, so that a file that lacks one is told which.
LAYOUTS = {
    "sgm UNet": Layout("unet", ("input_blocks.0.0.weight", "input_blocks.0.0.bias"), "", sgm.unet),
    "diffusers UNet": Layout(
        "unet",
        ("time_embedding.linear_1.weight", "time_embedding.linear_1.bias"),
        "",
        diffusers.unet,
    ),
    "sgm autoencoder": Layout(
        "autoencoder",
        ("decoder.conv_out.time_mix_conv.weight", "decoder.conv_out.time_mix_conv.bias"),
        "",
        sgm.autoencoder,
    ),
    "diffusers autoencoder": Layout(
        "autoencoder",
        ("decoder.time_conv_out.weight", "decoder.time_conv_out.bias"),
        "",
        diffusers.autoencoder,
    ),
    "OpenCLIP image tower": Layout(
        "vision",
        ("visual.class_embedding", "visual.conv1.weight"),
        clip.OPEN_CLIP,
        clip.open_clip,
        clip.TEXT_OPEN_CLIP,
    ),
    "transformers image tower": Layout(
        "vision",
        (
            "vision_model.embeddings.class_embedding",
            "vision_model.embeddings.patch_embedding.weight",
        ),
        "",
        clip.transformers,
        clip.TEXT_TRANSFORMERS,
    ),
}


class Part(NamedTuple):
    """One network of a checkpoint: tensors by the names of its key map, which follow `prefix`."""

    layout: str
    prefix: str
    tensors: dict[str, Any]
    container: Container

    def rules(self, config: Any) -> list[Rule]:
        """The key map for the network's settings."""
        return LAYOUTS[self.layout].rules(config)


class Found(NamedTuple):
    """The networks in a checkpoint, and the names of the tensors that are nobody's."""

    parts: dict[str, Part]
    unexpected: list[str]


def find(container: Container) -> Found:
    """The networks of a checkpoint; `UserError` if it has one of them twice.

    Left out are SVD's second autoencoder, which has no layers across frames, CLIP's text tower or
    what OpenCLIP keeps of it, and an index buffer of older transformers.
    """
    parts: dict[str, Part] = {}
    left_out: tuple[str, ...] = (sgm.CONDITIONING,)
    for name, layout in LAYOUTS.items():
        prefixes = _prefixes(container.tensors, layout)
        if not prefixes:
            continue
        if len(prefixes) > 1 or layout.network in parts:
            raise UserError(f"{container.path} holds more than one {NETWORKS[layout.network]}")
        (prefix,) = prefixes
        parts[layout.network] = Part(name, prefix + layout.root, {}, container)
        left_out += tuple(prefix + text for text in layout.text)
    unexpected = []
    # The longest first: the prefix of a bare network is empty and would take all.
    ordered = sorted(parts.values(), key=lambda part: -len(part.prefix))
    for name, tensor in container.tensors.items():
        if name.startswith(left_out) or name.endswith(".position_ids"):
            continue
        part = next((part for part in ordered if name.startswith(part.prefix)), None)
        if part is None:
            unexpected.append(name)
        else:
            part.tensors[name[len(part.prefix) :]] = tensor
    return Found(parts, unexpected)


def _prefixes(names: Mapping[str, Any], layout: Layout) -> set[str]:
    return {
        name.removesuffix(marker)
        for name in names
        for marker in layout.markers
        if name == marker or name.endswith("." + marker)
    }
