"""The smallest autoencoder, to see that training works; its pictures are worth nothing.

Command:  python -m v3d_jax.render MESHES... --out data/orbits --size 16 --views 6
          python -m v3d_jax.train configs/debug_vae.py
Hardware: any CPU
Hours:    under a minute
Result:   not measured: this file exists for tests
"""

from v3d_jax.config import AutoencoderTrainConfig, RunConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.nn.autoencoder import AutoencoderConfig
from v3d_jax.state import OptimConfig
from v3d_jax.training.autoencoder import AutoencoderLossConfig
from v3d_jax.training.objective import DataConfig

config = AutoencoderTrainConfig(
    model=AutoencoderConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1),
    loss=AutoencoderLossConfig(lpips=0.0),
    data=DataConfig(previews=1, loader=LoaderConfig(batch_size=8, num_frames=3, threads=2)),
    optim=OptimConfig(lr=1e-3, warmup=2),
    run=RunConfig(dir="runs/debug_vae", steps=6, log_every=2, sample_every=6, save_every=3),
    dtype="float32",
)
