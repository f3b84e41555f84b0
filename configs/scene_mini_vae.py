"""The mini scene model's autoencoder, from scratch on rooms: 8 x smaller, 16 channels.

Command:  python launch/pack_objects.py --furniture --faces 4000 --texture-size 128 --out rooms.pack
          python -m v3d_jax.render rooms.pack --out data/rooms --size 256 --views 18 --scenes 4608
          python -m v3d_jax.train configs/scene_mini_vae.py --data.path data/rooms
Hardware: one H200
Hours:    0.1 for 2,500 steps, 125 to 139 clips of 6 frames a second; not run to its end
Result:   28.1 dB over four held-out rooms after 2,500 steps

The mini's has seen objects on white: three rooms come back with 11, 16 and 22 dB, their colours and
borders lost. The model is in runs/scene_mini_vae/model, and takes frames alone as the mini's does.
"""

import dataclasses

from v3d_jax.config import AutoencoderTrainConfig, RunConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.nn.generator import SCENE_MINI
from v3d_jax.state import OptimConfig
from v3d_jax.training.autoencoder import AutoencoderLossConfig
from v3d_jax.training.objective import DataConfig

config = AutoencoderTrainConfig(
    model=dataclasses.replace(SCENE_MINI.autoencoder, frames_alone=True),
    loss=AutoencoderLossConfig(mse=0.5, lpips=0.7, kl=1e-5, frames=6),
    data=DataConfig(loader=LoaderConfig(batch_size=8, num_frames=18, threads=14)),
    optim=OptimConfig(
        lr=8e-4, warmup=500, decay="linear", decay_start=0.5, weight_decay=0.01, ema=0.999
    ),
    run=RunConfig(
        dir="runs/scene_mini_vae",
        steps=6_000,
        log_every=50,
        sample_every=3_000,
        save_every=3_000,
    ),
)
