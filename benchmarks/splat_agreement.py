"""How far images and gradients of the rasterizer are from gsplat's CUDA op, on one NVIDIA GPU.

Scenes are those of `splat_raster.py`; a name is a kind and a number of views. Where alpha is at its
cut of 1/255, a pixel at its stop, or two splats at one depth, rounding decides what is seen. Such
pixels are found by drawing the scene again and again with all numbers of the Gaussians changed by a
few units in the last place, and places by those of their distance from the camera, in which depths
are rounded: those whose colour then moves by more than half of the bound. Beside gsplat the same
holds of alpha's cap, 0.999 in its release 1.5.3 and 0.99 here: pixels that move by so much when
XLA's path is given that cap are none of those that are compared, and counted.

Bars: away from these, images are within 1e-4; gradients, all pixels included, are within 1e-3 of
their norm. Prints one table row a scene, and the same beside XLA's path. Run
`python benchmarks/splat_agreement.py`; without gsplat only the latter comes, on a CPU with
`--splats 2000 --size 128 --scenes fitted-2 --compositing xla`.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import splat_kernels
import splat_raster
from splat_kernels import Subject

from v3d_jax.ops import camera
from v3d_jax.splat import chunk
from v3d_jax.splat import gaussians as splats
from v3d_jax.splat.gaussians import Gaussians

IMAGE, GRADIENT = 1e-4, 1e-3  # bars
GSPLAT_CAP = 0.999  # csrc/RasterizeToPixels3DGSFwd.cu of gsplat 1.5.3
MOVED, DRAWN = 4 * 2.0**-24, 64  # relative; times that a scene is moved


def images_and_slopes(subject: Subject, compositing: str) -> Any:
    """Images, and gradients of their weighted sum, as a function of Gaussians and cameras."""
    config = dataclasses.replace(subject.config, compositing=compositing)
    passes = splat_raster.passes(config)
    return jax.jit(lambda *scene: (passes["forward"](*scene), passes["both"](*scene)))


def moved(gaussians: Gaussians, key: jax.Array, distance: float) -> Gaussians:
    """All numbers changed by some units in the last place, means by those of `distance`."""
    leaves, structure = jax.tree.flatten(gaussians)
    keys = jax.random.split(key, len(leaves) + 1)
    noise = [
        MOVED * jax.random.uniform(k, leaf.shape, minval=-1.0)
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    changed = [leaf * (1 + some) for leaf, some in zip(leaves, noise, strict=True)]
    other: Gaussians = jax.tree.unflatten(structure, changed)
    drift = MOVED * distance * jax.random.uniform(keys[-1], other.means.shape, minval=-1.0)
    return other._replace(means=other.means + drift)


def at_threshold(draw: Any, subject: Subject, image: np.ndarray) -> np.ndarray:
    """Pixels [i, h, w] that rounding decides."""
    found = np.zeros(image.shape[:3], bool)
    lenses = subject.case.camera
    distance = float(np.linalg.norm(camera.position(lenses), axis=-1).max())
    for number in range(DRAWN):
        other = moved(subject.case.gaussians, jax.random.key(number), distance)
        again = np.asarray(draw(other, lenses))
        found |= np.abs(again - image).max(axis=-1) > IMAGE / 2
    return found


@contextlib.contextmanager
def capped(cap: float) -> Iterator[None]:
    """Programs of XLA's path that are traced meanwhile cap alpha there."""
    own, chunk.ALPHA_MAX = chunk.ALPHA_MAX, cap
    jax.clear_caches()
    try:
        yield
    finally:
        chunk.ALPHA_MAX = own
        jax.clear_caches()


