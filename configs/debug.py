"""The smallest video model, to see that training works; its pictures are worth nothing.

Command:  python -m v3d_jax.train configs/debug_vae.py
          python -m v3d_jax.train configs/debug.py
Hardware: any CPU
Hours:    about a minute
Result:   not measured: this file exists for tests
"""

from v3d_jax.config import RunConfig, VideoTrainConfig
from v3d_jax.data.latents import CacheConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn.autoencoder import AutoencoderConfig
from v3d_jax.nn.clip import VisionConfig
from v3d_jax.nn.conditioner import ConditionerConfig
from v3d_jax.nn.generator import GeneratorConfig
from v3d_jax.nn.unet import UNetConfig
from v3d_jax.state import OptimConfig
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.objective import DataConfig

config = VideoTrainConfig(
    model=GeneratorConfig(
        unet=UNetConfig(
            model_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(2,),
            head_channels=16,
            context_dim=16,
            vector_dim=16,
        ),
        autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1),
        vision=VisionConfig(
            image_size=16,
            patch=8,
            width=16,
            layers=1,
            heads=2,
            mlp=32,
            output_dim=16,
            output="tokens",
            preprocess="plain",
        ),
        conditioner=ConditionerConfig(scalars=("azimuth",), dim=16),
        num_frames=3,
        image_size=16,
    ),
    latents=CachedLatentsConfig(
        autoencoder="runs/debug_vae/model", cache=CacheConfig(image_size=16, threads=2)
    ),
    sampling=SamplingConfig(steps=3, guidance_min=1.0, guidance_max=2.0),
    data=DataConfig(previews=1, loader=LoaderConfig(batch_size=8, num_frames=3, threads=2)),
    optim=OptimConfig(lr=1e-3, warmup=2),
    run=RunConfig(dir="runs/debug", steps=6, log_every=2, sample_every=6, save_every=3),
    dtype="float32",
)
