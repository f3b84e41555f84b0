"""The renderer of the scene model written out for one ray after the other, in numpy and float64."""

import numpy as np

from v3d_jax.nn import pixelnerf


def mlp(params, x):
    for name in ("linear1", "linear2", "linear3"):
        layer = params[name]
        x = x @ layer["kernel"] + layer["bias"]
        x = x if name == "linear3" else np.maximum(x, 0.0)
    return x


def span(origin, direction):
    """Where a ray is in the cube; None where it never is."""
    with np.errstate(divide="ignore"):
        ends = np.stack([(-1.0 - origin) / direction, (1.0 - origin) / direction])
    enter, leave = max(ends.min(axis=0).max(), 0.0), ends.max(axis=0).min()
    return (enter, leave) if leave > enter else None


def frame_rays(world_to_camera, intrinsics, width, height, size):
    pose = np.linalg.inv(world_to_camera)
    inverse = np.linalg.inv(intrinsics)
    for row in range(size[0]):
        for column in range(size[1]):
            pixel = [(column + 0.5) * width / size[1], (row + 0.5) * height / size[0], 1.0]
            direction = pose[:3, :3] @ (inverse @ pixel)
            yield pose[:3, 3], direction / np.linalg.norm(direction)


def interpolate(image, x, y):
    """By weights of all pixels; beyond the outermost centres nothing changes."""
    h, w, _ = image.shape
    x, y = np.clip(x - 0.5, 0, w - 1), np.clip(y - 0.5, 0, h - 1)
    across = np.maximum(1 - np.abs(x - np.arange(w)), 0)
    down = np.maximum(1 - np.abs(y - np.arange(h)), 0)
    return np.einsum("h,w,hwc->c", down, across, image)


def known(config, views, point):
    """`views` are (map, world_to_camera, intrinsics, width, height) of a clip, valid ones only."""
    found = []
    for image, world_to_camera, intrinsics, width, height in views:
        local = world_to_camera[:3, :3] @ point + world_to_camera[:3, 3]
        if local[2] > 1e-3:
            x, y, z = intrinsics @ local
            x, y = x / z, y / z
            if 0 <= x <= width and 0 <= y <= height:
                h, w, _ = image.shape
                found.append(interpolate(image, x * w / width, y * h / height))
    channels = views[0][0].shape[-1]
    parts = [np.mean(found, axis=0) if found else np.zeros(channels)]
    if config.deviation:
        parts.append(np.std(found, axis=0, ddof=1) if len(found) > 1 else np.zeros(channels))
    if config.position != "none":
        if config.position == "view":
            first = views[0][1]
            point = first[:3, :3] @ point + first[:3, 3]
            point = point / (1 + np.linalg.norm(point))
        waves = [f(np.pi * 2**k * point) for k in range(6) for f in (np.sin, np.cos)]
        parts += [point, *waves]
    return np.concatenate(parts), len(found)


def distances(config, target_rays):
    if config.sampling == "disparity":
        z = (np.arange(config.samples) + 0.5) / config.samples
        return [1 / ((1 - z) / config.near + z / config.far)] * len(target_rays)
    spans = [span(*ray) for ray in target_rays]
    hits = [s for s in spans if s is not None]
    fallback = (min(s[0] for s in hits), max(s[1] for s in hits))
    return [np.linspace(*(s or fallback), config.samples) for s in spans]


def render(config: pixelnerf.PixelNeRFConfig, params, views, targets, size):
    """Of one frame features and colours [h w, c], disparity [h w, 1], views of samples [h w, s]."""
    target_rays = list(frame_rays(*targets, size))
    outs, nears, counts = [], [], []
    for (origin, direction), along in zip(target_rays, distances(config, target_rays), strict=True):
        at = [known(config, views, origin + t * direction) for t in along]
        samples = mlp(params["sample"], np.stack([x for x, _ in at]))
        weight = np.exp(samples[:, -1] - samples[:, -1].max())
        out = mlp(params["ray"], weight @ samples[:, :-1] / weight.sum())
        outs.append(np.concatenate([out[3:], 1 / (1 + np.exp(-out[:3]))]))
        depths = [targets[0][2] @ [*(origin + t * direction), 1.0] for t in along]
        nears.append([weight @ (1 / np.asarray(depths)) / weight.sum()])
        counts.append([count for _, count in at])
    outs = np.stack(outs)
    return outs[:, :-3], outs[:, -3:], np.asarray(nears), np.asarray(counts)
