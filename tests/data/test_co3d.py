"""CO3D's folders, written here: cameras against PyTorch3D's definition, and what is left out."""

import gzip
import json

import ball_scene
import grain
import numpy as np
import pytest
from co3d_files import write_sequence
from co3d_walks import units, write_annotations
from PIL import Image

from v3d_jax.data import clips, co3d, skips
from v3d_jax.errors import UserError

CLIP = clips.ClipConfig(num_frames=5, size=64, min_sources=2, max_sources=4)
CONFIG = co3d.CO3DConfig(clip=CLIP)
FORMATS = ("ndc_isotropic", "ndc_norm_image_bounds")
NAME = "106_12648_23157"


def screen(view, points, size):
    """Pixels of world points by PyTorch3D's definition, of nothing but the annotation."""
    local = points @ np.asarray(view["R"]) + np.asarray(view["T"])
    ndc = np.asarray(view["focal_length"]) * local[:, :2] / local[:, 2:]
    ndc = ndc + np.asarray(view["principal_point"])
    # NDC grows to the left and up.
    return np.asarray(size) / 2.0 - ndc * units(view["intrinsics_format"], size)


@pytest.fixture
def rows(tmp_path):
    """The annotations of one good sequence, whose files lie in `tmp_path`."""
    found, _ = write_sequence(tmp_path, "hydrant", NAME)
    write_annotations(tmp_path, "hydrant", found, {NAME: 0.9})
    return found


def find(root, config=CONFIG, skip=None, **options):
    skip = {}.__setitem__ if skip is None else skip
    return co3d.sequences(root, "hydrant", config, skip, **options)


def read(sequence, config=CONFIG, seed=0):
    return co3d.read(sequence, config, np.random.default_rng(seed))


def refused(call, *parts):
    """The one line that something is refused with; it has all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("size", ball_scene.INTRINSICS)
@pytest.mark.parametrize("kind", FORMATS)
def test_points_are_where_the_cameras_say(tmp_path, kind, size):
    """The pictures, PyTorch3D's definition and what is read agree, before and after the box."""
    rows, points = write_sequence(tmp_path, "hydrant", NAME, kind=kind, size=size)
    write_annotations(tmp_path, "hydrant", rows, {NAME: 0.9})
    (sequence,) = find(tmp_path)
    assert sequence.name == f"hydrant/{NAME}"
    assert sequence.quality == 0.9
    shot = ball_scene.shots(size)
    for row, posed, rgb in zip(rows, sequence.posed, shot.rgb, strict=True):
        assert posed.size == size
        by_definition = screen(row["viewpoint"], points, size)
        found = ball_scene.projected(posed.world_to_camera, posed.intrinsics, points)
        np.testing.assert_allclose(found, by_definition, atol=1e-4)
        assert np.linalg.norm(by_definition - ball_scene.seen(rgb), axis=-1).max() < 0.5
    for side in (64, 110):
        config = co3d.CO3DConfig(clip=clips.ClipConfig(num_frames=5, size=side))
        ball_scene.check_clip(read(sequence, config), points, least=6)


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (40, 40)])
@pytest.mark.parametrize("kind", FORMATS)
def test_any_camera_is_pytorch3ds(tmp_path, rows, kind, size):
    """Of random numbers, with a principal point far from the middle."""
    rng = np.random.default_rng(3)
    for row in rows:
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        row["image"]["size"] = list(size[::-1])
        row["viewpoint"] = {
            "R": (rotation * np.sign(np.linalg.det(rotation))).tolist(),
            "T": rng.normal(size=3).tolist(),
            "focal_length": rng.uniform(1.0, 4.0, 2).tolist(),
            "principal_point": rng.uniform(-0.6, 0.6, 2).tolist(),
            "intrinsics_format": kind,
        }
        if kind == "ndc_norm_image_bounds" and row["frame_number"] % 2:
            del row["viewpoint"]["intrinsics_format"]  # which is the older one, then
    write_annotations(tmp_path, "hydrant", rows, {NAME: 0.9})
    (sequence,) = find(tmp_path)
    for row, posed in zip(rows, sequence.posed, strict=True):
        view = {"intrinsics_format": kind, **row["viewpoint"]}
        points = 5.0 * rng.normal(size=(20, 3))
        depth = points @ np.asarray(view["R"])[:, 2] + view["T"][2]
        points = points[depth > 0.5]
        np.testing.assert_allclose(
            ball_scene.projected(posed.world_to_camera, posed.intrinsics, points),
            screen(view, points, size),
            rtol=1e-9,
            atol=1e-9,
        )


