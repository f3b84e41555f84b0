"""Fits by gsplat 1.5.3 (torch, CUDA) with its own strategies, beside ours and on equal terms.

The same frames, points, losses, budget and view-steps as `v3d_jax.splat.fit`. Learning rates are
those of gsplat's examples/simple_trainer.py, which are also `fit.RateConfig`'s, with its fall of
the means' rate and its order of a step: losses, optimizers, schedule, strategy. Strategies keep
gsplat's defaults but for the budget and for when they stop, which is in proportion to the steps:

- mcmc: starts with all Gaussians of the budget, as ours;
- default: starts with a third of them, spaced accordingly, at the opacity 0.1 of the examples, and
  grows; where all that qualify would exceed the budget, those with the largest gradients do.

The regularisers of opacity and scale belong to MCMC, to the last step there where ours end with the
moves (`LossConfig.settled`), and are left out of the default strategy.
torch and gsplat are imported when they are used; gsplat compiles its CUDA code when it is imported
for the first time.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from v3d_jax.data import views
from v3d_jax.ops import camera
from v3d_jax.splat import fit, gaussians

Strategy = Literal["mcmc", "default"]
STRATEGIES: tuple[Strategy, ...] = ("mcmc", "default")
_DEFAULT_SHARE, _DEFAULT_OPACITY = 1 / 3, 0.1
# Of all steps, when densification ends: 25,000 and 15,000 of 30,000 in gsplat.
_MCMC_STOP, _DEFAULT_STOP = 25 / 30, 15 / 30


class Fitted(NamedTuple):
    """What a fit made, and what it cost."""

    renders: np.ndarray  # of the held-out cameras, float32 [v, h, w, 3], clipped to [0, 1]
    gaussians: int
    seconds: float  # of the fit, compilation included
    rate: float  # view-steps a second, after the first tenth
    memory: float | None  # peak, GB


def missing() -> str | None:
    """Why gsplat cannot be run here, or None."""
    for name in ("torch", "gsplat"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def run(
    strategy: Strategy,
    config: fit.FitConfig,
    targets: fit.Targets,
    start: gaussians.Gaussians,
    held: camera.Camera,
    *,
    seed: int,
    lpips_params: Any = None,
    device: str = "cuda",
    rasterization: Callable[..., Any] | None = None,
) -> Fitted:
    """Fits `start` to `targets` by `config`'s losses, rates, views a step and number of steps.

    On the fit's background. `lpips_params` are VGG16's, needed if the losses have an LPIPS term.
    `rasterization` stands in for gsplat's own.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(seed)
    if rasterization is None:
        from gsplat import rasterization
        from gsplat.cuda import _backend  # compiles, before the clock starts

        if _backend._C is None:
            raise RuntimeError("gsplat has no CUDA code: it needs nvcc or a wheel that carries it")
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    scene = _Scene(config, targets, lpips_params, device)
    behind = torch.tensor(np.array(fit.behind(config)), device=device)
    extent = float(fit.extent(targets.cameras))
    params, optimizers = _optimizers(config, _start(strategy, start), extent, device)
    fall = config.rates.means_left ** (1.0 / config.steps)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizers["means"], gamma=fall)
    policy = _policy(strategy, config, len(start.means))
    policy.check_sanity(params, optimizers)
    known = {} if strategy == "mcmc" else {"scene_scale": extent}
    state = policy.initialize_state(**known)

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    begun = settled = wait()
    for step, chosen in enumerate(_decks(len(scene.images), config)):
        if step == config.steps // 10:
            settled = wait()
        degree = min(step // config.degree_every, config.degree)
        lenses = scene.cameras(chosen)
        color, _, info = _draw(rasterization, params, lenses, degree, scene.size, behind)
        policy.step_pre_backward(params, optimizers, state, step, info)
        loss = scene.loss(color, chosen)
        if strategy == "mcmc":
            loss = loss + config.loss.opacity * torch.sigmoid(params["opacities"]).mean()
            loss = loss + config.loss.scale * torch.exp(params["scales"]).mean() / extent
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        schedule.step()
        extra = {"lr": schedule.get_last_lr()[0]} if strategy == "mcmc" else {"packed": False}
        policy.step_post_backward(params, optimizers, state, step, info, **extra)
    ended = wait()
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    poses, intrinsics = _lenses(held, device)
    renders = []
    with torch.no_grad():
        for pose, lens in zip(poses, intrinsics, strict=True):
            one = (pose[None], lens[None])
            color = _draw(rasterization, params, one, config.degree, scene.size, behind)[0]
            renders.append(color[0].clamp(0.0, 1.0).cpu().numpy())
    left = config.steps - config.steps // 10
    rate = left * config.views / max(ended - settled, 1e-9)
    return Fitted(np.stack(renders), len(params["means"]), ended - begun, rate, peak)


class _Scene:
    """Frames and cameras on the device, and the loss of a render."""

    def __init__(self, config: fit.FitConfig, targets: fit.Targets, lpips_params: Any, device: str):
        import torch
        import torch_losses

        alpha = None if targets.alpha is None else np.asarray(targets.alpha)
        shown = views.on_white(np.asarray(targets.images), alpha)
        self.images = torch.from_numpy(shown).to(device)
        self.poses, self.intrinsics = _lenses(targets.cameras, device)
        height, width = shown.shape[1:3]
        self.size = (width, height)
        self.weights = config.loss
        self.ssim = torch_losses.Ssim(height, width, device)
        self.lpips = None
        if config.loss.lpips:
            dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
            self.lpips = torch_losses.Lpips(lpips_params, device, dtype)
            with torch.no_grad():
                taps = [self.lpips.features(image[None]) for image in self.images]
            self.features = [torch.cat(tap) for tap in zip(*taps, strict=True)]

    def cameras(self, chosen: list[int]) -> tuple[Any, Any]:
        return self.poses[chosen], self.intrinsics[chosen]

    def loss(self, color: Any, chosen: list[int]) -> Any:
        weights, wanted = self.weights, self.images[chosen]
        total = weights.l1 * (color - wanted).abs().mean()
        total = total + weights.dssim * (1.0 - self.ssim(color, wanted).mean())
        if self.lpips is not None:
            seen = [tap[chosen] for tap in self.features]
            distance = self.lpips.distance(self.lpips.features(color), seen)
            total = total + weights.lpips * distance.mean()
        return total


def _decks(total: int, config: fit.FitConfig) -> Iterator[list[int]]:
    """The views of every step: decks that are shuffled anew when they are used up."""
    import torch

    deck: list[int] = []
    for _ in range(config.steps):
        while len(deck) < config.views:
            deck += torch.randperm(total).tolist()
        yield deck[: config.views]
        del deck[: config.views]


def _start(strategy: Strategy, start: gaussians.Gaussians) -> gaussians.Gaussians:
    if strategy == "mcmc":
        return start
    count = len(start.means)
    kept = np.random.default_rng(0).permutation(count)[: max(round(count * _DEFAULT_SHARE), 4)]
    some = gaussians.Gaussians(*(np.asarray(field)[kept] for field in start))
    # Points on surfaces: their distances grow with the root of what was left out.
    spread = some.log_scales + 0.5 * math.log(count / len(kept))
    faint = np.full(len(kept), math.log(_DEFAULT_OPACITY / (1.0 - _DEFAULT_OPACITY)), np.float32)
    return some._replace(log_scales=spread, opacity_logits=faint)


def _optimizers(
    config: fit.FitConfig, start: gaussians.Gaussians, extent: float, device: str
) -> tuple[Any, dict[str, Any]]:
    """Parameters by gsplat's names and an Adam for each, its averages as long whatever the views.

    Rates and epsilon scale with the root of the views, as in gsplat's examples.
    """
    import torch

    rates, batch = config.rates, config.views
    sh = np.asarray(start.sh, np.float32)
    table = {
        "means": (start.means, rates.means * extent),
        "scales": (start.log_scales, rates.log_scales),
        "quats": (start.rotations, rates.rotations),
        "opacities": (start.opacity_logits, rates.opacity_logits),
        "sh0": (sh[:, :1], rates.sh),
    }
    if sh.shape[1] > 1:
        table["shN"] = (sh[:, 1:], rates.sh_rest)
    params = torch.nn.ParameterDict(
        {
            name: torch.nn.Parameter(torch.from_numpy(np.array(value, np.float32)).to(device))
            for name, (value, _) in table.items()
        }
    )
    optimizers = {
        name: torch.optim.Adam(
            [{"params": params[name], "lr": rate * math.sqrt(batch), "name": name}],
            eps=1e-15 / math.sqrt(batch),
            betas=(max(0.0, 1.0 - batch * 0.1), max(0.0, 1.0 - batch * 1e-3)),
            fused=True,
        )
        for name, (_, rate) in table.items()
    }
    return params, optimizers


def _policy(strategy: Strategy, config: fit.FitConfig, budget: int) -> Any:
    from gsplat import strategy as strategies

    if strategy == "mcmc":
        stop = round(config.steps * _MCMC_STOP)
        return strategies.MCMCStrategy(cap_max=budget, refine_stop_iter=stop)

    class Capped(strategies.DefaultStrategy):
        """The default strategy, which never has more Gaussians than the budget."""

        def _grow_gs(self, params: Any, optimizers: Any, state: Any, step: int) -> tuple[int, int]:
            room, least = budget - len(params["means"]), self.grow_grad2d
            if room <= 0:
                return 0, 0
            mean = state["grad2d"] / state["count"].clamp_min(1)
            if int((mean > least).sum()) > room:
                self.grow_grad2d = float(mean.topk(room + 1).values[-1])
            grown = super()._grow_gs(params, optimizers, state, step)
            self.grow_grad2d = least
            return grown

    return Capped(refine_stop_iter=round(config.steps * _DEFAULT_STOP))


def _lenses(cameras: camera.Camera, device: str) -> tuple[Any, Any]:
    import torch

    fields = (cameras.world_to_camera, cameras.intrinsics)
    return tuple(torch.from_numpy(np.array(field, np.float32)).to(device) for field in fields)


def _draw(
    rasterization: Callable[..., Any],
    params: Any,
    lenses: tuple[Any, Any],
    degree: int,
    size: tuple[int, int],
    behind: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """gsplat's renders on a colour, alphas and what its strategies want to know."""
    import torch

    sh = params["sh0"]
    if "shN" in params:
        sh = torch.cat([sh, params["shN"]], dim=1)
    return rasterization(
        means=params["means"],
        quats=params["quats"],
        scales=torch.exp(params["scales"]),
        opacities=torch.sigmoid(params["opacities"]),
        colors=sh,
        viewmats=lenses[0],
        Ks=lenses[1],
        width=size[0],
        height=size[1],
        sh_degree=degree,
        packed=False,
        backgrounds=behind.expand(len(lenses[0]), 3),
    )
