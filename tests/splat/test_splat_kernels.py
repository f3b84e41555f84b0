"""The Triton kernels of compositing against the plain path, interpreted unless there is a GPU.

Interpreting needs the package `triton` (Linux; it comes with torch and with the extra `cuda`), and
is slow: images are small. On a GPU: `V3D_TEST_PLATFORM=cuda pytest -m "gpu or not gpu" FILE`.
"""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from importlib import util

import fixtures
import gaussian_scenes as scenes
import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import target
from v3d_jax.splat import bin, rasterize
from v3d_jax.splat.kernels import launches, nvidia

IMAGE, GRADIENT = 1e-5, 1e-4
WIDTH, HEIGHT, COUNT = 29, 19, 60  # no multiples of a tile
CONFIG = rasterize.RasterConfig(width=WIDTH, height=HEIGHT, slots=1 << 11)
BACKGROUND = np.asarray([1.0, 0.5, 0.0], np.float32)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels run by the GPU where there is one, and interpreted elsewhere."""
    if jax.default_backend() == "gpu":
        assert nvidia.missing() is None
        return
    pytest.importorskip("triton", reason="the kernels' interpreter is triton's")
    monkeypatch.setattr(launches, "run", interpreted.launch)


def evaluate(config):
    """Images and gradients as a function of Gaussians, background and cameras."""

    def run(gaussians, background, camera):
        gradient = jax.grad(scenes.loss, argnums=(0, 1), has_aux=True)
        return gradient(gaussians, background, camera, scenes.fast(config))

    return fixtures.jit(run)


@functools.cache
def plain(config):
    return evaluate(config)


def fused(config, **settings):
    """As `plain`, by kernels that are built with these settings; traced anew."""
    draw = functools.partial(nvidia.composite, settings=nvidia.Settings(**settings))

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nvidia, "composite", draw)
            return evaluate(replace(config, compositing="triton"))(*arguments)

    return run


def check(gaussians, camera, config=CONFIG, **settings):
    """Images and gradients of both paths agree; returns the kernels' images."""
    arguments = (gaussians, jnp.asarray(BACKGROUND), camera)
    (gradient, of_background), images = fused(config, **settings)(*arguments)
    (true_gradient, true_of_background), true_images = plain(config)(*arguments)
    for image, true in zip(images, true_images, strict=True):
        np.testing.assert_allclose(image, true, atol=IMAGE * max(1.0, float(true.max())))
    scale = np.linalg.norm(true_gradient.log_scales)
    for name, found, true in zip(scenes.FIELDS, gradient, true_gradient, strict=True):
        assert np.isfinite(found).all(), name
        # a round Gaussian has no gradient of its rotation to compare with
        if name == "rotations" and np.linalg.norm(true) < 1e-4 * scale:
            assert np.linalg.norm(found - true) < 1e-4 * scale
        else:
            assert scenes.relative(found, true) <= GRADIENT, name
    np.testing.assert_allclose(of_background, true_of_background, rtol=GRADIENT, atol=1e-5)
    return images


def scene(kind, count=COUNT):
    return scenes.as_float(scenes.scene(kind, count), jnp.float32)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", scenes.KINDS)
def test_equal_the_plain_path(kind):
    images = check(scene(kind), scenes.views(2, WIDTH, HEIGHT))
    assert float(images[1].max()) > (0.02 if kind == "faint" else 0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "settings",
    [
        {"saved": True},
        {"chunk": 8, "chunk_back": 32, "warps_back": 2},
        {"chunk": 32, "chunk_back": 32, "saved": True},
        {"owners": 8, "slots": 2, "many": 4},
    ],
    ids=str,
)
def test_any_settings_give_the_same(settings):
    check(scene("opaque"), scenes.views(2, WIDTH, HEIGHT), **settings)


@pytest.mark.usefixtures("kernels")
def test_one_view_of_one_gaussian_that_covers_all_of_it():
    one = scene("mixed", 1)
    wide = one._replace(means=0 * one.means, log_scales=0 * one.log_scales + 1.0)
    images = check(wide, scenes.views(1, WIDTH, HEIGHT))
    assert float(images[1].min()) > 0.1


@pytest.mark.usefixtures("kernels")
def test_views_of_different_intrinsics():
    camera = scenes.views(2, WIDTH, HEIGHT)
    other = np.array(camera.intrinsics)
    other[1] = [[55.0, 0.0, 9.0], [0.0, 31.0, 14.0], [0.0, 0.0, 1.0]]
    images = check(scene("mixed"), camera._replace(intrinsics=jnp.asarray(other)))
    assert np.abs(np.asarray(images[0][0] - images[0][1])).max() > 0.1


