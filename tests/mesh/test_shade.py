"""Shading against float64 ray casting, and the promises made about alpha, lights and mips."""

import functools

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.mesh import mipmap, rasterize, shade, surface
from v3d_jax.ops import camera as cameras

WIDTH, HEIGHT = 40, 32
CONFIG = rasterize.RasterConfig(width=WIDTH, height=HEIGHT, rows=1 << 10, slots=1 << 11)
WHITE = np.ones(3, np.float32)


def views():
    return cameras.orbit(2, width=WIDTH, height=HEIGHT, start_azimuth=25.0)


def ambient_only(level=1.0):
    return shade.Lights(jnp.full(3, level), jnp.asarray([[0.0, 0, 1]]), jnp.zeros((1, 3)))


def card(x, half=0.8):
    """Two triangles facing +x at the given x, uv from (0, 0) lower left to (1, 1)."""
    corners = half * np.asarray([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1]], np.float32)
    uv = np.float32([[0, 0], [1, 0], [1, 1], [0, 1]])
    faces = np.int32([[0, 1, 2], [0, 2, 3]])
    return corners + np.float32([x, 0, 0]), faces, uv[faces]


def cards(*layers, atlas=None, size=8):
    """One card a layer: (x, base RGBA, texture row or -1, cutoff)."""
    vertices, faces, uv, material = [], [], [], []
    for number, layer in enumerate(layers):
        v, f, t = card(layer[0])
        vertices.append(v), faces.append(f + 4 * number), uv.append(t)
        material += [number, number]
    vertices, faces = np.concatenate(vertices), np.concatenate(faces)
    return surface.Mesh(
        vertices=vertices,
        faces=faces,
        normals=surface.flat_normals(vertices, faces),
        uv=np.concatenate(uv),
        material=np.int32(material),
        base_color=np.float32([layer[1] for layer in layers]),
        texture=np.int32([layer[2] for layer in layers]),
        alpha_cutoff=np.float32([layer[3] for layer in layers]),
        atlas=np.zeros((0, size, size, 4), np.uint8) if atlas is None else np.uint8(atlas),
    )


def front():
    """The view along -x, and the one from behind."""
    return cameras.orbit(2, width=WIDTH, height=HEIGHT)


@functools.cache
def compiled(alpha, views_per_pass=None):
    draw = functools.partial(
        shade.render, config=CONFIG, alpha=alpha, views_per_pass=views_per_pass
    )
    return fixtures.jit(draw)


def common_size(mesh):
    """All meshes in the shapes of two compiled programs, with and without alpha test."""
    return surface.pad(mesh, vertices=18, faces=6, materials=2, textures=1, size=64)


def render(mesh, camera, lights, alpha=None):
    alpha = surface.has_alpha(mesh) if alpha is None else alpha
    out = compiled(alpha)(common_size(mesh), camera, lights)
    assert not bool(out.overflow(CONFIG))
    return out


def cast(mesh, camera, face, column, row):
    """Weights and depth of a ray through one sample, by solving for them in float64."""
    inverse = np.linalg.inv(np.float64(camera.world_to_camera))
    ray = np.linalg.inv(np.float64(camera.intrinsics)) @ [(column + 0.5) / 2, (row + 0.5) / 2, 1]
    ray = inverse[:3, :3] @ ray
    a, b, c = np.float64(mesh.vertices)[mesh.faces[face]]
    depth, one, two = np.linalg.solve(np.stack([ray, a - b, a - c], 1), a - inverse[:3, 3])
    return np.asarray([1 - one - two, one, two]), depth, ray


