"""The image tower against transformers' and OpenCLIP's layout of the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import clip as nn_clip
from v3d_jax.weights import clip, keymap

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
torch = pytest.importorskip("torch")

TINY = nn_clip.VisionConfig(
    image_size=32, patch=8, width=24, layers=3, heads=3, mlp=40, output_dim=16
)


def peer(config):
    transformers = pytest.importorskip("transformers")
    settings = transformers.CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp,
        projection_dim=config.output_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch,
        hidden_act="gelu",
    )
    return transformers.CLIPVisionModelWithProjection(settings).eval()


def test_tower_equals_transformers():
    model = peer(TINY)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            scale = np.prod(tensor.shape[1:]) ** -0.5 if tensor.ndim > 1 else 0.2
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: nn_clip.VisionTransformer(TINY, rngs=nnx.Rngs(0)))
    )
    rules = clip.transformers(TINY)
    params = keymap.read(rules, clip.without_buffers(tensors), abstract)
    ours = nnx.merge(graphdef, params)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).image_embeds.numpy()
    assert expected.std() > 0.1
    got = jax.jit(lambda m, x: m.encode(x))(ours, jnp.asarray(x))
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-4)
    for name, written in keymap.write(rules, params).items():
        np.testing.assert_array_equal(written, tensors[name])


def test_every_published_name_maps_once():
    config = nn_clip.VisionConfig()
    model = nnx.eval_shape(lambda: nn_clip.VisionTransformer(config, rngs=nnx.Rngs(0)))
    with torch.device("meta"):
        theirs = {name: tuple(x.shape) for name, x in peer(config).state_dict().items()}
    theirs = clip.without_buffers(theirs)
    assert len(theirs) == 520
    assert keymap.shapes(clip.transformers(config), nnx.state(model)) == theirs
