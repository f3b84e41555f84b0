"""Relocation against the paper's formula in float64, and against what it must leave as it was."""

import math

import fixtures
import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import metrics
from v3d_jax.splat import densify, rasterize
from v3d_jax.splat.gaussians import Gaussians

COUNT = 300


def shared_by_the_paper(opacity, copies):
    """Equation 9 as it is printed, in float64: opacity of each copy, factor on the scales."""
    new = 1.0 - (1.0 - opacity) ** (1.0 / copies)
    total = 0.0
    for i in range(1, copies + 1):
        for k in range(i):
            total += math.comb(i - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1)
    return new, opacity / total


@pytest.mark.parametrize("copies", [1, 2, 3, 7, 20, 51])
def test_share_is_the_papers_equation(copies):
    opacity = np.asarray([0.006, 0.05, 0.3, 0.7, 0.95, 0.99])
    expected = np.asarray([shared_by_the_paper(o, copies) for o in opacity])
    found = densify.share(jnp.asarray(opacity, jnp.float32), jnp.full(6, copies))
    np.testing.assert_allclose(found[0], expected[:, 0], rtol=3e-5)
    np.testing.assert_allclose(found[1], expected[:, 1], rtol=3e-5)


def test_share_holds_for_more_copies_than_float64_sums():
    """What N copies hide along a line through the mean is what one of theirs hid, at any N."""
    new, factor = densify.share(jnp.asarray([0.5]), jnp.asarray([5000]))
    line = np.linspace(-12.0, 12.0, 200_001)
    fall = np.exp(-0.5 * (line / float(factor[0])) ** 2)
    hidden = 1.0 - (1.0 - float(new[0]) * fall) ** 5000
    single = 0.5 * np.exp(-0.5 * line**2)
    assert np.trapezoid(hidden, line) == pytest.approx(np.trapezoid(single, line), rel=1e-4)


@pytest.fixture(scope="module")
def half_dead():
    """A scene with a third of its Gaussians below the threshold, and which."""
    scene = scenes.as_float(scenes.scene("mixed", COUNT, degree=0), jnp.float32)
    dead = np.arange(COUNT) % 3 == 0
    logits = np.where(dead, math.log(0.004), np.maximum(scene.opacity_logits, -3.0))
    return scene._replace(opacity_logits=jnp.asarray(logits, jnp.float32)), dead


def test_relocation_leaves_the_live_and_the_count(half_dead, key):
    scene, dead = half_dead
    told = densify.relocate(key, scene, 0.005)
    assert int(told.moved) == dead.sum()
    assert told.gaussians.means.shape == scene.means.shape
    assert float(told.gaussians.opacities.min()) >= 0.005
    live = {tuple(row) for row in np.asarray(scene.means)[~dead]}
    assert all(tuple(row) in live for row in np.asarray(told.gaussians.means))
    np.testing.assert_array_equal(np.asarray(told.gaussians.means)[~dead], scene.means[~dead])
    same = ~np.asarray(told.changed)
    assert 0 < same.sum() < (~dead).sum()
    for before, after in zip(scene, told.gaussians, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[same], np.asarray(after)[same])
    # Copies and the one they copy are equal in everything.
    rows = np.concatenate([np.asarray(field).reshape(COUNT, -1) for field in told.gaussians], 1)
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[:3]), set()).add(tuple(row))
    assert all(len(group) == 1 for group in groups.values())


@pytest.mark.parametrize("unit", [None, 1.0, 1e-12])
def test_relocation_draws_by_opacity(key, unit):
    """And by the pull, whatever its unit."""
    opacity = np.concatenate([np.full(9000, 0.001), np.full(500, 0.2), np.full(500, 0.8)])
    logits = jnp.asarray(np.log(opacity) - np.log1p(-opacity), jnp.float32)
    means = jnp.broadcast_to(jnp.arange(10_000.0)[:, None], (10_000, 3))
    scene = Gaussians(
        means, jnp.ones((10_000, 4)), jnp.zeros((10_000, 3)), logits, jnp.zeros((10_000, 1, 3))
    )
    pull = None if unit is None else jnp.where(jnp.arange(10_000) >= 9500, 4.0, 8.0) * unit
    told = densify.relocate(key, scene, 0.005, pull=pull)
    strong = np.asarray(told.gaussians.means)[:9000, 0] >= 9500
    share = 0.8 if unit is None else 2 / 3
    assert strong.mean() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 9000))


