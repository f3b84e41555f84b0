"""Writes rendered orbits as folders of CO3D, to run its protocol where CO3D is not at hand.

    python -m v3d_jax.render MESHES... --out data/orbits36 --views 36 --size 256
    python benchmarks/rendered_co3d.py data/orbits36 --split heldout --out data/rendered_co3d
    python -m v3d_jax.evaluate --protocol co3d data/rendered_co3d --categories rendered \\
        --model scene_mini

Every object becomes a sequence of the category "rendered" whose frames are all of the split that
the protocol scores. Cameras are written as PyTorch3D's, which `v3d_jax/data/co3d.py` describes.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from v3d_jax.data import co3d, co3d_protocol, orbits, png

CATEGORY = "rendered"
FLIP = np.diag([-1.0, -1.0, 1.0])


def main() -> None:
    """Writes all objects of a split as they are, without their augmented copies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="orbit data set with alpha")
    parser.add_argument("--split", default="heldout")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    records = orbits.source(arguments.data, arguments.split)
    rows: list[dict[str, Any]] = []
    names = []
    for place in range(len(records)):
        record = records[place]
        if record.variant == 0:
            names.append(f"{place:04d}_{record.name.rpartition('/')[2]}")
            rows += sequence(arguments.out, names[-1], record)
    folder = arguments.out / CATEGORY
    with gzip.open(folder / co3d.FRAMES, "wt") as file:
        json.dump(rows, file)
    with gzip.open(folder / co3d.SEQUENCES, "wt") as file:
        json.dump([{"sequence_name": name, "category": CATEGORY} for name in names], file)
    listed = [[row["sequence_name"], row["frame_number"], row["image"]["path"]] for row in rows]
    lists = folder / "set_lists" / f"set_lists_{co3d_protocol.SUBSET}.json"
    lists.parent.mkdir()
    lists.write_text(json.dumps({"train": [], "val": [], co3d_protocol.SPLIT: listed}))
    print(f"{len(names)} sequences, {len(rows)} frames: {arguments.out}")


def sequence(root: Path, name: str, record: orbits.Orbit) -> list[dict[str, Any]]:
    """Writes one object's pictures and masks; its frames' annotations."""
    rows = []
    for number, data in enumerate(record.frames):
        image = f"{CATEGORY}/{name}/images/frame{number:06d}.png"
        mask = image.replace("/images/", "/masks/")
        alpha = png.decode(data)[..., 3]
        for path, pixels in ((image, png.decode_on_white(data)), (mask, alpha)):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / path)
        pose, lens = record.world_to_camera[number], record.intrinsics[number]
        half = 0.5 * alpha.shape[0]  # frames are square
        rows.append(
            {
                "sequence_name": name,
                "frame_number": number,
                "frame_timestamp": float(number),
                "image": {"path": image, "size": list(alpha.shape)},
                "mask": {"path": mask, "mass": float(alpha.sum() / 255.0)},
                "viewpoint": {
                    "R": (FLIP @ pose[:3, :3]).T.tolist(),
                    "T": (FLIP @ pose[:3, 3]).tolist(),
                    "focal_length": [float(lens[0, 0] / half), float(lens[1, 1] / half)],
                    "principal_point": (1.0 - lens[:2, 2] / half).tolist(),
                    "intrinsics_format": "ndc_isotropic",
                },
            }
        )
    return rows


if __name__ == "__main__":
    main()
