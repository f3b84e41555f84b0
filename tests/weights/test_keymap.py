"""Key maps: every published tensor once with its shape, both directions, and what does not fit."""

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v3d_jax.errors import UserError
from v3d_jax.nn import autoencoder, unet
from v3d_jax.weights import keymap, sgm

# The tables of the published UNet: residual blocks as (name, input, output), transformers as
# (name, width), resampling convolutions as (name, width).
RES_BLOCKS = [
    *(("input_blocks.1.0", 320, 320), ("input_blocks.2.0", 320, 320)),
    *(("input_blocks.4.0", 320, 640), ("input_blocks.5.0", 640, 640)),
    *(("input_blocks.7.0", 640, 1280), ("input_blocks.8.0", 1280, 1280)),
    *(("input_blocks.10.0", 1280, 1280), ("input_blocks.11.0", 1280, 1280)),
    *(("middle_block.0", 1280, 1280), ("middle_block.2", 1280, 1280)),
    *((f"output_blocks.{i}.0", 2560, 1280) for i in range(5)),
    ("output_blocks.5.0", 1920, 1280),
    *(("output_blocks.6.0", 1920, 640), ("output_blocks.7.0", 1280, 640)),
    *(("output_blocks.8.0", 960, 640), ("output_blocks.9.0", 960, 320)),
    *(("output_blocks.10.0", 640, 320), ("output_blocks.11.0", 640, 320)),
]
TRANSFORMERS = [
    *((f"input_blocks.{i}.1", 320) for i in (1, 2)),
    *((f"input_blocks.{i}.1", 640) for i in (4, 5)),
    *((f"input_blocks.{i}.1", 1280) for i in (7, 8)),
    ("middle_block.1", 1280),
    *((f"output_blocks.{i}.1", 1280) for i in (3, 4, 5)),
    *((f"output_blocks.{i}.1", 640) for i in (6, 7, 8)),
    *((f"output_blocks.{i}.1", 320) for i in (9, 10, 11)),
]
RESAMPLE = [
    *(("input_blocks.3.0.op", 320), ("input_blocks.6.0.op", 640), ("input_blocks.9.0.op", 1280)),
    *(("output_blocks.2.1.conv", 1280), ("output_blocks.5.2.conv", 1280)),
    ("output_blocks.8.2.conv", 640),
]


