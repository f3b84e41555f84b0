"""Quality and time of a fit on NeRF-synthetic lego, every 8th view held out, on white.

    python benchmarks/lego.py FOLDER --size 400
    python benchmarks/lego.py FOLDER --size 800

FOLDER holds transforms_train.json and its pictures with alpha. Prints one table row: PSNR and SSIM
over the views that were not fitted, seconds with compilation, and view-steps a second without it.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from v3d_jax import pipeline
from v3d_jax.data import views
from v3d_jax.ops import camera, metrics
from v3d_jax.splat import fit, rasterize
from v3d_jax.splat.densify import DensifyConfig
from v3d_jax.splat.objective import LossConfig

HELD_OUT = 8


@dataclass(frozen=True)
class LegoArgs:
    """What is fitted, and how long."""

    folder: tyro.conf.Positional[Path]
    size: int = 400
    gaussians: int = 100_000
    steps: int = 7_000
    views: int = 1
    degree: int = 3
    seed: int = 0
    save: Path | None = None
    """Folder for held-out renders beside the truth."""


def main(args: LegoArgs) -> None:
    given = views.read(args.folder, max_side=args.size)
    assert given.alpha is not None
    held = np.arange(len(given.images)) % HELD_OUT == 0
    config = fit.FitConfig(
        count=args.gaussians,
        steps=args.steps,
        views=args.views,
        degree=args.degree,
        # 3DGS-MCMC's loss and schedule.
        loss=LossConfig(l1=0.8, dssim=0.2, lpips=0.0, opacity=0.01, scale=0.01),
        densify=DensifyConfig(start=min(500, args.steps // 8), stop=round(0.85 * args.steps)),
    )
    targets = fit.Targets(
        jnp.asarray(given.images[~held]),
        jnp.asarray(given.alpha[~held]),
        _part(given.cameras, ~held),
    )
    start_key, fit_key = jax.random.split(jax.random.key(args.seed))
    begin = jax.jit(pipeline.begin_splats, static_argnums=0)
    start = time.perf_counter()
    whole = pipeline.SplatConfig(config)
    _, gaussians = begin(whole, targets.images, targets.alpha, targets.cameras, start_key)
    height, width = given.images.shape[1:3]
    raster = rasterize.RasterConfig(width=width, height=height)
    needed = jax.jit(rasterize.needed_slots, static_argnums=2)
    slots = int(needed(gaussians, targets.cameras, raster)) * args.views
    told: list[tuple[int, float]] = []
    state, raster = fit.run(
        config,
        rasterize.with_room(raster, slots, slack=1.5),
        targets,
        gaussians,
        fit_key,
        progress=lambda done, _: told.append((done, time.perf_counter())),
    )
    seconds = told[-1][1] - start
    half = len(told) // 2  # by then every capacity that the fit needs is compiled, or nearly
    rate = (told[-1][0] - told[half][0]) * args.views / max(told[-1][1] - told[half][1], 1e-9)
    gaussians = state.parameters.gaussians
    lenses, truth = _part(given.cameras, held), views.on_white(given)[held]
    raster = rasterize.with_room(raster, needed(gaussians, lenses, raster))
    draw = jax.jit(rasterize.rasterize, static_argnums=2)
    scores = []
    for view, frame in enumerate(truth):
        lens = _part(lenses, np.asarray([view]))
        color = jnp.clip(draw(gaussians, lens, raster, jnp.ones(3)).color, 0.0, 1.0)
        pair = color, jnp.asarray(frame[None])
        scores.append([float(metric(*pair)[0]) for metric in (metrics.psnr, metrics.ssim)])
        if args.save is not None:
            _save(args.save, view, np.asarray(color[0]), frame)
    psnr, ssim = np.mean(scores, axis=0)
    print(
        "| size | Gaussians | view-steps | PSNR | SSIM | seconds | view-steps/s | slots | device |"
    )
    print(
        f"| {width} | {args.gaussians} | {args.steps * args.views} | {psnr:.2f} | {ssim:.4f} | "
        f"{seconds:.1f} | {rate:.1f} | {int(state.slots)} | {jax.devices()[0].device_kind} |"
    )


def _part(cameras: camera.Camera, chosen: np.ndarray) -> camera.Camera:
    return camera.Camera(*(field[chosen] for field in cameras))


def _save(folder: Path, view: int, render: np.ndarray, truth: np.ndarray) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pair = np.concatenate([render, truth], axis=1)
    Image.fromarray((pair * 255.0 + 0.5).astype(np.uint8)).save(folder / f"{view:03d}.png")


if __name__ == "__main__":
    main(tyro.cli(LegoArgs))