def gsplat(subject: Subject) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """gsplat's images and gradients, of what both programs take."""
    import torch
    from gsplat import rasterization

    def put(x: Any) -> Any:
        return torch.tensor(np.asarray(x), device="cuda")

    case, size = subject.case, subject.config.width
    g = case.gaussians
    names = ("means", "rotations", "log_scales", "opacity_logits")
    leaves = {name: put(getattr(g, name)).requires_grad_() for name in names}
    colors = put(0.5 + splats.SH_C0 * np.asarray(g.sh[:, 0])).requires_grad_()
    image, _, _ = rasterization(
        leaves["means"],
        leaves["rotations"],
        torch.exp(leaves["log_scales"]),
        torch.sigmoid(leaves["opacity_logits"]),
        colors,
        put(case.camera.world_to_camera),
        put(case.camera.intrinsics),
        size,
        size,
        packed=False,
        backgrounds=torch.ones(case.views, 3, device="cuda"),
    )
    weights = put(np.random.default_rng(1).normal(size=(size, size, 3)).astype(np.float32))
    (image * weights).sum().backward()
    slopes = {name: leaf.grad.cpu().numpy() for name, leaf in leaves.items()}
    slopes["sh"] = splats.SH_C0 * colors.grad.cpu().numpy()[:, None]
    return image.detach().cpu().numpy(), slopes


def row(
    name: str, peer: str, image: np.ndarray, other: np.ndarray, edge: np.ndarray,
    slopes: dict[str, Any], others: dict[str, Any],
) -> str:  # fmt: skip
    off = np.abs(image - other).max(axis=-1)
    away = np.where(edge, 0.0, off)
    apart = {
        key: np.linalg.norm(slopes[key] - others[key]) / max(np.linalg.norm(others[key]), 1e-30)
        for key in others
    }
    worst = max(apart, key=apart.__getitem__)
    return (
        f"| {name} | {peer} | {off.max():.1e} | {np.mean(off > IMAGE):.1e} | {edge.mean():.1e}"
        f" | {away.max():.1e} | {np.mean(away > IMAGE):.1e} | {apart[worst]:.1e} ({worst}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splats", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=512, help="pixels, width and height")
    names = ["fitted-4", "blob-4", "shell-4"]
    parser.add_argument("--scenes", nargs="+", default=names)
    parser.set_defaults(variants=[])
    parser.add_argument("--compositing", default="triton", help="xla, triton, auto")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}; bars: image {IMAGE}, gradients {GRADIENT}")
    columns = ("scene", "beside", "image off by", "pixels over the bar", "pixels at a threshold")
    columns += ("off elsewhere", "elsewhere over the bar", "gradients off by, at most")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    there = splat_raster.build_gsplat()
    for name, subject in splat_kernels.find_subjects(options, quiet=True).items():
        scene = (subject.case.gaussians, subject.case.camera)
        draw = images_and_slopes(subject, options.compositing)
        image, slopes = jax.tree.map(np.asarray, draw(*scene))
        only = jax.jit(
            splat_raster.passes(
                dataclasses.replace(subject.config, compositing=options.compositing)
            )["forward"]
        )
        edge = at_threshold(only, subject, image)
        tell = functools.partial(row, name, image=image, edge=edge, slopes=slopes._asdict())
        plain, others = jax.tree.map(np.asarray, images_and_slopes(subject, "xla")(*scene))
        others = others._asdict()
        if subject.case.kind != "fitted":
            others.pop("rotations")  # round Gaussians have no gradient of these but rounding
        print(tell("XLA", other=plain, others=others), flush=True)
        with capped(GSPLAT_CAP):
            as_theirs = np.asarray(images_and_slopes(subject, "xla")(*scene)[0])
        by_cap = np.abs(as_theirs - plain).max(axis=-1) > IMAGE / 2
        print(f"{name}: {by_cap.sum()} pixels go by alpha's cap", flush=True)
        if there:
            picture, theirs = gsplat(subject)
            theirs = {key: value for key, value in theirs.items() if key in others}
            print(tell("gsplat", other=picture, others=theirs, edge=edge | by_cap), flush=True)


if __name__ == "__main__":
    main()