def test_texture_light_and_depth_equal_ray_casting():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 64 * 2 * np.pi
    smooth = np.stack([np.sin(x), np.cos(y), np.sin(x + y), np.ones_like(x)], -1)
    atlas = np.round(127.5 + 127.5 * smooth)[None]
    # Large faces with little texture on them: magnified, so only the finest level is read.
    points = rng.uniform(-0.7, 0.7, (6, 3, 3)).reshape(-1, 3).astype(np.float32)
    faces = np.arange(18, dtype=np.int32).reshape(-1, 3)
    normals = surface.flat_normals(points, faces) + 0.3 * rng.normal(size=(6, 3, 3))
    mesh = surface.Mesh(
        vertices=points,
        faces=faces,
        normals=np.float32(normals / np.linalg.norm(normals, axis=-1, keepdims=True)),
        uv=rng.uniform(-0.1, 0.1, (6, 3, 2)).astype(np.float32),
        material=np.zeros(6, np.int32),
        base_color=np.float32([[1.0, 0.8, 0.6, 1.0]]),
        texture=np.zeros(1, np.int32),
        alpha_cutoff=np.zeros(1, np.float32),
        atlas=np.uint8(atlas),
    )
    lights = shade.random_lights(jax.random.key(1))
    camera = views()
    out = render(mesh, camera, lights)
    face = np.asarray(out.face)
    pixels = face.reshape(2, HEIGHT, 2, WIDTH, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)
    whole = np.flatnonzero((pixels >= 0).all(1))
    assert len(whole) > 300
    for index in rng.choice(whole, 60, replace=False):
        view, row, column = np.unravel_index(index, (2, HEIGHT, WIDTH))
        one = jax.tree.map(lambda a: np.asarray(a)[view], camera)  # noqa: B023
        colors = []
        for dy, dx in np.ndindex(2, 2):
            r, c = 2 * row + dy, 2 * column + dx
            weights, depth, ray = cast(mesh, one, face[view, r, c], c, r)
            np.testing.assert_allclose(out.depth[view, r, c], depth, rtol=2e-5)
            colors.append(expected_color(mesh, lights, face[view, r, c], weights, ray))
        got = np.asarray(out.rgba[view, row, column])
        np.testing.assert_allclose(got[:3], np.mean(colors, 0), atol=3e-3)
        assert got[3] == 1.0


def expected_color(mesh, lights, face, weights, ray):
    u, v = weights @ np.float64(mesh.uv[face])
    texel = bilinear(mesh.atlas[0], u, v)[:3]
    normal = weights @ np.float64(mesh.normals[face])
    a, b, c = np.float64(mesh.vertices)[mesh.faces[face]]
    plane = np.cross(b - a, c - a)
    towards = -np.sign(ray @ plane) * plane
    # corner normals point to the side of the winding here, up to the noise put on them
    corner = np.float64(mesh.normals[face])
    normal = weights @ (corner * np.sign(corner @ towards)[:, None])
    normal /= np.linalg.norm(normal)
    cosine = np.maximum(np.float64(lights.direction) @ normal, 0)
    light = np.float64(lights.ambient) + cosine @ np.float64(lights.color)
    return np.clip(mesh.base_color[0, :3] * texel * light, 0, 1)


def bilinear(image, u, v):
    size = len(image)
    x, y = (u % 1) * size - 0.5, (1 - v % 1) * size - 0.5
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    total = 0
    for dy, wy in ((0, 1 - (y - y0)), (1, y - y0)):
        for dx, wx in ((0, 1 - (x - x0)), (1, x - x0)):
            total = total + wx * wy * np.float64(image[(y0 + dy) % size, (x0 + dx) % size]) / 255
    return total


