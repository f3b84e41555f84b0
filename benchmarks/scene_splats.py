"""Quality and time of fits to unbounded scenes, every 8th view held out.

    python benchmarks/scene_splats.py --lego FOLDER --pack objects.pack
    python benchmarks/scene_splats.py --quick

Scenes: NeRF-synthetic lego in a patterned room instead of on nothing (FOLDER holds
transforms_train.json and its pictures with alpha), and rooms with three objects each, held-out ones
of a collection that `v3d_jax.data.pack` wrote, or procedural solids without one. Cameras in these
stand in one half of a room and look at the other. Prints one table row a scene and program: ours,
and gsplat's strategies where torch finds a GPU (`gsplat_peer`), from the same points, in the same
frame (`splat.scene`), with the same losses, budget and number of view-steps; then the means.
Bar: our PSNR is at least that of gsplat's better strategy less 0.2 dB. `--quick` is for a look at a
CPU: one small room of solids, minutes; its figures mean little. JAX takes most of a GPU's memory
for itself: XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 leaves some to torch.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gsplat_peer
import jax
import jax.numpy as jnp
import numpy as np
import orbit_splats
import splat_fits
import tyro

from v3d_jax import unbounded
from v3d_jax.data import solids, views, walls
from v3d_jax.ops import camera
from v3d_jax.splat import fit, recipe

HELD_OUT = 8
OBJECTS = 3  # in a room
HALF = (3.0, 2.5, 1.6)  # sides of a room of objects
MARGIN = 1.5  # of lego's room, around its cameras
FOV = 60.0


@dataclass(frozen=True)
class SceneArgs:
    """What is fitted, and how long."""

    lego: Path | None = None
    """Folder of NeRF-synthetic lego."""
    pack: Path | None = None
    """Collection of objects for the rooms; None: procedural solids."""
    rooms: int = 3
    """How many rooms."""
    first: int = 0
    """The first room's number: with it a run that was cut off goes on."""
    views: int = 80
    """Of a room, those held out included."""
    size: int = 512
    gaussians: int = recipe.SCENE.count
    steps: int = recipe.SCENE.steps
    degree: int = recipe.SCENE.degree
    seed: int = 0
    quick: bool = False
    """One room of 24 views of 64 pixels, 2,000 Gaussians, 300 steps."""
    peers: tuple[gsplat_peer.Strategy, ...] = gsplat_peer.STRATEGIES
    """gsplat's strategies to fit besides."""
    save: Path | None = None
    """Folder for held-out renders beside the truth."""


class Shots(NamedTuple):
    """Pictures of a scene and their cameras."""

    name: str
    images: np.ndarray  # uint8 [v, h, w, 3]
    cameras: camera.Camera


class Placed(NamedTuple):
    """An object where it stands in a room; `orbit_splats.draw` takes it for a pack's item."""

    name: str
    mesh: object
    centre: np.ndarray


def lego(folder: Path, size: int) -> Shots:
    """Lego's views with the walls of a room around its cameras."""
    given = views.read(folder, max_side=size)
    assert given.alpha is not None
    reach = float(jnp.abs(camera.position(given.cameras)).max())
    around = walls.room(0, (MARGIN * reach,) * 3)
    behind = walls.draw(around, given.cameras, given.images.shape[1:3])
    return Shots("lego", _over(given.images, given.alpha, behind), given.cameras)


def room(number: int, items: list[Placed], count: int, size: int) -> Shots:
    """A room with objects, from places in its rear half."""
    lenses = walk(number, count, size)
    behind = walls.draw(walls.room(number, HALF), lenses, (size, size))
    pictures = (behind * 255.0 + 0.5).astype(np.uint8)
    drawn = [orbit_splats.pictures(made) for made in orbit_splats.draw(items, lenses, size)]
    places = np.asarray(camera.position(lenses))
    gap = np.stack([np.linalg.norm(places - item.centre, axis=1) for item in items])
    # Objects stand apart: the farther is wholly behind the nearer.
    for view, order in enumerate(np.argsort(-gap, axis=0).T):
        for item in order:
            colors, alpha = (layer[view : view + 1] for layer in drawn[item])
            pictures[view] = _over(colors, alpha, pictures[view : view + 1] / 255.0)[0]
    return Shots(f"room {number}", pictures, lenses)


