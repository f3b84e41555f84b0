"""Work and communication of programs, against what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from v3d_jax.nn import layers
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import program, sharding
from v3d_jax.parallel.program import Collective

TEXT = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[8,128]) -> bf16[64,128] {
  ROOT %all-gather.9 = bf16[64,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
}

%again (p: bf16[8,128]) -> bf16[64,128] {
  ROOT %all-gather.10 = bf16[64,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
}

%turn (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %all-reduce.1 = f32[16]{0} all-reduce(%x), to_apply=%add
  ROOT %next = (s32[], f32[16]{0}) tuple(%i, %all-reduce.1)
}

%less (t: (s32[], f32[16])) -> pred[] {
  ROOT %is = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[16], w: bf16[8,128]) -> f32[16] {
  %loop = (s32[], f32[16]{0}) while(%begin), condition=%less, body=%turn, TRIPS
  %begun = ((bf16[8,128]), bf16[64,128], s32[]) async-start(%w), calls=%wrapped
  %kernel = f32[16] custom-call(%x), backend_config={"body": {
}, "needs_layout_passes": true}
  %ended = bf16[64,128] async-done(%begun), calls=%again
  %permute = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[], u32[]) collective-permute-start(%y)
  %gather = (f32[2]{0}, f32[16]{0}) all-gather-start(%z), dimensions={0}
  %both = (f32[3]{0}, pred[10]{0}) all-reduce(%u, %v), to_apply=%add
  ROOT %done = f32[16] get-tuple-element(%loop), index=1
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_collectives_are_counted_with_their_results_and_loops_a_turn():
    assert program.collectives(TEXT) == [
        Collective("all-gather", 2, 64 * 128 * 2 + 16 * 4),
        Collective("all-reduce", 5 + 1, 5 * 16 * 4 + 3 * 4 + 10),
        Collective("collective-permute", 1, 4 * 2 * 4),
    ]
    assert program.collectives("HloModule nothing\n\nENTRY %main () -> f32[] {\n}\n") == []


def test_collectives_of_a_compiled_program():
    """Eight devices sum a matrix whose rows they share: one sum of the result's size."""
    mesh = meshes.make(meshes.MeshConfig())
    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    step = jax.jit(lambda x: jnp.sum(x, axis=0), in_shardings=rows, out_shardings=whole)
    text = step.lower(jax.ShapeDtypeStruct((16, 256), jnp.float32)).compile().as_text()
    assert program.collectives(text) == [Collective("all-reduce", 1, 256 * 4)]


def flops(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return program.flops(jax.jit(function).trace(*arguments).jaxpr)


PRODUCT = 2 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (lambda x, w: x @ w, 1),
        (lambda x, w: jax.lax.scan(lambda c, _: (c + x @ w, None), 0 * x @ w, length=5)[0], 6),
        (lambda x, w: jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1))(x, w), 3),
        # With the product computed again.
        (lambda x, w: jax.grad(jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(x @ w))))(x, w), 3),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((8, 32))), 1),
    ],
)
def test_flops_of_products(function, times):
    assert flops(function, (8, 16), (16, 32)) == times * PRODUCT


def test_flops_of_convolutions_and_of_their_gradients():
    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    one = 2 * (4 * 8 * 8 * 7) * (3 * 3 * 5)
    assert flops(conv, (4, 8, 8, 5), (3, 3, 5, 7)) == one

    def gradient(x, w):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w))), (0, 1))(x, w)

    assert flops(gradient, (4, 8, 8, 5), (3, 3, 5, 7)) == pytest.approx(3 * one, rel=0.01)


def test_flops_of_devices_that_share_add_up():
    mesh = meshes.make(meshes.MeshConfig())
    spec = PartitionSpec("data")
    shared = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    assert flops(shared, (8, 16), (16, 32)) == PRODUCT


def test_bytes_of_a_device():
    mesh = meshes.make(meshes.MeshConfig(fsdp=4))
    tree = {"w": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16), "b": np.zeros(3, np.float32)}
    placements = {
        "w": NamedSharding(mesh, PartitionSpec(None, "fsdp")), "b": sharding.replicated(mesh)
    }  # fmt: skip
    assert program.bytes_per_device(tree, placements) == 8 * 4 * 2 + 3 * 4


def test_dots_keep_products_and_blocks_do_not():
    """What is computed again, by name of the policy: 2 products a block forward, 4 backward."""
    from flax import nnx

    block = layers.MLP(8, 8, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(block)

    def products(remat):
        def loss(params, x):
            return jnp.sum(layers.call(nnx.merge(graphdef, params), jnp.sin(x), remat=remat) ** 2)

        gradient = jax.jit(jax.grad(loss, (0, 1))).trace(params, jnp.ones((4, 8)))
        return program.flops(gradient.jaxpr) / (2 * 4 * 8 * 8)

    assert products("none") == products("dots") == 6
    assert products("blocks") > 6
    assert products(True) == products("blocks")
