"""Frames of an mp4, decoded by the ffmpeg that imageio-ffmpeg carries."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt8

from v3d_jax.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov")


def frames(path: Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Every frame in display order, one at a time, as 8-bit RGB.

    Raises `UserError` if the file is no mp4, is truncated or damaged, or ffmpeg is missing; damage
    inside shows only once the frames before it are read.
    """
    import imageio_ffmpeg

    _check_boxes(path)
    # Every frame once, whatever its time stamp; an error ends the program instead of being hidden.
    options = "-nostdin -v error -xerror -err_detect explode -i"
    images = "-map 0:v:0 -fps_mode passthrough -f image2pipe -c:v ppm -pix_fmt rgb24 -"
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *options.split(), str(path), *images.split()]
    except RuntimeError:
        raise UserError("no ffmpeg found: pip install --force-reinstall imageio-ffmpeg") from None
    # To a file: a full pipe of messages would stop ffmpeg.
    with tempfile.TemporaryFile() as messages:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process:
            assert process.stdout is not None
            while (frame := _ppm(process.stdout)) is not None:
                yield frame
        if process.returncode:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").strip().splitlines()
            raise _damaged(path, lines[-1] if lines else "no reason given")


def _ppm(stream: IO[bytes]) -> UInt8[np.ndarray, "h w 3"] | None:
    """The next picture of a stream of binary PPM files; None at the end or inside a torn one."""
    magic, size, _ = (stream.readline() for _ in range(3))
    if magic.strip() != b"P6" or len(size.split()) != 2:
        return None
    width, height = (int(number) for number in size.split())
    data = stream.read(3 * width * height)
    if len(data) < 3 * width * height:
        return None
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _check_boxes(path: Path) -> None:
    """Walks the boxes that an mp4 consists of (ISO/IEC 14496-12): they end where the file ends.

    ffmpeg plays a file that is cut off between two frames without a word.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            place, kinds = 0, []
            while place < length:
                file.seek(place)
                header = file.read(16)
                size, kind = int.from_bytes(header[:4]), header[4:8]
                if size == 1:  # a 64-bit size follows
                    size = int.from_bytes(header[8:16])
                kinds.append(kind)
                if kinds[0] != b"ftyp":
                    raise UserError(f"{path} is not an mp4: convert it with ffmpeg first")
                if size == 0:  # the last box, up to the end
                    size = length - place
                if size < 8 or place + size > length:
                    raise _damaged(path, "it is truncated")
                place += size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not length:
        raise UserError(f"{path} is empty (0 bytes): make it again")
    if b"moov" not in kinds:
        raise _damaged(path, "its index is missing")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged and cannot be decoded ({reason}): make it again")
