"""SparseFusion's protocol on CO3D's folders: which sequences, frames and input views."""

import numpy as np
import pytest
from co3d_walks import write_annotations, write_list, write_walk

from v3d_jax import errors
from v3d_jax.data import co3d_protocol as protocol

# What torch.randperm(10) gives after torch.manual_seed of the key.
RANDPERM = {
    0: [4, 1, 7, 5, 3, 9, 0, 8, 6, 2],
    1: [5, 6, 1, 2, 0, 8, 9, 3, 7, 4],
    42: [2, 6, 1, 8, 4, 5, 0, 9, 3, 7],
}


def write(root, category="hydrant", **lengths):
    """A category of sequences of so many frames, all of the protocol's split."""
    rows = {name: write_walk(root, category, name, frames) for name, frames in lengths.items()}
    everything = [row for of in rows.values() for row in of]
    write_annotations(root, category, everything, dict.fromkeys(rows, 0.9))
    write_list(root, category, everything)
    return rows


def find(root, skip=lambda *_: None, **settings):
    args = protocol.Co3dArgs(**{"categories": ("hydrant",), **settings})
    return protocol.find(root, args, skip)


@pytest.mark.parametrize("seed", RANDPERM)
def test_input_views_are_those_of_pytorchs_permutation(seed):
    assert protocol.permutation(10, seed) == RANDPERM[seed]


@pytest.mark.parity
def test_permutations_against_pytorch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for count in (11, 31, 32):
        for seed in range(20):
            wanted = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            assert protocol.permutation(count, seed) == wanted.tolist()


def test_frames_are_32_evenly_spaced_and_rounded_down():
    assert protocol.frames(100)[:5] == [0, 3, 6, 9, 12]
    assert protocol.frames(100)[-2:] == [95, 99]
    assert len(protocol.frames(100)) == len(protocol.frames(32)) == 32
    assert protocol.frames(32) == list(range(32))
    assert protocol.frames(20) == list(range(20))


def test_sequences_are_the_first_by_name_that_are_long_enough(tmp_path):
    write(tmp_path, b=12, a=40, c=10, d=11, e=11)
    assert [(one.place, one.sequence.name) for one in find(tmp_path)] == [
        (0, "hydrant/a"), (1, "hydrant/b"), (2, "hydrant/d"), (3, "hydrant/e"),
    ]  # fmt: skip
    assert [one.sequence.name for one in find(tmp_path, sequences=2)] == ["hydrant/a", "hydrant/b"]
    assert len(find(tmp_path, sequences=0)) == 4


def test_two_known_sequences_are_left_out_and_categories_are_apart(tmp_path):
    write(tmp_path, **{protocol.LEFT_OUT[0]: 12, "5": 12})
    write(tmp_path, category="plant", x=12)
    found = find(tmp_path, categories=("plant", "hydrant"))
    assert [(one.category, one.place, one.sequence.name) for one in found] == [
        ("plant", 0, "plant/x"), ("hydrant", 0, "hydrant/5"),
    ]  # fmt: skip


def test_a_missing_picture_changes_no_other_sequences_views(tmp_path):
    rows = write(tmp_path, a=12, b=12)
    (tmp_path / rows["a"][3]["image"]["path"]).unlink()
    told = {}
    (found,) = find(tmp_path, told.__setitem__)
    assert (found.place, found.sequence.name) == (1, "hydrant/b")
    assert "lacks 1 of 24 pictures" in told["hydrant/a"]


def test_frames_with_empty_masks_do_not_count(tmp_path):
    rows = write(tmp_path, a=14)["a"]
    rows[2]["mask"]["mass"] = 1.0
    write_annotations(tmp_path, "hydrant", rows, {"a": 0.9})
    (found,) = find(tmp_path)
    assert [view.name for view in found.sequence.posed] == [
        row["image"]["path"] for row in rows if row is not rows[2]
    ]


def test_only_frames_of_the_list_count(tmp_path):
    rows = write(tmp_path, a=30)["a"]
    write_list(tmp_path, "hydrant", rows[::2])
    (found,) = find(tmp_path)
    assert [view.name for view in found.sequence.posed] == [r["image"]["path"] for r in rows[::2]]


def test_three_views_are_the_two_and_another(tmp_path):
    write(tmp_path, a=12, b=40)
    (a, b) = find(tmp_path)
    order = protocol.permutation(32, 1)
    two, three = (protocol.read(b, 16, views, "black") for views in (2, 3))
    assert two.inputs == tuple(order[:2])
    assert three.inputs == tuple(order[:3])
    assert len(two.images) == 32
    assert set(two.unseen) | set(two.inputs) == set(range(32))
    assert protocol.read(a, 16, 2, "black").inputs == tuple(protocol.permutation(12, 0)[:2])
    with pytest.raises(errors.UserError, match="a has 12 frames"):
        protocol.read(a, 16, 12, "black")


def test_backgrounds(tmp_path):
    write(tmp_path, a=12)
    (found,) = find(tmp_path)
    kept, black, white = (
        protocol.read(found, 26, 2, around).images for around in ("kept", "black", "white")
    )
    # The mask's 10 x 8 pixels grow to 14 x 10, which become 26 x 19: the rest is padding.
    for shown, colour in ((black, 0), (white, 255)):
        assert (shown[:, 0] == colour).all()
        assert (shown[:, 19:] == colour).all()
        np.testing.assert_array_equal(shown[:, 10, 12], kept[:, 10, 12])
    assert (kept[:, 19:] == 0).all()
    assert (kept[:, 0] != 0).any()
    assert (kept[:, 18] != 0).any()


def test_what_is_not_there_is_told_in_one_line(tmp_path):
    write(tmp_path, a=10)
    with pytest.raises(errors.UserError, match="no sequence of 11 frames or more"):
        find(tmp_path)
    with pytest.raises(errors.UserError, match=r"cannot read .*donut"):
        find(tmp_path, categories=protocol.CATEGORIES)
    with pytest.raises(errors.UserError, match="does not exist"):
        find(tmp_path / "nowhere")
