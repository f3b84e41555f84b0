"""The step of `v3d_jax.training.video` as one would write it with diffusers' UNet and PyTorch.

Float32 weights, bfloat16 autocast, fused AdamW, clipping, and an average of the weights. Weights
are random: nothing is downloaded.
"""

from typing import Any, Literal

import generator_peer
import torch

from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.nn.generator import GeneratorConfig
from v3d_jax.state import OptimConfig

Mode = Literal["eager", "compile", "checkpoint"]


class Trainer:
    """Network, optimiser and average, and a batch of `clips` random clips of latents."""

    def __init__(
        self,
        config: GeneratorConfig,
        loss: LossConfig,
        optim: OptimConfig,
        clips: int,
        mode: Mode,
    ):
        self.config, self.loss, self.optim, self.clips = config, loss, optim, clips
        self.unet = generator_peer.unet_network(config).train()
        if mode == "checkpoint":
            self.unet.enable_gradient_checkpointing()
        self.network = torch.compile(self.unet) if mode == "compile" else self.unet
        self.params = list(self.unet.parameters())
        self.average = [p.detach().clone() for p in self.params]
        self.adamw = torch.optim.AdamW(
            self.params,
            lr=optim.lr,
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=generator_peer.device() == "cuda",
        )
        frames, height, width, channels = config.latent_shape
        self.latents = self._normal(clips, frames, channels, height, width)
        self.token = self._normal(clips, 1, config.unet.context_dim)

    def _normal(self, *shape: int) -> Any:
        return torch.randn(shape, device=generator_peer.device())

    def _kept(self, dropped: float) -> Any:
        """1 for the clips whose condition is kept, 0 for the others."""
        return (torch.rand(self.clips, device=generator_peer.device()) >= dropped).float()

    def step(self) -> Any:
        """One update; returns the loss, on the device."""
        clips, frames = self.latents.shape[:2]
        log_sigma = self.loss.p_mean + self.loss.p_std * self._normal(clips)
        sigma = log_sigma.exp()[:, None, None, None, None]
        noised = self.latents + sigma * torch.randn_like(self.latents)
        augment = 0.05 * torch.randn_like(self.latents[:, 0])
        latent = (self.latents[:, 0] + augment) * self._kept(self.loss.drop_latent).reshape(
            -1, 1, 1, 1
        )
        token = self.token * self._kept(self.loss.drop_context).reshape(-1, 1, 1)
        inputs = torch.cat(
            [noised / (1 + sigma**2).sqrt(), latent[:, None].expand(-1, frames, -1, -1, -1)], dim=2
        )
        count = len(self.config.conditioner.scalars)
        scalars = torch.full((clips, count), 0.5, device=inputs.device)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            raw = self.network(inputs, 0.25 * log_sigma, token, scalars).sample
        denoised = noised / (1 + sigma**2) - sigma / (1 + sigma**2).sqrt() * raw.float()
        weight = (1 + sigma**2) / sigma**2
        loss = (weight * (denoised - self.latents) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, self.optim.clip)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.params, 1 - self.optim.ema)
        return loss.detach()
