"""Tile lists: exact cover, depth order."""

import functools
import itertools

import fixtures
import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.splat import bin as bins
from v3d_jax.splat import rasterize
from v3d_jax.splat.project import BLUR, Projection

WIDTH, HEIGHT = 45, 38  # not multiples of the tile
ROWS, COLUMNS = bins.grid(WIDTH, HEIGHT)


def random_ellipses(rng, count):
    """Footprints of all sizes and shapes, up to 1000:1, in and around the image."""
    angle = rng.uniform(0, np.pi, count)
    long = 10.0 ** rng.uniform(-1, 2.7, count)
    short = long * 10.0 ** rng.uniform(-3, 0, count)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1)
    turn = turn.reshape(-1, 2, 2)
    spread = turn * np.stack([long, short], -1)[:, None]
    covariance = spread @ spread.swapaxes(1, 2) + BLUR * np.eye(2)
    conic = np.linalg.inv(covariance)
    mean = rng.uniform(-40, [WIDTH + 40, HEIGHT + 40], (count, 2))
    fields = [
        *(mean[:, 0], mean[:, 1], conic[:, 0, 0], conic[:, 0, 1], conic[:, 1, 1]),
        *(covariance[:, 0, 0], covariance[:, 1, 1], rng.uniform(1, 3, count)),
    ]
    fields = [jnp.asarray(field[None], jnp.float32) for field in fields]
    log_opacity = np.log(10.0 ** rng.uniform(-2.6, 0, count)).astype(np.float32)
    return Projection(*fields, jnp.ones((1, count), bool)), jnp.asarray(log_opacity)


def exact_tiles(projection, log_opacity):
    """[n, tiles]: holds a pixel whose alpha is at least 1/255; float64, pixel by pixel."""
    fields = [np.asarray(field[0], np.float64) for field in projection[:5]]
    reach = 2 * (np.asarray(log_opacity, np.float64) - np.log(1 / 255))
    y, x = np.mgrid[: ROWS * bins.TILE, : COLUMNS * bins.TILE] + 0.5
    shown = (y < HEIGHT) & (x < WIDTH)

    def one(splat):
        mx, my, a, b, c, limit = splat
        dx, dy = x - mx, y - my
        inside = (a * dx * dx + 2 * b * dx * dy + c * dy * dy <= limit) & shown
        return inside.reshape(ROWS, bins.TILE, COLUMNS, bins.TILE).any((1, 3)).reshape(-1)

    with jax.enable_x64(True):
        packed = [jnp.asarray(field) for field in (*fields, reach)]
        return np.asarray(fixtures.jit(lambda p: jax.lax.map(one, p, batch_size=500))(packed))


def listed_tiles(found, count):
    """[n, tiles] of Bins of one view."""
    got = np.zeros((count, ROWS * COLUMNS), bool)
    offsets = np.asarray(found.offsets)
    tile = np.repeat(np.arange(ROWS * COLUMNS), np.diff(offsets))
    got[np.asarray(found.order)[np.asarray(found.rank)[: offsets[-1]]], tile] = True
    assert got.sum() == offsets[-1]  # no slot twice
    return got


def test_cover_is_exact():
    count = 100_000
    projection, log_opacity = random_ellipses(np.random.default_rng(0), count)
    put = functools.partial(bins.bin_splats, size=(WIDTH, HEIGHT), capacity=1_600_000)
    found = fixtures.jit(put)(projection, log_opacity)
    assert int(found.total) <= 1_600_000
    exact = exact_tiles(projection, log_opacity)
    got = listed_tiles(found, count)
    assert exact.sum() > 3 * count
    assert not (exact & ~got).any()
    assert got.sum() <= 1.03 * exact.sum()


def test_lists_run_from_front_to_back():
    gaussians = scenes.as_float(scenes.scene("mixed"), jnp.float32)
    projection = rasterize.project_gaussians(gaussians, scenes.views(), scenes.CONFIG)
    found = fixtures.jit(rasterize.bin_gaussians, static_argnums=2)(
        gaussians, projection, scenes.CONFIG
    )
    offsets = np.asarray(found.offsets)
    flat = np.asarray(found.order)[np.asarray(found.rank)]
    depth = np.asarray(projection.depth).reshape(-1)[flat]
    tiles_a_view = (len(offsets) - 1) // scenes.VIEWS
    lengths = np.diff(offsets)
    assert lengths.max() > 16
    for tile, (start, end) in enumerate(itertools.pairwise(offsets)):
        assert (np.diff(depth[start:end]) >= 0).all()
        assert (flat[start:end] // scenes.COUNT == tile // tiles_a_view).all()
    # a slot in order of tile knows its place in order of owner
    slot, rank = np.asarray(found.slot)[: offsets[-1]], np.asarray(found.rank)[: offsets[-1]]
    assert (slot >= np.asarray(found.run_start)[rank]).all()
    assert (slot < np.asarray(found.run_end)[rank]).all()
    assert len(set(slot)) == len(slot)


def test_keys_of_16_and_32_bits_list_the_same():
    rng = np.random.default_rng(2)
    projection, log_opacity = random_ellipses(rng, 300)
    width = 8 * 2048
    # 32 rows of 2048 tiles and no tile: one more than 16 bits hold; 31 rows: fewer
    tall, flat = (
        fixtures.jit(functools.partial(bins.bin_splats, size=(width, height), capacity=1 << 17))(
            projection, log_opacity
        )
        for height in (256, 248)
    )
    assert int(tall.total) > int(flat.total) > 1000
    tiles = 31 * 2048
    assert tiles < bins.MOST_SHORT
    assert bins.MOST_SHORT < 32 * 2048
    np.testing.assert_array_equal(tall.offsets[: tiles + 1], flat.offsets)
    last = int(flat.offsets[-1])
    ranks = (np.asarray(found.order)[np.asarray(found.rank[:last])] for found in (tall, flat))
    np.testing.assert_array_equal(*ranks)


@pytest.mark.slow
def test_views_binned_in_halves_look_the_same(monkeypatch):
    gaussians = scenes.as_float(scenes.scene("mixed"), jnp.float32)
    camera = scenes.views(3)

    def seen():
        def channels(gaussians):
            found = rasterize.rasterize(gaussians, camera, scenes.CONFIG)
            layers = jnp.stack([found.alpha, found.depth, *jnp.moveaxis(found.color, -1, 0)])
            return layers, found.slots

        weights = np.random.default_rng(0).normal(size=(5, 3, scenes.HEIGHT, scenes.WIDTH))

        def loss(gaussians):
            layers, slots = channels(gaussians)
            return jnp.sum(layers * weights), (layers, slots)

        return fixtures.jit(jax.value_and_grad(loss, has_aux=True))(gaussians)

    (_, (whole, slots)), wanted = seen()
    # 16 bits as if they held two views' tiles, but not three views'
    rows, columns = bins.grid(scenes.WIDTH, scenes.HEIGHT)
    monkeypatch.setattr(bins, "MOST_SHORT", 2 * rows * columns)
    assert bins.tiling(3, scenes.WIDTH, scenes.HEIGHT) == (2, 2, rows, columns)
    assert bins.tiling(2, scenes.WIDTH, scenes.HEIGHT).parts == 1
    assert bins.tiling(5, scenes.WIDTH, scenes.HEIGHT).parts == 1
    (_, (halved, again)), found = seen()
    assert int(again) == int(slots)
    np.testing.assert_allclose(halved, whole, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))
