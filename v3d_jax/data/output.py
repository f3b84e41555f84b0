"""The files of a result: docs/method.md lists them; other programs may rely on them.

A folder is written aside and renamed, so nothing half-written ever has a final name.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from v3d_jax.data import preprocess
from v3d_jax.errors import UserError
from v3d_jax.mesh import export
from v3d_jax.ops import camera
from v3d_jax.splat import gaussians as splat_files
from v3d_jax.splat.gaussians import Gaussians

REPORT = "report.json"
PROGRAM = "v3d_jax"  # report.json's "program", by which a folder of ours is known
FPS = 6
TURN_FPS = 30
_CELL = 192  # largest side of a picture in the contact sheet
_SHOWN = 18  # views in it at most


class Splats(NamedTuple):
    """Fitted Gaussians and what they look like on white."""

    gaussians: Gaussians
    renders: UInt8[np.ndarray, "v h w 3"]  # in the frames' places
    turn: UInt8[np.ndarray, "n h w 3"]  # a smooth turn


class Mesh(NamedTuple):
    """A coloured surface and what it looks like on white."""

    painted: export.Painted
    renders: UInt8[np.ndarray, "v h w 3"]  # in places of frames, of all or of some
    formats: tuple[str, ...] = ()  # of files beside mesh.glb: obj, ply


def plan(pictures: Sequence[Path], out: Path) -> list[Path]:
    """The folder of every picture, `out`/<stem>, checked before any work is done.

    Raises `UserError` if two pictures would share one, or a folder cannot be written or replaced.
    """
    taken: dict[str, Path] = {}
    for picture in pictures:
        other = taken.setdefault(picture.stem.casefold(), picture)
        if other is not picture:
            raise UserError(
                f"{other} and {picture} would both be written to {out / picture.stem}: rename one "
                "of them or give them to separate runs"
            )
    folders = [out / picture.stem for picture in pictures]
    check_writable(out, folders)
    return folders


def check_writable(out: Path, folders: Sequence[Path]) -> None:
    """Raises `UserError` if `out` or its `folders` cannot be written or replaced."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"cannot write to {out}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {out}: permission denied in {there}")
    try:
        for folder in folders:
            _check_replaceable(folder)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None


def write(
    folder: Path,
    rgba: UInt8[np.ndarray, "s s 4"],
    frames: UInt8[np.ndarray, "t h w 3"],
    cameras: camera.Camera,
    report: dict[str, Any],
    splats: Splats | None = None,
    mesh: Mesh | None = None,
    video: str = "orbit.mp4",
) -> None:
    """Writes every file of one picture, replacing what an earlier run left in `folder`.

    `rgba` is the prepared input; `cameras` hold one camera a frame, with equal intrinsics. Raises
    `UserError` if the disk is full or `folder` holds something else.
    """
    with _aside(folder) as aside:
        (aside / "frames").mkdir()
        Image.fromarray(rgba).save(aside / "input.png")
        names = [f"frames/{index:03d}.png" for index in range(len(frames))]
        for name, frame in zip(names, frames, strict=True):
            Image.fromarray(frame).save(aside / name)
        write_mp4(aside / video, frames)
        _write_json(aside / "transforms.json", transforms(cameras, names))
        _write_made(aside, preprocess.on_white(rgba), frames, report, splats, mesh)


def write_reconstruction(
    folder: Path,
    views: UInt8[np.ndarray, "v h w 3"],
    report: dict[str, Any],
    splats: Splats | None = None,
    mesh: Mesh | None = None,
) -> None:
    """Writes what was made of posed views, replacing what an earlier run left in `folder`.

    `views` are on white. Raises `UserError` as `write` does.
    """
    with _aside(folder) as aside:
        _write_made(aside, views[0], _few(views), report, splats, mesh)


def _write_made(
    aside: Path,
    image: UInt8[np.ndarray, "a b 3"],
    views: UInt8[np.ndarray, "v h w 3"],
    report: dict[str, Any],
    splats: Splats | None,
    mesh: Mesh | None,
) -> None:
    """Splats, mesh, the sheet that shows them under `views`, and the report."""
    rows = [views]
    if splats is not None:
        splat_files.save_ply(aside / "splats.ply", splats.gaussians)
        write_mp4(aside / "splats.mp4", splats.turn, TURN_FPS)
        rows.append(_few(splats.renders))
    if mesh is not None:
        for suffix in ("glb", *mesh.formats):
            export.save(aside / f"mesh.{suffix}", mesh.painted)
        rows.append(_few(mesh.renders))
    Image.fromarray(contact_sheet(image, *rows)).save(aside / "preview.png")
    _write_json(aside / REPORT, {"program": PROGRAM, **report})


