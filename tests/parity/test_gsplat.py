"""Splats against gsplat's own torch functions, on the CPU and in float64.

gsplat lists the (Gaussian, pixel) pairs in CUDA only; they are made here from its tiles, with the
arithmetic of its `accumulate`. The cap of alpha is that of its later releases, 0.99 (it is 0.999 in
1.5.3).
"""

import functools

import gaussian_scenes as scenes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v3d_jax.ops import camera as cameras
from v3d_jax.splat import gaussians as splats
from v3d_jax.splat import project as projection
from v3d_jax.splat import rasterize
from v3d_jax.splat.chunk import ALPHA_MAX, T_MIN

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
torch = pytest.importorskip("torch", reason="torch is not installed")

BACKGROUND = np.asarray([1.0, 0.5, 0.0])
TILE = 16


@functools.cache
def theirs():
    # Imported here: the package looks for a CUDA toolkit when it is imported.
    pytest.importorskip("gsplat", reason="gsplat is not installed")
    from gsplat.cuda import _torch_impl

    return _torch_impl


def tensors(kind):
    """Leaves in float64 that gsplat takes: means, quaternions, scales, opacities, coefficients."""
    scene = scenes.scene(kind)
    fields = scene._replace(
        log_scales=np.exp(scene.log_scales), opacity_logits=1 / (1 + np.exp(-scene.opacity_logits))
    )
    return [torch.tensor(field, requires_grad=True) for field in fields]


@functools.cache  # once, in single precision: under x64 the orbit would come out otherwise
def numpy_views():
    camera = jax.tree.map(np.asarray, scenes.views())
    return np.float64(camera.world_to_camera), np.float64(camera.intrinsics)


def their_projection(means, quats, scales):
    poses, intrinsics = (torch.tensor(x) for x in numpy_views())
    covariance, _ = theirs()._quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    return theirs()._fully_fused_projection(
        means, covariance, poses, intrinsics, scenes.WIDTH, scenes.HEIGHT
    )


def their_colors(means, sh):
    poses, _ = (torch.tensor(x) for x in numpy_views())
    eyes = torch.linalg.inv(poses)[:, :3, 3]
    directions = means[None] - eyes[:, None]
    spread = sh[None].expand(scenes.VIEWS, -1, -1, -1)
    return torch.clamp_min(theirs()._spherical_harmonics(3, directions, spread) + 0.5, 0.0)


