"""The scene model at 512 pixels: V3D, or Stable Video Diffusion, with a PixelNeRF.

Command:  python -m v3d_jax.convert V3D_512.ckpt models/v3d_512
          python -m v3d_jax.render MESHES... --out data/rooms --size 512 --views 18 --scenes 20000
          python -m v3d_jax.train configs/scene.py --data.path data/rooms
          (from SVD: convert svd_xt.safetensors to models/svd_xt, and add --run.init-from)
Hardware: written for TPU v5e-256, one clip a chip; not run on it
Hours:    not run
Result:   not run

Noise, dropped conditions and the weight of the colours' loss are those of V3D's code, which names
neither data nor steps for its scene model and comes without weights of it: the rest is not V3D's.
`render --mvimgnet` and `--co3d` make data sets of real clips beside the rendered rooms.
"""

import dataclasses

from v3d_jax.config import RunConfig, SceneTrainConfig
from v3d_jax.data.latents import CacheConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.data.posed import SourceConfig
from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.nn.generator import SCENE_512
from v3d_jax.parallel.mesh import MeshConfig
from v3d_jax.state import OptimConfig
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.conditioning import ConditionConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.training.scene import SceneConfig

config = SceneTrainConfig(
    model=dataclasses.replace(SCENE_512, unet=dataclasses.replace(SCENE_512.unet, remat="blocks")),
    latents=CachedLatentsConfig(
        autoencoder="models/v3d_512", cache=CacheConfig(image_size=128, orbits_per_call=1)
    ),
    loss=LossConfig(p_mean=1.5, p_std=2.0, drop_context=0.2, drop_latent=0.2),
    condition=ConditionConfig(
        augment_mean=-3.0, augment_std=0.5, fps_id=1.0, motion_bucket_id=300.0
    ),
    scene=SceneConfig(sources=SourceConfig(min_sources=1, max_sources=5), rgb_weight=1.0),
    data=DataConfig(previews=0, loader=LoaderConfig(batch_size=256, num_frames=18)),
    optim=OptimConfig(lr=1e-4, warmup=500, decay="constant", weight_decay=0.01, ema=0.9999),
    run=RunConfig(
        dir="runs/scene",
        init_from="models/v3d_512",
        steps=30_000,
        save_every=500,
        export_dtype="float16",
    ),
    mesh=MeshConfig(fsdp=64),
    parts=("unet", "pixelnerf"),
)
