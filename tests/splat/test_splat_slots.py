"""The Triton kernels of binning against the plain path, interpreted unless there is a GPU.

Both take the same arithmetic in the same order, so results are compared to the bit: op by op, since
a compiled program may contract products and sums; a GPU's does, in the kernels too. See
`test_splat_fused` for what this needs.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import util

import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_splat_bins import HEIGHT, WIDTH, random_ellipses

from v3d_jax.splat import bin as bins
from v3d_jax.splat import rasterize
from v3d_jax.splat.kernels import nvidia_bin
from v3d_jax.splat.project import BLUR, Projection

COUNT, CAPACITY = 396, 1 << 13  # few distinct ones: op by op, every shape is compiled anew
SMALL = nvidia_bin.Settings(counts=128, slots=512, warps=1, tiles=32)


@pytest.fixture(autouse=True)
def run_or_interpret(request):
    """Tests that compile alone need neither."""
    if "compile" not in request.node.name:
        request.getfixturevalue("triton_kernels")


def both(projection, log_opacity, size, capacity, settings=SMALL):
    """Bins of the plain path and of the kernels."""
    arguments = (projection, log_opacity, size, capacity)
    with jax.disable_jit():
        wanted = bins.bin_splats(*arguments)
        found = nvidia_bin.bin_splats(*arguments, settings)
    return wanted, found


def check(*arguments, **keywords):
    """All of it is equal but for what means nothing; returns it.

    On a GPU, but for tiles whose test falls within rounding of its bound, too.
    """
    wanted, found = both(*arguments, **keywords)
    for name, one, other in zip(bins.Bins._fields, found, wanted, strict=True):
        assert one.dtype == other.dtype, name
        assert one.shape == other.shape, name
        if name not in ("rank", "slot", "offsets"):
            np.testing.assert_array_equal(one, other, err_msg=name)
    slots, ranks = (
        [np.asarray(b[field][: int(b.offsets[-1])]) for b in (wanted, found)]
        for field in (bins.Bins._fields.index(name) for name in ("slot", "rank"))
    )
    if jax.default_backend() == "gpu":
        alike = [np.isin(one, other) for one, other in (slots, slots[::-1])]
        assert sum((~a).sum() for a in alike) <= 0.01 * len(slots[0])
        slots, ranks = ([x[a] for x, a in zip(xs, alike, strict=True)] for xs in (slots, ranks))
    else:
        np.testing.assert_array_equal(found.offsets, wanted.offsets)
    np.testing.assert_array_equal(*slots)
    np.testing.assert_array_equal(*ranks)
    return found


def seen(kind, camera, count=COUNT // 2):
    """Projection and logarithms of opacity of a scene."""
    gaussians = scenes.as_float(scenes.scene(kind, count), jnp.float32)
    config = replace(scenes.CONFIG, width=WIDTH, height=HEIGHT)
    projection = rasterize.project_gaussians(gaussians, camera, config)
    return projection, jax.nn.log_sigmoid(gaussians.opacity_logits)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_equal_the_plain_path(kind):
    shown = seen(kind, scenes.views(2, WIDTH, HEIGHT))
    found = check(*shown, (WIDTH, HEIGHT), CAPACITY)
    assert 0 < int(found.total) < CAPACITY


@pytest.mark.parametrize(
    "settings",
    [nvidia_bin.Settings(), SMALL._replace(counts=1024, slots=128, tiles=256)],
    ids=str,
)
def test_ellipses_of_all_sizes(settings):
    shown = random_ellipses(np.random.default_rng(3), COUNT)
    found = check(*shown, (WIDTH, HEIGHT), CAPACITY, settings=settings)
    assert int(found.offsets[-1]) > 2 * COUNT
    # The exact test is one: it leaves some of the box.
    assert int(found.offsets[-1]) < int(found.total) < CAPACITY


def of_angle(angle):
    """Unit vectors, x and y."""
    return np.cos(angle), np.sin(angle)


def test_needles_from_afar_that_rounding_blurs():
    """1500 px long, seen up to 1000 px from their means: most tests are within the margin."""
    rng = np.random.default_rng(8)
    angle, away = rng.uniform(0, np.pi, COUNT), rng.uniform(100, 1000, COUNT)
    along, across = (np.stack(f(angle), -1) for f in (of_angle, lambda x: of_angle(x + np.pi / 2)))
    mean = rng.uniform(0, [WIDTH, HEIGHT], (COUNT, 2)) + away[:, None] * along
    covariance = 1500**2 * along[:, :, None] * along[:, None] + BLUR * np.eye(2)
    covariance += 0.3 * across[:, :, None] * across[:, None]
    conic = np.linalg.inv(covariance)
    fields = [*mean.T, conic[:, 0, 0], conic[:, 0, 1], conic[:, 1, 1]]
    fields += [covariance[:, 0, 0], covariance[:, 1, 1], rng.uniform(1, 3, COUNT)]
    fields = [jnp.asarray(field[None], jnp.float32) for field in fields]
    projection = Projection(*fields, jnp.ones((1, COUNT), bool))
    log_opacity = jnp.asarray(np.log(rng.uniform(0.1, 1, COUNT)), jnp.float32)
    found = check(projection, log_opacity, (WIDTH, HEIGHT), CAPACITY)
    assert 1000 < int(found.offsets[-1]) < 0.8 * CAPACITY


def test_one_view_of_one_gaussian_that_covers_all_of_it():
    projection, log_opacity = random_ellipses(np.random.default_rng(0), 1)
    wide = [jnp.full((1, 1), x) for x in (20.0, 20.0, 1e-6, 0.0, 1e-6, 1e6, 1e6, 2.0)]
    wide = projection._replace(**dict(zip(projection._fields, wide, strict=False)))
    found = check(wide, 0 * log_opacity, (WIDTH, HEIGHT), 64)
    rows, columns = bins.grid(WIDTH, HEIGHT)
    np.testing.assert_array_equal(found.offsets, np.arange(rows * columns + 1))


def test_one_that_covers_all_among_small_ones():
    projection, log_opacity = random_ellipses(np.random.default_rng(5), COUNT)
    at = np.arange(COUNT)[None] == COUNT // 2
    wide = dict(conic_xx=1e-6, conic_xy=0.0, conic_yy=1e-6, variance_x=1e6, variance_y=1e6)
    wide = {k: jnp.where(at, v, getattr(projection, k)) for k, v in wide.items()}
    log_opacity = jnp.where(at[0], 0.0, log_opacity)
    size = (301, 203)  # more tiles than a program has slots
    found = check(projection._replace(**wide), log_opacity, size, CAPACITY)
    assert int((found.run_end - found.run_start).max()) == 38 * 26


def test_views_of_different_intrinsics():
    camera = scenes.views(3, WIDTH, HEIGHT)
    other = np.array(camera.intrinsics)
    other[1] = [[55.0, 0.0, 9.0], [0.0, 31.0, 14.0], [0.0, 0.0, 1.0]]
    camera = camera._replace(intrinsics=jnp.asarray(other))
    check(*seen("mixed", camera, COUNT // 3), (WIDTH, HEIGHT), CAPACITY)


def test_nothing_visible():
    projection, log_opacity = random_ellipses(np.random.default_rng(1), COUNT)
    hidden = projection._replace(visible=jnp.zeros_like(projection.visible))
    found = check(hidden, log_opacity, (WIDTH, HEIGHT), CAPACITY)
    assert not np.asarray(found.offsets).any()
    assert int(found.total) == 0


def test_boxes_without_tiles_among_others():
    """Most are visible and off the image: owners with no slots."""
    projection, log_opacity = random_ellipses(np.random.default_rng(6), COUNT)
    away = jnp.where(jnp.arange(COUNT)[None] % 37 == 0, 0.0, 1e5)
    projection = projection._replace(mean_x=projection.mean_x + away)
    found = check(projection, log_opacity, (WIDTH, HEIGHT), CAPACITY)
    assert 0 < int(found.total) < CAPACITY


@pytest.mark.parametrize("capacity", [1, 128, 1001])
def test_overflow_drops_the_farthest(capacity):
    shown = random_ellipses(np.random.default_rng(3), COUNT)
    found = check(*shown, (WIDTH, HEIGHT), capacity)
    assert int(found.total) > capacity
    assert int(found.run_end.max()) == capacity


def test_keys_of_32_bits():
    shown = random_ellipses(np.random.default_rng(2), COUNT)
    check(*shown, (8 * 2048, 256), CAPACITY, settings=SMALL._replace(tiles=8192))


def test_views_binned_in_halves(monkeypatch):
    rows, columns = bins.grid(WIDTH, HEIGHT)
    monkeypatch.setattr(bins, "MOST_SHORT", 2 * rows * columns)
    for kind, capacity in (("mixed", CAPACITY), ("opaque", 1001)):
        shown = seen(kind, scenes.views(3, WIDTH, HEIGHT), count=COUNT // 3)
        found = check(*shown, (WIDTH, HEIGHT), capacity)
        assert found.offsets.shape == (4 * rows * columns + 1,)


def test_runs_hold_beyond_31_bits():
    count = jnp.full(1000, 1 << 23, jnp.int32)
    start, end = nvidia_bin.runs(SMALL, count, 2**30 + 5)
    exact = np.cumsum(np.full(1000, 1 << 23))
    np.testing.assert_array_equal(end, np.minimum(exact, 2**30 + 5))
    np.testing.assert_array_equal(start, np.minimum(exact - (1 << 23), 2**30 + 5))


def test_the_rasterizer_chooses_them_with_the_other_kernels(monkeypatch):
    called = []
    plain = nvidia_bin.bin_splats
    monkeypatch.setattr(nvidia_bin, "bin_splats", lambda *a: called.append(1) or plain(*a))
    gaussians = scenes.as_float(scenes.scene("mixed", 20), jnp.float32)
    camera = scenes.views(1, WIDTH, HEIGHT)
    config = rasterize.RasterConfig(width=WIDTH, height=HEIGHT, slots=1 << 12)

    def shapes(config):
        projection = rasterize.project_gaussians(gaussians, camera, config)
        return rasterize.bin_gaussians(gaussians, projection, config)

    # "auto" takes them where there is a GPU.
    wanted = jax.eval_shape(lambda: shapes(replace(config, compositing="xla")))
    assert not called
    assert jax.eval_shape(lambda: shapes(replace(config, compositing="triton"))) == wanted
    assert called


COMPILE = """
import re
import subprocess
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from v3d_jax.splat.kernels import slots

