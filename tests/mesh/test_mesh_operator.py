"""The image operator against look-ups sample by sample in float64, and its transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trimesh

from v3d_jax.mesh import operator, rasterize, unwrap
from v3d_jax.mesh.topology import Triangles
from v3d_jax.ops import camera

WIDTH, HEIGHT, TEXELS = 40, 32, 64
CONFIG = rasterize.RasterConfig(width=WIDTH, height=HEIGHT, supersample=2)


def cameras():
    return camera.orbit(3, width=WIDTH, height=HEIGHT, elevation=20.0, fov=40.0)


def solid():
    mesh = trimesh.creation.icosphere(2, 0.5)
    return Triangles(np.float32(mesh.vertices), np.int32(mesh.faces))


@pytest.fixture(scope="module")
def atlas():
    return unwrap.unwrap(solid(), TEXELS)


@pytest.fixture(scope="module", params=["texture", "vertices"])
def built(request, atlas):
    side = TEXELS if request.param == "texture" else None
    sight = operator.look(solid(), atlas, cameras(), CONFIG)
    return request.param, *operator.build(sight, cameras(), CONFIG, side)


def view(matrix, index):
    return jax.tree.map(lambda leaf: leaf[index], matrix)


def looked_up(kind, atlas, values, index):
    """One view's picture on white: rays in float64 against every face, then the values there."""
    lens = [np.asarray(part[index], np.float64) for part in cameras()[:2]]
    rotation, offset = lens[0][:3, :3], lens[0][:3, 3]
    y, x = (np.mgrid[: 2 * HEIGHT, : 2 * WIDTH] + 0.5) / 2
    pixels = np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3)
    rays = pixels @ np.linalg.inv(lens[1]).T @ rotation
    origin = -rotation.T @ offset
    vertices, faces = (np.asarray(part) for part in solid())
    corners = vertices.astype(np.float64)[faces]
    one, two = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    p = np.cross(rays[:, None], two[None])
    det = (p * one).sum(-1)
    first = (p * (origin - corners[:, 0])).sum(-1) / det
    q = np.cross(origin - corners[:, 0], one)
    second = (rays[:, None] * q).sum(-1) / det
    depth = (q * two).sum(-1) / det
    inside = (first >= 0) & (second >= 0) & (first + second <= 1)
    depth = np.where(inside, depth, np.inf)
    face = depth.argmin(axis=1)
    row = np.arange(len(rays))
    found = np.isfinite(depth[row, face])
    weights = np.stack([first, second], axis=-1)[row, face]
    weights = np.concatenate([1 - weights.sum(-1, keepdims=True), weights], axis=-1)
    if kind == "vertices":
        color = np.einsum("nk,nkc->nc", weights, values[faces[face]])
    else:
        u, v = np.einsum("nk,nkc->cn", weights, atlas.uv.astype(np.float64)[atlas.faces[face]])
        texture = values.reshape(TEXELS, TEXELS, 3)
        x, y = u * TEXELS - 0.5, (1 - v) * TEXELS - 0.5
        left, top = np.floor(x).astype(int), np.floor(y).astype(int)
        color = 0.0
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            weight = np.abs(1 - dx - (x - left)) * np.abs(1 - dy - (y - top))
            texel = texture[np.clip(top + dy, 0, TEXELS - 1), np.clip(left + dx, 0, TEXELS - 1)]
            color = color + weight[:, None] * texel
    color = np.where(found[:, None], color, 1.0).reshape(HEIGHT, 2, WIDTH, 2, 3)
    return color.mean(axis=(1, 3))


def test_pictures_are_those_of_float64_look_ups(built, atlas):
    kind, matrix, sizes = built
    values = np.random.default_rng(0).uniform(size=(sizes.values, 3))
    for index in range(3):
        found = operator.apply(view(matrix, index), jnp.asarray(values, jnp.float32))
        off = np.abs(np.asarray(found) - looked_up(kind, atlas, values, index)).max(axis=-1)
        # A sample may lie on an edge between two faces, or on the outline.
        assert np.mean(off > 1e-3) < 0.005
        assert np.median(off[off > 0]) < 1e-4


def test_the_transpose_is_the_gradient(built):
    kind, matrix, sizes = built
    rng = np.random.default_rng(1)
    values = jnp.asarray(rng.uniform(size=(sizes.values, 3)), jnp.float32)
    for index in range(3):
        one = view(matrix, index)
        image = jnp.asarray(rng.normal(size=(HEIGHT, WIDTH, 3)), jnp.float32)
        truth = jax.vjp(lambda v: operator.apply(one, v), values)[1](image)[0]  # noqa: B023
        found = operator.transpose(one, sizes, image)
        np.testing.assert_allclose(found, truth, atol=2e-5)
        np.testing.assert_array_equal(found, operator.transpose(one, sizes, image))
    total = operator.touched(matrix, sizes)
    counted = float((matrix.coverage * matrix.trusted).sum())
    assert float(total.sum()) == pytest.approx(counted, rel=1e-5)
    assert 0.9 < counted / float(matrix.coverage.sum()) < 1.0
    assert float(total.min()) == 0.0 or kind == "vertices"


def test_a_picture_of_ones_is_white_everywhere(built):
    _, matrix, sizes = built
    image = operator.apply(view(matrix, 0), jnp.ones((sizes.values, 3)))
    np.testing.assert_allclose(image, 1.0, atol=1e-6)
    assert 0.2 < float(matrix.coverage[0].mean()) < 0.8
    assert float(matrix.coverage[0].max()) == 1.0
