"""Meshes from V3D's orbit of held-out objects, scored against the true ones.

    python benchmarks/mesh.py objects.pack --objects 20 --size 512 --sheet sheet.png

The pack is a collection that `v3d_jax.data.pack` wrote. Of every object 18 views at elevation 0
with alpha are made into a mesh by `meshing.reconstruct`, from three fields: ours (the signed
distance field), the hull of the masks, and the fused depth of fitted splats; all else is the same.
Prints one table row an object and field, then the means.

- Chamfer: L1, the mean of both directions' mean distances to the nearest point, not squared.
- F: the harmonic mean of the shares of points of either surface that lie nearer to the other.
- IoU of the solids within the outlines of 64 views all around, because few true meshes are closed.
- normals: the mean of both directions' mean |cosine| with the nearest point's normal.
- Chamfer seen: between the true points that the 18 views show, and those nearest to them; `unseen`
  is the share that none shows, which an orbit at one elevation leaves open.
- PSNR, SSIM, LPIPS: 18 unseen views, half way between, at elevations +10 and -10 in turn.

`mesh_scores` defines which points count. Distances are shares of the longest edge of the box around
the true points; nothing is aligned or scaled, since both surfaces lie in the frames' world. The row
`truth` compares two samplings of the true surface: a perfect mesh would score that. Seconds are
those until the simplified surface is there, without colours, and of all stages. They hold
compilation, which is why the first object takes the longest. Bar: from the second object on, ours
has its surface within 15 seconds on one H200 (10.5 were measured, alone on the card).

SV3D (arXiv 2403.12008) reports a Chamfer distance of 0.021 and an IoU of 0.689 for reconstruction
from true renders of 50 Google Scanned Objects. How it scales and aligns meshes, samples points,
sums the directions and tells inside from outside is not known here, its code for that is not
released, and its objects and views are others: the figures lie beside ours, they do not compare.

`--quick` takes tiny grids and few steps, for a CPU with `--objects 1 --size 64`: what it prints
says that the benchmark runs, nothing about quality.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import mesh_fields
import mesh_scores
import numpy as np
import orbit_splats
import splat_fits
import tyro
from PIL import Image

from v3d_jax import errors, meshing, splatting, surfacing
from v3d_jax.data import views
from v3d_jax.mesh import export, operator, rasterize
from v3d_jax.mesh.topology import Triangles
from v3d_jax.ops import camera

Name = Literal["ours", "hull", "splats"]
SIDES = 8  # of the sheet
TILT = 30.0  # degrees up and down from which these look, in turn
TILE = 160  # pixels, at most
SUPERSAMPLE = orbit_splats.SUPERSAMPLE


@dataclass(frozen=True)
class Args:
    """Which objects are made into meshes, and how."""

    pack: tyro.conf.Positional[Path]
    objects: int = 4
    """How many of the held-out ones, evenly spread over the collection."""
    skip: int = 0
    """How many of these to leave out at the start, to go on after a run that was cut off."""
    most: int | None = None
    """How many to take then, to share the objects between processes."""
    size: int = 512
    seed: int = 0
    fields: tuple[Name, ...] = ("ours", "hull", "splats")
    sheet: Path | None = None
    """Picture to write: every object from eight sides, true and as reconstructed."""
    quick: bool = False
    """Tiny grids and few steps."""


@dataclass(frozen=True)
class Effort:
    """Sizes of the stages and of the scoring."""

    mesh: meshing.MeshArgs = field(default_factory=meshing.MeshArgs)
    surface: surfacing.SurfaceArgs = field(default_factory=surfacing.SurfaceArgs)
    splats: splatting.SplatArgs = field(default_factory=splatting.SplatArgs)
    carved: int = 256  # voxels a side of the hull and of the fused depth
    directions: int = 64
    points: int = 200_000
    grid: int = 128  # samples a side, of the IoU


QUICK = Effort(
    mesh=meshing.MeshArgs(faces=2_000, texture_size=128, texture_steps=20, mesh_resolution=64),
    surface=surfacing.SurfaceArgs(surface="preview", surface_steps=100),
    splats=splatting.SplatArgs(fit="mini", gaussians=1_000, fit_steps=60),
    carved=48,
    points=5_000,
    grid=32,
)


class Truth(NamedTuple):
    """An object: what is fitted, and what reconstructions are compared with."""

    name: str
    frames: splatting.Frames
    shell: mesh_scores.Shell
    again: mesh_scores.Shell  # the same surface with other points
    seen: np.ndarray  # which of the points the frames show
    held: np.ndarray  # unseen views on white, [v, h, w, 3]
    sides: np.ndarray


class Row(NamedTuple):
    """A reconstruction's scores."""

    scores: mesh_scores.Scores
    unseen: float
    views: splat_fits.Scores | None
    faces: int
    surface_seconds: float  # until its surface was extracted and simplified
    seconds: float