@pytest.mark.parametrize("flip", [False, True])
def test_both_sides_are_lit_whatever_the_winding(flip):
    mesh = cards((0.0, [1, 1, 1, 1], -1, 0))
    if flip:
        mesh = mesh._replace(faces=mesh.faces[:, ::-1].copy())
    lights = shade.Lights(jnp.full(3, 0.2), jnp.asarray([[1.0, 0, 0]]), jnp.full((1, 3), 0.5))
    middle = np.asarray(render(mesh, front(), lights).rgba)[:, HEIGHT // 2, WIDTH // 2]
    np.testing.assert_allclose(middle[0], [0.7, 0.7, 0.7, 1.0], atol=1e-6)
    np.testing.assert_allclose(middle[1], [0.2, 0.2, 0.2, 1.0], atol=1e-6)


def test_texture_is_upright_and_not_mirrored():
    atlas = np.zeros((1, 8, 8, 4))
    atlas[..., 3] = 255
    atlas[0, :4, :4, 0] = 255  # red: upper left
    atlas[0, :4, 4:, 1] = 255  # green: upper right
    atlas[0, 4:, :4, 2] = 255  # blue: lower left
    rgba = np.asarray(
        render(cards((0.0, [1, 1, 1, 1], 0, 0), atlas=atlas), front(), ambient_only()).rgba[0]
    )
    top, bottom = HEIGHT // 2 - 5, HEIGHT // 2 + 4
    left, right = WIDTH // 2 - 5, WIDTH // 2 + 4
    for place, color in (
        ((top, left), [1, 0, 0]),
        ((top, right), [0, 1, 0]),
        ((bottom, left), [0, 0, 1]),
        ((bottom, right), [0, 0, 0]),
    ):
        np.testing.assert_allclose(rgba[place][:3], color, atol=1e-2)


def test_holes_show_what_lies_behind():
    atlas = np.full((1, 8, 8, 4), 255)
    atlas[0, :, 4:, 3] = 0  # the right half is a hole
    atlas[0, :, 4:, :3] = 0  # and black, which must not bleed
    mesh = cards((0.3, [1, 0, 0, 1], 0, 0.5), (0.0, [0, 0, 1, 1], -1, 0), atlas=atlas)
    assert surface.has_alpha(mesh)
    rgba = np.asarray(render(mesh, front(), ambient_only()).rgba[0])
    row = rgba[HEIGHT // 2]
    left, right = row[WIDTH // 2 - 6 : WIDTH // 2 - 1], row[WIDTH // 2 + 1 : WIDTH // 2 + 6]
    np.testing.assert_allclose(left, [[1, 0, 0, 1]] * 5, atol=1e-6)
    np.testing.assert_allclose(right, [[0, 0, 1, 1]] * 5, atol=1e-6)
    without = cards((0.3, [1, 0, 0, 1], 0, 0.5), atlas=atlas)
    row = np.asarray(render(without, front(), ambient_only()).rgba[0])[HEIGHT // 2]
    assert (row[WIDTH // 2 + 1 : WIDTH // 2 + 6, 3] == 0).all()
    assert (row[WIDTH // 2 - 6 : WIDTH // 2 - 1, 3] == 1).all()


@pytest.mark.parametrize("opacity", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_glass_covers_its_share_of_samples(opacity):
    mesh = cards((0.3, [1, 0, 0, opacity], -1, 0.5))
    assert surface.has_alpha(mesh) == (opacity < 1)
    rgba = np.asarray(render(mesh, front(), ambient_only(), alpha=True).rgba[0])
    middle = rgba[HEIGHT // 2 - 4 : HEIGHT // 2 + 4, WIDTH // 2 - 4 : WIDTH // 2 + 4]
    share = np.sum(opacity > (np.arange(4) + 0.5) / 4) / 4
    assert (middle[..., 3] == share).all()
    assert abs(share - opacity) <= 0.125 + 1e-6
    if share:
        np.testing.assert_allclose(
            middle[..., :3], np.broadcast_to([1, 0, 0], (8, 8, 3)), atol=1e-6
        )


def test_texture_alpha_without_cutoff_is_glass():
    atlas = np.full((1, 8, 8, 4), 255)
    atlas[..., 3] = 128
    mesh = cards((0.3, [1, 1, 1, 1], 0, 0.0), atlas=atlas)
    rgba = np.asarray(render(mesh, front(), ambient_only()).rgba[0])
    assert rgba[HEIGHT // 2, WIDTH // 2, 3] == 0.5
    with_cutoff = mesh._replace(alpha_cutoff=np.float32([0.4]))
    rgba = np.asarray(render(with_cutoff, front(), ambient_only()).rgba[0])
    assert rgba[HEIGHT // 2, WIDTH // 2, 3] == 1.0


def test_full_alpha_passes_a_cutoff_of_one():
    atlas = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 4))
    atlas[..., 3] = 255
    mesh = cards((0.3, [1, 1, 1, 1], 0, 1.0), atlas=atlas)
    plain = render(mesh, front(), ambient_only(), alpha=False)
    tested = render(mesh, front(), ambient_only(), alpha=True)
    np.testing.assert_array_equal(plain.face, tested.face)


def test_outline_is_antialiased():
    rgba = np.asarray(render(cards((0.0, [1, 1, 1, 1], -1, 0)), views(), ambient_only()).rgba)
    levels = set(np.unique(rgba[..., 3]))
    assert {0.0, 1.0} < levels <= {0.0, 0.25, 0.5, 0.75, 1.0}
    np.testing.assert_allclose(rgba[rgba[..., 3] > 0][:, :3], 1.0, atol=1e-6)


def test_passes_change_nothing():
    mesh = cards((0.3, [1, 0, 0, 0.5], -1, 0), (0.0, [0, 0, 1, 1], -1, 0))
    lights = shade.standard_lights()
    whole = render(mesh, views(), lights)
    split = compiled(True, 1)(common_size(mesh), views(), lights)
    np.testing.assert_array_equal(whole.face, split.face)
    np.testing.assert_allclose(whole.rgba, split.rgba, atol=1e-6)
    assert int(split.slots) < int(whole.slots)


def test_minified_texture_is_its_mean():
    atlas = np.zeros((1, 64, 64, 4))
    atlas[..., 3] = 255
    atlas[0, ::2, ::2, :3] = 255  # a quarter of the texels
    mesh = cards((0.0, [1, 1, 1, 1], 0, 0), atlas=atlas)
    mesh = mesh._replace(uv=8 * mesh.uv)  # about 11 texels a sample
    rgba = np.asarray(render(mesh, front(), ambient_only()).rgba[0])
    middle = rgba[HEIGHT // 2 - 6 : HEIGHT // 2 + 6, WIDTH // 2 - 6 : WIDTH // 2 + 6, :3]
    np.testing.assert_allclose(middle, 0.25, atol=0.01)


def test_pyramid_levels_and_look_up():
    rng = np.random.default_rng(2)
    atlas = rng.integers(0, 256, (2, 8, 8, 4)).astype(np.uint8)
    atlas[..., 3] = 255
    texels = mipmap.pyramid(jnp.asarray(atlas))
    assert texels.shape == (2, 85)
    assert mipmap.coarsest_level(texels) == 3
    u, v = rng.uniform(-2, 2, (2, 50)).astype(np.float32)
    which = rng.integers(0, 2, 50).astype(np.int32)
    level = rng.integers(0, 4, 50).astype(np.int32)
    got = mipmap.sample(texels, *(jnp.asarray(a) for a in (which, u, v, level)))
    got = np.stack(got, -1)
    means = [np.float64(atlas)]
    while means[-1].shape[1] > 1:
        half = means[-1].shape[1] // 2
        means.append(means[-1].reshape(2, half, 2, half, 2, 4).mean((2, 4)))
    for k in range(50):
        expected = bilinear(means[level[k]][which[k]], np.float64(u[k]), np.float64(v[k]))
        np.testing.assert_allclose(got[k], expected, atol=3 * 0.5 / 255 + 1e-4)
    finest = mipmap.sample(texels, jnp.asarray(which), jnp.asarray(u), jnp.asarray(v), None)
    zero = jnp.zeros(50, jnp.int32)
    level_zero = mipmap.sample(texels, jnp.asarray(which), jnp.asarray(u), jnp.asarray(v), zero)
    np.testing.assert_allclose(np.stack(finest), np.stack(level_zero), atol=1e-6)
    with pytest.raises(ValueError, match="power of two"):
        mipmap.pyramid(jnp.zeros((1, 6, 6, 4), jnp.uint8))


def test_random_lights_stay_in_range():
    config = shade.LightConfig(count=4)
    draw = fixtures.jit(jax.vmap(lambda key: shade.random_lights(key, config)))
    lights = draw(jax.random.split(jax.random.key(0), 200))
    np.testing.assert_allclose(np.linalg.norm(lights.direction, axis=-1), 1.0, atol=1e-5)
    assert float(lights.direction[..., 2].min()) >= config.lowest
    assert config.ambient[0] <= float(lights.ambient.min())
    assert float(lights.ambient.max()) <= config.ambient[1]
    total = np.asarray(lights.color).sum(axis=1)
    assert total.min() >= config.total[0] * (1 - config.tint) - 1e-6
    assert total.max() <= config.total[1] * (1 + config.tint) + 1e-6
    assert len(np.unique(np.asarray(lights.ambient)[:, 0])) > 190


def test_padding_keeps_alpha_and_stacks():
    plain = cards((0.0, [1, 1, 1, 1], -1, 0))
    glass = cards((0.0, [1, 1, 1, 0.5], 0, 0), atlas=np.full((1, 64, 64, 4), 255), size=64)
    both = surface.stack([plain, glass])
    assert both.atlas.shape == (2, 1, 64, 64, 4)
    assert surface.has_alpha(both)
    assert not surface.has_alpha(surface.stack([plain, plain]))
    alone = compiled(True)(glass, front(), ambient_only()).rgba
    padded = render(surface.Mesh(*(a[1] for a in both)), front(), ambient_only()).rgba
    np.testing.assert_array_equal(alone, padded)
    with pytest.raises(ValueError, match="do not fit"):
        surface.pad(plain, vertices=3, faces=2, materials=1, textures=0, size=8)
