"""MVImgNet's folders of the balls, written here."""

import ball_scene
import colmap_files
from PIL import Image

WORLD = ball_scene.moved_world()


def write_object(folder, size=ball_scene.LANDSCAPE, *, masks=False, distortion=None, count=None):
    """An object whose world has another up and scale; the positions of its balls there."""
    shot = ball_scene.shots(size)
    poses, points = ball_scene.in_world(shot, WORLD)
    (folder / "images").mkdir(parents=True)
    (folder / "sparse" / "0").mkdir(parents=True)
    rows = []
    for index, (rgb, alpha, pose) in enumerate(zip(shot.rgb, shot.alpha, poses, strict=True)):
        name = f"{index + 1:03d}.jpg"
        Image.fromarray(rgb).save(folder / "images" / name, quality=95, subsampling=0)
        if masks:
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(alpha).save(folder / "masks" / f"{name}.png")
        pose = (*colmap_files.quaternion(pose[:3, :3]), *pose[:3, 3])
        rows.append((index + 1, pose, 1, name, [(1.5, 2.5, 7)]))
    (fx, _, cx), (_, fy, cy), _ = shot.intrinsics
    lens = ("PINHOLE", *size, (fx, fy, cx, cy))
    if distortion is not None:
        lens = ("SIMPLE_RADIAL", *size, (fx, cx, cy, distortion))
    cloud = [(7, point, (1, 2, 3), 0.5, [(1, 0)]) for point in points]
    # COLMAP stores images in the order of registration.
    colmap_files.write_binary(folder / "sparse" / "0", {1: lens}, rows[::-1][:count], cloud)
    return points
