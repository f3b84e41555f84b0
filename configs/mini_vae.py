"""The mini model's temporal autoencoder, from scratch on renders: 8 x smaller, 4 channels.

Command:  python -m v3d_jax.render MESHES... --out data/orbits --views 18 --variants 2
          (--elevation-jitter 10 besides)
          python -m v3d_jax.train configs/mini_vae.py --data.path data/orbits
Hardware: one H100
Hours:    5 minutes after compilation, 110 clips of 6 frames a second
Result:   31.45 dB, SSIM 0.955, LPIPS (AlexNet) 0.050 over the 17 views of 50 held-out objects

The model is in runs/mini_vae/model; its config.json holds the measured scale factor of the latents.
"""

from v3d_jax.config import AutoencoderTrainConfig, RunConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.nn.generator import MINI
from v3d_jax.state import OptimConfig
from v3d_jax.training.autoencoder import AutoencoderLossConfig
from v3d_jax.training.objective import DataConfig

config = AutoencoderTrainConfig(
    model=MINI.autoencoder,
    loss=AutoencoderLossConfig(mse=0.5, lpips=0.7, kl=1e-5, frames=6),
    data=DataConfig(loader=LoaderConfig(batch_size=8, num_frames=18, threads=14)),
    optim=OptimConfig(
        lr=8e-4, warmup=500, decay="linear", decay_start=0.7, weight_decay=0.01, ema=0.999
    ),
    run=RunConfig(
        dir="runs/mini_vae", steps=3_200, log_every=50, sample_every=1_600, save_every=1_600
    ),
)
