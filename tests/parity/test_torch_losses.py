"""The losses that other programs are fitted with in the benchmarks, against ours."""

import importlib
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.nn import lpips
from v3d_jax.ops import metrics

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def losses(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("torch_losses")


def pictures(height, width):
    rng = np.random.default_rng(0)
    a = rng.uniform(size=(2, height, width, 3)).astype(np.float32)
    a[:, : height // 2] = 0.7  # flat, where variances cancel
    return a, np.clip(a + 0.1 * rng.normal(size=a.shape), 0, 1).astype(np.float32)


def weights():
    """VGG16 with random weights that keep the activations' size."""
    rng = np.random.default_rng(1)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, *6 * (512,))
    convs = [
        lpips.Conv(
            jnp.asarray(rng.normal(size=(3, 3, i, o)) * (2 / (9 * i)) ** 0.5, jnp.float32),
            jnp.asarray(0.1 * rng.normal(size=o), jnp.float32),
        )
        for i, o in itertools.pairwise(widths)
    ]
    taps = [jnp.asarray(rng.uniform(size=c), jnp.float32) for c in (64, 128, 256, 512, 512)]
    return lpips.LPIPSParams(tuple(convs), tuple(taps))


def close(found, grad, expected, true_grad, rtol):
    np.testing.assert_allclose(found, expected, rtol=rtol)
    error = np.linalg.norm(grad - np.asarray(true_grad)) / np.linalg.norm(true_grad)
    assert error < 10 * rtol


def test_ssim_and_its_gradient(losses):
    a, b = pictures(31, 24)
    ours, gradient = jax.value_and_grad(lambda x: metrics.ssim(x, jnp.asarray(b)).sum())(
        jnp.asarray(a)
    )
    x = torch.tensor(a, requires_grad=True)
    theirs = losses.Ssim(31, 24, "cpu")(x, torch.tensor(b)).sum()
    theirs.backward()
    close(theirs.item(), x.grad.numpy(), ours, gradient, 1e-5)


def test_lpips_and_its_gradient(losses):
    a, b = pictures(40, 33)
    params = weights()
    ours, gradient = jax.value_and_grad(
        lambda x: lpips.distance(params, 2 * x - 1, jnp.asarray(2 * b - 1)).sum()
    )(jnp.asarray(a))
    network = losses.Lpips(params, "cpu", torch.float32)
    x = torch.tensor(a, requires_grad=True)
    with torch.no_grad():
        wanted = network.features(torch.tensor(b))
    theirs = network.distance(network.features(x), wanted).sum()
    theirs.backward()
    assert torch.isfinite(x.grad).all()
    close(theirs.item(), x.grad.numpy(), ours, gradient, 1e-4)


def test_lpips_in_half_the_bits(losses):
    a, b = pictures(40, 33)
    params = weights()
    pair = (jnp.asarray(2 * x - 1) for x in (a, b))
    ours = lpips.distance(params, *pair, dtype=jnp.bfloat16)
    network = losses.Lpips(params, "cpu", torch.bfloat16)
    theirs = network.distance(*(network.features(torch.tensor(x)) for x in (a, b)))
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=0.03)
