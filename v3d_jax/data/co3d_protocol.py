"""The protocol of SparseFusion (arXiv 2212.00792) on CO3D version 2, which V3D's scenes follow.

Of every category the sequences of the subset "fewview_dev", split "test", by name; of every
sequence 32 frames evenly spaced in time; of these 2 or 3 at random are the input views and the
others are scored, at 256 pixels, cut out by their masks. What is taken from where:

* The ten categories, the subset and split, the 32 frames, sequences of more than 10 frames, the
  two that are left out, frames with empty masks left out, the box around the mask, the black
  background, and the permutation that chooses input views: the released code (zhizdev/sparsefusion,
  commit bf10054: `utils/co3d_dataloader.py`, `utils/load_dataset.py`, `demo.py`).
* That LPIPS is VGG's: the same code, whose printed scores are over all 32 frames and are said there
  not to be the final ones. That unseen frames alone are scored is the setting here.
* Not known here: how many sequences of a category the paper scores (`sequences`, 10 unless told
  otherwise), and whether V3D kept the background, as its own reader of CO3D does (`background`).
"""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from v3d_jax import errors
from v3d_jax.data import clips, co3d
from v3d_jax.data.shots import Shots

CATEGORIES = (
    "donut",
    "apple",
    "hydrant",
    "vase",
    "cake",
    "ball",
    "bench",
    "suitcase",
    "teddybear",
    "plant",
)
SUBSET, SPLIT = "fewview_dev", "test"
FRAMES, LEAST_FRAMES = 32, 11
SIZE = 256
LEFT_OUT = ("411_55952_107659", "376_42884_85882")


@dataclasses.dataclass(frozen=True)
class Co3dArgs:
    """The protocol of SparseFusion on CO3D."""

    categories: tuple[str, ...] = CATEGORIES
    """Categories of CO3D to score; the standard ones are the protocol's ten."""
    sequences: int = 10
    """Sequences of each category, the first by name; 0 for all."""
    background: Literal["black", "white", "kept"] = "black"
    """What is around the object: black, as SparseFusion has it, white, or what was there."""


class Scored(NamedTuple):
    """A sequence to score, and its place in its category, which decides its input views."""

    category: str
    place: int
    sequence: co3d.Sequence


def find(root: Path, args: Co3dArgs, skip: clips.Skip) -> list[Scored]:
    """The sequences of all categories, in order; `skip` is told of those that cannot be used.

    Places count every sequence of enough frames, so that one that lacks a file changes no other's
    input views. Raises `UserError` as `co3d.sequences` does.
    """
    if not root.is_dir():
        raise errors.UserError(f"{root} does not exist: give the folder of CO3D's categories")
    config = co3d.CO3DConfig(clip=clips.ClipConfig(num_frames=2, size=SIZE))
    found = []
    for category in args.categories:
        refused: list[str] = []

        def tell(name: str, reason: str, refused: list[str] = refused) -> None:
            refused.append(name)
            skip(name, reason)

        usable = co3d.sequences(
            root, category, config, tell, subset=SUBSET, split=SPLIT, seen_only=True
        )
        short = {one.name for one in usable if len(one.posed) < LEAST_FRAMES}
        usable = [one for one in usable if one.name not in short]
        names = sorted(n for n in (*refused, *(one.name for one in usable)) if _taken(n))
        places = {name: place for place, name in enumerate(names)}
        scored = [Scored(category, places[one.name], one) for one in usable if _taken(one.name)]
        scored.sort(key=lambda one: one.place)
        found += scored[: args.sequences or None]
    if not found:
        raise errors.UserError(f"{root} has no sequence of {LEAST_FRAMES} frames or more to score")
    return found


def read(scored: Scored, size: int, views_given: int, background: str) -> Shots:
    """The frames of a sequence with so many input views, squares of `size` pixels.

    Raises `UserError` for pictures and masks that are damaged, and where no frame is unseen.
    """
    posed = scored.sequence.posed
    chosen = [posed[place] for place in frames(len(posed))]
    if views_given >= len(chosen):
        raise errors.UserError(f"{scored.sequence.name} has {len(chosen)} frames: give fewer views")
    config = co3d.CO3DConfig(clip=clips.ClipConfig(num_frames=2, size=size))
    cuts = [co3d.cut(view, config) for view in chosen]
    images = [_on(one, background) for one in cuts]
    order = permutation(len(chosen), scored.place)
    return Shots(
        scored.sequence.name,
        np.stack(images),
        np.stack([view.world_to_camera for view in chosen]),
        np.stack([one.intrinsics for one in cuts]),
        tuple(order[:views_given]),
    )


def frames(count: int) -> list[int]:
    """The places of 32 frames evenly spaced, the first and the last among them, rounded down.

    A sequence of fewer gives each of its frames once; in SparseFusion some then come twice.
    """
    return np.unique(np.linspace(0, count - 1, FRAMES).astype(int)).tolist()


def permutation(count: int, seed: int) -> list[int]:
    """A random order of 0 to `count` - 1, the one that PyTorch's `randperm` gives with this seed.

    A shuffle (Fisher and Yates) by the 32-bit numbers of the Mersenne Twister, of which each is
    taken modulo how many are left.
    """
    rng, order = np.random.RandomState(seed), list(range(count))
    for place in range(count - 1):
        number = int(rng.randint(0, 2**32, dtype=np.uint32))
        other = place + number % (count - place)
        order[place], order[other] = order[other], order[place]
    return order


def _taken(name: str) -> bool:
    return name.rpartition("/")[2] not in LEFT_OUT


def _on(cut: clips.Cut, background: str) -> UInt8[np.ndarray, "s s 3"]:
    """A picture with its background replaced, the padding beside it included."""
    if background == "kept":
        return cut.rgb
    opacity = cut.mask[..., None].astype(np.float32) / 255.0
    around = (1.0 - opacity) * (255.0 if background == "white" else 0.0)
    return (cut.rgb * opacity + around + 0.5).astype(np.uint8)
