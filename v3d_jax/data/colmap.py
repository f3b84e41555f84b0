"""COLMAP's sparse models: cameras, images and points3D as .bin or .txt (colmap.github.io/format).

The format is read here because pycolmap installs 140 MB for it. Models of any version are read:
rigs and frames (COLMAP 3.12 and later) add nothing to what images hold. Poses are world-to-camera
with OpenCV axes; the world stays COLMAP's, whose up is whatever the first pictures made it.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from v3d_jax.data import distortion, poses
from v3d_jax.errors import UserError

# Models that are read, by id: the name, how many focal lengths, and the numbers of distortion after
# them and the centre. Those of division must be zero.
_MODELS = {
    0: ("SIMPLE_PINHOLE", 1, ()),
    1: ("PINHOLE", 2, ()),
    2: ("SIMPLE_RADIAL", 1, ("k1",)),
    3: ("RADIAL", 1, ("k1", "k2")),
    4: ("OPENCV", 2, ("k1", "k2", "p1", "p2")),
    5: ("OPENCV_FISHEYE", 2, ("k1", "k2", "k3", "k4")),
    6: ("FULL_OPENCV", 2, ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")),
    8: ("SIMPLE_RADIAL_FISHEYE", 1, ("k1",)),
    9: ("RADIAL_FISHEYE", 1, ("k1", "k2")),
    12: ("SIMPLE_DIVISION", 1, ("division",)),
    13: ("DIVISION", 2, ("division",)),
    14: ("SIMPLE_FISHEYE", 1, ()),
    15: ("FISHEYE", 2, ()),
}
_OTHERS = {
    7: "FOV",
    10: "THIN_PRISM_FISHEYE",
    11: "RAD_TAN_THIN_PRISM_FISHEYE",
    16: "EUCM",
    17: "EQUIRECTANGULAR",
}
_BY_NAME = {name: number for number, (name, _, _) in _MODELS.items()}
# Below the folder that is given: COLMAP's own layout, its undistorter's, nerfstudio's.
_PLACES = (".", "sparse/0", "sparse", "0", "colmap/sparse/0")


class Points(NamedTuple):
    """The sparse cloud of a model, in world units."""

    positions: Float[np.ndarray, "p 3"]
    colours: UInt8[np.ndarray, "p 3"]


class _Lens(NamedTuple):
    intrinsics: Float[np.ndarray, "3 3"]
    size: tuple[int, int]
    lens: distortion.Lens | None  # None: a pinhole camera


class _Image(NamedTuple):
    quaternion: tuple[float, ...]  # w x y z, world to camera
    translation: tuple[float, ...]
    camera: int
    name: str


def find(folder: Path) -> Path | None:
    """The folder of a model in `folder` or where programs put it below, if there is one."""
    for place in _PLACES:
        model = folder / place
        if any((model / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return model
    return None


def read(model: Path, *, cloud: bool = True) -> tuple[list[poses.Posed], Points | None]:
    """The views of a model by name, and its points unless that file is missing or empty.

    Without `cloud` the points, most of a model, are left unread.

    Pictures are looked for in images/ of the model's folder and of the three above it, and masks
    in masks/ beside that, as NAME.png. Raises `UserError` for what is missing or damaged, and for
    lenses that are not read.
    """
    # As COLMAP does, .bin goes before .txt.
    suffix = ".bin" if (model / "cameras.bin").is_file() else ".txt"
    lenses = _read(model / f"cameras{suffix}", _cameras_bin, _cameras_txt)
    images = _read(model / f"images{suffix}", _images_bin, _images_txt)
    if not images:
        raise UserError(f"{model / f'images{suffix}'} holds no images: at least two are needed")
    points = None
    if cloud and (model / f"points3D{suffix}").is_file():
        points = _points(_read(model / f"points3D{suffix}", _points_bin, _points_txt))
    views = []
    files = _pictures(model, [image.name for image in images])
    for image, (picture, mask) in sorted(zip(images, files, strict=True), key=lambda p: p[0].name):
        where = f"{model / f'images{suffix}'}: image {image.name}"
        if image.camera not in lenses:
            raise UserError(
                f"{where} is of camera {image.camera}, which cameras{suffix} lacks: export the "
                "whole model again"
            )
        lens = lenses[image.camera]
        pose = _pose(image, where)
        views.append(poses.Posed(image.name, picture, mask, pose, *lens))
    return views, points


def _read(path: Path, binary: Any, text: Any) -> Any:
    try:
        content = path.read_bytes()
        if path.suffix == ".bin":
            return binary(_Bytes(content), path)
        return text(_lines(content.decode("utf-8")), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (struct.error, ValueError, IndexError, OverflowError):
        # Every parser below stops at the first thing that is not as the format says.
        raise UserError(f"{path} is truncated or damaged: export the model again") from None


class _Bytes:
    """Little-endian numbers one after the other; struct.error at the end."""

    def __init__(self, content: bytes):
        self.content = content
        self.place = 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self.content, self.place)
        self.place += struct.calcsize("<" + form)
        return values

    def skip(self, count: int) -> None:
        if self.place + count > len(self.content):
            raise struct.error
        self.place += count

    def name(self) -> str:
        end = self.content.index(b"\0", self.place)
        name = self.content[self.place : end].decode("utf-8")
        self.place = end + 1
        return name


def _lines(text: str) -> list[str]:
    # An image without points has an empty second line, so empty lines stay.
    return [line.strip() for line in text.splitlines() if not line.startswith("#")]


def _cameras_bin(data: _Bytes, path: Path) -> dict[int, _Lens]:
    lenses = {}
    for _ in range(data.take("Q")[0]):
        number, model, width, height = data.take("IiQQ")
        if model < 0:
            raise ValueError
        if model not in _MODELS:
            raise _unsupported(path, number, _OTHERS.get(model, f"model {model}"))
        _, focals, bent = _MODELS[model]
        parameters = data.take(f"{focals + 2 + len(bent)}d")
        lenses[number] = _lens(path, number, model, (width, height), parameters)
    return lenses


def _cameras_txt(lines: list[str], path: Path) -> dict[int, _Lens]:
    lenses = {}
    for line in filter(None, lines):
        number, model, width, height, *parameters = line.split()
        if model not in _BY_NAME:
            raise _unsupported(path, int(number), model)
        size, values = (int(width), int(height)), tuple(map(float, parameters))
        lenses[int(number)] = _lens(path, int(number), _BY_NAME[model], size, values)
    return lenses


def _lens(
    path: Path, number: int, model: int, size: tuple[int, int], parameters: tuple[float, ...]
) -> _Lens:
    name, focals, bent = _MODELS[model]
    if len(parameters) != focals + 2 + len(bent):
        raise ValueError
    numbers = dict(zip(bent, parameters[focals + 2 :], strict=True))
    if numbers.pop("division", 0.0):
        raise _unsupported(path, number, f"{name} with distortion")
    focal, centre = (parameters[0], parameters[focals - 1]), parameters[focals : focals + 2]
    where, fisheye = f"{path}: camera {number}", name.endswith("FISHEYE")
    intrinsics = poses.pinhole(focal, (centre[0], centre[1]), where)
    intrinsics, lens = distortion.pinhole_and_lens(
        intrinsics, numbers, size, where, fisheye=fisheye
    )
    return _Lens(intrinsics, size, lens)


def _unsupported(path: Path, number: int, model: str) -> UserError:
    return UserError(
        f"{path}: camera {number} is {model}, which is not supported: undistort to PINHOLE first "
        "(colmap image_undistorter)"
    )


def _images_bin(data: _Bytes, path: Path) -> list[_Image]:
    images = []
    for _ in range(data.take("Q")[0]):
        _, *pose, camera = data.take("I7dI")
        images.append(_Image(tuple(pose[:4]), tuple(pose[4:]), camera, data.name()))
        data.skip(24 * data.take("Q")[0])  # x, y and the id of the point
    return images


def _images_txt(lines: list[str], path: Path) -> list[_Image]:
    images = []
    remaining = iter(lines)
    for line in remaining:
        if not line:
            continue
        _, *pose, camera, name = line.split(maxsplit=9)
        numbers = tuple(map(float, pose))
        if len(numbers) != 7:
            raise ValueError
        images.append(_Image(numbers[:4], numbers[4:], int(camera), name))
        points = next(remaining, "").split()
        if len(points) % 3:
            raise ValueError
    return images


def _points_bin(data: _Bytes, path: Path) -> list[tuple[float, ...]]:
    points = []
    for _ in range(data.take("Q")[0]):
        _, *point, _, length = data.take("Q3d3BdQ")
        data.skip(8 * length)  # image and index of every observation
        points.append(tuple(map(float, point)))
    return points


def _points_txt(lines: list[str], path: Path) -> list[tuple[float, ...]]:
    points = []
    for line in filter(None, lines):
        _, x, y, z, *colour, _ = line.split()[:8]
        red, green, blue = (float(value) for value in colour)
        points.append((float(x), float(y), float(z), red, green, blue))
    return points


def _points(rows: list[tuple[float, ...]]) -> Points | None:
    table = np.asarray(rows, np.float64).reshape(-1, 6)
    table = table[(np.abs(table) < poses.LARGEST).all(axis=1)]  # drops NaN too
    if not len(table):
        return None
    return Points(table[:, :3].astype(np.float32), table[:, 3:].astype(np.uint8))


def _pose(image: _Image, where: str) -> Float[np.ndarray, "4 4"]:
    w, x, y, z = image.quaternion
    largest = np.abs([*image.quaternion, *image.translation]).max()
    length = float(np.sqrt(w * w + x * x + y * y + z * z)) if largest < poses.LARGEST else 0.0
    if length < 1e-6:
        raise UserError(f"{where} has no pose: its numbers are zero, NaN or infinite")
    w, x, y, z = (value / length for value in (w, x, y, z))
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = image.translation
    return pose


def _pictures(model: Path, names: list[str]) -> list[tuple[Path, Path | None]]:
    """Where the picture and the mask of every image are."""
    model = model.resolve()
    places = [model, *model.parents[:3]]
    rooms = [(place, room) for place in places for room in (place / "images", place)]
    found = next(
        ((place, room) for place, room in rooms if any((room / name).is_file() for name in names)),
        None,
    )
    if found is None:
        raise UserError(
            f"no picture of the COLMAP model in {model} was found: put them into a folder images/ "
            f"there or above, named as in the model ({names[0]})"
        )
    place, room = found
    missing = [name for name in names if not (room / name).is_file()]
    if missing:
        raise UserError(
            f"{room} lacks {len(missing)} of {len(names)} pictures of the COLMAP model, the first "
            f"is {missing[0]}: put them there"
        )
    masks = [place / "masks" / f"{name}.png" for name in names]
    there = [mask.is_file() for mask in masks]
    if any(there) and not all(there):
        raise UserError(
            f"{place / 'masks'} has {sum(there)} masks for {len(names)} pictures, "
            f"{masks[there.index(False)].name} is missing: give all of them or none"
        )
    return [
        (room / name, mask if any(there) else None) for name, mask in zip(names, masks, strict=True)
    ]
