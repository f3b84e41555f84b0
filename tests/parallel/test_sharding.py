"""The mesh, the rule for weights, and placing batches."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from v3d_jax import errors, state
from v3d_jax.nn import layers
from v3d_jax.ops import target
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import multihost, program, sharding


@pytest.mark.parametrize(
    ("fsdp", "frames", "shape"),
    [(1, 1, (8, 1, 1)), (2, 1, (4, 2, 1)), (8, 1, (1, 8, 1)), (2, 2, (2, 2, 2)), (1, 8, (1, 1, 8))],
)
def test_mesh(fsdp, frames, shape):
    mesh = meshes.make(meshes.MeshConfig(fsdp, frames=frames))
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp", "frames")
    assert meshes.clips(mesh) == 8 // frames
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("fsdp", "frames", "groups"),
    [(0, 1, "0"), (3, 1, "3"), (16, 1, "16"), (1, 0, "1 x 0"), (2, 3, "2 x 3 .fsdp x frames."),
     (4, 4, "4 x 4")],
)  # fmt: skip
def test_devices_must_divide(fsdp, frames, groups):
    with pytest.raises(
        errors.UserError, match=f"8 devices cannot be split into groups of {groups}"
    ):
        meshes.make(meshes.MeshConfig(fsdp, frames=frames))


def test_frames_of_a_clip_lie_in_one_process(monkeypatch):
    class Elsewhere:
        def __init__(self, index):
            self.process_index = index // 4

    groups = np.array([Elsewhere(index) for index in range(8)]).reshape(1, 1, 8)
    mesh = SimpleNamespace(devices=groups)
    monkeypatch.setattr(jax, "make_mesh", lambda *args, **settings: mesh)
    with pytest.raises(errors.UserError, match="on 8 devices would lie in several processes"):
        meshes.make(meshes.MeshConfig(frames=8))


@pytest.mark.parametrize(
    ("clips", "accumulate", "frames", "message"),
    [
        (6, 1, 4, "6 clips cannot be split over 4 groups of 2 devices: .* a multiple of 4"),
        (12, 2, 4, "12 clips in 2 parts cannot be split .* a multiple of 8"),
        (8, 1, 9, "9 frames cannot be split over 2 devices"),
    ],
)
def test_batches_must_divide(clips, accumulate, frames, message):
    mesh = meshes.make(meshes.MeshConfig(2, frames=2))
    sharding.check_batch(mesh, 8, 2, 4)
    with pytest.raises(errors.UserError, match=message):
        sharding.check_batch(mesh, clips, accumulate, frames)
    plain = meshes.make(meshes.MeshConfig(2))
    with pytest.raises(errors.UserError, match="over 8 devices: choose"):
        sharding.check_batch(plain, 12, 1, 9)


def test_a_network_is_split_by_clip_and_frame_where_there_is_a_mesh():
    x = jnp.arange(4 * 2 * 3, dtype=jnp.float32).reshape(4, 2, 1, 1, 3)

    def double(x):
        return sharding.split_clips(lambda x: 2 * x)(x)

    mesh = meshes.make(meshes.MeshConfig(2, frames=2))
    placed = sharding.put(x, sharding.replicated(mesh))
    split = jax.jit(sharding.on_mesh(double, mesh))(placed)
    assert split.sharding.shard_shape(split.shape) == (1, 1, 1, 1, 3)
    np.testing.assert_array_equal(split, 2 * x)
    assert double(x).shape == x.shape  # without a mesh nothing is pinned


def test_devices_gather_kernels_and_no_activations():
    """Two layers of split kernels: only their four arrays are gathered, and gradients are split."""
    mesh = meshes.make(meshes.MeshConfig(8))
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal(shape, np.float32) / 16 for shape in ((256, 512), (512, 256))]
    x = rng.standard_normal((16, 5, 256), np.float32)

    def loss(kernels, x):
        h = jnp.tanh(x @ sharding.whole(kernels[0]))
        return jnp.mean((h @ sharding.whole(kernels[1])) ** 2)

    step = jax.value_and_grad(loss)
    placements = sharding.weights(kernels, mesh)
    assert placements[0].spec == PartitionSpec(None, "fsdp")
    sharded = jax.jit(
        sharding.on_mesh(step, mesh),
        in_shardings=(placements, sharding.batch(mesh)),
        out_shardings=(sharding.replicated(mesh), placements),
    )
    text = sharded.lower(kernels, x).compile().as_text()
    gathered = set(re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text))
    assert gathered == {"256,512", "512,256"}
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    value, grads = sharded(kernels, x)
    expected_value, expected = step(kernels, x)  # without a mesh nothing is gathered
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for got, wanted in zip(grads, expected, strict=True):
        assert got.addressable_shards[0].data.size == 256 * 512 // 8
        np.testing.assert_allclose(got, wanted, atol=1e-7)


def test_gradients_on_gpus_are_laid_out_where_they_lie():
    """Each kernel is gathered once, and no gradient is."""
    mesh = meshes.make(meshes.MeshConfig(8))
    kernel = np.random.default_rng(0).standard_normal((256, 512), np.float32) / 16
    x = np.random.default_rng(1).standard_normal((16, 256), np.float32)
    key = jax.random.key(0)

    def loss(kernel, frozen, x, key):
        del frozen, key
        return jnp.mean((x @ sharding.whole(kernel)) ** 2), {}

    placement, everywhere = sharding.weights(kernel, mesh), sharding.replicated(mesh)
    step = jax.jit(
        sharding.on_mesh(functools.partial(state.gradients, loss, placements=placement), mesh),
        in_shardings=(placement, None, sharding.batch(mesh), everywhere),
        out_shardings=(everywhere, everywhere, placement),
    )
    with target.traced_for("cuda"):
        compiled = step.lower(kernel, None, x, key).compile()
    gathers = [one for one in program.collectives(compiled.as_text()) if one.kind == "all-gather"]
    assert gathers == [program.Collective("all-gather", 1, 256 * 512 * 4)]
    expected = jax.grad(lambda kernel: jnp.mean((x @ kernel) ** 2))(kernel)
    np.testing.assert_allclose(compiled(kernel, None, x, key)[2], expected, atol=1e-7)


def test_what_a_feed_forward_computes_again_gathers_nothing():
    mesh = meshes.make(meshes.MeshConfig(8))
    abstract = nnx.eval_shape(lambda: layers.FeedForward(256, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract)

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x) ** 2)

    placements = sharding.weights(params, mesh)
    step = jax.jit(
        sharding.on_mesh(jax.grad(loss), mesh),
        in_shardings=(placements, sharding.batch(mesh)),
        out_shardings=placements,
    )
    compiled = step.lower(params, jax.ShapeDtypeStruct((16, 5, 256), jnp.float32)).compile()
    gathers = [one for one in program.collectives(compiled.as_text()) if one.kind == "all-gather"]
    assert gathers == [program.Collective("all-gather", 2, 12 * 256 * 256 * 4)]


@pytest.mark.parametrize(("fsdp", "frames", "seen"), [(2, 1, 2), (8, 1, 2), (2, 2, 16), (1, 8, 16)])
def test_clips_are_treated_where_they_lie_unless_devices_share_one(fsdp, frames, seen):
    mesh = meshes.make(meshes.MeshConfig(fsdp, frames=frames))
    clips = jnp.arange(16.0 * 8).reshape(16, 8)
    shapes = []

    def total(a, b):
        shapes.append(a.shape)
        return a + b.sum(1, keepdims=True)

    step = jax.jit(sharding.on_mesh(lambda a, b: sharding.each_clip(total, a, b), mesh))
    placed = sharding.put_batch(clips, mesh)
    got = step(placed, placed)
    assert shapes == [(seen, 8)]
    np.testing.assert_array_equal(got, clips + clips.sum(1, keepdims=True))
    np.testing.assert_array_equal(sharding.each_clip(total, clips, clips), got)
    assert shapes[-1] == (16, 8)


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
