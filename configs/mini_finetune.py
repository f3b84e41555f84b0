"""Fine-tunes the shipped model on a kind of objects that it has not seen, 256 x 256 pixels.

Command:  python launch/pack_objects.py --openings --out doors.pack
          python -m v3d_jax.render doors.pack --out data/doors --size 256 --views 18 --variants 8
          python -m v3d_jax.train configs/mini_finetune.py --data.path data/doors
Hardware: one H200
Hours:    0.09 beside another program, most of it compilation (XLA_FLAGS of the run:
          --xla_gpu_enable_triton_gemm=false); 227 clips a second
Result:   loss on held-out objects 0.0877 to 0.0467, PSNR of their samples 18.1 to 20.6 dB

20 doors and windows to learn from, 10 others to judge by; any meshes of one kind take their place,
with `--heldout NAMES.txt` in rendering. The finished model is in runs/mini_finetune/model.
"""

import dataclasses
import runpy
from pathlib import Path

large = runpy.run_path(str(Path(__file__).with_name("mini.py")))["config"]

config = dataclasses.replace(
    large,
    latents=dataclasses.replace(large.latents, autoencoder="mini"),
    # The smaller of mini.py's two networks alone.
    perceptual=dataclasses.replace(large.perceptual, nets=("alex",)),
    data=dataclasses.replace(large.data, previews=10),
    # A rate of which the averaged weights follow within the run.
    optim=dataclasses.replace(large.optim, lr=1e-4, warmup=50, decay_start=0.1, ema=0.99),
    run=dataclasses.replace(
        large.run,
        dir="runs/mini_finetune",
        init_from="mini",
        steps=500,
        log_every=10,
        sample_every=250,
        save_every=250,
    ),
)
