"""From a bare surface and posed frames to its colours: a texture, or one colour a vertex.

A weighted projection of the frames is the start, what no frame shows is filled, `texture` fits the
rest, and what the fit could not see is filled once more from what it did.

Axes: v view, h w image, s places of the surface (texels of charts, or vertices), m values (all
texels, or vertices).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from v3d_jax.mesh import operator, paint, texels, texture, topology
from v3d_jax.mesh.rasterize import RasterConfig
from v3d_jax.mesh.texels import Texels
from v3d_jax.mesh.texture import Targets, TextureConfig
from v3d_jax.mesh.topology import Triangles
from v3d_jax.mesh.unwrap import Atlas
from v3d_jax.ops import binning

# Pixels, of all views together, from which on a value counts as seen.
_SEEN = 0.05


class Colors(NamedTuple):
    """What was fitted, and the frames' views of it on white; sRGB."""

    values: UInt8[np.ndarray, "m 3"]
    renders: UInt8[np.ndarray, "v h w 3"]
    seen: float  # share of the places that a view sees


class _Places(NamedTuple):
    """Where on the surface values lie."""

    triangles: Triangles
    texels: Texels | None  # None: values are those of vertices
    side: int
    index: Int[np.ndarray, "s"]  # of the value
    points: Float[np.ndarray, "s 3"]
    normals: Float[np.ndarray, "s 3"]


def bake(
    triangles: Triangles,
    atlas: Atlas | None,
    targets: Targets,
    config: TextureConfig,
    key: Key[Array, ""],
    *,
    perceptual: texture.Perceptual | None = None,
    params: Any = None,
    chunk: int = 100,
    progress: Callable[[int, float], None] | None = None,
) -> Colors:
    """The colours of a texture, row by row from the top, or without an atlas of the vertices.

    What no view sees continues its surroundings. `progress` is told the steps done and the loss.
    """
    height, width = targets.images.shape[1:3]
    samples = config.supersample
    raster = RasterConfig(width=width, height=height, supersample=samples, near=config.near)
    sight = operator.look(triangles, atlas, targets.cameras, raster)
    side = None if atlas is None else config.side
    matrix, sizes = operator.build(sight, targets.cameras, raster, side)
    places = _places(triangles, atlas, config.side)
    found, seen = _projected(places, sight, targets, raster)
    begun = np.full((sizes.values, 3), 0.5, np.float32)
    begun[places.index] = found
    known = np.zeros(sizes.values, bool)
    known[places.index] = seen
    count = len(places.index) if atlas is None else config.side**2
    begun[:count] = _filled(places, begun[:count], known[:count])
    more = {"perceptual": perceptual, "params": params, "chunk": chunk, "progress": progress}
    fitted = texture.run(config, sizes, matrix, targets, jnp.asarray(begun), key, **more)
    known |= np.asarray(_touched(matrix, sizes)) > _SEEN
    whole = np.array(fitted)
    whole[:count] = _filled(places, whole[:count], known[:count])
    values = (np.clip(whole, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    renders = _renders(matrix, jnp.asarray(values))
    return Colors(values[:count], renders, float(known[places.index].mean()))


_touched = jax.jit(operator.touched, static_argnums=1)


def _places(triangles: Triangles, atlas: Atlas | None, side: int) -> _Places:
    normals = topology.vertex_normals(triangles)
    if atlas is None:
        index = np.arange(len(triangles.vertices), dtype=np.int32)
        return _Places(triangles, None, side, index, triangles.vertices, normals)
    found = texels.lay(atlas, side)
    points = texels.interpolated(found, triangles, triangles.vertices).astype(np.float32)
    normals = texels.interpolated(found, triangles, normals)
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    return _Places(triangles, found, side, found.index, points, normals.astype(np.float32))


def _projected(
    places: _Places, sight: operator.Sight, targets: Targets, raster: RasterConfig
) -> tuple[Float[np.ndarray, "s 3"], Bool[np.ndarray, "s"]]:
    """`paint.project`, with common sizes."""
    count = len(places.points)
    more = ((0, binning.next_size(count) - count), (0, 0))
    points, normals = (jnp.asarray(np.pad(x, more)) for x in (places.points, places.normals))
    found = paint.project(
        sight, points, normals, targets.cameras, targets.images, targets.inside, raster
    )
    color, seen = (np.asarray(part)[:count] for part in found)
    return color, seen


def _filled(
    places: _Places,
    values: Float[np.ndarray, "m 3"],
    known: Bool[np.ndarray, "m"],
) -> Float[np.ndarray, "m 3"]:
    if places.texels is None:
        return texels.diffuse(places.triangles, values, known)
    return texels.fill(places.texels, places.triangles, places.side, values, known)


def _renders(matrix: operator.Operator, values: UInt8[Array, "m 3"]) -> np.ndarray:
    frames = []
    for view in range(len(matrix.coverage)):
        seen = jax.tree.map(lambda leaf: leaf[view], matrix)  # noqa: B023
        frames.append(np.asarray(_render(seen, values)))
    return np.stack(frames)


@jax.jit
def _render(seen: operator.Operator, values: UInt8[Array, "m 3"]) -> UInt8[Array, "h w 3"]:
    image = operator.apply(seen, values.astype(jnp.float32) / 255.0)
    return (jnp.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)
