"""What only Triton's kernels have; `test_splat_fused` holds them to the plain path."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from importlib import util

import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import pytest
from fused_splats import BACKGROUND, CONFIG, HEIGHT, WIDTH, check, evaluate, repeats, scene

from v3d_jax.ops import target
from v3d_jax.splat import bin, rasterize
from v3d_jax.splat.kernels import nvidia


def fused(config, **settings):
    """As `evaluate`, by kernels that are built with these settings."""
    draw = functools.partial(nvidia.composite, settings=nvidia.Settings(**settings))

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nvidia, "composite", draw)
            return evaluate(replace(config, compositing="triton"))(*arguments)

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    "settings",
    [
        {"saved": True},
        {"chunk": 8, "chunk_back": 32, "warps_back": 2},
        {"chunk": 32, "chunk_back": 32, "saved": True},
        {"owners": 8, "slots": 2, "many": 16, "rows": 8},
    ],
    ids=str,
)
def test_any_settings_give_the_same(settings):
    check(fused(CONFIG, **settings), scene("opaque"), scenes.views(2, WIDTH, HEIGHT))


@pytest.mark.gpu
@pytest.mark.usefixtures("triton_kernels")
def test_a_million_gaussians_on_a_gpu():
    config = rasterize.RasterConfig(width=500, height=333, slots=1 << 23)
    cloud = scene("tiny", 1_000_000)
    camera = scenes.views(3, 500, 333)
    run = fused(config)
    check(run, cloud, camera, config)
    repeats(run, cloud, jnp.asarray(BACKGROUND), camera)


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
NUMBERS = {"columns", "rows", "parts", "tiles", "count", "number"}
for kernel, static in (
    (tiles.ordered, {"B": 64}),
    (tiles.forward, {"K": 16, "SAVE": True}),
    (tiles.backward, {"K": 16, "SAVED": False}),
    (tiles.backward, {"K": 16, "SAVED": True}),
    (owners.gather, {"B": 16, "J": 4, "MANY": 4}),
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