def their_render(means, quats, scales, opacities, sh):
    """Colour over the background, and alpha, of both views."""
    radii, centres, depths, conics, _ = their_projection(means, quats, scales)
    colors = their_colors(means, sh)
    across, down = -(-scenes.WIDTH // TILE), -(-scenes.HEIGHT // TILE)
    _, keys, flat = theirs()._isect_tiles(
        centres.detach(), radii, depths.detach(), TILE, across, down
    )
    starts = theirs()._isect_offset_encode(keys, scenes.VIEWS, across, down).flatten().tolist()
    y, x = torch.meshgrid(torch.arange(TILE) + 0.5, torch.arange(TILE) + 0.5, indexing="ij")
    tiles = []
    for tile, (start, end) in enumerate(zip(starts, [*starts[1:], len(flat)], strict=True)):
        view, place = divmod(tile, across * down)
        ids = flat[start:end].long() - view * means.shape[0]
        px = (x.reshape(1, -1) + place % across * TILE).double()
        py = (y.reshape(1, -1) + place // across * TILE).double()
        tiles.append(
            one_tile(
                px - centres[view, ids, :1],
                py - centres[view, ids, 1:],
                conics[view, ids],
                opacities[ids],
                colors[view, ids],
            )
        )
    image = torch.stack(tiles).reshape(scenes.VIEWS, down, across, TILE, TILE, 4)
    image = image.permute(0, 1, 3, 2, 4, 5).reshape(scenes.VIEWS, down * TILE, across * TILE, 4)
    image = image[:, : scenes.HEIGHT, : scenes.WIDTH]
    return image[..., :3], image[..., 3]


def one_tile(dx, dy, conic, opacity, color):
    a, b, c = (conic[:, i : i + 1] for i in range(3))
    sigma = 0.5 * (a * dx**2 + c * dy**2) + b * dx * dy
    alpha = torch.clamp_max(opacity[:, None] * torch.exp(-sigma), ALPHA_MAX)
    seen = (sigma >= 0) & (alpha >= 1 / 255)
    alpha = torch.where(seen, alpha, 0.0)
    kept = seen & (torch.cumprod(1 - alpha, 0) > T_MIN)
    alpha = torch.where(kept, alpha, 0.0)
    behind = torch.cumprod(torch.cat([torch.ones(1, TILE * TILE), 1 - alpha]), 0)
    weight = alpha * behind[:-1]
    over = weight.T @ color + behind[-1][:, None] * torch.tensor(BACKGROUND)
    return torch.cat([over, 1 - behind[-1][:, None]], 1)


def test_projection_and_colors_equal_theirs():
    leaves = tensors("mixed")
    radii, centres, depths, conics, _ = their_projection(*leaves[:3])
    colors = their_colors(leaves[0], leaves[4])
    scene = scenes.scene("mixed")
    poses, intrinsics = numpy_views()
    camera = scenes.views()._replace(world_to_camera=poses, intrinsics=intrinsics)
    with jax.enable_x64(True):
        camera = jax.tree.map(jnp.asarray, camera)
        ours = scenes.as_float(scene, jnp.float64)
        p = projection.project(
            *(ours.means, ours.rotations, ours.scales, camera),
            width=scenes.WIDTH,
            height=scenes.HEIGHT,
        )
        shown = splats.color(ours.sh, ours.means, cameras.position(camera))
        pairs = [
            (p.mean_x, centres[..., 0]),
            (p.mean_y, centres[..., 1]),
            (p.conic_xx, conics[..., 0]),
            (p.conic_xy, conics[..., 1]),
            (p.conic_yy, conics[..., 2]),
            (p.depth, depths),
        ]
        for a, b in pairs:
            b = b.detach().numpy()
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())
        drawn = (radii > 0).all(-1).numpy()
        assert drawn.mean() > 0.9
        assert np.asarray(p.visible)[drawn].all()
        # their poses are inverted, ours transposed: single precision rotations differ in the end
        np.testing.assert_allclose(shown, colors.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_images_and_gradients_equal_theirs(kind):
    leaves = tensors(kind)
    color, alpha = their_render(*leaves)
    rng = np.random.default_rng(2)
    weights = rng.normal(size=color.shape), rng.normal(size=alpha.shape)
    total = (color * torch.tensor(weights[0])).sum() + (alpha * torch.tensor(weights[1])).sum()
    total.backward()
    scene = scenes.scene(kind)
    opacity = 1 / (1 + np.exp(-scene.opacity_logits))
    expected = splats.Gaussians(*(leaf.grad.numpy() for leaf in leaves))
    expected = expected._replace(  # their scales and opacities are bounded, ours are not
        log_scales=expected.log_scales * np.exp(scene.log_scales),
        opacity_logits=expected.opacity_logits * opacity * (1 - opacity),
    )

    @jax.jit
    def ours(gaussians, camera, background):
        def loss(gaussians):
            r = rasterize.rasterize(gaussians, camera, scenes.CONFIG, background)
            w = [jnp.asarray(weight, jnp.float32) for weight in weights]
            return jnp.sum(r.color * w[0]) + jnp.sum(r.alpha * w[1]), r

        return jax.grad(loss, has_aux=True)(gaussians)

    background = jnp.asarray(BACKGROUND, jnp.float32)
    gradient, result = ours(scenes.as_float(scene, jnp.float32), scenes.views(), background)
    assert not bool(result.overflow(scenes.CONFIG))
    image_bound, bound = (3e-3, 5e-4) if kind == "needle" else (2e-5, 2e-5)
    for a, b in ((result.color, color), (result.alpha, alpha)):
        assert np.abs(np.asarray(a, np.float64) - b.detach().numpy()).max() <= image_bound
    scale_norm = np.linalg.norm(expected.log_scales)
    for name, a, b in zip(scenes.FIELDS, gradient, expected, strict=True):
        if name == "rotations" and np.linalg.norm(b) < 1e-6 * scale_norm:
            continue
        assert scenes.relative(a, b) <= bound, name
