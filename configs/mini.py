"""The mini model: UNet and image tower from scratch on the frozen mini autoencoder's latents.

Command:  python -m v3d_jax.train configs/mini_vae.py --data.path data/orbits
          python -m v3d_jax.train configs/mini.py --data.path data/orbits
          (in pieces: add --run.time-limit 450, and call it again until it is done)
Hardware: one H200
Hours:    not measured yet
Result:   not measured yet (previews.csv: PSNR of unseen views, training and held-out clips)

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
    # Pictures are kept at full size, so that the tower shrinks them as it does when sampling.
    latents=CachedLatentsConfig(
        autoencoder="runs/mini_vae/model", cache=CacheConfig(image_size=256, threads=14)
    ),
    # V3D's noise (1.5, 2.0) is for fine-tuning; from scratch the details need their share.
    loss=LossConfig(p_mean=0.7, p_std=1.6, drop_context=0.2, drop_latent=0.2),
    sampling=SamplingConfig(steps=25, guidance_min=1.0, guidance_max=2.0),
    data=DataConfig(loader=LoaderConfig(batch_size=64, num_frames=18, threads=8)),
    optim=OptimConfig(
        lr=3e-4, warmup=1_000, decay="linear", decay_start=0.8, weight_decay=0.01, ema=0.9995
    ),
    run=RunConfig(
        dir="runs/mini", steps=60_000, log_every=50, sample_every=2_000, save_every=2_000
    ),
)