def test_the_box_is_around_the_mask_with_its_context(tmp_path, rows):
    """Of a mask drawn by hand: which pixels are taken, and where the camera's centre went."""
    first = rows[0]
    mask = np.zeros((72, 96), np.uint8)
    mask[20:40, 30:70] = 103  # just above 0.4 of 255
    mask[5:10, 2:9] = 102
    Image.fromarray(mask).save(tmp_path / first["mask"]["path"])
    (sequence,) = find(tmp_path)
    clip = read(sequence)
    # 40 x 20 grows by 0.3 of itself: 52 x 26, whose longest side becomes 64.
    assert clip.sizes[0].tolist() == [64, 32]
    fx, fy = 84.0 * 64 / 52, 80.0 * 32 / 26
    centre = (44.5 - 24) * 64 / 52, (37.25 - 17) * 32 / 26
    expected = [[fx, 0.0, centre[0]], [0.0, fy, centre[1]], [0.0, 0.0, 1.0]]
    np.testing.assert_allclose(clip.intrinsics[0], expected, rtol=1e-5)
    assert not clip.images[0, 32:].any()
    assert not clip.mask[0, 32:].any()
    assert clip.images[0, :32].any()
    # The background stays.
    assert np.median(clip.images[1, : clip.sizes[1, 1], : clip.sizes[1, 0]]) == 128

    Image.fromarray(mask * np.uint8(2)).save(tmp_path / first["mask"]["path"])
    clip = read(sequence)
    # From 2 to 70 and 5 to 40, and no farther than the picture.
    assert clip.sizes[0].tolist() == [64, round(64 * 45 / 80)]
    Image.fromarray(mask // 2).save(tmp_path / first["mask"]["path"])
    assert read(sequence).sizes[0].tolist() == [64, 48]


def test_order_is_that_of_time_then_of_numbers(tmp_path, rows):
    for row in rows:
        row["frame_timestamp"] = -float(row["frame_number"])
    write_annotations(tmp_path, "hydrant", rows, {NAME: None})
    (sequence,) = find(tmp_path)
    assert [view.name for view in sequence.posed] == [row["image"]["path"] for row in rows[::-1]]
    for row in rows:
        row["frame_timestamp"] = -1.0  # as where no time is known
    write_annotations(tmp_path, "hydrant", rows, {NAME: None})
    (sequence,) = find(tmp_path)
    assert [view.name for view in sequence.posed] == [row["image"]["path"] for row in rows]
    clip = read(sequence)
    assert clip.frames.tolist() == [0, 2, 3, 5, 7]
    assert clip.names.tolist() == [rows[k]["image"]["path"] for k in clip.frames]
    assert clip.valid.sum() >= 2


def test_what_is_left_out_has_a_reason(tmp_path):
    everything, qualities = [], {}
    for name in ("good", "poor", "unscored", "short", "missing", "mask", "blind", "still"):
        rows, _ = write_sequence(tmp_path, "hydrant", name)
        qualities[name] = 0.8
        if name == "poor":
            qualities[name] = 0.25
            rows[0]["viewpoint"]["R"] = None  # is not looked at
        elif name == "unscored":
            qualities[name] = None
        elif name == "short":
            rows = rows[:4]
        elif name == "missing":
            (tmp_path / rows[3]["image"]["path"]).unlink()
        elif name == "mask":
            rows[2]["mask"] = None
        elif name == "blind":
            rows[5]["viewpoint"] = rows[6]["viewpoint"] = None
        elif name == "still":
            for row in rows:
                row["viewpoint"] = rows[0]["viewpoint"]
        everything += rows
    write_annotations(tmp_path, "hydrant", everything, qualities)
    table = skips.Skips(tmp_path / "skipped.csv")
    found = find(tmp_path, co3d.CO3DConfig(clip=CLIP, min_quality=0.5), table.add)
    table.close()
    assert [sequence.name for sequence in found] == ["hydrant/good"]
    missing = tmp_path / "hydrant" / "missing" / "images" / "frame000014.jpg"
    assert table.reasons == {
        "hydrant/poor": "has quality 0.25, at least 0.5 is asked for",
        "hydrant/unscored": "has no viewpoint_quality_score, at least 0.5 is asked for",
        "hydrant/short": "has 4 frames, 5 are needed",
        "hydrant/missing": f"lacks 1 of 16 pictures and masks, the first is {missing}",
        "hydrant/mask": "has 1 frames without mask, the first is 2",
        "hydrant/blind": "has 2 frames without viewpoint, the first is 5",
        "hydrant/still": "was seen from one place only, which shows no depth",
    }
    many = co3d.CO3DConfig(clip=clips.ClipConfig(num_frames=9), min_quality=0.5)
    refused(lambda: find(tmp_path, many), "no sequence of", "hydrant can be used", "has 8 frames")


def test_set_lists_choose_frames(tmp_path):
    everything = []
    for name in ("a", "b"):
        rows, _ = write_sequence(tmp_path, "hydrant", name)
        everything += rows
    write_annotations(tmp_path, "hydrant", everything, {"a": 1.0, "b": 1.0})
    entry = lambda row: [row["sequence_name"], row["frame_number"], row["image"]["path"]]  # noqa: E731
    lists = {
        "train": [entry(row) for row in everything[:6]],
        "val": [entry(row) for row in everything[6:10]],
        "test": [["a", 99, "a.jpg"]],
    }
    path = tmp_path / "hydrant" / "set_lists" / "set_lists_fewview_dev.json"
    path.parent.mkdir()
    path.write_text(json.dumps(lists))
    assert [len(one.posed) for one in find(tmp_path)] == [8, 8]
    (sequence,) = find(tmp_path, subset="fewview_dev")
    expected = [row["image"]["path"] for row in everything[:6]]
    assert [view.name for view in sequence.posed] == expected
    within = lambda **options: lambda: find(tmp_path, subset="fewview_dev", **options)  # noqa: E731
    refused(within(split="val"), "no sequence", "hydrant/a: has 2 frames")
    refused(within(split="test"), f"{path}: \"test\" 0 is ['a', 99, 'a.jpg'], which is no frame")
    refused(within(split="nothing"), f'{path} has no list "nothing"')
    refused(lambda: find(tmp_path, subset="other"), "other.json", "there are: fewview_dev")
    for content in ("{", "[]", '{"train": [3]}', '{"train": [[{}, 1]]}'):
        path.write_text(content)
        refused(within(), str(path))


def test_clips_can_be_batched(tmp_path):
    everything = []
    for name, size in zip("ab", ball_scene.INTRINSICS, strict=True):
        rows, _ = write_sequence(tmp_path, "hydrant", name, size=size)
        everything += rows
    write_annotations(tmp_path, "hydrant", everything, {"a": 1.0, "b": 1.0})
    data = grain.MapDataset.source(find(tmp_path)).seed(3)
    data = data.random_map(lambda one, rng: co3d.read(one, CONFIG, rng)).batch(2)
    batch = data[0]
    assert batch.images.shape == (2, 5, 64, 64, 3)
    assert batch.sources.shape == batch.valid.shape == (2, 4)
    assert sorted(batch.name) == ["hydrant/a", "hydrant/b"]
    for one, other in zip(batch, data[0], strict=True):
        np.testing.assert_array_equal(one, other)


def damage(change):
    """What a damaged annotation is refused for: `change` is done to a frame's."""

    def call(root, rows):
        change(rows[3])
        write_annotations(root, "hydrant", rows, {NAME: 0.9})
        return refused(lambda: find(root), co3d.FRAMES)

    return call


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row.pop("frame_timestamp"), '"frame_timestamp" is missing'),
        (lambda row: row.pop("image"), '"image.path" is missing'),
        (lambda row: row["image"].pop("size"), '"image.size" is missing'),
        (lambda row: row["mask"].pop("path"), '"mask.path" is missing'),
        (lambda row: row["viewpoint"].pop("R"), '"viewpoint.R" is missing: 3 x 3 finite numbers'),
        (lambda row: row["viewpoint"].pop("T"), '"viewpoint.T" is missing'),
        (lambda row: row["viewpoint"].pop("focal_length"), '"viewpoint.focal_length" is missing'),
        (lambda row: row["viewpoint"].update(T=[0, float("nan"), 1]), '"viewpoint.T" is [0, nan'),
        (lambda row: row["viewpoint"].update(T=[0, "1", 1]), "\"viewpoint.T\" is [0, '1'"),
        (lambda row: row["viewpoint"].update(R=[[1, 0, 0], [0, 1]]), '"viewpoint.R" is [[1, 0'),
        (lambda row: row["viewpoint"].update(R=(2 * np.eye(3)).tolist()), "is no rotation"),
        (lambda row: row["viewpoint"].update(R=np.diag([1, 1, -1]).tolist()), "mirrors"),
        (lambda row: row["viewpoint"].update(focal_length=[0, 1]), "focal length 0"),
        (lambda row: row["viewpoint"].update(intrinsics_format="px"), "is 'px', which is unknown"),
        (lambda row: row.update(viewpoint=[1]), '"viewpoint.R" is missing'),
        (lambda row: row["image"].update(size=[72.0, "96"]), '"image.size" is [72.0'),
    ],
)
def test_damaged_frames(tmp_path, rows, change, told):
    message = damage(change)(tmp_path, rows)
    assert told in message
    assert "frame 3 of " + NAME in message


