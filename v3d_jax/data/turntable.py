"""Meshes to orbit records, as a stream: read and augment, render, encode, all at the same time.

Threads read, augment and pad meshes some objects ahead of the renderer and count what the
rasterizer will need; the renderer's programs run one behind the other; threads fetch finished
pictures and encode them. Records come out in the order of the objects, and each is a pure function
of (object, variant, settings), whatever else is rendered and by how many threads; an augmented
copy depends on the other training objects as well, which lend it textures and company.
"""

import collections
import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt8

from v3d_jax.data import augment, finder, objects, orbits, png, quality
from v3d_jax.mesh import rasterize, shade, surface
from v3d_jax.ops import binning
from v3d_jax.ops import camera as cameras

# Static sizes: few, because each combination that occurs is a program to compile.
FACES = (1 << 13, 1 << 17)
MATERIALS = (512,)
TEXTURES = (8, 64)
# (view, face) pairs of one pass: bounds the renderer's memory, whatever the mesh.
PAIRS_PER_PASS = 1 << 21

_T = TypeVar("_T")


@dataclass(frozen=True)
class TurntableConfig:
    """How objects are seen: V3D's cameras (radius 2, field of view 60 degrees) around each.

    Angles are in degrees. Held-out objects are always rendered plain: as they are, from azimuth 0
    and elevation 0, under the standard lights. Scenes bring their own cameras and count as seen
    from azimuth 0 and elevation 0 throughout.
    """

    views: int = 36
    """Frames of an orbit, equally spaced."""
    size: int = 256
    """Width and height of a frame in pixels."""
    supersample: int = 2
    """Samples a pixel along each axis."""
    elevation_jitter: float = 0.0
    """Largest elevation, up or down; drawn once an orbit."""
    start_azimuth: Literal["random"] | float = "random"
    """Azimuth of the first frame."""
    lights: Literal["random", "plain"] = "random"
    """Lights drawn once an orbit, or the same for all."""
    variants: int = 1
    """Orbits an object: the object as it is, then augmented copies."""
    seed: int = 0
    """Seed of every random choice."""


class _Scene(NamedTuple):
    """What one program renders: a padded mesh, cameras, lights and the static settings."""

    mesh: surface.Mesh
    camera: cameras.Camera
    lights: shade.Lights
    raster: rasterize.RasterConfig
    alpha: bool
    views_per_pass: int
    azimuths: np.ndarray
    elevation: float


class _Job(NamedTuple):
    entry: finder.Entry
    variant: int
    scene: futures.Future  # of a _Scene


def orbits_of(entry: finder.Entry, config: TurntableConfig) -> int:
    """How many orbits `render` makes of an object that can be read."""
    return 1 if entry.split == "heldout" else config.variants


def render(
    entries: Sequence[finder.Entry],
    config: TurntableConfig,
    unreadable: Callable[[finder.Entry, objects.UnreadableMesh], None],
    *,
    accepts: quality.QualityConfig | None = None,
    done: Collection[tuple[str, int]] = (),
    lenders: Sequence[finder.Entry] | None = None,
    workers: int = 0,
) -> Iterator[tuple[str, orbits.Orbit]]:
    """Yields (split, orbit) for every object and variant that is not `done`.

    `unreadable` is called for every object that cannot be read or whose frames, as it is, are not
    what `accepts` wants; it is then left out, copies included. Augmented copies borrow from
    `lenders`, or from `entries`. `workers` threads read and as many encode (0: one a core); a few
    orbits per worker are in memory.
    """
    workers = workers or os.cpu_count() or 1
    readers, encoders = (futures.ThreadPoolExecutor(workers) for _ in range(2))

    def encoding() -> Iterator[tuple[finder.Entry, futures.Future]]:
        lend = finder.lender(entries if lenders is None else lenders)
        for job in _ahead(_jobs(entries, config, readers, lend, done), workers + 2):
            try:
                with _memory(job.entry):
                    scene = job.scene.result()
                    pictures = _pictures(*scene[:6])
            except objects.UnreadableMesh as error:
                yield job.entry, _failed(error)
                continue
            record = encoders.submit(_record, job.entry, job.variant, scene, pictures, accepts)
            yield job.entry, record

    left_out = set()
    try:
        for entry, record in _ahead(encoding(), workers):
            if entry.name in left_out:
                continue
            try:
                orbit = record.result()
            except objects.UnreadableMesh as error:
                left_out.add(entry.name)
                unreadable(entry, error)
                continue
            yield entry.split, orbit
    finally:
        for pool in (readers, encoders):
            pool.shutdown(cancel_futures=True)


def _ahead(items: Iterator[_T], depth: int) -> Iterator[_T]:
    """The same items, each handed on once `depth` more have been taken."""
    taken = collections.deque()
    for item in items:
        taken.append(item)
        if len(taken) > depth:
            yield taken.popleft()
    yield from taken


def _failed(error: Exception) -> futures.Future:
    future = futures.Future()
    future.set_exception(error)
    return future


