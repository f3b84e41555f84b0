"""What only Triton's kernels have; `test_splat_fused` holds them to the plain path."""

import functools
import os
import subprocess
import sys
import types
from dataclasses import replace
from importlib import util

import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import pytest
from fused_splats import BACKGROUND, CONFIG, HEIGHT, WIDTH, check, evaluate, repeats, scene

from v3d_jax.ops import target
from v3d_jax.splat import bin, rasterize
from v3d_jax.splat.kernels import launches, nvidia


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
        {"owners": 8, "slots": 2, "rows": 8},
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


@pytest.mark.parametrize("version", ["0.3", "0.4"])
def test_launches_say_what_each_jax_triton_takes(version, monkeypatch):
    told = []

    def older(*arguments, kernel, grid, num_warps, zeroed_outputs, name, out_shape, **static):
        told.append((arguments, kernel, grid, num_warps, zeroed_outputs, name, static))
        return [jnp.zeros(leaf.shape, leaf.dtype) for leaf in out_shape]

    def newer(*arguments, out_type, backend_options, kernel, **more):
        told.append(backend_options)
        return older(*arguments, kernel=kernel, out_shape=out_type, **more)

    package = types.SimpleNamespace(triton_call=older if version == "0.3" else newer)
    monkeypatch.setitem(sys.modules, "jax_triton", package)
    monkeypatch.setattr(launches, "kernel", lambda launch: launch.kernel)
    outputs = (launches.floats(3, 2), launches.ints(4))
    launch = launches.Launch(
        "tiles", "backward", (jnp.ones(5),), (7,), outputs, {"K": 16}, 9, 2, (1,), registers=168
    )
    found = launches.run(launch)
    assert [(leaf.shape, leaf.dtype) for leaf in found] == [((3, 2), "float32"), ((4,), "int32")]
    (array, number), *rest = told.pop()
    assert (array.shape, number) == ((5,), 7)
    assert rest == ["backward", (9,), 2, (1,), "splat_backward", {"K": 16}]
    assert told == ([] if version == "0.3" else [{"enable_fp_fusion": True, "maxnreg": 168}])


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
    (owners.gather, {"B": 16, "J": 4}),
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