def test_damaged_files(tmp_path, rows):
    folder = tmp_path / "hydrant"
    for name in (co3d.FRAMES, co3d.SEQUENCES):
        path = folder / name
        data = path.read_bytes()
        for content in (data[:-20], data[:30], b"[]", data[:-6] + b"\0\0\0\0\0\0", b""):
            path.write_bytes(content)
            refused(lambda: find(tmp_path), str(path))
        for content in (b"[{", b"\xff\xfe\xff", b"[" * 100_000, b"{}", b"[1]", b'[{"a": 1}]'):
            path.write_bytes(gzip.compress(content))
            refused(lambda: find(tmp_path), str(path))
        path.unlink()
        refused(lambda: find(tmp_path), f"cannot read {path}: No such file")
        path.write_bytes(data)
    assert find(tmp_path)
    write_annotations(tmp_path, "hydrant", rows, {"other": 0.9})
    refused(lambda: find(tmp_path), co3d.SEQUENCES, f"lacks sequence {NAME}")


def test_pictures_that_do_not_fit(tmp_path, rows):
    (sequence,) = find(tmp_path)
    image, mask = (tmp_path / rows[0][key]["path"] for key in ("image", "mask"))
    good = image.read_bytes()
    Image.new("RGB", (48, 36)).save(image)
    told = f'{image} is 48 x 36 but its "image.size" in {co3d.FRAMES} is 96 x 72'
    refused(lambda: read(sequence), told)
    image.write_bytes(good[:300])
    refused(lambda: read(sequence), str(image))
    image.write_bytes(good)
    Image.new("L", (48, 36)).save(mask)
    refused(lambda: read(sequence), f"{mask} is 48 x 36 but its picture 96 x 72")
    mask.unlink()
    refused(lambda: read(sequence), f"{mask} does not exist")
