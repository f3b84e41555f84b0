"""The mini model's last part: the decoder learns as well, from the data's own pictures.

Command:  python -m v3d_jax.train configs/mini_finish.py --data.path data/orbits data/fronts
          (all commands: configs/mini.py)
Hardware: one H100
Hours:    0.2 and six minutes of compilation; 112 clips a second
Result:   held-out LPIPS 0.771 to 0.735 of the better baseline's, begun from an earlier model

One step leaves latents that lie between orbits, and a decoder that has only seen encoded pictures
makes a haze of them. Here it learns what sharp picture they stand for. Its frames are decoded
alone, so the finished model's are as well. The model is in runs/mini_finish/model.
"""

import dataclasses
import runpy
from pathlib import Path

large = runpy.run_path(str(Path(__file__).with_name("mini.py")))["config"]

config = dataclasses.replace(
    large,
    parts=("unet", "vision", "decoder"),
    latents=dataclasses.replace(large.latents, autoencoder="runs/mini/model"),
    # Noise of the one step alone: what the decoder learns from is what it will be given.
    loss=dataclasses.replace(large.loss, p_mean=4.3, p_std=0.5),
    perceptual=dataclasses.replace(large.perceptual, target="pictures", weight=4.0, absolute=0.5),
    data=dataclasses.replace(
        large.data,
        loader=dataclasses.replace(large.data.loader, random_start=0.35, threads=8),
    ),
    # Beginning again at 3e-4 took a thousand steps to make good.
    optim=dataclasses.replace(large.optim, lr=1.5e-4, decay_start=0.03),
    run=dataclasses.replace(
        large.run, dir="runs/mini_finish", init_from="runs/mini/model", steps=2_500
    ),
)