def test_relocation_keeps_the_image(half_dead, key):
    """And without the correction of eq. 9 it would not."""
    scene, dead = half_dead
    camera = scenes.views()
    draw = fixtures.jit(rasterize.rasterize, static_argnums=2)
    before = draw(scene, camera, scenes.CONFIG).color
    told = densify.relocate(key, scene, 0.005)
    after = draw(told.gaussians, camera, scenes.CONFIG).color
    source = [
        np.flatnonzero((np.asarray(scene.means)[~dead] == mean).all(axis=1))[0]
        for mean in np.asarray(told.gaussians.means)
    ]
    copied = Gaussians(*(field[jnp.asarray(np.flatnonzero(~dead)[source])] for field in scene))
    plain = draw(copied, camera, scenes.CONFIG).color
    kept, lost = (float(metrics.psnr(x, before).min()) for x in (after, plain))
    assert kept > 30.0
    assert lost < kept - 6.0


def test_copies_are_split_along_the_deviations_of_what_they_were(key):
    """From its own place by the new deviations; the unchanged and the rest of a copy stay."""
    count = 20_000
    scales = jnp.asarray([0.1, 1.0, 3.0])
    turn = jnp.asarray([math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5)])  # x to y, y to -x
    scene = Gaussians(
        jnp.zeros((count, 3)),
        jnp.broadcast_to(turn, (count, 4)),
        jnp.broadcast_to(jnp.log(scales), (count, 3)),
        jnp.where(jnp.arange(count) < count // 2, -9.0, 0.5),
        jnp.zeros((count, 1, 3)),
    )
    together = densify.relocate(key, scene, 0.005)
    told = densify.relocate(key, scene, 0.005, split=0.5)
    changed = np.asarray(told.changed)
    np.testing.assert_array_equal(changed, together.changed)
    apart = np.asarray(told.gaussians.means)
    assert 0 < changed.sum() < count
    assert (apart[~changed] == 0.0).all()
    ratio = apart[changed] / np.asarray(told.gaussians.scales)[changed][:, [1, 0, 2]]
    np.testing.assert_allclose(ratio.std(axis=0), 0.5, rtol=0.03)
    np.testing.assert_allclose(ratio.mean(axis=0), 0.0, atol=0.03)
    for before, after in zip(together.gaussians[1:], told.gaussians[1:], strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("pull", [None, 0.0])
def test_nothing_moves_where_nothing_lives(key, pull):
    scene = scenes.as_float(scenes.scene("mixed", 20, degree=0), jnp.float32)
    scene = scene._replace(opacity_logits=jnp.full(20, -9.0))
    factor = None if pull is None else jnp.full(20, pull)
    told = densify.relocate(key, scene, 0.005, pull=factor)
    assert int(told.moved) == 0
    assert not told.changed.any()
    jax.tree.map(np.testing.assert_array_equal, told.gaussians, scene)


def test_exploration_has_the_gaussians_shape_and_fades_with_opacity(key):
    """The step is covariance times normal noise: its own covariance is the square."""
    count = 40_000
    rng = np.random.default_rng(0)
    rotation = jnp.broadcast_to(jnp.asarray(rng.normal(size=(1, 4)), jnp.float32), (count, 4))
    scales = jnp.log(jnp.asarray([[0.5, 0.2, 0.05]]))
    faint = Gaussians(
        jnp.zeros((count, 3)),
        rotation,
        jnp.broadcast_to(scales, (count, 3)),
        jnp.full(count, -20.0),
        jnp.zeros((count, 1, 3)),
    )
    step = np.asarray(densify.exploration(key, faint, jnp.asarray(2.0)), np.float64)
    w, x, y, z = np.asarray(rotation[0], np.float64) / np.linalg.norm(rotation[0])
    turn = np.asarray(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    covariance = turn @ np.diag([0.25, 0.04, 0.0025]) @ turn.T
    gate = 1.0 / (1.0 + math.exp(-0.5))  # at opacity 0
    expected = (2.0 * gate) ** 2 * covariance @ covariance
    np.testing.assert_allclose(step.T @ step / count, expected, atol=0.03 * np.abs(expected).max())
    seen = faint._replace(opacity_logits=jnp.zeros(count))
    assert float(jnp.abs(densify.exploration(key, seen, jnp.asarray(2.0))).max()) < 1e-12
