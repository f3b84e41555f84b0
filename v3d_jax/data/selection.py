"""Which objects of the two Debian packages train the model, and which are held out by name.

`sweethome3d-furniture` gives catalogues of furniture, plants, vehicles and people;
`megaglest-data` gives units, buildings and scenery of a game.
"""

import dataclasses
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from v3d_jax.mesh import surface

HELDOUT_FILE = "assets/heldout.txt"

_COLORS = re.compile(
    "beige|black|blue|brown|cyan|dark|gold|golden|gray|green|grey|light|orange|pink|purple|red|"
    "silver|white|yellow|colou?r|textured"
)
# Animations of one unit, best pose first; a name with none of these is the model itself.
_POSES = ("standing", "stand", "idle", "", "walk", "attack", "dying", "die", "destr")


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """What makes an object worth training on.

    `min_thickness` is thinnest over longest side of the bounding box; `min_chroma` is the largest
    channel minus the smallest, in [0, 1], that some material of an untextured object must reach.
    """

    min_thickness: float = 0.08
    min_chroma: float = 25 / 255


class Candidate(NamedTuple):
    """A readable object: its unique name, what it is called, its kind, and whom to thank."""

    name: str
    title: str
    category: str
    mesh: surface.Mesh
    creator: str
    license: str


def refusal(mesh: surface.Mesh, config: SelectionConfig) -> str | None:
    """Why a mesh is left out ("flat" or "grey"), or None for a good one."""
    extent = np.ptp(mesh.vertices, axis=0)
    if extent.min() < config.min_thickness * extent.max():
        return "flat"
    used = np.unique(mesh.material)
    chroma = np.ptp(mesh.base_color[used, :3], axis=1).max()
    if (mesh.texture[used] < 0).all() and chroma < config.min_chroma:
        return "grey"
    return None


def family(name: str) -> str:
    """A name without numbering and colour words, so that variants of one object share it.

    Only the last part of a path counts: "Scopia/beige_sofa2" and "White sofa #3" give "sofa".
    """
    split = re.sub(r"([a-z])([A-Z])", r"\1 \2", name.rpartition("/")[2])
    words = re.findall(r"[^\W\d_]+", split.lower())
    kept = [word for word in words if not _COLORS.fullmatch(word) and len(word) > 1]
    return "".join(kept or words)


def topology(mesh: surface.Mesh) -> bytes:
    """A digest of connectivity and texture layout: equal for poses or recolourings of a model."""
    digest = hashlib.sha256(np.ascontiguousarray(mesh.faces))
    digest.update(np.ascontiguousarray(mesh.uv))
    return digest.digest()


def distinct(paths: Sequence[Path], meshes: Sequence[surface.Mesh]) -> list[int]:
    """One number for each model: of animations that share topology and textures, the standing one.

    In the order of the first of each group.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number, mesh in enumerate(meshes):
        look = hashlib.sha256(np.ascontiguousarray(mesh.atlas)).digest()
        groups[topology(mesh) + look].append(number)

    def rank(number: int) -> tuple[int, int]:
        stem = paths[number].stem.lower()
        return next(i for i, pose in enumerate((*_POSES, "")) if _poses(stem, pose)), number

    return [min(group, key=rank) for group in groups.values()]


def _poses(stem: str, pose: str) -> bool:
    if pose:
        return pose in stem
    return not any(other in stem for other in _POSES if other)


def choose_heldout(
    candidates: Iterable[Candidate], count: int, largest_family: int = 4
) -> list[str]:
    """Names of `count` objects over all categories in turn, the same for the same candidates.

    Order within a category is that of the names' SHA-256. An object whose family has more than
    `largest_family` members is passed over, as is one related to an object already chosen: holding
    out one chair must not cost the training set all chairs.
    """
    candidates = list(candidates)
    members: dict[str, set[str]] = defaultdict(set)
    for item in candidates:
        for key in keys(item):
            members[key].add(item.name)
    queues: dict[str, list[Candidate]] = defaultdict(list)
    for item in sorted(candidates, key=lambda c: hashlib.sha256(c.name.encode()).digest()):
        if max(len(members[key]) for key in keys(item)) <= largest_family:
            queues[item.category].append(item)
    chosen, taken = [], set()
    while len(chosen) < count and any(queues.values()):
        for category in sorted(queues):
            while queues[category] and taken & keys(queues[category][0]):
                queues[category].pop(0)
            if queues[category] and len(chosen) < count:
                item = queues[category].pop(0)
                taken |= keys(item)
                chosen.append(item.name)
    return sorted(chosen)


def keys(item: Candidate) -> set[str]:
    """What two objects must not share across the split: families of both names, topology."""
    shape = topology(item.mesh).hex()
    return {f"title {family(item.title)}", f"name {family(item.name)}", f"shape {shape}"}


def split(
    candidates: Iterable[Candidate], heldout: Iterable[str]
) -> tuple[list[Candidate], list[Candidate], list[Candidate]]:
    """Training objects, held-out ones, and those dropped because they resemble a held-out one."""
    candidates, names = list(candidates), set(heldout)
    kept_out = [item for item in candidates if item.name in names]
    taken = set().union(*(keys(item) for item in kept_out))
    rest = [item for item in candidates if item.name not in names]
    train = [item for item in rest if not taken & keys(item)]
    return train, kept_out, [item for item in rest if taken & keys(item)]


def heldout_names() -> list[str]:
    """The held-out objects' names, from the list inside the package."""
    text = resources.files("v3d_jax").joinpath(HELDOUT_FILE).read_text("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
