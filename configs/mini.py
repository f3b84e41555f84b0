"""The mini model: UNet and image tower from scratch on the frozen mini autoencoder's latents.

Command:  python -m v3d_jax.train configs/mini_vae.py --data.path data/orbits
          python -m v3d_jax.train configs/mini.py --data.path data/orbits
          (in pieces: add --run.time-limit 450, and call it again until it is done)
Hardware: one H100
Hours:    not run whole; 385 clips a second, 12 steps; the first step compiles for minutes
Result:   after 4,535 steps, the last 1,972 with a falling rate: v3d_jax/assets/mini/README.md

The model is in runs/mini/model, a folder that `python -m v3d_jax.sample --model` takes.
"""

from v3d_jax.config import RunConfig, VideoTrainConfig
from v3d_jax.data.latents import CacheConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn.generator import MINI
from v3d_jax.state import OptimConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.training.video import CachedLatentsConfig

config = VideoTrainConfig(
    model=MINI,
    latents=CachedLatentsConfig(
        autoencoder="runs/mini_vae/model", cache=CacheConfig(image_size=128, threads=14)
    ),
    # V3D's noise (1.5, 2.0) is for fine-tuning; from scratch the details need their share.
    loss=LossConfig(p_mean=0.7, p_std=1.6, drop_context=0.2, drop_latent=0.2),
    # Latents of 32 x 32 need less noise to hide an orbit than V3D's 64 x 64.
    sampling=SamplingConfig(
        steps=16,
        sampler="dpmpp_2m",
        sigma_min=0.01,
        sigma_max=80.0,
        guidance_min=1.0,
        guidance_max=2.0,
        guidance_shape="triangle",
    ),
    data=DataConfig(loader=LoaderConfig(batch_size=32, num_frames=18, threads=4)),
    optim=OptimConfig(
        lr=5e-4, warmup=300, decay="linear", decay_start=0.6, weight_decay=0.01, ema=0.999
    ),
    run=RunConfig(
        dir="runs/mini", steps=40_000, log_every=50, sample_every=5_000, save_every=5_000
    ),
)
