"""The generator's networks as diffusers and transformers build them, in V3D's sampling loop.

Weights are random: nothing is downloaded. Arrays come and go as NumPy, channels last.
"""

import itertools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from flax import nnx

from v3d_jax.diffusion.guidance import Condition
from v3d_jax.nn.generator import GeneratorConfig
from v3d_jax.weights import clip, diffusers, keymap

Mode = Literal["eager", "compile"]


def device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _library() -> Any:
    """diffusers, told to be silent: it remarks on every cast."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers as library
    library.logging.set_verbosity_error()
    return library


def unet_network(config: GeneratorConfig) -> Any:
    """The UNet at the size of the settings, on the device."""
    unet = config.unet
    attends = [unet.has_attention(level) for level in range(len(unet.widths))]
    kinds = ["CrossAttn" if attend else "" for attend in attends]
    with torch.device(device()):
        made = _library().UNetSpatioTemporalConditionModel(
            down_block_types=tuple(f"{kind}DownBlockSpatioTemporal" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlockSpatioTemporal" for kind in kinds[::-1]),
            block_out_channels=unet.widths,
            addition_time_embed_dim=config.conditioner.dim,
            projection_class_embeddings_input_dim=unet.vector_dim,
            layers_per_block=unet.num_res_blocks,
            cross_attention_dim=unet.context_dim,
            num_attention_heads=tuple(width // unet.head_channels for width in unet.widths),
            num_frames=config.num_frames,
        )
    # Some parameters of diffusers' are made from tensors that ignore the device above.
    return made.to(device())


def networks(config: GeneratorConfig) -> tuple[Any, Any, Any]:
    """UNet, autoencoder and image tower at the sizes of the settings, on the device."""
    library = _library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    vae, vision = config.autoencoder, config.vision
    tower = transformers.CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp,
        projection_dim=vision.output_dim,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch,
        hidden_act="gelu",
    )
    with torch.device(device()):
        made = (
            unet_network(config),
            library.AutoencoderKLTemporalDecoder(
                down_block_types=("DownEncoderBlock2D",) * len(vae.widths),
                block_out_channels=vae.widths,
                layers_per_block=vae.num_res_blocks,
                scaling_factor=vae.scale_factor,
            ),
            transformers.CLIPVisionModelWithProjection(tower),
        )
    return tuple(model.to(device()).eval().requires_grad_(False) for model in made)


class Peer:
    """The networks in one type, eager or compiled, and the stages of a sample."""

    def __init__(self, config: GeneratorConfig, dtype: torch.dtype):
        self.config = config
        self.unet, self.vae, self.tower = networks(config)
        self.modules = (self.unet, self.vae, self.tower)
        self.to(dtype)
        self.run_unet, self.run_decoder = self.unet, self.vae.decode

    def to(self, dtype: torch.dtype) -> None:
        """Casts every weight."""
        self.dtype = dtype
        for module in self.modules:
            module.to(dtype)

    def set_layout(self, channels_last: bool) -> None:
        """Lays out the kernels of convolutions, which those of activations follow."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for module in self.modules:
            for tensor in module.parameters():
                if tensor.dim() in formats:
                    kind = formats[tensor.dim()] if channels_last else torch.contiguous_format
                    tensor.data = tensor.data.contiguous(memory_format=kind)

    def compile(self) -> None:
        """Runs UNet and decoder through torch.compile from here on."""
        self.run_unet = torch.compile(self.unet)
        self.run_decoder = torch.compile(self.vae.decode)

    @torch.no_grad()
    def randomise(self) -> None:
        """Weights of about unit gain everywhere: nothing stays zero, one or an identity."""
        generator = torch.Generator(device()).manual_seed(0)
        for module in self.modules:
            for name, tensor in module.state_dict().items():
                if not tensor.is_floating_point():
                    continue
                noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
                if tensor.ndim > 1:
                    noise = noise / np.prod(tensor.shape[1:]) ** 0.5
                elif name.endswith("weight"):
                    noise = 1 + 0.1 * noise
                elif not name.endswith("mix_factor"):
                    noise = 0.05 * noise
                tensor.copy_(noise)

    def weights(self, abstract: Any) -> Any:
        """The same weights as our parameters, in the tree of `abstract` (dicts by network)."""
        found = [
            {name: x.float().cpu().numpy() for name, x in module.state_dict().items()}
            for module in self.modules
        ]
        tensors = (found[0], diffusers.fold_quant_conv(found[1]), clip.without_buffers(found[2]))
        rules = (
            diffusers.unet(self.config.unet),
            diffusers.autoencoder(self.config.autoencoder),
            clip.transformers(self.config.vision),
        )
        names = ("unet", "autoencoder", "vision")
        return {
            name: nnx.to_pure_dict(keymap.read(rule, given, abstract[name]))
            for name, rule, given in zip(names, rules, tensors, strict=True)
        }

    @torch.no_grad()
    def denoise(self, x: Any, sigma: float, condition: Condition, scale: Any) -> Any:
        """D(x; sigma) with guidance: both branches in one batch, EDM's scalings as ours."""
        both = torch.cat([x, x])
        c_in = (sigma**2 + 1) ** -0.5
        latent = condition.latent[:, None].expand(-1, x.shape[1], -1, -1, -1)
        inputs = torch.cat([c_in * both, latent], dim=2).to(self.dtype)
        noise = torch.tensor(0.25 * float(np.log(sigma)), device=x.device)
        context = condition.context.to(self.dtype)
        raw = self.run_unet(inputs, noise, context, condition.vector).sample.float()
        denoised = both / (sigma**2 + 1) - sigma * c_in * raw
        uncond, cond = denoised.chunk(2)
        return uncond + scale[None, :, None, None, None] * (cond - uncond)

    @torch.no_grad()
    def step(
        self, x: Any, sigma: float, sigma_next: float, condition: Condition, scale: Any
    ) -> Any:
        """One step of Euler's method."""
        d = (x - self.denoise(x, sigma, condition, scale)) / sigma
        return x + (sigma_next - sigma) * d

    @torch.no_grad()
    def encode(self, image: Any, pixels: Any, noise: Any, scalars: tuple[float, ...]) -> Condition:
        """Both branches' condition: of the picture, the tower's pixels, and the latent's noise.

        The latent is the posterior's mean plus the noise; `vector` holds the three scalars.
        """
        latent = self.vae.encode(image.to(self.dtype)).latent_dist.mean.float() + noise
        context = self.tower(pixels.to(self.dtype)).image_embeds[:, None].float()
        vector = torch.tensor([scalars] * 2, device=image.device)
        both = [torch.cat([torch.zeros_like(x), x]) for x in (context, latent)]
        return Condition(*both, vector)

    @torch.no_grad()
    def decode(self, x: Any) -> Any:
        """Frames in [0, 1] of one clip's scaled latents [1, t, c, h, w], all at once."""
        latents = (x[0] / self.config.autoencoder.scale_factor).to(self.dtype)
        frames = self.run_decoder(latents, num_frames=len(latents)).sample.float()
        return (0.5 * frames + 0.5).clamp(0, 1)

    def sample(self, levels: np.ndarray, noise: Any, condition: Condition, scale: Any) -> Any:
        """The whole loop, from standard normal noise to scaled latents."""
        x = noise * (1 + float(levels[0]) ** 2) ** 0.5
        for sigma, sigma_next in itertools.pairwise(levels):
            x = self.step(x, float(sigma), float(sigma_next), condition, scale)
        return x


def to_torch(x: Any) -> Any:
    """An array [..., h, w, c] as a float32 tensor [..., c, h, w] on the device."""
    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float32), -1, -3).copy()).to(device())


def to_numpy(x: Any) -> np.ndarray:
    """A tensor [..., c, h, w] as an array [..., h, w, c]."""
    return np.moveaxis(x.float().cpu().numpy(), -3, -1)


def wait(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, returning when the device is done."""

    def waiting() -> Any:
        out = call()
        if device() == "cuda":
            torch.cuda.synchronize()
        return out

    return waiting
