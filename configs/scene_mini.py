"""The mini scene model: the mini with a PixelNeRF, on rooms furnished with its objects, 256 pixels.

Command:  python launch/pack_objects.py --furniture --faces 4000 --texture-size 128 --out rooms.pack
          python -m v3d_jax.render rooms.pack --out data/rooms --size 256 --views 18 --scenes 4608
          python -m v3d_jax.train configs/scene_mini_vae.py --data.path data/rooms
          python -m v3d_jax.train configs/scene_mini.py --data.path data/rooms
          python launch/package_model.py runs/scene_mini/model v3d_jax/assets/scene_mini
          --base ../mini
Hardware: two H200s (16 clips a step each), 32 CPU cores
Hours:    0.17 for 2,548 steps of 2,671 (--optim.warmup 200), 125 to 158 clips a second, and 3 min
          to compile; the autoencoder 2.3 min on one; not run to its end
Result:   40 held-out rooms: 19.16 dB, LPIPS 0.268 from one view, 24.44 dB, 0.101 from three: 2.2
          and 5.0 dB more and 0.77 and 0.59 times the LPIPS of views warped by a plane

The image tower and two of the UNet's deepest parts stay the mini's, so that the packaged model is
what differs from it: 15.5 MB, of 10.7 million weights of the UNet, 2.8 of the autoencoder and 0.9
of the PixelNeRF. The autoencoder is its own, so the UNet's first and last convolutions are new.
"""

from v3d_jax.config import RunConfig, SceneTrainConfig
from v3d_jax.data.latents import CacheConfig
from v3d_jax.data.loader import LoaderConfig
from v3d_jax.data.posed import SourceConfig
from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn.generator import SCENE_MINI
from v3d_jax.state import OptimConfig
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.training.perceptual import PerceptualConfig
from v3d_jax.training.scene import SceneConfig

config = SceneTrainConfig(
    model=SCENE_MINI,
    latents=CachedLatentsConfig(
        autoencoder="runs/scene_mini_vae/model", cache=CacheConfig(image_size=128, threads=14)
    ),
    # One step with LPIPS, as the mini, whose UNet it begins with: views leave less open than a
    # single picture does, and noise that is never sampled from need not be learnt.
    loss=LossConfig(p_mean=4.3, p_std=0.5, drop_context=0.05, drop_latent=0.05),
    perceptual=PerceptualConfig(
        weight=2.0, target="pictures", frames=1, shrink=1, nets=("vgg", "alex"), absolute=0.5
    ),
    scene=SceneConfig(sources=SourceConfig(min_sources=1, max_sources=3), rgb_weight=1.0),
    sampling=SamplingConfig(
        steps=1,
        sampler="dpmpp_2m",
        sigma_min=3.0,
        sigma_max=80.0,
        guidance_min=1.0,
        guidance_max=1.0,
    ),
    data=DataConfig(loader=LoaderConfig(batch_size=32, num_frames=18, threads=14)),
    # The PixelNeRF is new, the UNet is not.
    optim=OptimConfig(
        lr=4e-4,
        faster=(("pixelnerf.*", 5.0),),
        warmup=500,
        decay="linear",
        decay_start=0.1,
        weight_decay=0.01,
        ema=0.999,
    ),
    run=RunConfig(
        dir="runs/scene_mini",
        init_from="v3d_jax/assets/mini",
        steps=40_000,
        log_every=50,
        sample_every=5_000,
        save_every=5_000,
    ),
    parts=("unet", "pixelnerf"),
    train_only=(
        "pixelnerf.*",
        "unet.conv_*",
        "unet.norm_out.*",
        "unet.down.*",
        "unet.mid1.*",
        "unet.up.0.*",
        "unet.up.1.*",
    ),
)