def joined(*cameras: camera.Camera) -> camera.Camera:
    return camera.Camera(*(jnp.concatenate(parts) for parts in zip(*cameras, strict=True)))


def sides(size: int) -> camera.Camera:
    """Eight cameras around the object, every other one from below."""
    half, step = SIDES // 2, 360.0 / SIDES
    kinds = ((TILT, 0.0), (-TILT, step))
    rings = [
        camera.orbit(half, width=size, height=size, elevation=tilt, start_azimuth=start)
        for tilt, start in kinds
    ]
    order = np.arange(SIDES).reshape(2, half).T.reshape(-1)
    return splat_fits.part(joined(*rings), order)


def truths(args: Args, effort: Effort) -> Iterator[Truth]:
    """The chosen objects, one after the other."""
    items = orbit_splats.chosen(args.pack, args.objects)[args.skip :][: args.most]
    seen, held = (lens(args.size) for lens in (_orbit, orbit_splats.unseen))
    around = mesh_scores.around(effort.directions, args.size)
    lenses = joined(seen, held, sides(args.size), around)
    ends = np.cumsum([len(part.intrinsics) for part in (seen, held, sides(args.size))])
    drawn = orbit_splats.draw(items, lenses, args.size)
    for item, made in zip(items, drawn, strict=True):
        colors, alpha = orbit_splats.pictures(made)
        white = views.on_white(colors[ends[0] : ends[2]], alpha[ends[0] : ends[2]])
        inverse = 1.0 / made.depth  # 0 where there is nothing
        surface = Triangles(item.mesh.vertices, item.mesh.faces)
        depths = mesh_scores.Depths(around, inverse[ends[2] :], SUPERSAMPLE)
        shells = [
            mesh_scores.shell(surface, depths, effort.points, args.seed + i) for i in range(2)
        ]
        shown = mesh_scores.shown(
            mesh_scores.Depths(seen, inverse[: ends[0]], SUPERSAMPLE), *shells[0][:2]
        )
        frames = splatting.Frames(colors[: ends[0]], alpha[: ends[0]], seen)
        count = ends[1] - ends[0]
        yield Truth(item.name, frames, *shells, shown, white[:count], white[count:])


def _orbit(size: int) -> camera.Camera:
    return camera.orbit(width=size, height=size)


def fit_field(name: Name, effort: Effort, seed: int) -> meshing.FitField:
    if name == "ours":
        return meshing.field_of(effort.surface)
    if name == "hull":
        return mesh_fields.hull(effort.carved)
    return mesh_fields.fused(effort.splats, effort.carved, seed)


def drawn(
    painted: export.Painted, directions: int, size: int
) -> tuple[mesh_scores.Depths, np.ndarray]:
    """What is seen of a reconstruction all around, and the unseen views and sides on white."""
    raster = rasterize.RasterConfig(width=size, height=size, supersample=SUPERSAMPLE)
    around = mesh_scores.around(directions, size)
    shown = joined(orbit_splats.unseen(size), sides(size))
    count = len(shown.intrinsics)
    sight = operator.look(painted.triangles, painted.atlas, joined(shown, around), raster)
    depths = mesh_scores.Depths(around, sight.inverse_depth[count:], SUPERSAMPLE)
    sight = sight._replace(face=sight.face[:count], inverse_depth=sight.inverse_depth[:count])
    side = None if painted.atlas is None else round(len(painted.colors) ** 0.5)
    matrix, sizes = operator.build(sight, shown, raster, side)
    # Vertices are padded, texels are not.
    more = ((0, sizes.values - len(painted.colors)), (0, 0))
    values = jnp.asarray(np.pad(painted.colors, more), jnp.float32) / 255.0
    made = [
        np.asarray(_apply(jax.tree.map(lambda leaf, view=view: leaf[view], matrix), values))
        for view in range(count)
    ]
    return depths, np.clip(np.stack(made), 0.0, 1.0)


