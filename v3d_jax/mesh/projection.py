"""The faces of a mesh on the screens of several views, and their edge functions.

Axes: i view, f face, n one of their pairs, s slot. Positions on the screen are in samples from the
image centre, x right, y down (`mesh.rasterize`).

Precision: positions and edge functions at block centres are computed in two-float arithmetic and
rounded once; inside a block offsets are at most 3.5 samples. What is left is below 1e-5 samples
from an edge however large the face is. Corners are first sorted by position on the screen: then the
two faces that share an edge get exactly opposite values of its function (no cracks, and a sample
exactly on it belongs to both), and a face that repeats another with reversed winding gets the same
depth to the bit, so that the one meant for the viewer's side shows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from v3d_jax.mesh.surface import Mesh
from v3d_jax.ops import twofloat
from v3d_jax.ops.camera import Camera
from v3d_jax.ops.twofloat import TwoFloat


class Screen(NamedTuple):
    """(view, face) pairs on the screen, n = i * f of them."""

    x: TwoFloat  # [n, 3] corners, in ascending order of (x, y)
    y: TwoFloat
    inverse_depth: Float[Array, "n 3"]
    area: Float[Array, "n"]  # twice the signed area in that order; 0: not drawn
    front: Bool[Array, "n"]  # the file's order runs counter-clockwise for the viewer
    near: Bool[Array, "n"]


def project(
    mesh: Mesh, camera: Camera, size: tuple[int, int], supersample: int, near: float
) -> Screen:
    """Corners of every (view, face) on screens of `size` (height, width) samples.

    A pixel has `supersample` samples along each axis; faces with a corner nearer than `near` (world
    units) are not drawn.
    """
    faces = jnp.asarray(mesh.faces)
    points = jnp.asarray(mesh.vertices)
    pose = camera.world_to_camera[:, :3, :, None]  # [i, axis, 4, 1]
    local = twofloat.exact(pose[:, :, 3])
    for k in range(3):
        term = twofloat.product(pose[:, :, k], points[None, None, :, k])
        local = twofloat.add(term, local)
    z = twofloat.part(local, np.s_[:, 2:])
    far = z.hi > near
    z = TwoFloat(jnp.where(far, z.hi, 1.0), jnp.where(far, z.lo, 0.0))
    slope = twofloat.divide(twofloat.part(local, np.s_[:, :2]), z)
    focal = camera.intrinsics[:, :2, :, None]  # [i, axis, 3, 1]
    pixel = twofloat.exact(focal[:, :, 2])
    for k in range(2):
        term = twofloat.multiply(
            twofloat.exact(focal[:, :, k]), twofloat.part(slope, np.s_[:, k, None])
        )
        pixel = twofloat.add(term, pixel)
    sides = np.float32([[[size[1]], [size[0]]]])
    pixel = twofloat.multiply(pixel, twofloat.exact(jnp.full_like(sides, supersample)))
    pixel = twofloat.add(pixel, twofloat.exact(jnp.asarray(-0.5 * sides)))

    def corners(value: Array) -> Array:
        return value[:, faces].reshape(-1, 3)

    x, y = (jax.tree.map(corners, twofloat.part(pixel, np.s_[:, k])) for k in range(2))
    dropped = ~corners(far[:, 0]).all(axis=1)
    padding = (faces[:, 0] == faces[:, 1]) & (faces[:, 1] == faces[:, 2])
    padding = jnp.tile(padding, camera.intrinsics.shape[0])
    x, y, inverse, odd = _sort_corners(x, y, corners(1.0 / z.hi[:, 0]))
    area = jnp.where(dropped | padding, 0.0, _area(x, y))
    front = (area > 0) == odd  # y points down: counter-clockwise is negative
    return Screen(x, y, inverse, area, front, dropped & ~padding)


def _sort_corners(
    x: TwoFloat, y: TwoFloat, inverse: Float[Array, "n 3"]
) -> tuple[TwoFloat, TwoFloat, Float[Array, "n 3"], Bool[Array, "n"]]:
    """Corners [n, 3] in ascending order of (x, y), and whether that took an odd permutation."""
    columns = [jax.tree.map(lambda a: a[:, k], (x, y, inverse)) for k in range(3)]  # noqa: B023
    odd = jnp.zeros(inverse.shape[:1], bool)
    for i, j in ((0, 1), (1, 2), (0, 1)):
        (xi, yi, _), (xj, yj, _) = columns[i], columns[j]
        swap = twofloat.less(xj, xi) | (twofloat.equal(xj, xi) & twofloat.less(yj, yi))
        pick = functools.partial(jnp.where, swap)
        columns[i], columns[j] = (
            jax.tree.map(pick, columns[j], columns[i]),
            jax.tree.map(pick, columns[i], columns[j]),
        )
        odd = odd ^ swap
    x, y, inverse = jax.tree.map(lambda *a: jnp.stack(a, axis=1), *columns)
    return x, y, inverse, odd


def _area(x: TwoFloat, y: TwoFloat) -> Float[Array, "n"]:
    """Twice the signed area of triangles [n, 3]."""
    ends, start = np.s_[:, 1:], np.s_[:, :1]
    sides = [  # [n, 2] each
        twofloat.subtract(twofloat.part(c, ends), twofloat.part(c, start)) for c in (x, y)
    ]
    turned = jax.tree.map(lambda a: a[:, ::-1], sides[1])
    both = twofloat.multiply(sides[0], turned)
    return twofloat.subtract(twofloat.part(both, np.s_[:, 0]), twofloat.part(both, np.s_[:, 1])).hi


def edges(screen: Screen, pair: Array, cx: Array, cy: Array) -> tuple[Array, Array, Array]:
    """Edge functions a * dx + b * dy + c around (cx, cy), [s, 3] each; k is opposite corner k.

    Positive inside: w(P) = (p - P) x (q - P) for the edge from p to q, p before q in the sorted
    order (which turns the edge from corner 2 to corner 0 around).
    """
    x, y = twofloat.part(screen.x, pair), twofloat.part(screen.y, pair)
    first, second = np.s_[:, np.asarray([1, 0, 0])], np.s_[:, np.asarray([2, 2, 1])]
    (px, qx), (py, qy) = ((twofloat.part(c, first), twofloat.part(c, second)) for c in (x, y))
    a, b = twofloat.subtract(py, qy), twofloat.subtract(qx, px)
    c = twofloat.add(
        twofloat.multiply(a, twofloat.subtract(twofloat.exact(cx[:, None]), px)),
        twofloat.multiply(b, twofloat.subtract(twofloat.exact(cy[:, None]), py)),
    )
    sign = np.float32([[1.0, -1.0, 1.0]]) * jnp.sign(screen.area[pair])[:, None]
    return sign * a.hi, sign * b.hi, sign * c.hi
