"""Scenes without bounds: a frame in which lengths mean something, and a unit that grows with range.

A scene's world may have any scale and origin. Fits run in a frame whose origin is the mean of the
camera centres and whose unit is 3DGS's extent, so that rates, the near plane and random steps are
the same whatever the world is. Beyond that unit what counts is the angle at which cameras see a
length: in the contraction of Mip-NeRF 360 (Barron et al. 2022, arXiv 2111.12077, eq. 10), which is
the identity for |x| <= 1 and (2 - 1 / |x|) x / |x| outside, a length across the ray shrinks by
about |x|. `unit` is that factor, and what is in world units elsewhere is in units of it here.

Axes: v view, n Gaussian.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from v3d_jax.ops import camera
from v3d_jax.splat.gaussians import Gaussians

_MARGIN = 1.1  # of the extent, as 3DGS


class Frame(NamedTuple):
    """World coordinates are origin + size times the frame's."""

    origin: Float[Array, "3"]
    size: Float[Array, ""]  # world units


def frame(cameras: camera.Camera) -> Frame:
    """The frame of a batch of cameras [v]: their mean, and 1.1 times the largest distance to it."""
    centres = camera.position(cameras)
    origin = centres.mean(axis=0)
    distance = jnp.linalg.norm(centres - origin[None], axis=1)
    return Frame(origin, _MARGIN * distance.max())


def cameras_inside(place: Frame, cameras: camera.Camera) -> camera.Camera:
    """Cameras of the world in the frame; their pictures stay."""
    pose = cameras.world_to_camera
    moved = jnp.einsum("vij,j->vi", pose[:, :3, :3], place.origin, precision=lax.Precision.HIGHEST)
    offset = (pose[:, :3, 3] + moved) / place.size
    return cameras._replace(world_to_camera=pose.at[:, :3, 3].set(offset))


def points_inside(place: Frame, points: Float[Array, "p 3"]) -> Float[Array, "p 3"]:
    """Points of the world in the frame."""
    return (points - place.origin[None]) / place.size


def gaussians_outside(place: Frame, gaussians: Gaussians) -> Gaussians:
    """Gaussians of the frame in the world; colours and opacities stay."""
    return gaussians._replace(
        means=place.origin[None] + place.size * gaussians.means,
        log_scales=gaussians.log_scales + jnp.log(place.size),
    )


def unit(means: Float[Array, "n 3"]) -> Float[Array, "n"]:
    """Length that looks like the frame's unit at its border: 1 inside, the range outside."""
    return jnp.sqrt(jnp.maximum(jnp.square(means).sum(axis=1), 1.0))
