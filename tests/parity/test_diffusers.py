"""The networks against diffusers' own, with random weights through the key maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax.nn import autoencoder, layers, unet
from v3d_jax.ops import image
from v3d_jax.weights import diffusers, keymap

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
torch = pytest.importorskip("torch")

TINY_UNET = unet.UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1,),
    head_channels=16,
    context_dim=12,
    vector_dim=24,
)
# Two blocks a level, because diffusers builds as many in the middle, and ours are always two.
TINY_AUTOENCODER = autoencoder.AutoencoderConfig(
    channels=32, channel_mult=(1, 2, 2), num_res_blocks=2
)


def build(name, **settings):
    # Imported here: the package looks for hardware and warns when it is imported.
    package = pytest.importorskip("diffusers")
    return getattr(package, name)(**settings)


def tiny_unet():
    return build(
        "UNetSpatioTemporalConditionModel",
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=12,
        num_attention_heads=(2, 4),
        num_frames=3,
    )


def tiny_autoencoder():
    return build(
        "AutoencoderKLTemporalDecoder",
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
    )


def randomize(model):
    """Random weights of about unit gain everywhere: nothing stays zero, one or an identity."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            noise = noise / np.sqrt(np.prod(tensor.shape[1:]))
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif not name.endswith("mix_factor"):
            noise = 0.05 * noise
        tensor.copy_(noise)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def ours(module, rules, tensors):
    graphdef, params = nnx.split(nnx.eval_shape(module))
    return nnx.merge(graphdef, keymap.read(rules, tensors, params))


def nchw(x):
    """[..., h, w, c] to torch's [..., c, h, w]."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, -3).copy())


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), -3, -1)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("indicator", [False, True])
def test_unet(tokens, indicator):
    rng = np.random.default_rng(0)
    peer = tiny_unet()
    tensors = randomize(peer)
    module = lambda: unet.VideoUNet(TINY_UNET, rngs=nnx.Rngs(0))  # noqa: E731
    model = ours(module, diffusers.unet(TINY_UNET), tensors)
    # One clip where it has several tokens: diffusers pairs clips and pixels in another order then.
    b, t = (2 if tokens == 1 else 1), 3
    x = rng.standard_normal((b, t, 8, 8, 8)).astype(np.float32)
    context = rng.standard_normal((b, tokens, 12)).astype(np.float32)
    scalars = np.float32([[6, 127, 0.02], [1, 300, 0.5]])[:b]
    noise = np.float32(-0.7)
    # Marks no frame as an image in its own forward; set there to compare both kinds.
    with torch.no_grad():
        if indicator:
            real = torch.zeros
            torch.zeros = lambda *s, **k: torch.ones(*s, **k) if s == (b, t) else real(*s, **k)
        try:
            output = peer(
                nchw(x), torch.tensor(noise), torch.from_numpy(context), torch.from_numpy(scalars)
            )
        finally:
            if indicator:
                torch.zeros = real
    vector = layers.sinusoid(jnp.asarray(scalars), 8).reshape(b, 1, 24)
    got = jax.jit(lambda m, *a: m(*a))(
        model,
        jnp.asarray(x),
        jnp.full((b, t), noise),
        jnp.asarray(context)[:, None],
        vector,
        jnp.full((b, t), indicator),
    )
    expected = nhwc(output.sample)
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_autoencoder():
    rng = np.random.default_rng(0)
    peer = tiny_autoencoder()
    tensors = randomize(peer)
    module = lambda: autoencoder.Autoencoder(TINY_AUTOENCODER, rngs=nnx.Rngs(0))  # noqa: E731
    rules = diffusers.autoencoder(TINY_AUTOENCODER)
    model = ours(module, rules, diffusers.fold_quant_conv(tensors))
    images = rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 3, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        moments = peer.encode(nchw(images)).latent_dist
        frames = peer.decode(nchw(latents.reshape(6, 8, 8, 4)), num_frames=3).sample
    posterior = jax.jit(lambda m, x: m.encode(x))(model, jnp.asarray(images))
    np.testing.assert_allclose(posterior.mean, nhwc(moments.mean), atol=1e-4)
    np.testing.assert_allclose(posterior.logvar, nhwc(moments.logvar), atol=1e-4)
    decoded = jax.jit(lambda m, z: m.decode(z))(model, jnp.asarray(latents))
    assert nhwc(frames).std() > 0.1
    np.testing.assert_allclose(decoded.reshape(6, 32, 32, 3), nhwc(frames), atol=1e-4)
    # And back: diffusers reads what we write, with an identity for the layer we do not have.
    written = diffusers.unfold_quant_conv(keymap.write(rules, nnx.state(model)))
    peer.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in written.items()})
    with torch.no_grad():
        again = peer.encode(nchw(images)).latent_dist
    np.testing.assert_allclose(nhwc(again.mean), nhwc(moments.mean), atol=1e-4)


def published(name, **settings):
    with torch.device("meta"):
        model = build(name, **settings)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def test_every_published_name_maps_once():
    model = nnx.eval_shape(lambda: unet.VideoUNet(unet.UNetConfig(), rngs=nnx.Rngs(0)))
    theirs = published("UNetSpatioTemporalConditionModel")
    assert len(theirs) == 1428
    assert keymap.shapes(diffusers.unet(unet.UNetConfig()), nnx.state(model)) == theirs

    config = autoencoder.AutoencoderConfig()
    model = nnx.eval_shape(lambda: autoencoder.Autoencoder(config, rngs=nnx.Rngs(0)))
    theirs = published(
        "AutoencoderKLTemporalDecoder",
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    quant = {name: theirs.pop(name) for name in ("quant_conv.weight", "quant_conv.bias")}
    assert quant == {"quant_conv.weight": (8, 8, 1, 1), "quant_conv.bias": (8,)}
    assert len(theirs) == 372
    assert keymap.shapes(diffusers.autoencoder(config), nnx.state(model)) == theirs


@pytest.mark.parametrize("size", [(512, 512), (96, 130), (300, 224), (576, 1024)])
def test_clip_resize_equals_the_pipeline(size):
    pipeline = pytest.importorskip(
        "diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion"
    )
    x = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    # In float64, because torch rounds the sampling positions to float32.
    expected = pipeline._resize_with_antialiasing(nchw(x).double(), (224, 224))
    np.testing.assert_allclose(image.clip_resize(jnp.asarray(x), 224), nhwc(expected), atol=1e-5)