@contextlib.contextmanager
def _memory(entry: finder.Entry) -> Iterator[None]:
    """Leaves an object out that the device's memory is too small for."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise quality.Refused(entry.name, "the device's memory is too small for it") from error


def _jobs(
    entries: Sequence[finder.Entry],
    config: TurntableConfig,
    pool: futures.Executor,
    lend: finder.Lend,
    done: Collection[tuple[str, int]],
) -> Iterator[_Job]:
    """Starts reading an object, and preparing its variants, when its first one is asked for."""
    for entry in entries:
        variants = [v for v in range(orbits_of(entry, config)) if (entry.name, v) not in done]
        mesh = pool.submit(entry.load) if variants else None
        for variant in variants:
            yield _Job(entry, variant, pool.submit(_scene, mesh, entry, variant, config, lend))


def _scene(
    reading: futures.Future,
    entry: finder.Entry,
    variant: int,
    config: TurntableConfig,
    lend: finder.Lend,
) -> _Scene:
    """Draws an orbit's choices, pads its mesh and counts what the rasterizer needs."""
    mesh = reading.result()
    rng = _generator(entry.name, variant, config.seed)
    elevation, start, lights = 0.0, 0.0, shade.standard_lights()
    if entry.split != "heldout":
        elevation = rng.uniform(-1.0, 1.0) * config.elevation_jitter
        random = rng.uniform(0.0, 360.0)
        start = random if config.start_azimuth == "random" else float(config.start_azimuth)
        key = jax.random.key(int(rng.integers(1 << 31)))
        if config.lights == "random":
            lights = jax.jit(shade.random_lights)(key)
    if variant:
        mesh = augment.augment(mesh, rng, lend)
    azimuths = (start + 360.0 / config.views * np.arange(config.views)).astype(np.float32)
    if entry.cameras is not None:
        camera = entry.cameras(config.views, config.size)
        elevation, azimuths = 0.0, np.zeros(config.views, np.float32)
    else:
        camera = cameras.orbit(
            config.views,
            width=config.size,
            height=config.size,
            elevation=elevation,
            start_azimuth=start,
        )
    alpha, mesh = surface.has_alpha(mesh), jax.device_put(_padded(mesh))
    views_per_pass = _views_per_pass(config.views, mesh.faces.shape[0])
    raster = rasterize.RasterConfig(config.size, config.size, config.supersample)
    return _Scene(
        mesh,
        camera,
        lights,
        _capacities(mesh, camera, raster, views_per_pass),
        alpha,
        views_per_pass,
        azimuths,
        elevation,
    )


def _generator(name: str, variant: int, seed: int) -> np.random.Generator:
    """Random numbers of one orbit: the same whatever else is rendered."""
    digest = hashlib.sha256(f"{seed}\0{variant}\0{name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def _padded(mesh: surface.Mesh) -> surface.Mesh:
    faces = _static(len(mesh.faces), FACES)
    return surface.pad(
        mesh,
        vertices=max(3 * faces, binning.next_size(len(mesh.vertices), steps=1)),
        faces=faces,
        materials=_static(len(mesh.base_color), MATERIALS),
        textures=_static(len(mesh.atlas), TEXTURES),
        size=surface.TEXTURE_SIZES[-1],
    )


def _static(number: int, sizes: Sequence[int]) -> int:
    """The first of `sizes` that is large enough, or a power of two."""
    return next((size for size in sizes if size >= number), binning.next_size(number, steps=1))


def _views_per_pass(views: int, faces: int) -> int:
    """The most views that divide all views and keep within `PAIRS_PER_PASS`; at least one."""
    divisors = [n for n in range(1, views + 1) if views % n == 0]
    return max(n for n in divisors if n == 1 or n * faces <= PAIRS_PER_PASS)


def _capacities(
    mesh: surface.Mesh,
    camera: cameras.Camera,
    raster: rasterize.RasterConfig,
    views_per_pass: int,
) -> rasterize.RasterConfig:
    """One capacity for rows and slots that holds every pass, a power of two."""
    needed = rasterize.fit(mesh, camera, raster, views_per_pass=views_per_pass, steps=1)
    # As many as the picture has blocks, at the least: smaller sizes would only make programs.
    blocks = views_per_pass * (raster.width * raster.supersample // rasterize.BLOCK) ** 2
    most = max(blocks, needed.rows, needed.slots)
    size = binning.next_size(most, steps=1)
    return replace(raster, rows=size, slots=size)


@functools.partial(jax.jit, static_argnames=("raster", "alpha", "views_per_pass"))
def _pictures(
    mesh: surface.Mesh,
    camera: cameras.Camera,
    lights: shade.Lights,
    raster: rasterize.RasterConfig,
    alpha: bool,
    views_per_pass: int,
) -> tuple[UInt8[Array, "v h w 4"], Bool[Array, ""]]:
    """Eight-bit RGBA views, black where nothing is, and whether faces are missing."""
    views = shade.render(mesh, camera, lights, raster, alpha=alpha, views_per_pass=views_per_pass)
    rgba = jnp.round(255.0 * views.rgba).astype(jnp.uint8)
    return jnp.where(rgba[..., 3:] > 0, rgba, 0).astype(jnp.uint8), views.overflow(raster)


def _record(
    entry: finder.Entry,
    variant: int,
    scene: _Scene,
    pictures: tuple[jax.Array, jax.Array],
    accepts: quality.QualityConfig | None,
) -> orbits.Orbit:
    """Fetches an orbit's pictures, looks whether they are good, and encodes them."""
    with _memory(entry):
        rgba, overflow = (np.asarray(x) for x in pictures)
    if overflow:
        raise RuntimeError(f"{entry.name}: the rasterizer's capacities are too small")
    if accepts is not None and variant == 0:
        quality.check_frames(entry.name, rgba, accepts)
    return orbits.Orbit(
        name=entry.name,
        variant=variant,
        frames=[png.encode(frame) for frame in rgba],
        world_to_camera=np.asarray(scene.camera.world_to_camera),
        intrinsics=np.asarray(scene.camera.intrinsics),
        azimuths=scene.azimuths,
        elevation=scene.elevation,
    )
