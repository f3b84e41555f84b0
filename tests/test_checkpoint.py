"""Checkpoints: to the bit, onto another mesh, a part alone, and in small files."""

import contextlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from v3d_jax import checkpoint, errors, state
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import sharding

OPTIMIZER = state.optimizer(state.OptimConfig())
MIB = 2**20


def loss(params, frozen, batch, key):
    del frozen, batch
    leaves = jax.tree.leaves(params)
    noise = jax.random.normal(key, ())
    return sum(jnp.sum(jnp.square(leaf - noise)) for leaf in leaves), {}


def fresh(rows: int = 64) -> state.TrainState:
    # Integer keys and a tuple inside are what models and optimisers have.
    values = jax.random.normal(jax.random.key(0), (rows, 256))
    return state.create({"blocks": {0: values, 1: values[0]}, "scale": jnp.ones(())}, OPTIMIZER)


def abstract(devices: int = 1, fsdp: int = 1, rows: int = 64) -> state.TrainState:
    shapes = jax.eval_shape(lambda: fresh(rows))
    mesh = meshes.make(meshes.MeshConfig(fsdp), jax.devices()[:devices])
    return checkpoint.abstract_like(shapes, sharding.weights(shapes, mesh, small=0))


@pytest.fixture
def step():
    return jax.jit(
        lambda begun: state.train_step(
            loss, OPTIMIZER, 0.9, begun, None, None, jax.random.key(1), jnp.asarray(1e-4)
        ),
        donate_argnums=0,
    )


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def test_a_state_comes_back_to_the_bit_though_its_buffers_were_donated(tmp_path, step):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        assert saved.latest is None
        current, _ = step(fresh())
        expected = host(current)
        saved.save(current, {"global_next_index": 8})
        for _ in range(3):
            current, _ = step(current)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        assert saved.latest == 1
        restored = saved.restore(abstract())
        assert restored.loader == {"global_next_index": 8}
        assert_equal(restored.state, expected)
        # What was restored can be donated and gives what the unbroken run gave.
        resumed = restored.state
        for _ in range(3):
            resumed, _ = step(resumed)
    assert_equal(resumed, current)


def test_restores_onto_another_mesh_and_the_average_alone(tmp_path, step):
    current, _ = step(fresh())
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        saved.save(current, {"global_next_index": 1})
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        target = abstract(devices=8, fsdp=4)
        restored = saved.restore(target).state
        assert_equal(restored, current)
        kernel = restored.params["blocks"][0]
        assert len(kernel.sharding.device_set) == 8
        assert kernel.addressable_shards[0].data.shape == (64, 64)
        assert_equal(saved.restore_ema(target.ema), current.ema)


def test_keeps_the_last_ones(tmp_path, step):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=2)) as saved:
        current = fresh()
        for count in (1, 2, 3):
            current, _ = step(current)
            saved.save(current, {"global_next_index": count})
            saved.save(current, {"global_next_index": count})  # the same step: nothing to do
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["2", "3"]


@pytest.mark.parametrize("part", ["ema/d", "params/ocdbt.process_0/d"])
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_good(tmp_path, step, part):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        first, _ = step(fresh())
        kept = host(first)
        saved.save(first, {"global_next_index": 1})
        second, _ = step(first)
        saved.save(second, {"global_next_index": 2})
    for file in (tmp_path / "2" / part).iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    # Found before any array is read: what Orbax leaves of a failed reading is reported much later.
    found = rf"^checkpoint 2 cannot be read \({part}/\w+ has \d+ bytes, not the \d+ of its index\)"
    with (
        contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved,
        pytest.raises(errors.UserError, match=found) as caught,
    ):
        saved.restore(abstract())
    message = str(caught.value)
    assert message.endswith(f": remove {tmp_path / '2'} to go on from checkpoint 1")
    assert "\n" not in message
    shutil.rmtree(tmp_path / "2")
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        assert_equal(saved.restore(abstract()).state, kept)


def test_every_level_of_an_index_is_looked_through(tmp_path, monkeypatch):
    store = tensorstore.KvStore.open(
        {
            "driver": "ocdbt",
            "base": f"{tmp_path.as_uri()}/",
            "config": {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 8},
        }
    ).result()
    with tensorstore.Transaction() as writing:
        for count in range(40):
            store.with_transaction(writing)[f"array{count}"] = bytes(40)
    looked = []
    monkeypatch.setattr(checkpoint, "_check_reference", lambda _, found: looked.append(found))
    checkpoint._check_files(tmp_path)
    kinds = [found.split(":")[0] for found in looked]
    assert kinds.count("value") == 40
    assert kinds.count("btreenode") > 4


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, step):
    first, _ = step(fresh())
    kept = host(first)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        saved.save(first, {"global_next_index": 1})
    saved = checkpoint.Checkpoints(tmp_path)
    second, _ = step(first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # no file may become larger

    def save_and_wait():
        saved.save(second, {"global_next_index": 2})
        saved.close()

    try:
        with pytest.raises(errors.UserError, match=r"^cannot write a checkpoint to ") as caught:
            save_and_wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).endswith("the run goes on from checkpoint 1")
    assert "\n" not in str(caught.value)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        assert saved.latest == 1
        assert_equal(saved.restore(abstract()).state, kept)


def test_files_stay_small(tmp_path):
    large = fresh(rows=3 * 2**14)._replace(opt_state=jnp.ones(1))  # 48 MiB of noise a copy
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        saved.save(large, {"global_next_index": 0})
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(sizes) > 80 * MIB
    assert max(sizes) <= 12 * MIB


def test_errors_name_the_arrays(tmp_path, step):
    current, _ = step(fresh())
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        with pytest.raises(errors.UserError, match="no checkpoint"):
            saved.restore(abstract())
        saved.save(current, {"global_next_index": 0})
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        with pytest.raises(errors.UserError, match=r"blocks\.0 is \(64, 256\), .* \(32, 256\)"):
            saved.restore(abstract(rows=32))
        target = abstract()
        wrong = target._replace(params={**target.params, "more": target.params["scale"]})
        with pytest.raises(errors.UserError, match="more is missing"):
            saved.restore(wrong)
        with pytest.raises(errors.UserError, match="no checkpoint 7"):
            saved.restore(target, step=7)