def _few(views: UInt8[np.ndarray, "v h w 3"]) -> UInt8[np.ndarray, "s h w 3"]:
    """At most as many as a sheet shows, evenly spaced."""
    return views[np.unique(np.linspace(0, len(views) - 1, min(len(views), _SHOWN)).astype(int))]


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends without an error."""
    target = folder.resolve()
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        _check_replaceable(target)
        aside.mkdir(parents=True)
        yield aside
        _rename_into_place(aside, target)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def transforms(cameras: camera.Camera, names: Sequence[str]) -> dict[str, Any]:
    """Cameras as instant-ngp and nerfstudio read them: pixels, and OpenGL camera-to-world."""
    poses = np.asarray(camera.to_opengl(cameras), np.float64) + 0.0  # no minus zeros
    intrinsics = np.asarray(cameras.intrinsics, np.float64)
    if not (intrinsics == intrinsics[0]).all():
        raise ValueError("transforms.json holds one set of intrinsics for all frames")
    width, height = int(cameras.width[0]), int(cameras.height[0])
    focal_x, focal_y = intrinsics[0, 0, 0], intrinsics[0, 1, 1]
    return {
        "camera_model": "OPENCV",
        "camera_angle_x": 2.0 * float(np.arctan(0.5 * width / focal_x)),
        "camera_angle_y": 2.0 * float(np.arctan(0.5 * height / focal_y)),
        "fl_x": float(focal_x),
        "fl_y": float(focal_y),
        "cx": float(intrinsics[0, 0, 2]),
        "cy": float(intrinsics[0, 1, 2]),
        "w": width,
        "h": height,
        "frames": [
            {"file_path": name, "transform_matrix": pose.tolist()}
            for name, pose in zip(names, poses, strict=True)
        ],
    }


def write_mp4(path: Path, frames: UInt8[np.ndarray, "t h w 3"], fps: int = FPS) -> None:
    """H.264 in yuv420p with its index in front, which browsers play; odd sizes gain a pixel.

    Uses the ffmpeg that imageio-ffmpeg brings. Raises `UserError` if it is missing or fails.
    """
    import imageio_ffmpeg

    frames = np.pad(
        frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge"
    )
    height, width = frames.shape[1:3]
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -"
    colours = "-colorspace bt709 -color_primaries bt709 -color_trc iec61966-2-1"
    filters = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
    codec = f"-c:v libx264 -crf 16 -preset medium -vf {filters} {colours}"
    container = "-movflags +faststart -map_metadata -1 -f mp4 -y"
    options = f"-loglevel error {source} {codec} {container}".split()
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *options, str(path)]
        subprocess.run(command, input=frames.tobytes(), capture_output=True, check=True)
    except (RuntimeError, FileNotFoundError):
        raise UserError("no ffmpeg found: pip install --force-reinstall imageio-ffmpeg") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["no reason"])[-1]
        raise UserError(f"ffmpeg cannot write {path.name}: {reason}") from None


def contact_sheet(
    image: UInt8[np.ndarray, "a b 3"], *videos: UInt8[np.ndarray, "t h w 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The input at the left, then the frames of each video row by row, on white."""
    frames = videos[0]
    rows = min(3, max(1, len(frames) // 4))
    columns = -(-len(frames) // rows)
    height, width = frames.shape[1:3]
    factor = min(1.0, _CELL / max(height, width))
    height, width = max(1, round(height * factor)), max(1, round(width * factor))
    gap = max(2, width // 24)
    # A double gap sets the input apart from the frames, and videos from each other.
    block = rows * (height + gap) + gap
    size = ((columns + 1) * (width + gap) + 2 * gap, len(videos) * block)
    sheet = Image.new("RGB", size, "white")
    _paste(sheet, image, (gap, gap), (width, height))
    for order, video in enumerate(videos):
        for index, frame in enumerate(video):
            row, column = divmod(index, columns)
            place = (
                2 * gap + (column + 1) * (width + gap),
                order * block + gap + row * (height + gap),
            )
            _paste(sheet, frame, place, (width, height))
    return np.asarray(sheet)


def _paste(
    sheet: Image.Image,
    pixels: UInt8[np.ndarray, "h w 3"],
    place: tuple[int, int],
    size: tuple[int, int],
) -> None:
    sheet.paste(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS), place)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _check_replaceable(folder: Path) -> None:
    """An absent or empty folder, or one that this program wrote, may be replaced."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and (not any(folder.iterdir()) or _is_ours(folder)):
        return
    raise UserError(f"{folder} exists and is not an earlier result: move it or change --out")


def _is_ours(folder: Path) -> bool:
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("program") == PROGRAM


def _rename_into_place(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    old = aside.with_name(aside.name + ".old")
    target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
