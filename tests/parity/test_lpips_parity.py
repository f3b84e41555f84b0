"""LPIPS against the authors' own package, with the same weights."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.nn import lpips as ours
from v3d_jax.weights import lpips as weights

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def layer_lists(torch):
    """VGG16's and AlexNet's layers in torchvision's order, which is all that lpips takes of it."""
    nn = torch.nn

    def vgg16():
        layers, channels = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if width == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        return nn.Sequential(*layers)

    def alexnet():
        conv, relu, pool = nn.Conv2d, lambda: nn.ReLU(inplace=True), lambda: nn.MaxPool2d(3, 2)
        return nn.Sequential(
            *(conv(3, 64, 11, stride=4, padding=2), relu(), pool()),
            *(conv(64, 192, 5, padding=2), relu(), pool()),
            *(conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu()),
            *(conv(256, 256, 3, padding=1), relu(), pool()),
        )

    return {"vgg": vgg16, "alex": alexnet}


@pytest.fixture
def peer(monkeypatch):
    """Builds lpips.LPIPS with the trunk weights of `params`; needs no torchvision."""
    torch = pytest.importorskip("torch")
    lists = layer_lists(torch)
    stand_in = types.ModuleType("torchvision")
    stand_in.models = types.ModuleType("torchvision.models")
    for name, net in (("vgg16", "vgg"), ("alexnet", "alex")):
        build = lists[net]
        setattr(
            stand_in.models,
            name,
            lambda pretrained=False, build=build: types.SimpleNamespace(features=build()),
        )
    monkeypatch.setitem(sys.modules, "torchvision", stand_in)
    monkeypatch.setitem(sys.modules, "torchvision.models", stand_in.models)
    package = pytest.importorskip("lpips")

    def build(net, params):
        model = package.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
        convs = [m for m in model.net.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convs) == len(params.convs)
        for target, source in zip(convs, params.convs, strict=True):
            kernel = np.array(source.kernel).transpose(3, 2, 0, 1)
            target.weight.data.copy_(torch.from_numpy(kernel.copy()))
            target.bias.data.copy_(torch.from_numpy(np.array(source.bias)))
        return torch, model

    return build


@pytest.mark.parametrize("net", ["vgg", "alex"])
@pytest.mark.parametrize("size", [(64, 64), (75, 50)])
def test_distance_and_gradient_equal_lpips(peer, net, size):
    params = weights.load(net)
    torch, model = peer(net, params)
    # The linear layers are lpips's own file; the trunk is the same on both sides.
    for mine, theirs in zip(params.linear, model.lins, strict=True):
        np.testing.assert_array_equal(mine, theirs.model[-1].weight.detach().numpy().ravel())
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    b = np.clip(a + 0.3 * rng.standard_normal(a.shape), -1, 1).astype(np.float32)
    x, y = (torch.from_numpy(i.transpose(0, 3, 1, 2).copy()) for i in (a, b))
    expected = model(x.requires_grad_(), y)
    expected.sum().backward()
    expected = expected.detach().numpy().ravel()
    assert expected.min() > 0.01

    def total(image):
        distance = ours.distance(params, image, jnp.asarray(b))
        return distance.sum(), distance

    gradient, got = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(a))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    theirs = x.grad.numpy().transpose(0, 2, 3, 1)
    assert np.linalg.norm(gradient - theirs) < 1e-3 * np.linalg.norm(theirs)
