"""Checkpoints in the layouts of published models, at any size, written without PyTorch."""

import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
from safetensors import numpy as safetensors_numpy

from v3d_jax.nn import autoencoder, clip, conditioner, generator, unet
from v3d_jax.weights import clip as clip_names
from v3d_jax.weights import diffusers, folder, keymap, published, sgm

# As small as the layouts allow: 32 groups, two blocks a level for diffusers' decoder.
REDUCED = generator.GeneratorConfig(
    unet=unet.UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        head_channels=16,
        context_dim=12,
        vector_dim=24,
    ),
    autoencoder=autoencoder.AutoencoderConfig(channels=32, channel_mult=(1, 2)),
    vision=clip.VisionConfig(
        image_size=28, patch=14, width=128, layers=2, heads=2, mlp=40, output_dim=12
    ),
    conditioner=conditioner.ConditionerConfig(dim=8),
    num_frames=3,
    image_size=16,
)

Tensors = dict[str, np.ndarray]


def global_op(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integers(values) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"


def tensor(kind: str, key: str, length: int, offset: int, size, stride) -> bytes:
    """The opcodes of one tensor in a storage, as PyTorch writes them."""
    pid = b"(" + text("storage") + global_op("torch", kind) + text(key) + text("cpu")
    pid += b"J" + struct.pack("<i", length) + b"tQ"
    hooks = global_op("collections", "OrderedDict") + b")R"
    body = b"(" + pid + b"J" + struct.pack("<i", offset) + integers(size) + integers(stride)
    return global_op("torch._utils", "_rebuild_tensor_v2") + body + b"\x89" + hooks + b"tR"


def mapping(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def torch_zip(path: Path, content: bytes, storages, compression=zipfile.ZIP_STORED) -> Path:
    """A file as of `torch.save`: a pickle and the storages it refers to, by key."""
    pairs = storages.items() if isinstance(storages, Mapping) else storages
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("model/byteorder", b"little")
        for key, data in pairs:
            archive.writestr(f"model/data/{key}", data)
    return path


_KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def contiguous(name: str, key: str, shape: tuple[int, ...]) -> bytes:
    """The opcodes of a whole storage of the NumPy type `name` as one tensor."""
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    return tensor(_KINDS[name], key, int(np.prod(shape)), 0, shape, strides)


def lightning(path: Path, tensors: Mapping[str, Any]) -> Path:
    """A checkpoint as PyTorch Lightning writes it: tensors under `state_dict`, and bookkeeping."""
    state = {
        name: contiguous(str(x.dtype), str(i), x.shape)
        for i, (name, x) in enumerate(tensors.items())
    }
    callback = global_op("pytorch_lightning.callbacks", "ModelCheckpoint") + b")R"
    content = mapping(
        {"global_step": b"K\x07", "state_dict": mapping(state), "callbacks": callback}
    )
    storages = ((str(i), np.asarray(x).tobytes()) for i, x in enumerate(tensors.values()))
    return torch_zip(path, content, storages)


def shapes(config: generator.GeneratorConfig, network: str, rules) -> dict[str, tuple[int, ...]]:
    abstract = keymap.strip(folder.flatten(folder.abstract_params(config)), f"{network}.")
    return keymap.shapes(rules, abstract)


def sgm_shapes(config: generator.GeneratorConfig) -> dict[str, tuple[int, ...]]:
    """What both V3D's and SVD's files hold."""
    first = shapes(config, "autoencoder", sgm.autoencoder(config.autoencoder))
    return {
        **prefixed(sgm.UNET, shapes(config, "unet", sgm.unet(config.unet))),
        **prefixed(sgm.AUTOENCODER, first),
    }


def tower_shapes(config: generator.GeneratorConfig) -> dict[str, tuple[int, ...]]:
    """OpenCLIP's tower and what is left of its text tower in an SVD file."""
    rest = {
        "positional_embedding": (77, config.vision.output_dim),
        "token_embedding.weight": (49408, config.vision.output_dim),
        "ln_final.weight": (config.vision.output_dim,),
        "ln_final.bias": (config.vision.output_dim,),
        "text_projection": (config.vision.output_dim,) * 2,
        "logit_scale": (),
    }
    return rest | prefixed("visual.", shapes(config, "vision", clip_names.open_clip(config.vision)))


def conditioning_shapes(config: generator.GeneratorConfig) -> dict[str, tuple[int, ...]]:
    """The autoencoder of images that conditions SVD; its names follow from the temporal one's."""
    first = shapes(config, "autoencoder", sgm.autoencoder(config.autoencoder))
    across = ("time_stack", "mix_factor", "time_mix_conv")
    latent = config.autoencoder.latent_channels
    found = {name: x for name, x in first.items() if not any(part in name for part in across)}
    for name, channels in (("quant_conv", 2 * latent), ("post_quant_conv", latent)):
        found[f"{name}.weight"], found[f"{name}.bias"] = (channels, channels, 1, 1), (channels,)
    return prefixed("conditioner.embedders.3.encoder.", found)


def svd_shapes(config: generator.GeneratorConfig) -> dict[str, tuple[int, ...]]:
    """All tensors of an SVD file (2446 at the published size)."""
    return {
        **sgm_shapes(config),
        **prefixed("conditioner.embedders.0.open_clip.model.", tower_shapes(config)),
        **conditioning_shapes(config),
    }


def diffusers_shapes(config: generator.GeneratorConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of a diffusers folder, by the folders in it."""
    moments = 2 * config.autoencoder.latent_channels
    quant = {"quant_conv.weight": (moments, moments, 1, 1), "quant_conv.bias": (moments,)}
    return {
        "unet": shapes(config, "unet", diffusers.unet(config.unet)),
        "vae": shapes(config, "autoencoder", diffusers.autoencoder(config.autoencoder)) | quant,
        "image_encoder": shapes(config, "vision", clip_names.transformers(config.vision)),
    }


def prefixed(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in named.items()}


def fill(named: Mapping[str, tuple[int, ...]], dtype: Any = np.float32) -> Tensors:
    return {name: np.asarray(x, dtype) for name, x in fixtures.fill(dict(named)).items()}


def save(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors_numpy.save_file(tensors, path)
    return path


def shard(folder: Path, stem: str, tensors: Tensors, parts: int = 3) -> Path:
    """Several files and their index, as Hugging Face's libraries write them."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for part in range(parts):
        held = {name: x for i, (name, x) in enumerate(tensors.items()) if i % parts == part}
        file = save(folder / f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors", held)
        places |= dict.fromkeys(held, file.name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return index


def diffusers_configs(config: generator.GeneratorConfig) -> dict[str, dict[str, Any]]:
    """The entries of the JSON files that tell what tensors do not."""
    attends = [config.unet.has_attention(level) for level in range(len(config.unet.widths))]
    kinds = ["CrossAttnDown" if attend else "Down" for attend in attends]
    return {
        "unet": {
            "block_out_channels": list(config.unet.widths),
            "num_attention_heads": [x // config.unet.head_channels for x in config.unet.widths],
            "down_block_types": [f"{kind}BlockSpatioTemporal" for kind in kinds],
            "num_frames": config.num_frames,
        },
        "vae": {"scaling_factor": config.autoencoder.scale_factor},
        "image_encoder": {"num_attention_heads": config.vision.heads, "hidden_act": "gelu"},
    }


def diffusers_folder(
    path: Path, config: generator.GeneratorConfig, tensors, write: Callable[..., Any] | None = None
) -> Path:
    """A folder like the published ones; `tensors` by the folders in it."""
    write = write or save
    for name, content in diffusers_configs(config).items():
        stem = "model" if name == "image_encoder" else "diffusion_pytorch_model"
        (path / name).mkdir(parents=True)
        write(path / name / f"{stem}.safetensors", tensors[name])
        (path / name / "config.json").write_text(json.dumps(content))
    (path / "model_index.json").write_text("{}")
    return path


V3D = fill(sgm_shapes(REDUCED))
# One more, so that it shows whose weights were taken.
SVD = {name: np.asarray(x + np.float32(1)) for name, x in fill(svd_shapes(REDUCED)).items()}
# What the files' tensors do not tell.
HINTS = published.Hints(frames=3, size=(16, 16), head_channels=16)


def pair(path: Path) -> Path:
    """V3D's checkpoint, with SVD's beside it."""
    save(path / "svd_xt.safetensors", SVD)
    return lightning(path / "V3D_512.ckpt", V3D)


def values(model: folder.Unread) -> Tensors:
    return {name: np.asarray(tensor) for name, tensor in model.tensors.items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Holds tensors to the same names, types and bits."""
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        assert found[name].tobytes() == x.tobytes(), name
