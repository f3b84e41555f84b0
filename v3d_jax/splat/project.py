"""Projection of 3D Gaussians to the screen (EWA splatting), with gsplat's conventions.

Zwicker et al., EWA Volume Splatting (2001), eq. 24 to 27: a Gaussian of covariance S under an
affine approximation J of the perspective at its mean has the screen covariance J R S R^T J^T,
blurred here by 0.3 px^2. As gsplat does, J is taken at the mean clamped to 15 % of the image
beyond its border, so that Gaussians beside the camera do not blow up.

Axes: v view, n Gaussian. Pixels: x right, y down, centres at half-integers. Products are written
out component by component: no matrix unit rounds them, and arrays keep n as their last axis.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from v3d_jax.ops.camera import Camera

BLUR = 0.3  # px^2 added to both variances on the screen
CLAMP = 0.15  # of the image's size, beyond its border
NEAR = 0.01  # world units

Rows = list[list[Array]]


class Projection(NamedTuple):
    """Gaussians on the screen; fields mean nothing where not `visible`."""

    mean_x: Float[Array, "v n"]  # pixels
    mean_y: Float[Array, "v n"]
    conic_xx: Float[Array, "v n"]  # inverse covariance, 1 / px^2
    conic_xy: Float[Array, "v n"]
    conic_yy: Float[Array, "v n"]
    variance_x: Float[Array, "v n"]  # px^2
    variance_y: Float[Array, "v n"]
    depth: Float[Array, "v n"]  # camera z, world units
    visible: Bool[Array, "v n"]  # in front of the near plane


def rotation_rows(quaternions: Float[Array, "n 4"]) -> Rows:
    """Rotation matrices of quaternions (w, x, y, z) of any length, as rows of arrays [n]."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(quaternions), axis=1), 1e-24))
    w, x, y, z = (quaternions[:, i] / norm for i in range(4))
    return [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]


def project(
    means: Float[Array, "n 3"],
    rotations: Float[Array, "n 4"],
    scales: Float[Array, "n 3"],
    camera: Camera,
    *,
    width: int,
    height: int,
    near: float = NEAR,
) -> Projection:
    """Gaussians on the screens of a batch of views [v], differentiable in the first three.

    The cameras' own width and height are not read, nor is a skew. The determinant of the screen
    covariance is a sum of squares (Cauchy-Binet: |j0 x j1|^2 + blur * trace + blur^2), so that
    needles a thousand times as long as wide keep their width.
    """
    pose, intrinsics = camera.world_to_camera, camera.intrinsics
    fx, fy, cx, cy = (intrinsics[:, i, j][:, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    rotation = [[pose[:, i, j][:, None] for j in range(3)] for i in range(3)]
    position = [means[:, i][None] for i in range(3)]
    local = [_dot(rotation[i], position) + pose[:, i, 3][:, None] for i in range(3)]
    visible = local[2] > near
    z = jnp.where(visible, local[2], 1.0)
    slope_x, slope_y = local[0] / z, local[1] / z

    def clamped(slope: Array, focal: Array, centre: Array, size: int) -> Array:
        margin = CLAMP * size / focal
        return jnp.clip(slope, -centre / focal - margin, (size - centre) / focal + margin)

    at_x, at_y = clamped(slope_x, fx, cx, width), clamped(slope_y, fy, cy, height)
    axes = [[(row[j] * scales[:, j])[None] for row in rotation_rows(rotations)] for j in range(3)]
    # j0, j1: rows of J R sqrt(S), one entry for each axis of the Gaussian
    seen = [[_dot(rotation[i], axis) for axis in axes] for i in range(3)]
    j0 = [fx / z * (seen[0][j] - at_x * seen[2][j]) for j in range(3)]
    j1 = [fy / z * (seen[1][j] - at_y * seen[2][j]) for j in range(3)]
    bare_x, bare_y, covariance = _dot(j0, j0), _dot(j1, j1), _dot(j0, j1)
    minors = [j0[i] * j1[j] - j0[j] * j1[i] for i, j in ((1, 2), (2, 0), (0, 1))]
    determinant = _dot(minors, minors) + BLUR * (bare_x + bare_y) + BLUR * BLUR
    return Projection(
        fx * slope_x + cx,
        fy * slope_y + cy,
        (bare_y + BLUR) / determinant,
        -covariance / determinant,
        (bare_x + BLUR) / determinant,
        bare_x + BLUR,
        bare_y + BLUR,
        local[2],
        visible,
    )


def _dot(a: list[Array], b: list[Array]) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
