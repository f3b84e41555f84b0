"""The z-buffer against a float64 loop over faces, sample by sample."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.mesh import rasterize, surface
from v3d_jax.ops import camera as cameras

EDGE = 1e-5  # samples; plain float32 fails here
TIE = 1e-6  # relative depth


def icosphere_like(rng, faces_u=12, faces_v=24, bumps=0.3):
    """A closed bumpy sphere of latitude-longitude quads cut in triangles."""
    u, v = np.meshgrid(np.linspace(0, np.pi, faces_u + 1), np.arange(faces_v), indexing="ij")
    v = v * 2 * np.pi / faces_v
    radius = 0.7 * (1 + bumps * rng.uniform(-1, 1, u.shape))
    points = np.stack([np.sin(u) * np.cos(v), np.sin(u) * np.sin(v), np.cos(u)], -1)
    points = (points * radius[..., None]).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(faces_u), np.arange(faces_v), indexing="ij")
    a, b = i * faces_v + j, i * faces_v + (j + 1) % faces_v
    c, d = a + faces_v, b + faces_v
    faces = np.concatenate([np.stack([a, c, d], -1), np.stack([a, d, b], -1)]).reshape(-1, 3)
    return points, faces


def soup(rng, count, size, spread=0.6):
    """Loose, interpenetrating triangles of about `size` world units."""
    centre = rng.uniform(-spread, spread, (count, 1, 3))
    points = (centre + size * rng.normal(size=(count, 3, 3))).reshape(-1, 3)
    return points, np.arange(3 * count).reshape(-1, 3)


def grazing(rng):
    """A floor and fans of planes seen almost edge-on by the cameras at elevation 0."""
    points, faces = soup(rng, 60, 0.5)
    points[:, 2] *= 2e-3
    tilted = points + np.asarray([0.0, 0.0, 0.3])
    tilted[:, 2] += 1e-2 * tilted[:, 0]
    return np.concatenate([points, tilted]), np.concatenate([faces, faces + len(points)])


def lattice(rng, camera, count=200):
    """Edges within about 1e-4 samples of many sample centres of view 0, most of them far longer.

    Every edge runs along a lattice direction through the image; its ends lie up to 5,000 samples
    away. The distances that count are those of the rounded vertices.
    """
    directions = np.asarray([[1, 0], [0, 1], [1, 1], [1, -1], [2, 1], [1, 3]])
    direction = directions[rng.integers(0, len(directions), count)]
    through = rng.integers([20, 20], [170, 140], (count, 2)) + 0.5
    aside = np.stack([-direction[:, 1], direction[:, 0]], -1) * rng.uniform(-1e-4, 1e-4, (count, 1))
    ends = [through + aside + n[:, None] * direction for n in rng.integers(-1500, 1500, (2, count))]
    third = through + rng.uniform(-20, 20, (count, 2))
    screen = np.stack([*ends, third], 1) / 2
    screen = np.concatenate([screen, np.ones((count, 3, 1))], -1)
    local = screen @ np.linalg.inv(np.float64(camera.intrinsics[0])).T
    local *= rng.uniform(1, 3, (count, 3, 1))
    pose = np.linalg.inv(np.float64(camera.world_to_camera[0]))
    points = local @ pose[:3, :3].T + pose[:3, 3]
    return points.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3)


SCENES = {
    "bumpy": lambda rng: icosphere_like(rng),
    "tiny": lambda rng: icosphere_like(rng, 40, 80, bumps=0.05),
    "soup": lambda rng: soup(rng, 150, 0.25),
    "larger_than_image": lambda rng: soup(rng, 24, 6.0, spread=0.1),
    "partly_off_screen": lambda rng: soup(rng, 100, 0.3, spread=2.5),
    "grazing": grazing,
    "lattice": lambda rng: lattice(rng, views(elevation=20.0)),
}


def brute_force(mesh, camera, config):
    """Nearest face, its 1/depth and whether the sample is decided clearly; float64, one by one."""
    size = config.supersample
    height, width = config.height * size, config.width * size
    pose = np.asarray(camera.world_to_camera, np.float64)
    intrinsics = np.asarray(camera.intrinsics, np.float64)
    points = np.asarray(mesh.vertices, np.float64)
    faces, depths, clear = [], [], []
    for world_to_camera, k in zip(pose, intrinsics, strict=True):
        local = points @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
        with np.errstate(divide="ignore", invalid="ignore"):
            screen = (local @ k.T)[:, :2] / local[:, 2:] * size
        best = np.zeros((height, width))
        index = np.full((height, width), -1)
        sure = np.ones((height, width), bool)
        second = np.zeros((height, width))
        for number, corner in enumerate(np.asarray(mesh.faces)):
            if (local[corner, 2] <= config.near).any():
                continue
            window = loop_window(screen[corner], width, height)
            if window is None:
                continue
            inside, unclear, depth = one_face(screen[corner], 1 / local[corner, 2], window)
            rows, columns = window
            part = np.s_[rows[0] : rows[1], columns[0] : columns[1]]
            # a sample near this face's edge is undecided if the face could be in front there
            sure[part] &= ~(unclear & (depth >= best[part] * (1 - 1e-3)))
            nearer = inside & (depth > best[part])
            second[part] = np.where(
                nearer, best[part], np.where(inside, np.maximum(second[part], depth), second[part])
            )
            best[part] = np.where(nearer, depth, best[part])
            index[part] = np.where(nearer, number, index[part])
        sure &= (second < best * (1 - TIE)) | (index < 0)
        faces.append(index), depths.append(best), clear.append(sure)
    return np.stack(faces), np.stack(depths), np.stack(clear)


def loop_window(screen, width, height):
    low = np.clip(np.floor(screen.min(0) - 1), 0, [width, height]).astype(int)
    high = np.clip(np.ceil(screen.max(0) + 1), 0, [width, height]).astype(int)
    if (low >= high).any():
        return None
    return (low[1], high[1]), (low[0], high[0])


def one_face(screen, inverse_depth, window):
    rows, columns = window
    y, x = np.meshgrid(np.arange(*rows) + 0.5, np.arange(*columns) + 0.5, indexing="ij")
    a, b, c = screen
    area = (b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]
    if area == 0:
        return np.zeros_like(x, bool), np.zeros_like(x, bool), np.zeros_like(x)
    weights, distances = [], []
    for p, q in ((b, c), (c, a), (a, b)):
        value = ((p[0] - x) * (q[1] - y) - (p[1] - y) * (q[0] - x)) * np.sign(area)
        weights.append(value / abs(area))
        distances.append(value / max(np.hypot(*(q - p)), 1e-300))
    inside = np.all(np.asarray(weights) >= 0, axis=0)
    # within EDGE of the outline: no edge function clearly negative, one of them about zero
    unclear = (np.min(distances, axis=0) > -EDGE) & (np.min(np.abs(distances), axis=0) < EDGE)
    depth = np.tensordot(inverse_depth, np.asarray(weights), 1)
    return inside, unclear, depth


CONFIG = rasterize.RasterConfig(width=96, height=80, rows=1 << 15, slots=1 << 16)


def views(count=3, width=96, height=80, **orbit):
    return cameras.orbit(count, width=width, height=height, start_azimuth=11.0, **orbit)


def common_size(mesh):
    """All scenes in the shapes of one compiled program."""
    return surface.pad(mesh, vertices=3280, faces=6400, materials=1, textures=0, size=64)


@functools.cache
def compiled(config):
    return jax.jit(lambda mesh, camera: rasterize.rasterize(mesh, camera, config))


def draw(mesh, camera):
    result = compiled(CONFIG)(common_size(mesh), camera)
    assert not bool(result.overflow(CONFIG))
    return result


@pytest.mark.parametrize("name", SCENES)
def test_equals_float64_loop(name):
    rng = np.random.default_rng(3)
    mesh = surface.from_geometry(*SCENES[name](rng))
    camera = views(elevation=0.0 if name == "grazing" else 20.0)
    result = draw(mesh, camera)
    face, depth, clear = brute_force(mesh, camera, CONFIG)
    got = np.asarray(result.face)
    assert (face >= 0).mean() > 0.02
    assert clear.mean() > 0.99
    assert (got != face)[clear].sum() == 0
    both = clear & (face >= 0)
    np.testing.assert_allclose(np.asarray(result.inverse_depth)[both], depth[both], rtol=2e-5)
    assert ((got >= 0) == (np.asarray(result.inverse_depth) > 0)).all()


def test_closed_surface_has_no_cracks():
    rng = np.random.default_rng(0)
    mesh = surface.from_geometry(*icosphere_like(rng, 40, 80, bumps=0.0))
    seen = np.asarray(draw(mesh, views()).face) >= 0
    assert seen.any(axis=2).sum() > 200
    for row in seen.reshape(-1, seen.shape[-1]):  # a ball covers one run of every row
        assert np.abs(np.diff(row.astype(int))).sum() <= 2


def test_samples_exactly_on_shared_edges_are_drawn():
    corners = [[0, -0.5, -0.5], [0, 0.5, -0.5], [0, 0.5, 0.5], [0, -0.5, 0.5], [0, 0, 0]]
    mesh = surface.from_geometry(
        np.asarray(corners), np.asarray([[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])
    )
    # Looking down -x, with the optical axis on the centre of sample (16, 16).
    pose = [[0.0, 1, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 2], [0, 0, 0, 1]]
    camera = views(1)._replace(
        world_to_camera=jnp.asarray([pose]),
        intrinsics=jnp.asarray([[[32.0, 0, 16.5], [0, 32.0, 16.5], [0, 0, 1]]]),
    )
    config = rasterize.RasterConfig(width=32, height=32, supersample=1, rows=64, slots=64)
    face = np.asarray(compiled(config)(mesh, camera).face)[0]
    assert (face[9:24, 9:24] >= 0).all()
    assert face[16, 16] == 0  # all four meet here at one depth: the lowest index
    assert set(np.unique(face[9:24, 9:24])) == {0, 1, 2, 3}


def test_of_two_faces_back_to_back_the_one_towards_the_viewer_shows():
    points, faces = icosphere_like(np.random.default_rng(2))
    backs = len(points) + faces[:, ::-1]  # the same corners again, as other vertices
    mesh = surface.from_geometry(np.concatenate([points] * 2), np.concatenate([backs, faces]))
    out = np.asarray(draw(mesh, views()).face)
    swapped = np.asarray(draw(mesh._replace(faces=mesh.faces[:, ::-1]), views()).face)
    assert (out >= 0).mean() > 0.1
    assert (out[out >= 0] >= len(faces)).mean() > 0.99  # bumps may turn a face's back to the view
    seen, other = out >= 0, out % len(faces) + len(faces) * (out < len(faces))
    np.testing.assert_array_equal(swapped[seen], other[seen])
    assert (swapped[~seen] == -1).all()


def test_capacity_overflow_is_reported():
    mesh = surface.from_geometry(*icosphere_like(np.random.default_rng(0)))
    full = draw(mesh, views())
    short = dataclasses.replace(CONFIG, rows=64)
    assert bool(compiled(short)(common_size(mesh), views()).overflow(short))
    short = dataclasses.replace(CONFIG, slots=int(full.slots) - 1)
    result = compiled(short)(common_size(mesh), views())
    assert bool(result.overflow(short))
    assert int(result.slots) == int(full.slots)
    assert (np.asarray(result.face) == np.asarray(full.face)).mean() > 0.99  # one block lost


def test_faces_at_the_near_plane_are_dropped_and_counted():
    points = np.asarray([[0, -1, -1], [0, 1, -1], [0, 0, 1], [3, 0, -0.2], [0, 0.3, 0], [0, 0, 0]])
    mesh = surface.from_geometry(points, np.asarray([[0, 1, 2], [3, 4, 5]]))
    camera = jax.tree.map(lambda x: jnp.repeat(x[:1], 3, axis=0), views())
    result = draw(mesh, camera)
    assert int(result.near_faces) == 3
    assert set(np.unique(result.face)) == {-1, 0}


@pytest.mark.slow
def test_padded_scanned_and_batched_meshes_draw_the_same():
    rng = np.random.default_rng(1)
    meshes = [
        surface.from_geometry(*icosphere_like(rng)),
        surface.from_geometry(*soup(rng, 37, 0.3)),
    ]
    camera = views()
    alone = [draw(mesh, camera) for mesh in meshes]
    stacked = jax.tree.map(jnp.asarray, surface.stack(meshes))
    assert stacked.faces.shape == (2, 640, 3)

    def one(mesh):
        return rasterize.rasterize(mesh, camera, CONFIG)

    scanned = jax.jit(lambda m: jax.lax.map(one, m))(stacked)
    batched = jax.jit(jax.vmap(one))(stacked)
    for k in range(2):
        for got in (scanned, batched):
            for field in range(5):
                np.testing.assert_array_equal(got[field][k], alone[k][field])


def test_keep_lets_through_what_lies_behind():
    points = [[0.2, -1, -1], [0.2, 1, -1], [0.2, 0, 1], [0, -1, -1], [0, 1, -1], [0, 0, 1]]
    mesh = surface.from_geometry(np.asarray(points), np.asarray([[0, 1, 2], [3, 4, 5]]))
    camera = views()

    def keep(view, face, x, y):
        return (face != 0) | ((x + y) % 2 == 0)

    mesh = common_size(mesh)
    opaque = np.asarray(compiled(CONFIG)(mesh, camera).face)[0]
    draw_holed = jax.jit(lambda mesh, camera: rasterize.rasterize(mesh, camera, CONFIG, keep))
    holed = np.asarray(draw_holed(mesh, camera).face)[0]
    y, x = np.mgrid[:160, :192]
    front, hole = opaque == 0, (x + y) % 2 == 1
    assert front.sum() > 1000
    assert (holed[front & ~hole] == 0).all()
    assert (holed[front & hole] != 0).all()
    assert (holed[front & hole] == 1).mean() > 0.7
    np.testing.assert_array_equal(holed[~front], opaque[~front])


def test_fitted_capacities_are_just_enough():
    mesh = common_size(surface.from_geometry(*icosphere_like(np.random.default_rng(0))))
    camera = views()
    needed = compiled(CONFIG)(mesh, camera)
    fitted = rasterize.fit(mesh, camera, CONFIG)
    assert int(needed.rows) <= fitted.rows <= 1.25 * int(needed.rows)
    assert int(needed.slots) <= fitted.slots <= 1.25 * int(needed.slots)
    single = rasterize.fit(mesh, camera, CONFIG, views_per_pass=1)
    assert single.rows < fitted.rows / 2
    assert single.slots < fitted.slots / 2
    with pytest.raises(ValueError, match="do not divide"):
        rasterize.fit(mesh, camera, CONFIG, views_per_pass=2)
