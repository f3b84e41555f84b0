"""The mini model: UNet and image tower on the frozen mini autoencoder's latents, 256 x 256 pixels.

Command:  python -m v3d_jax.render MESHES... --out data/low --size 128 --views 18 --variants 4
          --solids 2500 --elevation-jitter 20, and the same with --out data/orbits --size 256
          python -m v3d_jax.render MESHES... --out data/fronts --size 256 --views 18 --variants 4
          --start-azimuth 0 --lights plain
          python -m v3d_jax.train configs/mini_vae.py --data.path data/orbits
          python -m v3d_jax.train configs/mini_low.py --data.path data/low
          python -m v3d_jax.train configs/mini.py --data.path data/orbits data/fronts
          python -m v3d_jax.train configs/mini_finish.py --data.path data/orbits data/fronts
          (in pieces: add --run.time-limit 450, and call it again until it is done)
Hardware: one H100
Hours:    not run whole; 168 clips a second, after three and a half minutes of compilation
Result:   in pieces, what is shipped: v3d_jax/assets/mini/README.md

The model is in runs/mini/model, a folder that `python -m v3d_jax.sample --model` takes, and
configs/mini_finish.py goes on from it.
"""

from v3d_jax.config import RunConfig, VideoTrainConfig
from v3d_jax.data.latents import CacheConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn.generator import MINI
from v3d_jax.state import OptimConfig
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.training.perceptual import PerceptualConfig

config = VideoTrainConfig(
    model=MINI,
    latents=CachedLatentsConfig(
        autoencoder="runs/mini_vae/model", cache=CacheConfig(image_size=128, threads=14)
    ),
    # Its one step is taken at noise level 80, without guidance: V3D's (1.5, 2.0), with conditions
    # dropped for every fifth clip, would spend most of the training elsewhere.
    loss=LossConfig(p_mean=4.0, p_std=1.2, drop_context=0.05, drop_latent=0.05),
    perceptual=PerceptualConfig(weight=2.0, frames=1, shrink=1, nets=("vgg", "alex")),
    # Trained with LPIPS, one step gives the orbit. More look busier and score worse: they pick one
    # of many backs, where this stays between them.
    sampling=SamplingConfig(
        steps=1,
        sampler="dpmpp_2m",
        sigma_min=3.0,
        sigma_max=80.0,
        guidance_min=1.0,
        guidance_max=1.0,
    ),
    # Pictures are mostly taken from the front.
    data=DataConfig(loader=LoaderConfig(batch_size=32, num_frames=18, random_start=0.5, threads=4)),
    optim=OptimConfig(
        lr=4e-4, warmup=100, decay="linear", decay_start=0.01, weight_decay=0.01, ema=0.999
    ),
    run=RunConfig(
        dir="runs/mini",
        init_from="runs/mini_low/model",
        steps=40_000,
        log_every=50,
        sample_every=5_000,
        save_every=5_000,
    ),
)
