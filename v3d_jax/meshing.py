"""Posed frames to a textured mesh from the host: field, surface, colours, with progress shown.

Axes: v view, h w image.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8

from v3d_jax import console, errors, pipeline, splatting, surfacing
from v3d_jax.data import views
from v3d_jax.mesh import bake, export, extract, simplify, texture, topology, unwrap
from v3d_jax.mesh.topology import Triangles
from v3d_jax.ops import camera

STAGES = ("field", "extract", "unwrap", "texture")  # names of the times spent
# Pixels of all frames together from which on some are left out when colours are fitted: those that
# see the mesh, about a third, take 192 bytes each.
_MOST_PIXELS = 1 << 26
_CHUNKS = 10  # of a fit: how often progress is told
_OPAQUE = 250  # alpha from which on a pixel is all object
_SIDES = (256, 2048)  # of a texture whose size is not given


class Field(NamedTuple):
    """A fitted surface: where `sdf` is zero within `box`, negative inside; world units."""

    sdf: extract.Sdf
    box: extract.Box
    report: dict[str, Any]


# Fits a field to frames; adds its times to the dictionary. Raises `UserError`.
FitField = Callable[[splatting.Frames, Key[Array, ""], dict[str, float]], Field]


@dataclasses.dataclass(frozen=True)
class MeshArgs:
    """Settings of the mesh that a command line offers."""

    faces: int = simplify.FACES
    """How many faces, about."""
    colours: Literal["auto", "texture", "vertices"] = "auto"
    """A texture (needs xatlas), or one colour a vertex; auto: a texture if xatlas is installed."""
    texture_size: int | None = None
    """Texels a side of the texture; by default about twice the frames' pixels."""
    texture_steps: int | None = None
    """Steps of the fit of colours; by default 500, on a CPU 120."""
    mesh_resolution: int | None = None
    """Samples a side of the grid that the surface is read from; by default 384, on a CPU 192."""
    mesh_formats: str = ""
    """Further files, separated by commas: obj, ply."""


class Result(NamedTuple):
    """A coloured surface, what it looks like on white in the places of frames, and a report."""

    painted: export.Painted
    renders: UInt8[np.ndarray, "i h w 3"]
    shown: Int[np.ndarray, "i"]  # the frames whose places those are; all, unless they are too many
    report: dict[str, Any]


def check(args: MeshArgs) -> None:
    """Raises `UserError` for settings out of range, and for a texture without xatlas."""
    ranges = {
        "faces": (100, 1_000_000),
        "texture_size": (64, 8192),
        "texture_steps": (0, None),
        "mesh_resolution": (32, 1024),
    }
    for name, (low, high) in ranges.items():
        value, flag = getattr(args, name), name.replace("_", "-")
        if value is not None and value < low:
            raise errors.UserError(f"--{flag} {value}: at least {low} is needed")
        if value is not None and high is not None and value > high:
            raise errors.UserError(f"--{flag} {value}: at most {high} is possible")
    for name in ("texture_size", "mesh_resolution"):
        value, flag = getattr(args, name), name.replace("_", "-")
        if value is not None and value % extract.BLOCK:
            raise errors.UserError(f"--{flag} {value}: a multiple of {extract.BLOCK} is needed")
    if args.colours == "texture" and not unwrap.available():
        raise errors.UserError("--colours texture needs xatlas: pip install xatlas")
    for suffix in formats(args):
        if f".{suffix}" not in export.SUFFIXES:
            known = ", ".join(one[1:] for one in export.SUFFIXES)
            raise errors.UserError(
                f"--mesh-formats: {suffix!r} is not available; there is: {known}"
            )


def reconstruct(
    args: MeshArgs,
    frames: splatting.Frames,
    fit_field: FitField,
    seed: int,
    seconds: dict[str, float],
) -> Result:
    """Fits a field and colours its surface; adds the stages' times to `seconds`.

    Raises `UserError` where the frames show nothing or the field has no surface.
    """
    splatting.check_frames(frames)
    if frames.alpha is not None:
        images, alpha = views.opaque(frames.images, frames.alpha)
        frames = frames._replace(images=images, alpha=alpha)
    field_key, color_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
    with console.timed(seconds, "field"):
        field = fit_field(frames, field_key, seconds)
    resolution = args.mesh_resolution or _usual(384, 192)
    with console.progress(seconds, "extract", 2) as bar:
        whole = extract.extract(
            field.sdf, field.box, extract.ExtractConfig(resolution, coarse=_coarse(resolution))
        )
        bar.update()
        surface = simplify.simplify(whole, args.faces)
        bar.update()
    config = texture.TextureConfig(
        side=args.texture_size or _side(frames),
        steps=_usual(500, 120) if args.texture_steps is None else args.texture_steps,
        near=_near(surface, frames),
    )
    atlas = _unwrapped(args, surface, config.side, seconds)
    shown = _shown(frames)
    found = _colored(config, surface, atlas, frames, shown, color_key, seconds)
    truth = views.on_white(frames.images, frames.alpha)[shown]
    report = {
        "field": field.report,
        "extracted_faces": len(whole.faces),
        "faces": len(surface.faces),
        "vertices": len(surface.vertices),
        "watertight": topology.is_watertight(surface),
        "pieces": int(topology.components(surface).max()) + 1,
        "colours": "vertices" if atlas is None else "texture",
        "texture": dataclasses.asdict(config),
        "charts": None if atlas is None else atlas.charts,
        "texture_used": None if atlas is None else unwrap.used(atlas),
        "seen": found.seen,
        "fitted_frames": len(shown),
        **splatting.scores(found.renders, truth),
    }
    painted = export.Painted(surface, atlas, found.values)
    return Result(painted, found.renders, shown, report)