@pytest.mark.usefixtures("kernels")
def test_nothing_in_view_leaves_the_background():
    far = scene("mixed")
    far = far._replace(means=far.means + jnp.asarray([[0.0, 0.0, 1e3]]))
    arguments = (far, jnp.asarray(BACKGROUND), scenes.views(2, WIDTH, HEIGHT))
    (gradient, _), images = fused(CONFIG)(*arguments)
    np.testing.assert_array_equal(images[0], np.broadcast_to(BACKGROUND, images[0].shape))
    assert not np.asarray(images[1]).any()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("kernels")
def test_gradients_stay_finite_when_gaussians_are_missing():
    small = replace(CONFIG, slots=150)
    camera = scenes.views(2, WIDTH, HEIGHT)
    check(scene("mixed"), camera, small)
    drawn = fixtures.jit(rasterize.rasterize, static_argnums=2)(scene("mixed"), camera, small)
    assert bool(drawn.overflow(small))


@pytest.mark.usefixtures("kernels")
def test_gradients_repeat_bit_for_bit():
    arguments = (scene("opaque"), jnp.asarray(BACKGROUND), scenes.views(2, WIDTH, HEIGHT))
    run = fused(CONFIG)
    for a, b in zip(
        jax.tree.leaves(run(*arguments)), jax.tree.leaves(run(*arguments)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_a_million_gaussians_on_a_gpu():
    config = rasterize.RasterConfig(width=500, height=333, slots=1 << 23)
    cloud = scene("tiny", 1_000_000)
    camera = scenes.views(3, 500, 333)
    check(cloud, camera, config)
    run = fused(config)
    arguments = (cloud, jnp.asarray(BACKGROUND), camera)
    for a, b in zip(
        jax.tree.leaves(run(*arguments)), jax.tree.leaves(run(*arguments)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_settings_and_channels_that_kernels_do_not_take():
    tiles = bin.tiling(1, 8, 8)
    one = jnp.zeros(1, jnp.int32)
    bins = bin.Bins(one, one, one, one, one, jnp.zeros(2, jnp.int32), jnp.int32(0))
    with pytest.raises(ValueError, match="4 channels, not 3"):
        nvidia.composite(tiles, (jnp.zeros(1),) * 9, bins)
    mixed = nvidia.Settings(chunk=8, chunk_back=16, saved=True)
    with pytest.raises(ValueError, match="the same size"):
        nvidia.composite(tiles, (jnp.zeros(1),) * 10, bins, mixed)


def test_xla_is_used_and_the_reason_given_once_where_kernels_cannot_be(monkeypatch):
    config = replace(CONFIG, compositing="auto")
    monkeypatch.setattr(nvidia, "missing", lambda: "no such package, for this test")
    rasterize._warn.cache_clear()
    with target.traced_for("gpu"):
        with pytest.warns(RuntimeWarning, match="no such package, for this test"):
            assert rasterize.compositing(config) == "xla"
        assert rasterize.compositing(config) == "xla"  # a second warning would be an error
        monkeypatch.setattr(nvidia, "missing", lambda: None)
        assert rasterize.compositing(config) == "triton"
        assert rasterize.compositing(replace(config, compositing="xla")) == "xla"
    for platform in ("cpu", "tpu"):
        with target.traced_for(platform):
            assert rasterize.compositing(config) == "xla"


def test_reasons_name_what_is_missing(monkeypatch):
    plain = nvidia.missing.__wrapped__
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert plain() == "triton is not installed (extra `cuda`)"
    monkeypatch.setattr(util, "find_spec", lambda name: name)
    if jax.default_backend() != "gpu":
        assert "gpu" in plain()


COMPILE = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from v3d_jax.splat.kernels import owners, tiles

WHOLE = {"rank", "slot", "offsets", "live", "place", "run_start", "run_end", "order"}
NUMBERS = {"columns", "rows", "parts", "tiles", "count"}
for kernel, static in (
    (tiles.forward, {"K": 16, "SAVE": True}),
    (tiles.backward, {"K": 16, "SAVED": False}),
    (tiles.backward, {"K": 16, "SAVED": True}),
    (owners.gather, {"B": 16, "J": 4, "MANY": 16}),
):
    types = {
        name: "constexpr" if name in static
        else "i32" if name in NUMBERS
        else "*i32" if name in WHOLE
        else "*fp32"
        for name in kernel.arg_names
    }
    for capability in (80, 90):
        source = ASTSource(kernel, types, constexprs=static)
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"num_warps": 1})
        assert made.asm["cubin"], kernel
        assert not re.search(r"\\b(atom|red)\\.", made.asm["ptx"]), kernel
"""


@pytest.mark.slow
def test_compile_for_nvidia_without_a_gpu_and_hold_no_atomics():
    if util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
