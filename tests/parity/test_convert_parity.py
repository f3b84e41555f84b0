"""Converted files in PyTorch's tools: diffusers and transformers load them and compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published_files as files
import pytest
from flax import nnx

from v3d_jax.diffusion import sampler
from v3d_jax.nn import generator, layers
from v3d_jax.weights import export, folder, published

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
torch = pytest.importorskip("torch")
# The pipeline resizes pictures to 224 pixels for every tower.
CONFIG = dataclasses.replace(
    files.REDUCED,
    image_size=32,
    vision=dataclasses.replace(files.REDUCED.vision, image_size=224, patch=56),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of ours, and the folder that it was written to for diffusers."""
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)

    def draw(name, leaf):
        noise = rng.standard_normal(leaf.shape)
        if len(leaf.shape) > 1:
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        elif name.endswith("scale"):
            noise = 1 + 0.1 * noise
        elif not name.endswith("mix_factor"):
            noise = 0.05 * noise
        return noise.astype(np.float32)

    abstract = folder.flatten(folder.abstract_params(CONFIG))
    tensors = {name: draw(name, leaf) for name, leaf in abstract.items()}
    model = folder.Unread(CONFIG, sampler.SamplingConfig(), tensors, {})
    # Through all layouts, so that every one of them counts.
    export.write_sgm(path / "model.safetensors", model)
    export.write_diffusers(path / "svd", published.open_model(path / "model.safetensors"))
    network = generator.abstract(CONFIG)
    ours = nnx.merge(nnx.split(network)[0], folder.read(model).params)
    return ours, path / "svd"


@pytest.fixture(scope="module")
def pipeline(models):
    package = pytest.importorskip("diffusers")
    return package.StableVideoDiffusionPipeline.from_pretrained(models[1])


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, -3).copy())


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), -3, -1)


def test_the_pipeline_has_every_tensor_and_ours_alone(models):
    """Nothing is missing or left over, so nothing was initialised at random."""
    diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
    for cls, name in (
        (diffusers.UNetSpatioTemporalConditionModel, "unet"),
        (diffusers.AutoencoderKLTemporalDecoder, "vae"),
        (transformers.CLIPVisionModelWithProjection, "image_encoder"),
    ):
        _, report = cls.from_pretrained(models[1] / name, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
        assert not report["mismatched_keys"]


def test_unet(models, pipeline):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 16, 16, 8)).astype(np.float32)
    context = rng.standard_normal((2, 1, 12)).astype(np.float32)
    scalars = np.float32([[6, 127, 0.02], [1, 300, 0.5]])
    noise = np.float32(0.3)
    with torch.no_grad():
        expected = pipeline.unet(
            nchw(x), torch.tensor(noise), torch.from_numpy(context), torch.from_numpy(scalars)
        ).sample
    vector = layers.sinusoid(jnp.asarray(scalars), CONFIG.conditioner.dim).reshape(2, 1, -1)
    got = jax.jit(lambda m, *a: m(*a))(
        models[0].unet, jnp.asarray(x), jnp.full((2, 3), noise), context[:, None], vector
    )
    assert nhwc(expected).std() > 0.1
    np.testing.assert_allclose(got, nhwc(expected), atol=1e-4)


def test_autoencoder(models, pipeline):
    rng = np.random.default_rng(2)
    images = rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    latents = rng.standard_normal((1, 3, 16, 16, 4)).astype(np.float32)
    with torch.no_grad():
        moments = pipeline.vae.encode(nchw(images)).latent_dist
        frames = pipeline.vae.decode(nchw(latents[0]), num_frames=3).sample
    posterior = jax.jit(lambda m, x: m.encode(x))(models[0].autoencoder, jnp.asarray(images))
    np.testing.assert_allclose(posterior.mean, nhwc(moments.mean), atol=1e-4)
    decoded = jax.jit(lambda m, z: m.decode(z))(models[0].autoencoder, jnp.asarray(latents))
    assert nhwc(frames).std() > 0.1
    np.testing.assert_allclose(decoded[0], nhwc(frames), atol=1e-4)
    assert pipeline.vae.config.scaling_factor == CONFIG.autoencoder.scale_factor


def test_image_tower(models, pipeline):
    images = np.random.default_rng(3).standard_normal((2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = pipeline.image_encoder(nchw(images)).image_embeds.numpy()
    got = jax.jit(lambda m, x: m.encode(x))(models[0].vision, jnp.asarray(images))
    assert expected.std() > 0.1
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-4)


def test_noise_levels(pipeline):
    pipeline.scheduler.set_timesteps(25)
    ours = sampler.sigmas(sampler.SamplingConfig(steps=25))
    np.testing.assert_allclose(ours, pipeline.scheduler.sigmas, rtol=1e-4)


def test_the_pipeline_runs(pipeline):
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(4).integers(0, 255, (32, 32, 3), np.uint8))
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        picture, 32, 32, num_inference_steps=2, decode_chunk_size=3, output_type="np"
    ).frames
    assert frames.shape == (1, 3, 32, 32, 3)
    assert np.isfinite(frames).all()


def test_what_diffusers_saves_is_read(models, tmp_path):
    """In the other direction: written by the libraries, sharded and in half precision too."""
    diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
    pipe = diffusers.StableVideoDiffusionPipeline.from_pretrained(models[1])
    pipe.unet.save_pretrained(tmp_path / "svd" / "unet", max_shard_size="400KB")
    pipe.vae.half().save_pretrained(tmp_path / "svd" / "vae", variant="fp16")
    pipe.image_encoder.save_pretrained(tmp_path / "svd" / "image_encoder")
    assert isinstance(pipe.image_encoder, transformers.CLIPVisionModelWithProjection)
    assert len(list((tmp_path / "svd" / "unet").glob("*.safetensors"))) > 1
    model = published.open_model(tmp_path / "svd", published.Hints(size=(32, 32)))
    assert model.generator == CONFIG
    for name, x in folder.flatten(nnx.state(models[0])).items():
        tolerance = 2**-10 if name.startswith("autoencoder.") else 0.0
        np.testing.assert_allclose(
            np.asarray(model.tensors[name], np.float32), x, rtol=tolerance, atol=tolerance / 100
        )


@pytest.mark.parametrize("sharded", [False, True])
def test_what_torch_saves_is_read(tmp_path, sharded):
    """V3D's pair as PyTorch writes it, Lightning's entries and all."""
    tensors = {name: torch.from_numpy(x) for name, x in files.V3D.items()}
    torch.save(
        {"state_dict": tensors, "global_step": 7, "pytorch-lightning_version": "2.0.1"},
        tmp_path / "V3D_512.ckpt",
    )
    if sharded:
        files.shard(tmp_path, "svd_xt", files.SVD)
    else:
        files.save(tmp_path / "svd_xt.safetensors", files.SVD)
    found = files.values(published.open_model(tmp_path / "V3D_512.ckpt", files.HINTS))
    expected = files.values(published.open_model(files.pair(tmp_path / "other"), files.HINTS))
    files.assert_same(found, expected)
