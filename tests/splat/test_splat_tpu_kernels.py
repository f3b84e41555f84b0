"""What only the TPU kernels have, interpreted; `test_splat_fused` holds them to the plain path."""

from dataclasses import replace
from unittest import mock

import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_splats import CONFIG, HEIGHT, WIDTH, check, evaluate, scene

from v3d_jax.ops import target
from v3d_jax.splat import bin, rasterize
from v3d_jax.splat.kernels import mosaic, tpu


def test_tiles_and_blocks_that_two_launches_share():
    """Lists of several blocks, four pieces a launch: state is given on, finished tiles skipped."""
    with mock.patch.object(tpu, "SEGMENT", 4), mock.patch.object(tpu, "WINDOW", 1024):
        config = replace(CONFIG, compositing="pallas", slots=1 << 13)
        check(evaluate(config), scene("opaque", 400), scenes.views(1, WIDTH, HEIGHT), config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "opaque"])
def test_equal_the_plain_path_on_larger_images(kind):
    config = replace(scenes.CONFIG, compositing="pallas")
    check(evaluate(config), scene(kind, scenes.COUNT), scenes.views(), config)


def test_every_slot_is_in_one_piece_of_its_tile():
    rng = np.random.default_rng(0)
    counts = rng.choice([0, 1, 3, 127, 128, 129, 500], 40)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    slots = int(offsets[-1]) + 77
    zero = jnp.zeros(slots, jnp.int32)
    bins = bin.Bins(zero, zero, zero, zero, zero, jnp.asarray(offsets), jnp.int32(slots))
    pieces = tpu.cut(bins)
    total, tile = int(pieces.total), np.full(slots, -1)
    ends, fresh = 0, []
    for block, owner, word in zip(*(np.asarray(part[:total]) for part in pieces[:3]), strict=True):
        low, high = word & 255, word >> mosaic.HIGH & 255
        assert 0 <= low < high <= mosaic.K
        at = block * mosaic.K + np.arange(low, high)
        assert (tile[at] == -1).all()
        assert bool(word >> mosaic.BEGINS & 1) == (at[0] == offsets[owner])
        assert bool(word >> mosaic.ENDS & 1) == (at[-1] == offsets[owner + 1] - 1)
        tile[at] = owner
        ends += word >> mosaic.ENDS & 1
        fresh += [block] if word >> mosaic.FRESH & 1 else []
    np.testing.assert_array_equal(tile[: offsets[-1]], np.repeat(np.arange(40), counts))
    assert (tile[offsets[-1] :] == -1).all()
    assert ends == (counts > 0).sum()
    np.testing.assert_array_equal(fresh, np.unique(np.arange(offsets[-1]) // mosaic.K))


def test_take_gathers_columns():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(mosaic.ROWS, 3000)).astype(np.float32)
    index = rng.integers(0, 3000, 2500).astype(np.int32)
    with mock.patch.object(tpu, "WINDOW", 1024):
        found = jax.jit(tpu.take)(array, index)
    np.testing.assert_array_equal(found[:, :2500], array[:, index])


def test_running_sums_start_anew_at_every_head():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(mosaic.ROWS, 2048)).astype(np.float32)
    head = np.zeros(2048, np.float32)
    head[np.cumsum(rng.choice([1, 2, 100, 300], 40)) % 2048] = 1
    true, total = np.zeros(values.shape), np.zeros(mosaic.ROWS)
    for i in range(2048):
        total = np.where(head[i], 0, total) + values[:, i]
        true[:, i] = total
    found = jax.jit(tpu._run_sums)(head, values)
    np.testing.assert_allclose(found, true, rtol=1e-5, atol=1e-5)


def test_what_the_kernels_do_not_take():
    tiles = bin.tiling(1, 8, 8)
    one = jnp.zeros(1, jnp.int32)
    bins = bin.Bins(one, one, one, one, one, jnp.zeros(2, jnp.int32), jnp.int32(0))
    with pytest.raises(ValueError, match="6 channels, not 7"):
        tpu.composite(tiles, (jnp.zeros(1),) * 13, bins)
    with target.traced_for("gpu"), pytest.raises(ValueError, match="for TPUs, not for gpu"):
        tpu.composite(tiles, (jnp.zeros(1),) * 10, bins)


def test_auto_does_not_choose_them():
    for platform in ("cpu", "tpu"):
        with target.traced_for(platform):
            assert rasterize.compositing(replace(CONFIG, compositing="auto")) == "xla"
            assert rasterize.compositing(replace(CONFIG, compositing="pallas")) == "pallas"
