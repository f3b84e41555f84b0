"""The mesh, the rule for weights, and placing batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from v3d_jax import errors
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import multihost, sharding


@pytest.mark.parametrize(("fsdp", "shape"), [(1, (8, 1)), (2, (4, 2)), (8, (1, 8))])
def test_mesh(fsdp, shape):
    mesh = meshes.make(meshes.MeshConfig(fsdp))
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp")
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_devices_must_divide(fsdp):
    with pytest.raises(errors.UserError, match="8 devices"):
        meshes.make(meshes.MeshConfig(fsdp))


@pytest.mark.parametrize(
    ("shape", "fsdp", "expected"),
    [
        ((3, 3, 64, 128), 4, PartitionSpec(None, None, None, "fsdp")),
        ((3, 3, 128, 64), 4, PartitionSpec(None, None, "fsdp")),
        ((128, 128), 4, PartitionSpec(None, "fsdp")),  # of equals the last
        ((128, 130), 4, PartitionSpec("fsdp")),  # the largest does not divide
        ((129, 131), 4, PartitionSpec()),
        ((128, 128), 1, PartitionSpec()),
        ((), 4, PartitionSpec()),
    ],
)
def test_rule(shape, fsdp, expected):
    assert sharding.rule(shape, fsdp, small=0) == expected


def test_small_weights_are_repeated():
    assert sharding.rule((2**8, 2**7), 4, small=2**15 + 1) == PartitionSpec()
    assert sharding.rule((2**8, 2**7), 4, small=2**15) == PartitionSpec("fsdp")


def test_batches_are_split_over_all_devices_and_weights_are_not_changed():
    mesh = meshes.make(meshes.MeshConfig(2))
    local = {"frames": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3), "index": np.arange(16)}
    batch = sharding.put_batch(local, mesh)
    for name, leaf in batch.items():
        assert len(leaf.addressable_shards) == 8
        assert leaf.addressable_shards[0].data.shape[0] == 2
        np.testing.assert_array_equal(leaf, local[name])
    weights = {"kernel": np.arange(24.0, dtype=np.float32).reshape(4, 6)}
    for placements in (
        sharding.replicated(mesh),
        sharding.weights(weights, mesh, small=0),
    ):
        placed = sharding.put(weights, placements)
        np.testing.assert_array_equal(placed["kernel"], weights["kernel"])
    assert placed["kernel"].addressable_shards[0].data.shape == (4, 3)


def test_one_process_agrees_with_itself_and_gathers():
    assert multihost.is_main()
    assert multihost.any_process(True)
    assert not multihost.any_process(False)
    assert isinstance(multihost.to_host({"a": jnp.ones(2)})["a"], np.ndarray)
    multihost.initialize(multihost.MultihostConfig())  # nothing to join


def test_half_an_address_is_refused():
    with pytest.raises(errors.UserError, match="belong together"):
        multihost.initialize(multihost.MultihostConfig(coordinator="localhost:1"))