FLOATS = {"mean_x", "mean_y", "conic_xx", "conic_xy", "conic_yy", "reach"}
NUMBERS = {"number", "limit", "final", "blocks", "capacity", "tiles"}
NUMBERS |= {"columns", "width", "height", "keys"}
CASES = [
    (slots.sums, {"B": 2048}, "u16", 8, 32),
    (slots.prefix, {"B": 2048}, "u16", 8, 80),
    (slots.edges, {"S": 256, "G": 64}, "u16", 2, 32),
    (slots.emit, {"S": 256}, "u16", 4, 96),
    (slots.emit, {"S": 256}, "u32", 4, 96),
    (slots.offsets, {"G": 64, "PARTS": 1}, "u16", 2, 32),
    (slots.offsets, {"G": 64, "PARTS": 2}, "u32", 2, 32),
    # jax-triton makes numbers that are 1 constants.
    (slots.prefix, {"B": 2048, "number": 1, "limit": 1}, "u16", 8, 96),
    (slots.edges, {"S": 256, "G": 64, "final": 1, "blocks": 1}, "u16", 2, 32),
    (slots.emit, {"S": 256, "final": 1, "keys": 1}, "u16", 4, 96),
    (slots.emit, {"S": 256, "columns": 1, "capacity": 1}, "u16", 4, 96),
    (slots.offsets, {"G": 64, "PARTS": 1, "capacity": 1, "tiles": 1}, "u16", 2, 32),
]
for kernel, static, key, warps, most in CASES:
    types = {
        name: "constexpr" if name in static
        else "i32" if name in NUMBERS
        else "*fp32" if name in FLOATS
        else "*" + key if name == "key"
        else "*i32"
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    for capability in (80, 90):
        source = ASTSource(kernel, types, constexprs=static, attrs=aligned)
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"num_warps": warps})
        assert not re.search(r"\\b(atom|red)\\.", made.asm["ptx"]), kernel
        with open(sys.argv[1], "wb") as file:
            file.write(made.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.check_output([tool, "-res-usage", sys.argv[1]], text=True)
        registers, stack, local = (
            int(re.search(name + r":(\\d+)", told)[1]) for name in ("REG", "STACK", "LOCAL")
        )
        print(kernel.__name__, static, key, capability, registers, "registers")
        assert 0 < registers <= most, told
        assert stack == local == 0, told
"""


@pytest.mark.slow
def test_compile_for_nvidia_without_a_gpu_and_spill_nothing(tmp_path):
    if util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "kernel.cubin")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("registers") == 2 * 12
