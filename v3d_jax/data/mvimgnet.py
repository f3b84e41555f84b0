"""MVImgNet: videos of objects, walked around by hand, with COLMAP's sparse models.

    ROOT/CATEGORY/OBJECT/images/001.jpg ...
    ROOT/CATEGORY/OBJECT/sparse/0/{cameras,images,points3D}.bin

A category is a number; pictures are numbered as they were taken; one camera is shared by all
pictures of an object. Version 2.0 adds masks/ beside images/. COLMAP failed for some objects, whose
sparse/ is empty, and where it made several models only the first counts. Sources: the READMEs of
GAP-LAB-CUHK-SZ/MVImgNet and luyues/MVImgNet2.0, and the former's issues 15 and 18.

The published cameras are SIMPLE_RADIAL, mostly with distortion: pictures are straightened as they
are read (`data.distortion`). What `colmap image_undistorter` writes, images/ and sparse/, is read
as well.
"""

import dataclasses
from pathlib import Path

import numpy as np

from v3d_jax.data import clips, colmap, poses, views
from v3d_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MVImgNetConfig:
    """How objects become clips.

    Of every picture a square as wide as its shorter side is taken: the middle, or with
    `random_crop` any, drawn anew for each frame.
    """

    clip: clips.ClipConfig = dataclasses.field(default_factory=clips.ClipConfig)
    random_crop: bool = False


def folders(root: Path) -> list[Path]:
    """The objects' folders below `root`, sorted, unread; raises `UserError` if there are none."""
    found = sorted(path for path in root.glob("*/*") if path.is_dir())
    if not found:
        raise UserError(f"{root} holds no objects: give the folder of CATEGORY/OBJECT/images")
    return found


def name(folder: Path) -> str:
    """CATEGORY/OBJECT."""
    return f"{folder.parent.name}/{folder.name}"


def refusal(folder: Path, config: MVImgNetConfig) -> str | None:
    """Why an object makes no clip, if it does not, as far as its model tells."""
    try:
        return clips.refusal(_views(folder), config.clip)
    except UserError as error:
        return str(error)


def objects(root: Path, config: MVImgNetConfig, skip: clips.Skip) -> list[Path]:
    """The folders below `root` that make clips, sorted; `skip` is told of every other and why.

    All models are read for it, no pictures. What is left out: objects without a model or with a
    damaged one, with too few frames, or with pictures missing. Raises `UserError` if
    nothing is left.
    """
    everything = folders(root)
    found, first = [], ""
    for folder in everything:
        reason = refusal(folder, config)
        if reason is None:
            found.append(folder)
            continue
        first = first or f"{name(folder)}: {reason}"
        skip(name(folder), reason)
    if not found:
        raise UserError(f"none of {len(everything)} objects in {root} can be used ({first})")
    return found


def read(folder: Path, config: MVImgNetConfig, rng: np.random.Generator) -> clips.Clip:
    """The clip of one object: frames in the order of their names, the first is the reference.

    Cameras and scale are as `clips.Clip` says. Raises `UserError` for what `objects` leaves out,
    and for a picture that is damaged or of another size than its camera.
    """

    def cutter(view: poses.Posed) -> clips.Cut:
        rgb, mask, _ = views.pixels(view)
        box = _square(view.size, rng if config.random_crop else None)
        return clips.cut(rgb, mask, view.intrinsics, box, config.clip.size)

    return clips.read(name(folder), _views(folder), cutter, config.clip, rng)


def _views(folder: Path) -> list[poses.Posed]:
    model = colmap.find(folder)
    if model is None:
        raise UserError(f"{folder / 'sparse' / '0'} holds no COLMAP model: leave the object out")
    return colmap.read(model, cloud=False)[0]


def _square(size: tuple[int, int], rng: np.random.Generator | None) -> tuple[int, int, int, int]:
    """The middle square of a picture, or a random one."""
    side = min(size)
    left, top = (
        (length - side) // 2 if rng is None else int(rng.integers(length - side + 1))
        for length in size
    )
    return left, top, left + side, top + side
