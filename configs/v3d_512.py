"""V3D's fine-tuning of Stable Video Diffusion on orbits, second part: 18 frames of 512 x 512.

Command:  python -m v3d_jax.convert svd_xt.safetensors models/svd_xt
          python -m v3d_jax.train configs/v3d_512_9frames.py --data.path data/orbits
          python -m v3d_jax.train configs/v3d_512.py --data.path data/orbits
          (before that, without data: add --plan v5e-256, as in docs/training.md)
Hardware: written for TPU v5e-256, one clip a chip; not run on it
Hours:    not run
Result:   not run

Noise, dropped conditions, optimiser and what learns are those of the released configuration
(arXiv 2403.06738; AdamW with PyTorch's defaults at a constant rate of 1e-4, all of the UNet and
nothing else). It names neither batch size nor steps: those here are not V3D's. It keeps no average
of weights; here the average is what is exported, as in training the model that it begins with.
"""

import dataclasses

from v3d_jax.config import RunConfig, VideoTrainConfig
from v3d_jax.data.latents import CacheConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.nn.generator import V3D_512
from v3d_jax.parallel.mesh import MeshConfig
from v3d_jax.state import OptimConfig
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.conditioning import ConditionConfig
from v3d_jax.training.objective import DataConfig

config = VideoTrainConfig(
    model=dataclasses.replace(V3D_512, unet=dataclasses.replace(V3D_512.unet, remat="blocks")),
    latents=CachedLatentsConfig(
        autoencoder="models/svd_xt", cache=CacheConfig(image_size=256, orbits_per_call=1)
    ),
    loss=LossConfig(p_mean=1.5, p_std=2.0, drop_context=0.2, drop_latent=0.2),
    condition=ConditionConfig(
        augment_mean=-3.0, augment_std=0.5, fps_id=1.0, motion_bucket_id=300.0
    ),
    # A preview samples on every device the same clips, in more memory than a step.
    data=DataConfig(previews=0, loader=LoaderConfig(batch_size=256, num_frames=18)),
    optim=OptimConfig(lr=1e-4, warmup=1, decay="constant", weight_decay=0.01, clip=1.0, ema=0.9999),
    run=RunConfig(
        dir="runs/v3d_512",
        init_from="runs/v3d_512_9frames/model",
        steps=10_000,
        save_every=500,
        export_dtype="float16",
    ),
    # Kernels of 320 channels divide by 64, not by more.
    mesh=MeshConfig(fsdp=64),
    parts=("unet",),
)
