"""What is worth training on, and that the held-out objects and their like are not trained on."""

from pathlib import Path

import numpy as np
import pytest

from v3d_jax.data import parts, selection
from v3d_jax.mesh import surface

BOX = np.asarray([[-1, -1, -1], [1, -1, -1], [0, 1, -1], [0, 0, 1]], np.float32) / 2
FACES = np.asarray([[0, 1, 2], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
RED = (0.8, 0.1, 0.1, 1.0)


def solid(color=RED, height: float = 1.0, extra: int = 0) -> surface.Mesh:
    """A tetrahedron; `extra` faces drawn twice make another topology."""
    faces = np.concatenate([FACES, FACES[:1].repeat(extra, axis=0)])
    return surface.from_geometry(BOX * [1.0, 1.0, height], faces, color=color)


def candidate(name, title, category="Kitchen", number=None) -> selection.Candidate:
    number = sum(map(ord, name)) if number is None else number
    return selection.Candidate(name, title, category, solid(extra=number), "me", "CC0")


def test_refusals():
    config = selection.SelectionConfig()
    assert selection.refusal(solid(), config) is None
    assert selection.refusal(solid(height=0.05), config) == "flat"
    grey = solid(color=(0.5, 0.5, 0.55, 1.0))
    assert selection.refusal(grey, config) == "grey"
    textured = grey._replace(
        texture=np.zeros(1, np.int32), atlas=np.zeros((1, 64, 64, 4), np.uint8)
    )
    assert selection.refusal(textured, config) is None
    # A colourful material that no face has does not count.
    spare = grey._replace(base_color=np.asarray([[0.5, 0.5, 0.5, 1], RED], np.float32))
    assert selection.refusal(spare, config) == "grey"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Scopia/beige_sofa2", "sofa"),
        ("White sofa #3", "sofa"),
        ("sofa", "sofa"),
        ("lyingDownMale02", "lyingdownmale"),
        ("BlendSwap-CC-0/chairWithCushion", "chairwithcushion"),
        ("orange", "orange"),
        ("Blue", "blue"),
    ],
)
def test_families(name, family):
    assert selection.family(name) == family


def test_poses_of_one_model_give_its_standing_one():
    names = ["ox_dying", "ox_standing", "ox_walking", "hut", "hut_destroyed", "cart"]
    meshes = [solid(), solid(), solid(), solid(extra=1), solid(extra=1), solid(extra=2)]
    paths = [Path(f"{name}.g3d") for name in names]
    kept = selection.distinct(paths, meshes)
    assert [names[k] for k in kept] == ["ox_standing", "hut", "cart"]
    other = solid()._replace(atlas=np.zeros((1, 64, 64, 4), np.uint8))
    assert len(selection.distinct(paths[:2], [solid(), other])) == 2


def test_split_keeps_the_like_of_held_out_objects_out_of_training():
    items = [
        candidate("s/mug", "Mug"),
        candidate("s/mug_2", "Cup"),
        candidate("s/beaker", "White mug"),
        candidate("s/twin", "Twin", number=sum(map(ord, "s/mug"))),
        candidate("s/lamp", "Lamp"),
    ]
    train, heldout, related = selection.split(items, ["s/mug"])
    assert [c.name for c in train] == ["s/lamp"]
    assert [c.name for c in heldout] == ["s/mug"]
    assert [c.name for c in related] == ["s/mug_2", "s/beaker", "s/twin"]


def test_held_out_choice_is_repeatable_and_spread_over_categories():
    shapes = iter(range(100))
    items = [
        candidate(f"s/{word}", word, category, next(shapes))
        for category, words in {
            "A": "ape bear cat dog eel fox gnu hen".split(),  # noqa: SIM905
            "B": "ant bee".split(),  # noqa: SIM905
            "C": ["chair1", "chair2", "chair3", "stool"],
        }.items()
        for word in words
    ]
    chosen = selection.choose_heldout(items, 5, largest_family=2)
    assert chosen == selection.choose_heldout(items[::-1], 5, largest_family=2)
    kinds = [next(c.category for c in items if c.name == name) for name in chosen]
    assert {kind: kinds.count(kind) for kind in "ABC"} == {"A": 2, "B": 2, "C": 1}
    assert "s/stool" in chosen
    # No more objects of small families are left than these.
    assert len(selection.choose_heldout(items, 50, largest_family=2)) == 11


def test_packaged_list():
    names = selection.heldout_names()
    assert len(names) == 50
    assert len(set(names)) == 50
    assert names == sorted(names)
    assert all(name.startswith("sweethome3d/") for name in names)
    assert len({selection.family(name) for name in names}) >= 45


def test_unreadable_name_and_reason_are_one_line():
    assert str(parts.UnreadableMesh("a", "b\n c")) == "a: b c"