_apply = jax.jit(operator.apply)


def reconstructed(
    name: Name, truth: Truth, args: Args, effort: Effort, judge: splat_fits.Judge
) -> tuple[Row, np.ndarray]:
    """The scores of one field's mesh, and the mesh from eight sides."""
    begun, spent = time.perf_counter(), {}
    fit = fit_field(name, effort, args.seed)
    result = meshing.reconstruct(effort.mesh, truth.frames, fit, args.seed, spent)
    seconds = time.perf_counter() - begun
    painted = result.painted
    depths, renders = drawn(painted, effort.directions, args.size)
    made = mesh_scores.shell(painted.triangles, depths, effort.points, args.seed)
    scores = mesh_scores.compare(truth.shell, made, truth.seen, effort.grid)
    count = len(truth.held)
    seen = judge.scores(renders[:count], truth.held)
    faces, surfaced = len(painted.triangles.faces), spent["field"] + spent["extract"]
    unseen = float(1.0 - truth.seen.mean())
    return Row(scores, unseen, seen, faces, surfaced, seconds), renders[count:]


def header(judge: splat_fits.Judge) -> str:
    """The table's first two lines."""
    marks = [f"F@{threshold}" for threshold in mesh_scores.THRESHOLDS]
    columns = ["object", "field", "Chamfer", *marks, "IoU", "normals", "Chamfer seen", "unseen"]
    columns += ["PSNR", "SSIM", f"LPIPS ({judge.net})", "faces", "surface s", "all s", "device"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def line(first: str, name: str, row: Row) -> str:
    """A row of the table."""
    scores, seen = row.scores, row.views
    cells = [first, name, f"{scores.chamfer:.4f}", *(f"{mark:.3f}" for mark in scores.f_scores)]
    cells += [f"{scores.iou:.3f}", f"{scores.normals:.3f}", f"{scores.chamfer_seen:.4f}"]
    cells += [f"{100.0 * row.unseen:.1f} %"]
    if seen is None:
        cells += ["-"] * 6
    else:
        distance = "-" if seen.lpips is None else f"{seen.lpips:.4f}"
        cells += [f"{seen.psnr:.2f}", f"{seen.ssim:.4f}", distance]
        cells += [str(row.faces), f"{row.surface_seconds:.1f}", f"{row.seconds:.1f}"]
    return f"| {' | '.join([*cells, jax.devices()[0].device_kind])} |"


def mean(rows: list[Row]) -> Row:
    """Means over objects."""
    # None, for what is not there, is a leaf as well: all rows lack the same.
    return jax.tree.map(
        lambda *found: None if found[0] is None else type(found[0])(np.nanmean(found)),
        *rows,
        is_leaf=lambda leaf: leaf is None,
    )


def tiles(pictures: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] side by side, made small."""
    side = min(TILE, pictures.shape[1])
    made = [Image.fromarray((picture * 255.0 + 0.5).astype(np.uint8)) for picture in pictures]
    return np.concatenate([np.asarray(one.resize((side, side))) for one in made], axis=1)


def main(args: Args) -> None:
    effort, judge = QUICK if args.quick else Effort(), splat_fits.Judge()
    meshing.check(effort.mesh)
    print(header(judge))
    found, strips = defaultdict(list), []
    for truth in truths(args, effort):
        short = truth.name.rsplit("/", 1)[-1]
        floor = mesh_scores.compare(truth.shell, truth.again, truth.seen, effort.grid)
        row = Row(floor, float(1.0 - truth.seen.mean()), None, 0, 0.0, 0.0)
        found["truth"].append(row)
        print(line(short, "truth", row), flush=True)
        strips.append(tiles(truth.sides))
        for name in args.fields:
            try:
                row, pictures = reconstructed(name, truth, args, effort, judge)
            except (errors.UserError, ValueError) as error:
                print(f"{short}, {name}: {error}", flush=True)
                strips.append(np.full_like(strips[-1], 255))
                continue
            found[name].append(row)
            print(line(short, name, row), flush=True)
            strips.append(tiles(pictures))
        if args.sheet is not None:
            Image.fromarray(np.concatenate(strips)).save(args.sheet)
    for name, rows in found.items():
        print(line(f"mean of {len(rows)}", name, mean(rows)))


if __name__ == "__main__":
    main(tyro.cli(Args))
