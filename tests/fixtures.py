"""Networks with reproducible weights, and the summaries of the published networks' outputs.

The reference modules were filled by the rule of `fill` and run once in PyTorch (CPU, float32); what
they returned is stored as a few numbers: mean, population standard deviation, mean magnitude, the
first four and the last three values in C order, channels before height and width.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v3d_jax.nn import autoencoder, unet
from v3d_jax.weights import keymap, sgm

# The sizes that the stored numbers belong to.
UNET = unet.UNetConfig(
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    head_channels=32,
    context_dim=16,
    vector_dim=24,
)
AUTOENCODER = autoencoder.AutoencoderConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1)

# A quarter of the time to compile; networks here are far too small for it to matter when they run.
ON_CPU = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # there are no others from then on
    ON_CPU["xla_cpu_use_fusion_emitters"] = False
FAST_COMPILE = ON_CPU if jax.default_backend() == "cpu" else {}
# The CPU compiler drops, before it orders operations, the barriers that hold rematerialised blocks
# back until the gradient needs them; other compilers keep them, and so does this option.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander", **FAST_COMPILE}

jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


class Summary(NamedTuple):
    mean: float
    std: float
    mean_abs: float
    first: tuple[float, ...]
    last: tuple[float, ...]


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A value for every tensor of a state dict, drawn with its name as the seed."""
    filled = {}
    for name, shape in shapes.items():
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("mix_factor"):
            value = z
        elif len(shape) == 1:
            value = 1 + 0.1 * z if name.endswith("weight") else 0.05 * z
        else:
            value = z / np.sqrt(np.prod(shape[1:]))
        filled[name] = value.astype(np.float32)
    return filled


def build(create: Callable[[], nnx.Module], rules: list[keymap.Rule]) -> tuple[Any, Any]:
    """Graphdef and filled parameters of a network whose key map is `rules`."""
    graphdef, abstract = nnx.split(nnx.eval_shape(create))
    return graphdef, keymap.read(rules, fill(keymap.shapes(rules, abstract)), abstract)


def randomise(create: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    """A module with every parameter drawn anew, at unit gain; faster than its own initialisers."""
    rng = np.random.default_rng(seed)
    graphdef, abstract = nnx.split(nnx.eval_shape(create))

    def one(leaf: Any) -> jnp.ndarray:
        scale = np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(one, abstract))


def filled_unet(config: unet.UNetConfig = UNET) -> tuple[Any, Any]:
    return build(lambda: unet.VideoUNet(config, rngs=nnx.Rngs(0)), sgm.unet(config))


def filled_encoder() -> tuple[Any, Any]:
    def create() -> nnx.Module:
        return autoencoder.Encoder(AUTOENCODER, dtype=jnp.float32, rngs=nnx.Rngs(0))

    return build(create, sgm.encoder(AUTOENCODER))


def filled_decoder() -> tuple[Any, Any]:
    def create() -> nnx.Module:
        return autoencoder.TemporalDecoder(AUTOENCODER, dtype=jnp.float32, rngs=nnx.Rngs(0))

    return build(create, sgm.decoder(AUTOENCODER))


@functools.cache
def forward(graphdef: Any) -> Callable:
    """A network as a compiled function of its parameters and inputs."""
    return jit(lambda params, *args: nnx.merge(graphdef, params)(*args))


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def channels_last(x: np.ndarray, clips: int) -> jnp.ndarray:
    """[b t, c, h, w] as [b, t, h, w, c]."""
    return jnp.asarray(x.reshape(clips, -1, *x.shape[1:]).transpose(0, 1, 3, 4, 2))


def assert_summary(x: Any, expected: Summary) -> None:
    """Holds an output [b, t, h, w, c] to a stored summary within 1e-4."""
    x = np.moveaxis(np.asarray(x, np.float64), -1, 2)
    found = [x.mean(), x.std(), np.abs(x).mean(), *x.ravel()[:4], *x.ravel()[-3:]]
    wanted = [expected.mean, expected.std, expected.mean_abs, *expected.first, *expected.last]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
