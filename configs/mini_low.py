"""The mini model's first part: the same networks at 128 x 128 pixels, three times as fast.

Command:  python -m v3d_jax.train configs/mini_low.py --data.path data/low
          (all commands: configs/mini.py)
Hardware: one H100
Hours:    not run whole; 1,200 clips a second, 19 steps, after minutes of compilation
Result:   loss 0.118 to 0.101 in 4,444 steps (5 minutes 28 s), begun from an earlier model

What an object's back looks like is learnt as well where a picture is small. The model is in
runs/mini_low/model, and configs/mini.py goes on from it.
"""

import dataclasses
import runpy
from pathlib import Path

from v3d_jax.training.perceptual import PerceptualConfig

large = runpy.run_path(str(Path(__file__).with_name("mini.py")))["config"]

config = dataclasses.replace(
    large,
    model=dataclasses.replace(large.model, image_size=128),
    perceptual=PerceptualConfig(weight=0.0),
    data=dataclasses.replace(
        large.data, loader=dataclasses.replace(large.data.loader, batch_size=64)
    ),
    optim=dataclasses.replace(large.optim, lr=7e-4),
    run=dataclasses.replace(large.run, dir="runs/mini_low", init_from=None, steps=20_000),
)
