"""V3D's fine-tuning of Stable Video Diffusion on orbits, first part: 9 frames, 40 degrees apart.

Command:  python -m v3d_jax.train configs/v3d_512_9frames.py --data.path data/orbits
          (all commands: configs/v3d_512.py)
Hardware: written for TPU v5e-256, one clip a chip; neither compiled for it nor run on it
Hours:    not run
Result:   not run

Half the frames take half the memory and work. The UNet has no weight that depends on their number,
so configs/v3d_512.py goes on from the model in runs/v3d_512_9frames/model.
"""

import dataclasses
import runpy
from pathlib import Path

full = runpy.run_path(str(Path(__file__).with_name("v3d_512.py")))["config"]

config = dataclasses.replace(
    full,
    model=dataclasses.replace(full.model, num_frames=9),
    data=dataclasses.replace(full.data, loader=dataclasses.replace(full.data.loader, num_frames=9)),
    run=dataclasses.replace(
        full.run, dir="runs/v3d_512_9frames", init_from="models/svd_xt", steps=10_000
    ),
)
