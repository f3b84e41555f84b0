import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import clip, generator

TINY = clip.VisionConfig(
    image_size=8, patch=4, width=12, layers=2, heads=3, mlp=20, output_dim=5, preprocess="plain"
)


def build(config, dtype=jnp.float32):
    return clip.VisionTransformer(config, dtype=dtype, rngs=nnx.Rngs(0))


def changed(model, dtype=jnp.float32, **settings):
    """The same weights under other settings."""
    config = dataclasses.replace(TINY, **settings)
    abstract = nnx.eval_shape(lambda: build(config, dtype))
    return nnx.merge(nnx.graphdef(abstract), nnx.state(model))


run = jax.jit(lambda model, x: model(x))


def images(*shape):
    return jax.random.uniform(jax.random.key(1), (*shape, 3), minval=-1.0, maxval=1.0)


def numpy_tower(model, x):
    """The tower written out in float64 for one preprocessed image."""
    config = model.config
    params = nnx.to_pure_dict(nnx.state(model))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(p, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def linear(p, x):
        return x @ p["kernel"] + p.get("bias", 0.0)

    erf = np.vectorize(math.erf)
    size, patch = config.image_size, config.patch
    patches = [
        x[i : i + patch, j : j + patch].ravel()
        for i in range(0, size, patch)
        for j in range(0, size, patch)
    ]
    tokens = np.stack(patches) @ params["patch_embed"]["kernel"]
    tokens = np.concatenate([params["class_embedding"][None], tokens])
    tokens = norm(params["norm_pre"], tokens + params["position_embedding"])
    for i in range(config.layers):
        p = params["blocks"][i]
        y = norm(p["norm1"], tokens)
        q, k, v = (linear(p["attn"][name], y) for name in ("to_q", "to_k", "to_v"))
        heads = []
        for a, b, c in zip(*(np.split(m, config.heads, -1) for m in (q, k, v)), strict=True):
            weights = np.exp(a @ b.T / np.sqrt(a.shape[-1]))
            heads.append(weights / weights.sum(-1, keepdims=True) @ c)
        tokens = tokens + linear(p["attn"]["to_out"], np.concatenate(heads, -1))
        y = linear(p["linear1"], norm(p["norm2"], tokens))
        tokens = tokens + linear(p["linear2"], 0.5 * y * (1 + erf(y / np.sqrt(2))))
    return norm(params["norm_post"], tokens) @ params["proj"]["kernel"]


def test_full_size_has_the_published_parameters():
    model = nnx.eval_shape(lambda: build(clip.VisionConfig()))
    assert generator.num_parameters(model) == 632_076_800
    assert clip.VisionConfig().num_patches == 256
    output = jax.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((2, 512, 512, 3), "f4"))
    assert output.shape == (2, 1, 1024)


def test_equals_the_tower_written_out():
    model, x = build(TINY), images(2, 8, 8)
    pooled, tokens = (run(changed(model, output=kind), x) for kind in ("pooled", "tokens"))
    for i in range(2):
        expected = numpy_tower(model, np.asarray(x[i], np.float64))
        np.testing.assert_allclose(pooled[i], expected[:1], atol=2e-5)
        np.testing.assert_allclose(tokens[i], expected[1:], atol=2e-5)


def test_plain_preprocessing_resizes_any_image():
    model = build(TINY)
    assert model.preprocess(images(2, 31, 17)).shape == (2, 8, 8, 3)
    x = images(1, 8, 8)
    np.testing.assert_allclose(model.preprocess(x), x, atol=1e-6)


def test_clip_preprocessing_normalises():
    model = build(dataclasses.replace(TINY, preprocess="clip"))
    grey = model.preprocess(jnp.full((1, 30, 20, 3), -0.5))
    expected = (0.25 - np.array(clip.CLIP_MEAN)) / np.array(clip.CLIP_STD)
    np.testing.assert_allclose(grey, np.broadcast_to(expected, (1, 8, 8, 3)), atol=1e-5)


def test_remat_changes_nothing_and_bfloat16_stays_close():
    plain, x = build(TINY), images(1, 8, 8)

    @jax.jit
    @jax.grad
    def gradient(model):
        return jnp.sum(jnp.square(model(x)))

    a, b = gradient(plain), gradient(changed(plain, remat=True))
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    half = run(changed(plain, jnp.bfloat16), x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), run(plain, x), atol=0.1)


@pytest.mark.parametrize("change", [{"image_size": 9}, {"heads": 5}])
def test_sizes_that_do_not_divide_are_errors(change):
    with pytest.raises(ValueError, match="do not divide"):
        dataclasses.replace(TINY, **change)
