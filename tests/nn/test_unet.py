"""The UNet: stored outputs of the published network, sizes, and what images among clips see."""

import dataclasses

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import unet

# One level, with its only transformer in the middle.
SMALL = unet.UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    head_channels=16,
    context_dim=6,
    vector_dim=10,
)
CLIPS, IMAGES = jnp.zeros((2, 3), bool), jnp.ones((2, 3), bool)


def abstract(config: unet.UNetConfig) -> unet.VideoUNet:
    return nnx.eval_shape(lambda: unet.VideoUNet(config, rngs=nnx.Rngs(0)))


def inputs(size=4, dtype=jnp.float32):
    """Two clips of three frames with two tokens a frame."""
    shapes = ((2, 3, size, size, 8), (2, 3), (2, 3, 2, 6), (2, 3, 10))
    return [jnp.asarray(fixtures.draw(seed, s), dtype) for seed, s in enumerate(shapes)]


@pytest.fixture(scope="module")
def published():
    return fixtures.filled_unet()


@pytest.mark.golden
@pytest.mark.parametrize(
    ("tokens", "image_only", "expected"),
    [
        pytest.param(
            (2, (6, 1, 16)),
            False,
            fixtures.Summary(
                -0.180733,
                0.579873,
                0.485741,
                (0.14181, 0.37563, 0.81882, 0.48257),
                (0.28669, 0.64011, -0.1497),
            ),
            id="clips",
        ),
        pytest.param(
            (2, (6, 1, 16)),
            True,
            fixtures.Summary(
                -0.247185,
                0.568151,
                0.490746,
                (0.01124, 0.4078, 0.84818, 0.61823),
                (1.1125, 0.53772, 0.03728),
            ),
            id="images",
        ),
        pytest.param(
            (4, (6, 2, 16)),
            False,
            fixtures.Summary(
                -0.250589,
                0.545417,
                0.478870,
                (-0.31531, -0.04178, 0.22937, 0.37281),
                (0.5808, 0.72826, -0.08701),
            ),
            id="two-tokens",
        ),
    ],
)
def test_equals_the_published_network(published, tokens, image_only, expected):
    graphdef, params = published
    context = jnp.asarray(fixtures.draw(*tokens)).reshape(2, 3, -1, 16)
    out = fixtures.forward(graphdef)(
        params,
        fixtures.channels_last(fixtures.draw(1, (6, 8, 8, 8)), clips=2),
        jnp.asarray([[0.5] * 3, [-1.25] * 3]),
        context,
        jnp.asarray(fixtures.draw(3, (6, 24))).reshape(2, 3, 24),
        jnp.full((2, 3), image_only),
    )
    fixtures.assert_summary(out, expected)


def test_full_size_has_the_published_parameters():
    state = nnx.to_flat_state(nnx.state(abstract(unet.UNetConfig())))
    sizes = {path: leaf.size for path, leaf in state}
    temporal = {"temporal", "frame_embed", "mix"}
    assert len(sizes) == 1428
    assert sum(sizes.values()) == 1_524_623_082
    assert sum(n for path, n in sizes.items() if temporal & set(path)) == 656_076_838
    assert sum(path[-1] == "mix_factor" for path in sizes) == 38


def test_full_size_runs_on_512_pixels_by_shape():
    graphdef, params = nnx.split(abstract(unet.UNetConfig()))
    shapes = ((2, 18, 64, 64, 8), (2, 18), (2, 1, 1, 1024), (2, 18, 768))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    out = jax.eval_shape(lambda p, *a: nnx.merge(graphdef, p)(*a), params, *args)
    assert out.shape == (2, 18, 64, 64, 4)


@pytest.fixture(scope="module")
def small():
    graphdef, params = fixtures.filled_unet(SMALL)
    return fixtures.forward(graphdef), params


def test_a_fresh_network_predicts_zero(small):
    graphdef, _ = nnx.split(abstract(SMALL))
    params = fixtures.jit(lambda: nnx.state(unet.VideoUNet(SMALL, rngs=nnx.Rngs(0))))()
    assert not np.any(small[0](params, *inputs(), CLIPS))
    # Zero because the last layer of every part is, not because signals vanish.
    block = nnx.merge(graphdef, params).mid1
    for layer in (block.res.spatial.conv2, block.res.temporal.conv2, block.attn.proj_out):
        assert not np.any(layer.kernel[...])
    assert np.any(block.attn.temporal.attn1.to_out.kernel[...])
    assert np.any(block.attn.temporal.ff.out.kernel[...])


def test_images_see_nothing_of_other_frames(small):
    run, params = small
    x, *conditioning = inputs()
    changed = x.at[:, 1].add(1.0)
    for image_only, independent in ((IMAGES, True), (CLIPS, False)):
        before, after = (run(params, y, *conditioning, image_only) for y in (x, changed))
        difference = np.abs(before - after).max(axis=(0, 2, 3, 4))
        assert difference[1] > 1e-2
        others = difference[np.asarray([0, 2])]
        assert np.all(others == 0.0) if independent else np.all(others > 1e-3)


