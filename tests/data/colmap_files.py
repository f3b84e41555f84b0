"""COLMAP's models, written in both encodings as its documentation describes them."""

import struct

import numpy as np

IDS = {
    "SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4,
    "OPENCV_FISHEYE": 5, "FULL_OPENCV": 6, "FOV": 7, "SIMPLE_RADIAL_FISHEYE": 8,
    "RADIAL_FISHEYE": 9, "SIMPLE_DIVISION": 12, "DIVISION": 13, "SIMPLE_FISHEYE": 14,
    "FISHEYE": 15, "EUCM": 16, "NEW": 77,
}  # fmt: skip


def quaternion(rotation):
    """w x y z of a rotation matrix, as the eigenvector of Bar-Itzhack's matrix."""
    m = np.asarray(rotation, np.float64)
    k = np.zeros((4, 4))
    k[1:, 1:] = m + m.T - np.trace(m) * np.eye(3)
    k[0, 0] = np.trace(m)
    k[0, 1:] = k[1:, 0] = [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]]
    return np.linalg.eigh(k)[1][:, -1]


def write_text(model, cameras, images, points=()):
    lines = ["# Camera list with one line of data per camera:"]
    for number, (kind, width, height, parameters) in cameras.items():
        lines.append(" ".join([f"{number} {kind} {width} {height}", *map(repr, parameters)]))
    (model / "cameras.txt").write_text("\n".join(lines) + "\n")
    lines = ["# Image list with two lines of data per image:", "#   POINTS2D[] as (X, Y, ID)"]
    for number, pose, camera, name, seen in images:
        numbers = " ".join(repr(float(value)) for value in pose)
        lines.append(f"{number} {numbers} {camera} {name}")
        lines.append(" ".join(f"{x!r} {y!r} {point}" for x, y, point in seen))
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# 3D point list"]
    for number, place, colour, error, track in points:
        values = [number, *place, *colour, error, *(part for pair in track for part in pair)]
        lines.append(" ".join(map(repr, values)))
    (model / "points3D.txt").write_text("\n".join(lines) + "\n")


def write_binary(model, cameras, images, points=()):
    data = struct.pack("<Q", len(cameras))
    for number, (kind, width, height, parameters) in cameras.items():
        data += struct.pack("<IiQQ", number, IDS[kind], width, height)
        data += struct.pack(f"<{len(parameters)}d", *parameters)
    (model / "cameras.bin").write_bytes(data)
    data = struct.pack("<Q", len(images))
    for number, pose, camera, name, seen in images:
        data += struct.pack("<I7dI", number, *pose, camera) + name.encode() + b"\0"
        data += struct.pack("<Q", len(seen))
        data += b"".join(struct.pack("<ddq", *point) for point in seen)
    (model / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(points))
    for number, place, colour, error, track in points:
        data += struct.pack("<Q3d3Bd", number, *place, *colour, error)
        data += struct.pack("<Q", len(track)) + b"".join(
            struct.pack("<II", *pair) for pair in track
        )
    (model / "points3D.bin").write_bytes(data)


WRITERS = {"bin": write_binary, "txt": write_text}
