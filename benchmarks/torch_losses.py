"""The image losses of `v3d_jax.splat.objective` in torch, for fits by other programs.

Images are [b, h, w, 3] in [0, 1]. tests/parity/test_torch_losses.py holds both functions to ours.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from v3d_jax.nn import lpips
from v3d_jax.ops import metrics

# ImageNet's statistics for images in [-1, 1], rounded as in LPIPS's release.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10


class Ssim:
    """`metrics.ssim` for images of one size: two banded products instead of convolutions."""

    def __init__(self, height: int, width: int, device: Any):
        self.rows, self.columns = (_band(side).to(device) for side in (height, width))

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Mean structural similarity of every image [b]."""
        a, b = (image.permute(0, 3, 1, 2) for image in (a, b))
        maps = torch.stack([a, b, a * a, b * b, a * b])
        mean_a, mean_b, aa, bb, ab = self.rows @ maps @ self.columns.T
        c1, c2 = metrics.K1**2, metrics.K2**2
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        variances = aa - mean_a**2 + bb - mean_b**2
        structure = (2 * (ab - mean_a * mean_b) + c2) / (variances + c2)
        return (luminance * structure).mean(dim=(1, 2, 3))


class Lpips:
    """`lpips.distance` on VGG16, in two steps, the trunk running in `dtype`."""

    def __init__(self, params: lpips.LPIPSParams, device: Any, dtype: torch.dtype):
        self.dtype = dtype
        self.convs = [
            (
                _tensor(np.asarray(conv.kernel).transpose(3, 2, 0, 1), device)
                .to(dtype)
                .contiguous(memory_format=torch.channels_last),
                _tensor(conv.bias, device).to(dtype),
            )
            for conv in params.convs
        ]
        self.linear = [_tensor(weights, device) for weights in params.linear]
        self.shift, self.scale = (_tensor(np.float32(x), device) for x in (_SHIFT, _SCALE))

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Tapped activations [b, c, _, _], every pixel's channels scaled to unit length."""
        x = (2.0 * images - 1.0 - self.shift) / self.scale
        x = x.permute(0, 3, 1, 2).to(self.dtype)
        taps = []
        for conv, layer in zip(self.convs, lpips.VGG16, strict=True):
            if layer.pool:
                x = F.max_pool2d(x, layer.pool, stride=2)
            x = F.relu(F.conv2d(x, *conv, stride=layer.stride, padding=layer.padding))
            if layer.tap:
                taps.append(_normalized(x))
        return taps

    def distance(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        """LPIPS of every pair of images [b], from their features."""
        total = torch.zeros((), device=self.shift.device)
        for weights, x, y in zip(self.linear, a, b, strict=True):
            total = total + (x.float() - y.float()).square().mean(dim=(2, 3)) @ weights
        return total


def _normalized(x: torch.Tensor) -> torch.Tensor:
    """x / (|x| + eps) in float32; a zero gradient instead of NaN where x is zero."""
    wide = x.float()
    squared = wide.square().sum(dim=1, keepdim=True)
    active = squared > 0
    length = torch.where(active, torch.where(active, squared, 1.0).sqrt(), 0.0)
    return (wide / (length + _EPS)).to(x.dtype)


def _band(side: int) -> torch.Tensor:
    """Row i holds SSIM's Gaussian window from column i on."""
    middle = metrics.WINDOW // 2
    taps = [math.exp(-((i - middle) ** 2) / (2 * metrics.SIGMA**2)) for i in range(metrics.WINDOW)]
    window = torch.tensor(taps, dtype=torch.float64)
    window = (window / window.sum()).float()
    count = side - metrics.WINDOW + 1
    return torch.stack([F.pad(window, (i, count - 1 - i)) for i in range(count)])


def _tensor(array: Any, device: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32)).to(device)
