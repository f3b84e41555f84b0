"""CO3D's annotations by PyTorch3D's definition of cameras, and small sequences of noise."""

import gzip
import json
import zlib

import numpy as np
from PIL import Image

from v3d_jax.data import co3d, paths


def units(kind, size):
    """Pixels of one unit of NDC along x and y."""
    width, height = size
    return (
        np.full(2, min(size) / 2.0) if kind == "ndc_isotropic" else np.asarray([width, height]) / 2
    )


def viewpoint(pose, intrinsics, kind, size):
    """PyTorch3D's camera: the columns of R are its axes in the world, left, up and forward."""
    right, down, forward = pose[:3, :3]
    rotation = np.stack([-right, -down, forward], axis=1)
    centre = -pose[:3, :3].T @ pose[:3, 3]
    (fx, _, cx), (_, fy, cy), _ = intrinsics
    middle, unit = np.asarray(size) / 2.0, units(kind, size)
    return {
        "R": rotation.tolist(),
        "T": (-centre @ rotation).tolist(),
        "focal_length": ([fx, fy] / unit).tolist(),
        "principal_point": ((middle - [cx, cy]) / unit).tolist(),
        "intrinsics_format": kind,
    }


def write_annotations(root, category, rows, qualities):
    folder = root / category
    with gzip.open(folder / co3d.FRAMES, "wt") as file:
        # Frames of a sequence need not be in order.
        json.dump(rows[::-1], file)
    listed = [
        {"sequence_name": name, "category": category, "video": None, "point_cloud": None,
         "viewpoint_quality_score": score}
        for name, score in qualities.items()
    ]  # fmt: skip
    with gzip.open(folder / co3d.SEQUENCES, "wt") as file:
        json.dump(listed, file)


def write_walk(root, category, name, frames, size=(20, 16)):
    """A sequence of so many small pictures of noise around an object; its annotations."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    intrinsics = np.asarray([[18.0, 0.0, 10.0], [0.0, 18.0, 8.0], [0.0, 0.0, 1.0]])
    first = paths.look_at(np.asarray([2.0, 0.0, 0.5]), np.zeros(3))
    path = paths.orbit(first, np.zeros(3), np.asarray([0.0, 0.0, 1.0]), 300.0, frames)
    rows = []
    for number, pose in enumerate(path):
        image = f"{category}/{name}/images/frame{number:06d}.png"
        mask = image.replace("images", "masks")
        alpha = np.zeros(size[::-1], np.uint8)
        alpha[4:12, 6:16] = 255
        rgb = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
        for file, pixels in ((image, rgb), (mask, alpha)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / file)
        rows.append(
            {
                "sequence_name": name,
                "frame_number": number,
                "frame_timestamp": 0.1 * number,
                "image": {"path": image, "size": list(size[::-1])},
                "mask": {"path": mask, "mass": 80.0},
                "viewpoint": viewpoint(pose, intrinsics, "ndc_isotropic", size),
            }
        )
    return rows


def write_list(root, category, rows, subset="fewview_dev", split="test"):
    """A set list that has all rows in one split."""
    path = root / category / "set_lists" / f"set_lists_{subset}.json"
    path.parent.mkdir(exist_ok=True)
    entries = [[row["sequence_name"], row["frame_number"], row["image"]["path"]] for row in rows]
    path.write_text(json.dumps({"train": [], "val": [], "test": [], split: entries}))
