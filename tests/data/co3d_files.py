"""Sequences of the balls as CO3D's folders, written here."""

import ball_scene
from co3d_walks import viewpoint
from PIL import Image

WORLD = ball_scene.moved_world(1)


def write_sequence(root, category, name, *, kind="ndc_isotropic", size=ball_scene.LANDSCAPE):
    """Pictures and masks of a sequence; its frames' annotations and its balls' positions."""
    shot = ball_scene.shots(size)
    poses, points = ball_scene.in_world(shot, WORLD)
    rows = []
    for number, (rgb, alpha, pose) in enumerate(zip(shot.rgb, shot.alpha, poses, strict=True)):
        # A file's number is not its frame's.
        image = f"{category}/{name}/images/frame{number + 11:06d}.jpg"
        mask = f"{category}/{name}/masks/frame{number + 11:06d}.png"
        for path, pixels, options in (
            (image, rgb, {"quality": 95, "subsampling": 0}),
            (mask, alpha, {}),
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / path, **options)
        rows.append(
            {
                "sequence_name": name,
                "frame_number": number,
                "frame_timestamp": 0.2 * number,
                "image": {"path": image, "size": [size[1], size[0]]},
                "depth": {"path": "x.png", "scale_adjustment": 1.0, "mask_path": None},
                "mask": {"path": mask, "mass": float(alpha.sum() / 255)},
                "viewpoint": viewpoint(pose, shot.intrinsics, kind, size),
                "meta": {"frame_type": "train_known"},
            }
        )
    return rows, points