def walk(number: int, count: int, size: int) -> camera.Camera:
    """Cameras as a hand would hold them, to and fro in a room's rear half."""
    rng = np.random.default_rng(number)
    time = np.linspace(0.0, 2.0 * np.pi, count)
    place = np.stack(
        [-1.6 + 0.6 * np.sin(2.0 * time), 1.4 * np.cos(time), 0.4 * np.sin(3.0 * time)]
    )
    place = place.T + rng.normal(scale=0.05, size=(count, 3))
    target = np.asarray([1.5, 0.0, -0.3]) + rng.normal(scale=0.35, size=(count, 3))
    up = jnp.asarray([0.0, 0.0, 1.0])
    poses = [
        camera.look_at(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), up)
        for a, b in zip(place, target, strict=True)
    ]
    intrinsics = jnp.broadcast_to(camera.pinhole(FOV, size, size), (count, 3, 3))
    sides = jnp.full(count, size, jnp.int32)
    return camera.Camera(jnp.stack(poses), intrinsics, sides, sides)


def furnished(path: Path | None, number: int) -> list[Placed]:
    """The objects of a room, on its floor in its far half."""
    rng = np.random.default_rng(number)
    if path is None:
        names = [f"solid {OBJECTS * number + place}" for place in range(OBJECTS)]
        found = [(name, solids.solid(name, rng)) for name in names]
    else:
        items = orbit_splats.chosen(path, OBJECTS * (number + 1))[-OBJECTS:]
        found = [(item.name, item.mesh) for item in items]
    placed = []
    for place, (name, mesh) in enumerate(found):
        scale = 0.55 / np.abs(mesh.vertices).max()
        floor = -HALF[2] - scale * mesh.vertices[:, 2].min()
        spot = (rng.uniform(0.6, 1.8), 1.5 * (place - 1) + rng.uniform(-0.1, 0.1), floor)
        centre = np.asarray(spot, np.float32)
        vertices = np.float32(scale * mesh.vertices + centre)
        placed.append(Placed(name, mesh._replace(vertices=vertices), centre))
    return placed


def given(args: SceneArgs) -> Iterator[Shots]:
    if args.lego is not None:
        yield lego(args.lego, args.size)
    for number in range(args.first, args.first + args.rooms):
        yield room(number, furnished(args.pack, number), args.views, args.size)


def main(args: SceneArgs) -> None:
    if args.quick:
        small = {"rooms": 1, "views": 24, "size": 64, "gaussians": 2_000, "steps": 300}
        args = dataclasses.replace(args, degree=0, **small)
    config = dataclasses.replace(
        recipe.SCENE,
        count=args.gaussians,
        steps=args.steps,
        degree=args.degree,
        densify=dataclasses.replace(
            recipe.SCENE.densify,
            start=min(500, args.steps // 8),
            stop=round(0.6 * args.steps),
        ),
    )
    judge, strategies = splat_fits.Judge(), splat_fits.peers(list(args.peers))
    print(splat_fits.header("scene", judge))
    found = defaultdict(list)
    for shots in given(args):
        held = np.arange(len(shots.images)) % HELD_OUT == 0
        truth = shots.images[held].astype(np.float32) / np.float32(255.0)
        start_key, key = jax.random.split(jax.random.key(args.seed))
        fitted_lenses = splat_fits.part(shots.cameras, ~held)
        begun = unbounded.begin(config, shots.images[~held], fitted_lenses, None, start_key)
        targets = fit.Targets(jnp.asarray(shots.images[~held]), None, begun.cameras)
        unseen = begun.inside(splat_fits.part(shots.cameras, held))
        scene = (targets, begun.gaussians, unseen)
        raster = splat_fits.capacity(config, [scene[:2]], None)
        fits = [("ours", splat_fits.ours(config, *scene, key, raster=raster))]
        fits += [
            (f"gsplat {strategy}", gsplat_peer.run(strategy, config, *scene, seed=args.seed))
            for strategy in strategies
        ]
        for name, fitted in fits:
            scores = judge.scores(fitted.renders, truth)
            found[name].append((fitted, scores))
            print(splat_fits.row(shots.name, name, args.steps, fitted, scores), flush=True)
            if args.save is not None:
                splat_fits.save(args.save / shots.name / name, fitted.renders, truth)
    for name, rows in found.items():
        mean = orbit_splats.mean(rows)
        print(splat_fits.row(f"mean of {len(rows)}", name, args.steps, *mean))


def _over(colors: np.ndarray, alpha: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """Straight colours of 8 bits over pictures in [0, 1], as 8 bits."""
    cover = alpha[..., None].astype(np.float32) / 255.0
    return (colors * cover + 255.0 * behind * (1.0 - cover) + 0.5).astype(np.uint8)


if __name__ == "__main__":
    main(tyro.cli(SceneArgs))