def told(result: Result, seconds: dict[str, float]) -> str:
    """A run's last line on it."""
    spent = sum(seconds.get(stage, 0.0) for stage in STAGES)
    return f"{result.report['faces']} faces in {spent:.1f} s ({result.report['psnr']:.2f} dB)"


def field_of(args: surfacing.SurfaceArgs) -> FitField:
    """The fit of a signed distance field to frames, by these settings."""

    def fit(frames: splatting.Frames, key: Key[Array, ""], seconds: dict[str, float]) -> Field:
        found = surfacing.reconstruct(args, frames, key, seconds)
        box = extract.Box(np.asarray(found.place.corner), float(found.place.side))
        return Field(found.sdf, box, found.report)

    return fit


def formats(args: MeshArgs) -> tuple[str, ...]:
    """The file formats beside GLB that were asked for."""
    return tuple(one.strip().lower() for one in args.mesh_formats.split(",") if one.strip())


def _usual(accelerator: int, cpu: int) -> int:
    return cpu if jax.default_backend() == "cpu" else accelerator


def _near(surface: Triangles, frames: splatting.Frames) -> float:
    """About a hundredth of the way to the surface, whatever a world's unit is; a power of two."""
    offset = np.asarray(camera.position(frames.cameras)) - surface.vertices.mean(axis=0)
    return float(2.0 ** np.floor(np.log2(1e-2 * np.linalg.norm(offset, axis=1).min())))


def _side(frames: splatting.Frames) -> int:
    """A power of two: more texels than pixels would only hold what the fit makes up."""
    wanted = 2 * max(frames.images.shape[1:3])
    return int(np.clip(1 << (wanted - 1).bit_length(), *_SIDES))


def _coarse(resolution: int) -> int:
    """A third of the samples, in whole blocks."""
    return max(32, resolution // 3 // extract.BLOCK * extract.BLOCK)


def _unwrapped(
    args: MeshArgs, surface: Triangles, side: int, seconds: dict[str, float]
) -> unwrap.Atlas | None:
    if args.colours == "vertices":
        return None
    if not unwrap.available():
        console.note("xatlas is not installed (pip install xatlas): colours are those of vertices")
        return None
    with console.progress(seconds, "unwrap", 1) as bar:
        atlas = unwrap.unwrap(surface, side)
        bar.update()
    return atlas


def _colored(
    config: texture.TextureConfig,
    surface: Triangles,
    atlas: unwrap.Atlas | None,
    frames: splatting.Frames,
    shown: Int[np.ndarray, "i"],
    key: Key[Array, ""],
    seconds: dict[str, float],
) -> bake.Colors:
    network, params, alpha = None, None, frames.alpha
    # On a CPU VGG16 alone would take seconds a step.
    if jax.default_backend() == "cpu":
        config = dataclasses.replace(config, lpips=0.0)
    elif params := splatting.load_lpips("vgg", "colours are fitted by squared differences alone"):
        # In bfloat16 its gradient is mostly rounding so near the frames (docs/method.md).
        network = pipeline.perceptual(jnp.dtype(jnp.float32))
    pictures = views.on_white(frames.images[shown], None if alpha is None else alpha[shown])
    targets = bake.Targets(
        jnp.asarray((pictures * 255.0 + 0.5).astype(np.uint8)),
        jnp.asarray(_inside(frames)[shown]),
        jax.tree.map(lambda leaf: leaf[shown], frames.cameras),
    )
    with console.progress(seconds, "texture", config.steps) as bar:

        def told(done: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.5f}", refresh=False)
            bar.update(done - bar.n)

        return bake.bake(
            surface,
            atlas,
            targets,
            config,
            key,
            perceptual=network,
            params=params,
            chunk=max(1, config.steps // _CHUNKS),
            progress=told,
        )


def _shown(frames: splatting.Frames) -> Int[np.ndarray, "i"]:
    """The frames that colours are fitted to, evenly spaced."""
    count, height, width = frames.images.shape[:3]
    room = max(2, min(count, _MOST_PIXELS // (height * width)))
    if room < count:
        console.note(f"colours are fitted to {room} of {count} frames, which fill the memory")
    return np.unique(np.linspace(0, count - 1, room).round().astype(int))


def _inside(frames: splatting.Frames) -> np.ndarray:
    """Where a frame shows nothing but the object; bool.

    At its outline a frame without alpha has mixed in its background: a pixel goes all around.
    """
    found = splatting.masks(frames)
    if frames.alpha is not None:
        return found >= _OPAQUE
    padded = np.pad(found, ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = found.shape[1:]
    shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.logical_and.reduce(shifted)
