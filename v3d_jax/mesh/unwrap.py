"""Surfaces laid out on a square texture, by xatlas where it is installed.

v vertices, f faces, n vertices after cutting. The texture is `size` texels a side, row 0 on top; u
runs right and v up, as in `surface.Mesh`. Charts keep about `gutter` texels between them, and half
of that to the border: bilinear look-ups and what is painted around a chart stay clear of its
neighbours, and of the opposite side where a viewer repeats the texture.
"""

import importlib.util
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from v3d_jax.errors import UserError
from v3d_jax.mesh import topology
from v3d_jax.mesh.topology import Triangles

GUTTER = 4
# Cost at which charts stop to grow: small charts are quick to make and mostly pack well, but on a
# rough surface of 25,000 faces xatlas makes thousands of them, which takes minutes.
_COSTS, _ROUGH_COSTS = (0.5, 1.0, 2.0), (2.0, 4.0)
_ROUGH = 0.03  # share of sharp edges from which a surface is rough
_SHARP = 45.0  # degrees between the normals of two faces
# Every place is tried for every chart, which is quick only on a grid coarser than the texture:
# cells as wide as the gutter, and no more than these a side.
_ROUNDNESS = 0.1
_CELLS = 256
_SIDE = 1000.0
_FULL = 0.5  # share of the texture from which on a packing is good enough


class Atlas(NamedTuple):
    """A surface cut along seams: its faces in the same order, with coordinates on a texture."""

    source: Int[np.ndarray, "n"]  # the vertex of the uncut surface
    faces: Int[np.ndarray, "f 3"]
    uv: Float[np.ndarray, "n 2"]  # in [0, 1], v up
    charts: int


def available() -> bool:
    """Whether xatlas is installed."""
    return importlib.util.find_spec("xatlas") is not None


def unwrap(triangles: Triangles, size: int, gutter: int = GUTTER) -> Atlas:
    """Cuts a surface into charts and packs them; single-threaded, seconds for 25,000 faces.

    Raises `UserError` without xatlas, and where the charts do not fit on one texture.
    """
    if not available():
        raise UserError("textures need xatlas: pip install xatlas, or ask for vertex colours")
    best, most = None, -1.0
    for cost in _ROUGH_COSTS if topology.sharp(triangles, _SHARP) > _ROUGH else _COSTS:
        found = _packed(triangles, size, gutter, cost)
        if found is not None and (share := used(found)) > most:
            best, most = found, share
        if most >= _FULL:
            break
    if best is None:
        raise UserError(
            f"{len(triangles.faces)} faces do not fit on one texture of {size} texels: "
            "ask for fewer faces or a larger texture"
        )
    return best


def used(atlas: Atlas) -> float:
    """The share of the texture that faces lie on."""
    corners = atlas.uv[atlas.faces].astype(np.float64)
    (ax, ay), (bx, by) = ((corners[:, k] - corners[:, 0]).T for k in (1, 2))
    return float(0.5 * np.abs(ax * by - ay * bx).sum())


def _packed(triangles: Triangles, size: int, gutter: int, cost: float) -> Atlas | None:
    import xatlas

    # xatlas drops faces smaller than a fixed area: make them large.
    scale = _SIDE / max(float(np.ptp(triangles.vertices, axis=0).max()), 1e-30)
    atlas = xatlas.Atlas()
    atlas.add_mesh(np.float32(scale * triangles.vertices), np.uint32(triangles.faces))
    charts, packing = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_cost, charts.roundness_weight = cost, _ROUNDNESS
    packing.resolution, packing.padding, packing.bruteForce = min(size // gutter, _CELLS), 1, True
    atlas.generate(charts, packing)
    source, faces, uv = atlas.get_mesh(0)
    if atlas.atlas_count != 1 or not (source[faces] == triangles.faces).all():
        return None
    # A nearly square rectangle of about the cells asked for comes back. It is stretched to the
    # square, with half a cell around: a tenth more texels along one axis beat an empty margin.
    extent = np.float32([atlas.width, atlas.height])
    place = (uv * extent + 0.5) / (extent + 1.0)
    place[:, 1] = 1.0 - place[:, 1]
    return Atlas(np.int32(source), np.int32(faces), np.float32(place), int(atlas.chart_count))
