import jax
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import clip as nn_clip
from v3d_jax.weights import clip, keymap

TINY = nn_clip.VisionConfig(
    image_size=8, patch=4, width=6, layers=2, heads=2, mlp=10, output_dim=5, preprocess="plain"
)


@pytest.fixture
def params():
    return nnx.state(nn_clip.VisionTransformer(TINY, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("layout", [clip.open_clip, clip.transformers])
def test_there_and_back(params, layout):
    tensors = keymap.write(layout(TINY), params)
    back = keymap.read(layout(TINY), tensors, params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)


def test_both_layouts_hold_the_same_layers(params):
    """OpenCLIP stacks q, k and v, and stores the last projection as a matrix."""
    first = keymap.write(clip.open_clip(TINY), params)
    second = keymap.write(clip.transformers(TINY), params)
    attention = "vision_model.encoder.layers.1.self_attn"
    stacked = [second[f"{attention}.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(
        first["transformer.resblocks.1.attn.in_proj_weight"], np.concatenate(stacked)
    )
    np.testing.assert_array_equal(first["proj"], second["visual_projection.weight"].T)
    np.testing.assert_array_equal(
        first["conv1.weight"], second["vision_model.embeddings.patch_embedding.weight"]
    )


def test_patch_layer_is_the_strided_convolution(params):
    kernel = keymap.write(clip.open_clip(TINY), params)["conv1.weight"]
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    convolved = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "OIHW", "NHWC")
    )
    rows = nn_clip._patches(jax.numpy.asarray(images), 4) @ params["patch_embed"]["kernel"][...]
    np.testing.assert_allclose(rows.reshape(2, 2, 2, 6), convolved, atol=1e-5)


def test_open_clip_names_at_the_published_size():
    config = nn_clip.VisionConfig()
    model = nnx.eval_shape(lambda: nn_clip.VisionTransformer(config, rngs=nnx.Rngs(0)))
    shapes = keymap.shapes(clip.open_clip(config), nnx.state(model))
    assert shapes["conv1.weight"] == (1280, 3, 14, 14)
    assert shapes["positional_embedding"] == (257, 1280)
    assert shapes["proj"] == (1280, 1024)
    assert shapes["transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert shapes["transformer.resblocks.31.mlp.c_fc.weight"] == (5120, 1280)
    # The file's 398 tensors less the six that are left of the text tower.
    assert len(shapes) == 392