def test_an_image_gives_the_same_alone_as_in_a_clip(small):
    run, params = small
    batched = run(params, *inputs(), IMAGES)
    frames = [y.reshape(6, 1, *y.shape[2:]) for y in inputs()]
    alone = run(params, *frames, jnp.ones((6, 1), bool))
    np.testing.assert_allclose(batched.reshape(alone.shape), alone, atol=2e-5)


def test_shared_conditioning_is_the_same_as_repeated(small):
    run, params = small
    x, noise, context, vector = inputs()
    context, vector = context[:, :1], vector[:, :1]
    shared = run(params, x, noise, context, vector)
    repeated = run(params, x, noise, jnp.repeat(context, 3, 1), jnp.repeat(vector, 3, 1), CLIPS)
    np.testing.assert_allclose(shared, repeated, atol=2e-5)


def test_answers_of_one_token_stand_for_it(small):
    """Of a token a frame and of one shared by the clip, to the bit."""
    run, params = small
    graphdef, _ = nnx.split(abstract(SMALL))
    answer = fixtures.jit(lambda p, c: nnx.merge(graphdef, p).answers(c))
    x, noise, tokens, vector = inputs()
    for context in (tokens[:, :, :1], tokens[:, :1, :1]):
        answers = answer(params, context)
        assert [one is not None for one in answers] == [False, True, False, False, False]
        assert answers[1].spatial.value.shape == (2, context.shape[1], 1, 32)
        assert answers[1].temporal.value.shape == (2, 1, 1, 32)
        hoisted = run(params, x, noise, answers, vector)
        np.testing.assert_allclose(hoisted, run(params, x, noise, context, vector), atol=1e-6)
    assert np.abs(hoisted - run(params, x, noise, answer(params, -context), vector)).max() > 1e-2


def compile_gradient(config, params, args, dtype=jnp.float32):
    """Loss and gradient of a network, compiled."""
    net = nnx.eval_shape(lambda: unet.VideoUNet(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(net)

    def loss(params, *args):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(*args).astype(jnp.float32)))

    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, *args)
    return lowered.compile(compiler_options=fixtures.KEEP_BARRIERS)


def distance(tree, other) -> float:
    """Norm of the difference of two trees over the norm of the second."""
    ours, theirs = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]) for x in (tree, other)
    )
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_bfloat16_activations_keep_float32_parameters_and_finite_gradients(small):
    run, params = small
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    args = (*inputs(), CLIPS)
    loss, grads = compile_gradient(SMALL, params, args, jnp.bfloat16)(params, *args)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(loss, np.mean(np.square(run(params, *args))), rtol=0.05)


@pytest.mark.slow
def test_gradients_agree_across_settings_and_remat_takes_less_memory(small):
    params, args = small[1], inputs(size=16)
    plain, remat, dots, half = (
        compile_gradient(dataclasses.replace(SMALL, remat=remat), params, args, dtype)
        for remat, dtype in (
            (False, jnp.float32),
            ("blocks", jnp.float32),
            ("dots", jnp.float32),
            (False, jnp.bfloat16),
        )
    )
    loss, want = plain(params, *args)
    for run, tolerance in ((remat, 1e-4), (dots, 1e-4), (half, 0.1)):
        other, got = run(params, *args)
        np.testing.assert_allclose(other, loss, rtol=tolerance)
        assert distance(got, want) < tolerance
    used = [x.memory_analysis().temp_size_in_bytes for x in (plain, dots, remat)]
    # What is left is the middle transformer, a large part of so small a network.
    assert used[2] < 0.75 * used[0]
    assert used[2] < used[1] < used[0]


def test_bfloat16_activations_reach_every_block():
    net = nnx.eval_shape(lambda: unet.VideoUNet(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(net)
    args = inputs(dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda p, *a: nnx.merge(graphdef, p)(*a))(params, *args)
    heavy = [
        eqn.outvars[0].aval.dtype
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]
    assert len(heavy) == 2 + 4 * 5
    assert set(heavy) == {jnp.dtype(jnp.bfloat16)}


def test_refuses_latents_that_do_not_halve():
    config = dataclasses.replace(SMALL, channel_mult=(1, 1))

    def run(*args):
        return unet.VideoUNet(config, rngs=nnx.Rngs(0))(*args)

    with pytest.raises(ValueError, match="do not divide by 2"):
        jax.eval_shape(run, *inputs(size=5))


def test_a_widened_network_ignores_the_new_channels(small):
    run, params = small
    wide = unet.widen(params, 136)
    graphdef, wanted = nnx.split(abstract(dataclasses.replace(SMALL, in_channels=136)))
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), x) for x in (wide, wanted)]
    assert shapes[0] == shapes[1]
    x, *conditioning = inputs()
    want = run(params, x, *conditioning)
    for scale in (0.0, 1.0, 1e3):
        features = scale * jnp.asarray(fixtures.draw(9, (*x.shape[:-1], 128)))
        x_wide = jnp.concatenate([x, features], axis=-1)
        out = fixtures.forward(graphdef)(wide, x_wide, *conditioning)
        np.testing.assert_allclose(out, want, atol=2e-5)


def test_only_networks_can_be_widened(small):
    with pytest.raises(ValueError, match=r"no conv_in\.kernel"):
        unet.widen({"unet": small[1]}, 136)
