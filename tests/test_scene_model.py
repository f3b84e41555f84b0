"""A scene model as a whole: its start from an object model, its conditioning, its folder."""

import dataclasses
import json
import shutil

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_generator
import tiny_scene
from flax import nnx

from v3d_jax import errors, evaluate, pipeline, scene_pipeline
from v3d_jax.diffusion import guidance
from v3d_jax.diffusion.loss import LossConfig, drop_condition
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn import generator
from v3d_jax.ops import image
from v3d_jax.training import parts
from v3d_jax.weights import export, folder
from v3d_jax.weights import tensors as tensor_files

SAMPLING = SamplingConfig(steps=2, guidance_min=1.0, guidance_max=2.0)
SETTINGS = pipeline.Settings(tiny_scene.CONFIG, SAMPLING)
scene_condition = fixtures.jit(scene_pipeline.scene_condition, static_argnums=0)
encode_condition = fixtures.jit(pipeline.encode_condition, static_argnums=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of an object model and of a scene model of its sizes."""
    path = tmp_path_factory.mktemp("models")
    params = nnx.to_pure_dict(tiny_generator.params())
    folder.save(path / "object", tiny_generator.CONFIG, SAMPLING, params)
    folder.save(path / "scene", tiny_scene.CONFIG, SAMPLING, tiny_scene.params())
    return path


def test_what_starts_from_an_object_model_makes_its_frames(models, key):
    """At the first step features change nothing, whatever they are."""
    begun = parts.load(models / "object", parts.SCENE_PARTS, tiny_scene.CONFIG)
    params = {"autoencoder": folder.load(models / "object").params["autoencoder"], **begun}
    params = {**params, "autoencoder": nnx.to_pure_dict(params["autoencoder"])}
    views = tiny_scene.views()
    condition = scene_condition(SETTINGS, params, views, tiny_scene.cameras(), key).condition
    assert float(jnp.std(condition.features)) > 0.01

    alone = dataclasses.replace(SETTINGS, generator=tiny_generator.CONFIG)
    first = image.from_network(views.images[:, 0])
    unposed = nnx.to_pure_dict(tiny_generator.params())
    wanted = encode_condition(alone, unposed, first, key)
    np.testing.assert_array_equal(condition.latent, wanted.latent)
    np.testing.assert_array_equal(condition.context, wanted.context)
    # Told that all its frames are the input's, as a scene model is.
    wanted = wanted._replace(vector=condition.vector)
    sample = fixtures.jit(pipeline.sample_latents, static_argnums=0)
    expected = sample(alone, unposed, wanted, key)
    found = sample(SETTINGS, params, condition, key)
    assert float(jnp.std(expected)) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * float(jnp.abs(expected).max()))


def test_other_latents_take_new_convolutions_at_the_unets_ends(models):
    wider = generator.scene(tiny_generator.CONFIG, tiny_scene.CONFIG.pixelnerf, latent_channels=8)
    begun = parts.load(models / "object", parts.SCENE_PARTS, wider)
    wanted = folder.abstract_params(wider)
    for name in parts.SCENE_PARTS:
        shapes = jax.tree.map(np.shape, begun[name])
        assert shapes == jax.tree.map(np.shape, nnx.to_pure_dict(wanted)[name])
    of_object = nnx.to_pure_dict(folder.load(models / "object").params)["unet"]
    assert not np.any(begun["unet"]["conv_out"]["kernel"])
    assert np.std(begun["unet"]["conv_in"]["kernel"]) > 0.01
    jax.tree.map(
        np.testing.assert_array_equal,
        {name: x for name, x in begun["unet"].items() if name not in ("conv_in", "conv_out")},
        {name: x for name, x in of_object.items() if name not in ("conv_in", "conv_out")},
    )


def test_frames_follow_the_cameras_and_the_views(key):
    """Each of target cameras, a further view and a view that is not valid tells what it should."""
    make = fixtures.jit(scene_pipeline.views_to_frames, static_argnums=0)
    params, targets, views = tiny_scene.params(), tiny_scene.cameras(), tiny_scene.views()
    frames = make(SETTINGS, params, views, targets, key)
    assert frames.shape == (1, 3, 16, 16, 3)
    turned = targets._replace(world_to_camera=targets.world_to_camera[:, ::-1])
    assert float(jnp.abs(make(SETTINGS, params, views, turned, key) - frames).max()) > 0.01
    one = views._replace(valid=views.valid.at[:, 1].set(False))
    fewer = make(SETTINGS, params, one, targets, key)
    assert float(jnp.abs(fewer - frames).max()) > 0.01
    hidden = one._replace(images=one.images.at[:, 1].set(0.5))
    np.testing.assert_array_equal(make(SETTINGS, params, hidden, targets, key), fewer)


def test_frames_are_decoded_and_then_finished(key):
    params, targets, views = tiny_scene.params(), tiny_scene.cameras(), tiny_scene.views()
    made = scene_condition(SETTINGS, params, views, targets, pipeline.split_key(key)[0])
    sample = fixtures.jit(pipeline.sample_latents, static_argnums=0)
    latents = sample(SETTINGS, params, made.condition, pipeline.split_key(key)[1])
    decoded = fixtures.jit(pipeline.decode, static_argnums=0)(SETTINGS, params, latents)
    finish = fixtures.jit(scene_pipeline.finish, static_argnums=0)
    wanted = finish(SETTINGS, params, decoded, views, targets, made.disparity)
    assert float(jnp.abs(wanted - decoded).max()) > 0.05
    found = fixtures.jit(scene_pipeline.views_to_frames, static_argnums=0)(
        SETTINGS, params, views, targets, key
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow  # both together
@pytest.mark.parametrize("changes", [{"low_memory": True}, {"devices": 2}])
def test_branches_in_turn_and_on_devices_of_their_own_make_the_same_frames(key, changes):
    make = fixtures.jit(scene_pipeline.views_to_frames, static_argnums=0)
    given = tiny_scene.params(), tiny_scene.views(), tiny_scene.cameras(), key
    other = dataclasses.replace(SETTINGS, **changes)
    found = make(other, *given)
    np.testing.assert_allclose(found, make(SETTINGS, *given), rtol=0, atol=1e-4)


def test_scenes_have_no_azimuth():
    vector = pipeline.vector(SETTINGS, 1)
    np.testing.assert_array_equal(vector, jnp.broadcast_to(vector[:, :1], vector.shape))
    of_object = pipeline.vector(dataclasses.replace(SETTINGS, generator=tiny_generator.CONFIG), 1)
    assert float(jnp.abs(of_object[:, 1] - of_object[:, 0]).max()) > 0.1


def test_both_branches_of_guidance_have_the_cameras(key):
    views, targets = tiny_scene.views(), tiny_scene.cameras()
    made = scene_condition(SETTINGS, tiny_scene.params(), views, targets, key).condition
    both = guidance.branches(made, pipeline.frame_scale(SETTINGS)).condition
    np.testing.assert_array_equal(both.features[0], both.features[1])
    assert float(jnp.abs(both.latent[0]).max()) == 0.0
    assert float(jnp.abs(both.latent[1]).max()) > 0.0


def test_features_are_dropped_a_frame_at_a_time(key):
    ones = guidance.Condition(
        jnp.ones((64, 1, 2)),
        jnp.ones((64, 2, 2, 4)),
        jnp.ones((64, 5, 3)),
        jnp.ones((64, 5, 2, 2, 6)),
    )
    kept = drop_condition(key, ones, LossConfig(drop_features=0.25)).features
    per_frame = np.asarray(kept).reshape(320, -1)
    assert set(np.unique(per_frame)) == {0.0, 1.0}
    np.testing.assert_array_equal(per_frame, np.repeat(per_frame[:, :1], 24, axis=1))
    assert 0.65 < per_frame.mean() < 0.85
    by_clip = per_frame[:, 0].reshape(64, 5).mean(axis=1)
    assert by_clip.std() > 0.0
    same = drop_condition(key, ones, LossConfig())
    np.testing.assert_array_equal(same.features, ones.features)


def test_the_unet_must_have_room_for_the_features():
    narrow = dataclasses.replace(tiny_scene.CONFIG.unet, in_channels=8)
    with pytest.raises(ValueError, match=r"unet\.in_channels is 8, .* need 14"):
        dataclasses.replace(tiny_scene.CONFIG, unet=narrow)
    assert generator.SCENE_512.unet.in_channels == 136


def test_a_folder_round_trip_and_a_folder_with_a_base(models, tmp_path):
    loaded = folder.load(models / "scene")
    assert loaded.generator == tiny_scene.CONFIG
    whole = {**tiny_scene.params(), "vision": nnx.to_pure_dict(tiny_generator.params())["vision"]}
    shutil.copytree(models / "object", tmp_path / "object")
    folder.save(tmp_path / "scene", tiny_scene.CONFIG, SAMPLING, whole, base="../object")
    (file,) = (tmp_path / "scene").glob("*.safetensors")
    assert file.stat().st_size < (models / "scene" / file.name).stat().st_size
    assert json.loads((tmp_path / "scene" / "config.json").read_text())["base"] == "../object"
    found, wanted = (folder.flatten(x) for x in (folder.load(tmp_path / "scene").params, whole))
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    (tmp_path / "object").rename(tmp_path / "elsewhere")
    with pytest.raises(errors.UserError, match="object is not a model folder"):
        folder.load(tmp_path / "scene")
    (tmp_path / "scene").rename(tmp_path / "object")
    with pytest.raises(errors.UserError, match="has a base itself: name a whole model"):
        folder.load(tmp_path / "object")


def test_what_was_kept_as_half_floats_is_still_the_bases(models, tmp_path):
    """Training exports to float16 what it left alone as well."""
    whole = {**tiny_scene.params(), "vision": nnx.to_pure_dict(tiny_generator.params())["vision"]}
    halves = jax.tree.map(lambda x: np.float16(x).astype(np.float32), whole)
    shutil.copytree(models / "object", tmp_path / "object")
    for name, params in (("whole", whole), ("halves", halves)):
        folder.save(tmp_path / name, tiny_scene.CONFIG, SAMPLING, params, base="../object")
    kept = [
        tensor_files.open_file(tmp_path / name / "model.safetensors")[0].keys()
        for name in ("whole", "halves")
    ]
    assert kept[0] == kept[1]
    assert not any(name.startswith("vision.") for name in kept[1])
    found = folder.flatten(folder.load(tmp_path / "halves").params)
    for name, leaf in folder.flatten(whole).items():
        np.testing.assert_allclose(found[name], leaf, rtol=2**-11, atol=1e-7, err_msg=name)


def test_no_other_program_runs_a_scene_model(models, tmp_path):
    for write in (export.write_sgm, export.write_diffusers):
        with pytest.raises(errors.UserError, match="its pixelnerf is True, and False there"):
            write(tmp_path / "made", folder.open_folder(models / "scene"))
    assert not (tmp_path / "made").exists()


def test_a_scene_model_is_not_for_single_pictures(models, key):
    with pytest.raises(errors.UserError, match="scene is a scene model: name a model of objects"):
        evaluate.evaluate(evaluate.EvaluateArgs(model=str(models / "scene")))
    model = pipeline.load(models / "scene")
    with pytest.raises(errors.UserError, match="this is a scene model"):
        pipeline.generate_orbit(model, jnp.zeros((16, 16, 3)), key)
    assert jax.tree.structure(model.params) == jax.tree.structure(tiny_scene.params())
