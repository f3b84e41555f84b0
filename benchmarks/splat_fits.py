"""One fit of ours, timed; scores of held-out renders; and the table that benchmarks of fits print.

Axes: v view, h w image.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import gsplat_peer
import jax
import jax.numpy as jnp
import numpy as np
from gsplat_peer import Fitted

from v3d_jax import errors, pipeline, splatting
from v3d_jax.nn import lpips
from v3d_jax.ops import binning, camera
from v3d_jax.splat import fit, rasterize, recipe
from v3d_jax.splat.gaussians import Gaussians
from v3d_jax.weights import lpips as lpips_weights

CHUNK = 100  # steps between two looks at the capacity


class Scores(NamedTuple):
    """Means over held-out views."""

    psnr: float  # dB
    ssim: float
    lpips: float | None  # on AlexNet, or on VGG16 where that alone is there


class Judge:
    """Scores renders; the same for every program that made them."""

    def __init__(self) -> None:
        self.net, self.params = None, None
        for net in ("alex", "vgg"):
            try:
                self.net, self.params = net, lpips_weights.load(net)
                return
            except errors.UserError as error:
                print(f"LPIPS on {net}: {error}")

    def scores(self, renders: np.ndarray, truth: np.ndarray) -> Scores:
        """Both are [v, h, w, 3] in [0, 1]."""
        rows = []
        for render, frame in zip(renders, truth, strict=True):
            values = splatting.score_jit(self.params, jnp.asarray(render), jnp.asarray(frame))
            rows.append([float(value) for value in values])
        means = np.mean(rows, axis=0).tolist()
        return Scores(means[0], means[1], means[2] if len(means) > 2 else None)


def vgg() -> lpips.LPIPSParams | None:
    """Weights of the LPIPS loss; None, with a line that says so, where there are none."""
    try:
        return lpips_weights.load("vgg")
    except errors.UserError as error:
        print(f"{error}; the fits go on with L1 and DSSIM")
        return None


def part(cameras: camera.Camera, chosen: np.ndarray) -> camera.Camera:
    return camera.Camera(*(field[chosen] for field in cameras))


def begin(
    config: fit.FitConfig, targets: fit.Targets, seed: int
) -> tuple[Gaussians, jax.Array, float]:
    """The Gaussians that every program starts from, the fit's key, and seconds, compiled anew."""
    start_key, fit_key = jax.random.split(jax.random.key(seed))
    start = time.perf_counter()
    whole = recipe.SplatConfig(config)
    carve = jax.jit(recipe.begin, static_argnums=0)
    _, gaussians = carve(whole, targets.images, targets.alpha, targets.cameras, start_key)
    jax.block_until_ready(gaussians)
    return gaussians, fit_key, time.perf_counter() - start


def capacity(
    config: fit.FitConfig,
    starts: list[tuple[fit.Targets, Gaussians]],
    block: int | None,
) -> rasterize.RasterConfig:
    """One configuration with room for the fits of all `starts`, and for their growth.

    Fits with the same one share their compiled programs. `block` is `RasterConfig`'s, or None for
    its default.
    """
    height, width = starts[0][0].images.shape[1:3]
    raster = rasterize.RasterConfig(width=width, height=height)
    if block is not None:
        raster = dataclasses.replace(raster, block=block)
    needed = max(int(_needed(gaussians, to.cameras, raster)) for to, gaussians in starts)
    slots = binning.next_size(needed * config.views, slack=1.5, steps=8)
    return dataclasses.replace(raster, slots=slots)


def ours(
    config: fit.FitConfig,
    targets: fit.Targets,
    gaussians: Gaussians,
    held: camera.Camera,
    key: jax.Array,
    *,
    raster: rasterize.RasterConfig,
    lpips_params: Any = None,
) -> Fitted:
    """Our fit from `gaussians`, and its renders of the held-out cameras on its background."""
    start = time.perf_counter()
    network = None
    if config.loss.lpips:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        network = pipeline.perceptual(jnp.dtype(dtype))
    told: list[tuple[int, float]] = []
    state, raster = fit.run(
        config,
        raster,
        targets,
        gaussians,
        key,
        perceptual=network,
        params=lpips_params if network else None,
        chunk=CHUNK,
        progress=lambda done, _: told.append((done, time.perf_counter())),
    )
    ended = time.perf_counter()
    half = (len(told) - 1) // 2  # by then every capacity that the fit needs is compiled, or nearly
    spent = max(told[-1][1] - told[half][1], 1e-9)
    rate = (told[-1][0] - told[half][0]) * config.views / spent
    found = state.parameters.gaussians
    needed = int(_needed(found, held, raster))
    if needed > raster.slots:
        raster = rasterize.with_room(raster, needed)
    renders = []
    for view in range(len(held.intrinsics)):
        color = _draw(found, part(held, np.asarray([view])), raster, fit.behind(config)).color
        renders.append(np.clip(np.asarray(color[0]), 0.0, 1.0))
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    memory = None if peak is None else peak / 1e9
    return Fitted(np.stack(renders), config.count, ended - start, rate, memory)


_needed = jax.jit(rasterize.needed_slots, static_argnums=2)
_draw = jax.jit(rasterize.rasterize, static_argnums=2)


def save(folder: Path, renders: np.ndarray, truth: np.ndarray) -> None:
    """Renders beside the truth, a picture a view."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for view, pair in enumerate(zip(renders, truth, strict=True)):
        pixels = (np.concatenate(pair, axis=1) * 255.0 + 0.5).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{view:03d}.png")


def header(first: str, judge: Judge) -> str:
    """The table's first two lines."""
    columns = [first, "fit", "Gaussians", "view-steps", "PSNR", "SSIM", f"LPIPS ({judge.net})"]
    columns += ["seconds", "view-steps/s", "peak GB", "device"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def row(first: str, name: str, steps: int, fitted: Fitted, scores: Scores) -> str:
    """A row of the table; the seconds hold compilation, view-steps/s does not."""
    distance = "-" if scores.lpips is None else f"{scores.lpips:.4f}"
    memory = "-" if fitted.memory is None else f"{fitted.memory:.1f}"
    return (
        f"| {first} | {name} | {fitted.gaussians} | {steps} | {scores.psnr:.2f} | "
        f"{scores.ssim:.4f} | {distance} | {fitted.seconds:.1f} | {fitted.rate:.1f} | {memory} | "
        f"{jax.devices()[0].device_kind} |"
    )


def peers(names: list[str]) -> list[gsplat_peer.Strategy]:
    """Which of gsplat's strategies can be run here; says why if none can."""
    why = gsplat_peer.missing() if names else None
    if why is not None:
        print(f"gsplat is not fitted: {why}")
        return []
    return [name for name in gsplat_peer.STRATEGIES if name in names]