def weighted(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """Weight and bias of one layer."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def res_tensors(r: str, i: int, o: int) -> dict[str, tuple[int, ...]]:
    """One residual block of the UNet."""
    skip = weighted(f"{r}.skip_connection", o, i, 1, 1) if i != o else {}
    return {
        **weighted(f"{r}.in_layers.0", i),
        **weighted(f"{r}.in_layers.2", o, i, 3, 3),
        **weighted(f"{r}.emb_layers.1", o, 1280),
        **weighted(f"{r}.out_layers.0", o),
        **weighted(f"{r}.out_layers.3", o, o, 3, 3),
        **skip,
        **weighted(f"{r}.time_stack.in_layers.0", o),
        **weighted(f"{r}.time_stack.in_layers.2", o, o, 3, 1, 1),
        **weighted(f"{r}.time_stack.emb_layers.1", o, 1280),
        **weighted(f"{r}.time_stack.out_layers.0", o),
        **weighted(f"{r}.time_stack.out_layers.3", o, o, 3, 1, 1),
        f"{r}.time_mixer.mix_factor": (1,),
    }


def feed_forward_tensors(name: str, c: int) -> dict[str, tuple[int, ...]]:
    return {
        **weighted(f"{name}.net.0.proj", 8 * c, c),
        **weighted(f"{name}.net.2", c, 4 * c),
    }


def transformer_tensors(a: str, c: int) -> dict[str, tuple[int, ...]]:
    """One spatial and temporal transformer of the UNet."""
    found = {
        **weighted(f"{a}.norm", c),
        **weighted(f"{a}.proj_in", c, c),
        **weighted(f"{a}.proj_out", c, c),
        **weighted(f"{a}.time_pos_embed.0", 4 * c, c),
        **weighted(f"{a}.time_pos_embed.2", c, 4 * c),
        **weighted(f"{a}.time_stack.0.norm_in", c),
        **feed_forward_tensors(f"{a}.time_stack.0.ff_in", c),
        f"{a}.time_mixer.mix_factor": (1,),
    }
    for block in (f"{a}.transformer_blocks.0", f"{a}.time_stack.0"):
        found |= feed_forward_tensors(f"{block}.ff", c)
        for norm in ("norm1", "norm2", "norm3"):
            found |= weighted(f"{block}.{norm}", c)
        for attn, context in (("attn1", c), ("attn2", 1024)):
            found |= {
                f"{block}.{attn}.to_q.weight": (c, c),
                f"{block}.{attn}.to_k.weight": (c, context),
                f"{block}.{attn}.to_v.weight": (c, context),
                **weighted(f"{block}.{attn}.to_out.0", c, c),
            }
    return found


def unet_tensors() -> dict[str, tuple[int, ...]]:
    found = {
        **weighted("time_embed.0", 1280, 320),
        **weighted("time_embed.2", 1280, 1280),
        **weighted("label_emb.0.0", 1280, 768),
        **weighted("label_emb.0.2", 1280, 1280),
        **weighted("input_blocks.0.0", 320, 8, 3, 3),
        **weighted("out.0", 320),
        **weighted("out.2", 4, 320, 3, 3),
    }
    for name, i, o in RES_BLOCKS:
        found |= res_tensors(name, i, o)
    for name, c in TRANSFORMERS:
        found |= transformer_tensors(name, c)
    for name, c in RESAMPLE:
        found |= weighted(name, c, c, 3, 3)
    return found


def image_tensors(name: str, i: int, o: int, *, temporal: bool) -> dict[str, tuple[int, ...]]:
    """One residual block of the autoencoder."""
    found = {
        **weighted(f"{name}.norm1", i),
        **weighted(f"{name}.conv1", o, i, 3, 3),
        **weighted(f"{name}.norm2", o),
        **weighted(f"{name}.conv2", o, o, 3, 3),
    }
    if i != o:
        found |= weighted(f"{name}.nin_shortcut", o, i, 1, 1)
    if temporal:
        found[f"{name}.mix_factor"] = (1,)
        for norm, conv in (("in_layers.0", "in_layers.2"), ("out_layers.0", "out_layers.3")):
            found |= weighted(f"{name}.time_stack.{norm}", o)
            found |= weighted(f"{name}.time_stack.{conv}", o, o, 3, 1, 1)
    return found


def autoencoder_tensors() -> dict[str, tuple[int, ...]]:
    found = {
        **weighted("encoder.conv_in", 128, 3, 3, 3),
        **weighted("encoder.norm_out", 512),
        **weighted("encoder.conv_out", 8, 512, 3, 3),
        **weighted("decoder.conv_in", 512, 4, 3, 3),
        **weighted("decoder.norm_out", 128),
        **weighted("decoder.conv_out", 3, 128, 3, 3),
        **weighted("decoder.conv_out.time_mix_conv", 3, 3, 3, 1, 1),
    }
    for side in ("encoder", "decoder"):
        for i in (1, 2):
            name = f"{side}.mid.block_{i}"
            found |= image_tensors(name, 512, 512, temporal=side == "decoder")
        found |= weighted(f"{side}.mid.attn_1.norm", 512)
        for layer in ("q", "k", "v", "proj_out"):
            found |= weighted(f"{side}.mid.attn_1.{layer}", 512, 512, 1, 1)
    widths = (128, 128, 256, 512, 512)
    for level in range(4):
        for j in range(2):
            name, i = f"encoder.down.{level}.block.{j}", widths[level] if j == 0 else None
            found |= image_tensors(name, i or widths[level + 1], widths[level + 1], temporal=False)
    for level, c in ((0, 128), (1, 256), (2, 512)):
        found |= weighted(f"encoder.down.{level}.downsample.conv", c, c, 3, 3)
    for level, first, o in ((3, 512, 512), (2, 512, 512), (1, 512, 256), (0, 256, 128)):
        for j in range(3):
            name = f"decoder.up.{level}.block.{j}"
            found |= image_tensors(name, first if j == 0 else o, o, temporal=True)
    for level, c in ((3, 512), (2, 512), (1, 256)):
        found |= weighted(f"decoder.up.{level}.upsample.conv", c, c, 3, 3)
    return found


def abstract(create) -> nnx.State:
    return nnx.split(nnx.eval_shape(create))[1]


def test_every_tensor_of_the_published_unet_has_its_place():
    config = unet.UNetConfig()
    params = abstract(lambda: unet.VideoUNet(config, rngs=nnx.Rngs(0)))
    found = keymap.shapes(sgm.unet(config), params)
    assert len(found) == 1428
    assert found == unet_tensors()


def test_every_tensor_of_the_published_autoencoder_has_its_place():
    config = autoencoder.AutoencoderConfig()
    params = abstract(lambda: autoencoder.Autoencoder(config, rngs=nnx.Rngs(0)))
    found = keymap.shapes(sgm.autoencoder(config), params)
    assert len(found) == 372
    assert found == autoencoder_tensors()


@pytest.fixture(scope="module")
def small():
    config = autoencoder.AutoencoderConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
    params = abstract(lambda: autoencoder.Autoencoder(config, rngs=nnx.Rngs(0)))
    rules = sgm.autoencoder(config)
    return rules, params, fixtures.fill(keymap.shapes(rules, params))


def test_reading_and_writing_undo_each_other(small):
    rules, params, tensors = small
    ours = keymap.read(rules, tensors, params)
    assert jax.tree.structure(ours) == jax.tree.structure(params)
    again = keymap.write(rules, ours)
    assert list(again) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_other_float_types_are_read_as_the_model_has_them(small):
    rules, params, tensors = small
    halves = {name: jnp.asarray(x, jnp.bfloat16) for name, x in tensors.items()}
    ours = keymap.read(rules, {name: np.asarray(x) for name, x in halves.items()}, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float32)}
    again = keymap.write(rules, ours)
    for name, x in halves.items():
        np.testing.assert_array_equal(again[name], x.astype(jnp.float32))


def test_what_does_not_fit_is_listed_by_name_in_one_line(small):
    rules, params, tensors = small
    broken = dict(tensors)
    del broken["encoder.conv_in.bias"]
    broken["decoder.surplus.weight"] = np.zeros(3, np.float32)
    broken["decoder.norm_out.bias"] = np.zeros(31, np.float32)
    broken["decoder.conv_in.weight"] = broken["decoder.conv_in.weight"].transpose(1, 0, 2, 3)
    with pytest.raises(UserError) as caught:
        keymap.read(rules, broken, params, "some.safetensors")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "some.safetensors",
        "1 missing: encoder.conv_in.bias",
        "1 unexpected: decoder.surplus.weight",
        "2 of another shape",
        "decoder.norm_out.bias (31,) not (32,)",
        "decoder.conv_in.weight (4, 64, 3, 3) not (64, 4, 3, 3)",
    ):
        assert part in message


def test_a_long_list_is_cut_in_the_message_and_kept_in_the_error(small):
    rules, params, tensors = small
    with pytest.raises(keymap.KeyMismatch, match=f"and {len(tensors) - 20} more") as caught:
        keymap.read(rules, {}, params)
    assert caught.value.missing == list(tensors)


@pytest.mark.parametrize("broken", ["twice", "lacking", "surplus"])
def test_a_map_that_is_not_one_to_one_is_refused(small, broken):
    rules, params, _ = small
    rules = {
        "twice": [*rules, rules[0]],
        "lacking": rules[1:],
        "surplus": [*rules, keymap.rule("a", "b")],
    }[broken]
    with pytest.raises(ValueError, match="key map"):
        keymap.shapes(rules, params)


def test_stacked_tensors_are_taken_apart_and_put_together():
    rules = [
        keymap.rule("in_proj", ("q", "k", "v"), keymap.stacked(keymap.LINEAR, 3)),
        keymap.rule("bias", ("bq", "bk", "bv"), keymap.stacked(keymap.SAME, 3)),
    ]
    params = {name: np.zeros((4, 2), np.float32) for name in "qkv"}
    params |= {f"b{name}": np.zeros(2, np.float32) for name in "qkv"}
    theirs = {
        "in_proj": np.arange(24, dtype=np.float32).reshape(6, 4),
        "bias": np.arange(6, dtype=np.float32),
    }
    ours = keymap.read(rules, theirs, params)
    np.testing.assert_array_equal(ours["k"], theirs["in_proj"][2:4].T)
    np.testing.assert_array_equal(ours["bv"], [4.0, 5.0])
    again = keymap.write(rules, ours)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_strip_selects_by_prefix():
    tensors = {"model.diffusion_model.out.0.bias": 1, "model_ema.decay": 2}
    assert keymap.strip(tensors, sgm.UNET) == {"out.0.bias": 1}
