"""The texels of an unwrapped surface: where on it they lie, and colours for those nobody saw.

t texels of a chart, v vertices. Textures are rows of side * side texels, from the top. NumPy on the
host, but for the look-up of faces, which is the z-buffer's.

What no view saw is filled by diffusion: over the mesh, which knows no seams, from the vertices
whose texels were seen; then from the texels around. Texels outside charts repeat the nearest one
inside, so that neither bilinear look-ups nor mip levels bring in a background.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from v3d_jax.mesh import rasterize, surface, topology
from v3d_jax.mesh.surface import Mesh
from v3d_jax.mesh.topology import Triangles
from v3d_jax.mesh.unwrap import Atlas
from v3d_jax.ops.camera import Camera

_SMOOTHINGS = 32  # of filled texels among their neighbours
_PULL = 1e-6  # towards the mean colour, for pieces that nobody saw any of


class Texels(NamedTuple):
    """Texels whose centre lies on a face, with that place."""

    index: Int[np.ndarray, "t"]  # in the texture
    face: Int[np.ndarray, "t"]
    weights: Float[np.ndarray, "t 3"]  # of the face's corners


def lay(atlas: Atlas, side: int) -> Texels:
    """The texels of every face, by rasterizing the layout itself."""
    flat = atlas.uv * np.float32([side, -side]) + np.float32([0, side])
    points = np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1)
    mesh = surface.bucketed(surface.from_geometry(points, atlas.faces))
    mesh = Mesh(*(jnp.asarray(part) for part in mesh))
    lens = Camera(jnp.eye(4)[None], jnp.eye(3)[None], *2 * [jnp.full(1, side)])
    config = rasterize.RasterConfig(width=side, height=side, supersample=1)
    face = np.asarray(rasterize.see(mesh, lens, config).face[0]).reshape(-1)
    index = np.flatnonzero(face >= 0)
    face = face[index]
    row, column = np.divmod(index, side)
    corners = flat.astype(np.float64)[atlas.faces[face]]
    offset = np.stack([column + 0.5, row + 0.5], axis=-1) - corners[:, 0]
    one, two = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]
    first = (offset[:, 0] * two[:, 1] - offset[:, 1] * two[:, 0]) / area
    second = (one[:, 0] * offset[:, 1] - one[:, 1] * offset[:, 0]) / area
    weights = np.clip(np.stack([1 - first - second, first, second], axis=-1), 0.0, 1.0)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return Texels(index.astype(np.int32), face.astype(np.int32), weights.astype(np.float32))


def interpolated(
    texels: Texels, triangles: Triangles, values: Float[np.ndarray, "v c"]
) -> Float[np.ndarray, "t c"]:
    """Values at the vertices of the uncut surface, between them at the texels."""
    return np.einsum("tk,tkc->tc", texels.weights, values[triangles.faces[texels.face]])


def fill(
    texels: Texels,
    triangles: Triangles,
    side: int,
    texture: Float[np.ndarray, "m 3"],
    known: Bool[np.ndarray, "m"],
) -> Float[np.ndarray, "m 3"]:
    """The texture with every texel that is not `known` filled."""
    texture, known = np.array(texture, np.float32), np.array(known)
    inside = np.zeros(side * side, bool)
    inside[texels.index] = True
    lacking = ~known[texels.index]
    if lacking.any():
        texture[texels.index[lacking]] = _from_mesh(texels, triangles, texture, known)[lacking]
        _smooth(texture, texels.index[lacking], inside, side)
    return _spread(texture, known | inside, side)


def diffuse(
    triangles: Triangles, colors: Float[np.ndarray, "v 3"], known: Bool[np.ndarray, "v"]
) -> Float[np.ndarray, "v 3"]:
    """Colours of the unknown vertices such that each is the mean of its neighbours' colours."""
    from scipy import sparse
    from scipy.sparse import linalg

    if known.all() or not known.any():
        return colors
    ends = topology.edges(triangles)[0]
    count, ones = len(triangles.vertices), np.ones(len(ends))
    half = sparse.coo_matrix((ones, (ends[:, 0], ends[:, 1])), shape=(count, count))
    links = (half + half.T).tocsr()
    degree = np.asarray(links.sum(axis=1)).reshape(-1) + _PULL
    unknown = ~known
    system = sparse.diags(degree[unknown]) - links[unknown][:, unknown]
    given = links[unknown][:, known] @ colors[known] + _PULL * colors[known].mean(axis=0)
    filled = np.array(colors, np.float32)
    filled[unknown] = linalg.splu(system.tocsc()).solve(np.float64(given))
    return filled


def _from_mesh(
    texels: Texels, triangles: Triangles, texture: np.ndarray, known: np.ndarray
) -> Float[np.ndarray, "t 3"]:
    seen = known[texels.index]
    corner = triangles.faces[texels.face[seen]].reshape(-1)
    weight = texels.weights[seen].reshape(-1).astype(np.float64)
    color = texture[texels.index[seen]].repeat(3, axis=0)
    count = len(triangles.vertices)
    total = np.bincount(corner, weight, count)
    sums = [np.bincount(corner, weight * color[:, k], count) for k in range(3)]
    colors = np.stack(sums, axis=-1) / np.maximum(total, 1e-9)[:, None]
    filled = diffuse(triangles, colors.astype(np.float32), total > 1e-3)
    return interpolated(texels, triangles, filled)


def _smooth(texture: np.ndarray, index: np.ndarray, inside: np.ndarray, side: int) -> None:
    """Means over neighbours in the chart, again and again, of the texels in `index` only."""
    around = index[:, None] + np.asarray([-side, -1, 1, side])
    there = inside[np.clip(around, 0, side * side - 1)]
    around = np.where(there, around, index[:, None])
    for _ in range(_SMOOTHINGS):
        texture[index] = texture[around].mean(axis=1)


def _spread(texture: np.ndarray, known: np.ndarray, side: int) -> Float[np.ndarray, "m 3"]:
    """Every other texel takes the colour of the nearest known one."""
    from scipy import ndimage

    if not known.any():
        return texture
    grid = ~known.reshape(side, side)
    row, column = ndimage.distance_transform_edt(grid, return_distances=False, return_indices=True)
    return texture[(row * side + column).reshape(-1)]
