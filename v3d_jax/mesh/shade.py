"""From visible faces to pictures: texture, alpha test, lights, and compositing to RGBA views.

Axes: i view, h w pixels or samples, c channel. Colours are sRGB as displayed, and light
multiplies them as they are. Alpha in the result is straight (not premultiplied): the share of a
pixel's samples that see the object.

Textures are minified by the supersampling and a mip pyramid: bilinear in the level whose texels
are as large as a sample's footprint (by area, so oblique surfaces stay sharp).

Holes (texel alpha below the material's cutoff) are cut sample by sample before the depth test, so
whatever lies behind shows, however many leaves there are. See-through material uses the same test:
of the S x S samples of a pixel, those whose threshold (k + 1/2) / S^2 lies below its alpha see it.
That needs no sorting and repeats exactly; it renders alpha in steps of 1 / S^2, and several sheets
of glass in a row hide what one does.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key, UInt32

from v3d_jax.mesh import hits, mipmap, rasterize
from v3d_jax.mesh.rasterize import RasterConfig, Visibility
from v3d_jax.mesh.surface import Mesh
from v3d_jax.ops.camera import Camera


class Lights(NamedTuple):
    """Ambient light and directional lights that stay fixed in the world."""

    ambient: Float[Array, "3"]  # RGB
    direction: Float[Array, "l 3"]  # unit, towards the light
    color: Float[Array, "l 3"]  # RGB at normal incidence


@dataclass(frozen=True)
class LightConfig:
    """Ranges of `random_lights`; intensities are factors on displayed colours."""

    count: int = 3
    ambient: tuple[float, float] = (0.4, 0.65)
    total: tuple[float, float] = (0.6, 0.9)  # of all directional lights together
    tint: float = 0.08  # largest relative change of a colour channel
    lowest: float = -0.2  # smallest z of a light's direction


class Views(NamedTuple):
    """Rendered views; `face` and `depth` are those of single samples, S x S a pixel."""

    rgba: Float[Array, "i h w 4"]  # in [0, 1], straight alpha
    face: Int32[Array, "i hs ws"]  # -1: nothing
    depth: Float[Array, "i hs ws"]  # camera z in world units; inf: nothing
    rows: Int32[Array, ""]  # as in rasterize.Visibility, the largest over passes
    slots: Int32[Array, ""]
    near_faces: Int32[Array, ""]  # sum over passes

    def overflow(self, config: RasterConfig) -> Bool[Array, ""]:
        """Whether a capacity was too small, so that faces are missing."""
        return (self.rows > config.rows) | (self.slots > config.slots)


def standard_lights() -> Lights:
    """A key light from the front left above, a fill light and a weak light from behind."""
    direction = np.asarray([[1.0, -0.8, 1.2], [0.6, 1.0, 0.3], [-1.0, 0.2, 0.6]], np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    color = np.asarray([[0.45], [0.2], [0.15]], np.float32) * np.ones((1, 3), np.float32)
    return Lights(jnp.full(3, 0.5), jnp.asarray(direction), jnp.asarray(color))


def random_lights(key: Key[Array, ""], config: LightConfig = LightConfig()) -> Lights:
    """Ambient light and `config.count` directional lights drawn from the config's ranges."""
    keys = jax.random.split(key, 6)
    azimuth = jax.random.uniform(keys[0], (config.count,), maxval=2 * np.pi)
    z = jax.random.uniform(keys[1], (config.count,), minval=config.lowest, maxval=1.0)
    flat = jnp.sqrt(1.0 - z * z)
    direction = jnp.stack([flat * jnp.cos(azimuth), flat * jnp.sin(azimuth), z], axis=-1)
    share = jax.random.dirichlet(keys[2], jnp.ones(config.count))
    total = jax.random.uniform(keys[3], (), minval=config.total[0], maxval=config.total[1])
    tint = 1.0 + config.tint * jax.random.uniform(keys[4], (config.count, 3), minval=-1.0)
    low, high = config.ambient
    ambient = jax.random.uniform(keys[5], (), minval=low, maxval=high)
    return Lights(jnp.full(3, ambient), direction, (share * total)[:, None] * tint)


def render(
    mesh: Mesh,
    camera: Camera,
    lights: Lights,
    config: RasterConfig,
    *,
    alpha: bool,
    views_per_pass: int | None = None,
) -> Views:
    """Render a batch of views [i] of one mesh.

    `alpha` says whether to test holes and see-through materials (`surface.has_alpha`); it costs
    texture reads for every fragment. With `views_per_pass` (a divisor of i) the batch is cut in
    passes to bound memory; the capacities in `config` then hold for one pass. All shapes are
    static: scan or vmap it over a stack of padded meshes.

    Raises ValueError if `views_per_pass` does not divide the number of views.
    """
    mesh = jax.tree.map(jnp.asarray, mesh)
    faces, texels = hits.face_rows(mesh), mipmap.pyramid(mesh.atlas)

    def one_pass(camera: Camera) -> Views:
        keep = _alpha_test(faces, texels, camera, config) if alpha else None
        seen = rasterize.rasterize(mesh, camera, config, keep)
        rgba, depth = _shade(faces, texels, camera, lights, config, seen)
        return Views(rgba, seen.face, depth, seen.rows, seen.slots, seen.near_faces)

    count = camera.intrinsics.shape[0]
    out = lax.map(one_pass, rasterize.split_views(camera, views_per_pass))
    rgba, face, depth = (x.reshape(count, *x.shape[2:]) for x in out[:3])
    return Views(rgba, face, depth, out.rows.max(), out.slots.max(), out.near_faces.sum())


def _alpha_test(
    faces: hits.Faces, texels: UInt32[Array, "n t"], camera: Camera, config: RasterConfig
) -> rasterize.Keep:
    """The `keep` function of `rasterize` for holes and see-through materials."""
    size = config.supersample

    def keep(view: Array, face: Array, column: Array, row: Array) -> Array:
        base, cutoff = hits.read(faces, face, hits.ALPHA, 2)
        texture = faces.texture[face]
        texel = jnp.ones(column.shape, jnp.float32)
        if texels.shape[0]:
            hit = hits.intersect(faces, camera, config, view, face, column, row)
            u, v = hits.interpolate(hit, hits.read(faces, face, hits.UV, 6), 2)
            slot = jnp.broadcast_to(jnp.maximum(texture, 0), u.shape)
            texel = jnp.where(texture < 0, 1.0, mipmap.sample(texels, slot, u, v, None)[3])
        opacity = base * jnp.where(cutoff > 0, 1.0, texel)
        # thresholds run along the diagonals, so that neighbours in a row differ most
        x, y = column % size, row % size
        threshold = ((x + y) % size * size + y + 0.5) / size**2
        # half a step of 8 bits: a bilinear mean of equal texels may round below them
        return (texel >= cutoff - 0.5 / 255) & (opacity > threshold)

    return keep


def _shade(
    faces: hits.Faces,
    texels: UInt32[Array, "n t"],
    camera: Camera,
    lights: Lights,
    config: RasterConfig,
    seen: Visibility,
) -> tuple[Float[Array, "i h w 4"], Float[Array, "i hs ws"]]:
    """Colour every sample and average the samples of each pixel."""
    views, height, width = seen.face.shape
    face = jnp.maximum(seen.face, 0)
    view = jnp.arange(views, dtype=jnp.int32)[:, None, None]
    column = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    row = jnp.arange(height, dtype=jnp.int32)[None, :, None]
    # Barriers end a fused loop: without them the compiler recomputes what follows from each of
    # the gathers once for every colour channel.
    hit = hits.intersect(faces, camera, config, view, face, column, row)
    hit = lax.optimization_barrier(hit)
    color = lax.optimization_barrier(_albedo(faces, texels, camera, config, face, hit))
    light = _irradiance(faces, lights, face, hit)
    covered = seen.face >= 0
    planes = [
        jnp.where(covered, jnp.clip(c * e, 0, 1), 0) for c, e in zip(color, light, strict=True)
    ]
    planes = lax.optimization_barrier([*planes, covered.astype(jnp.float32)])
    size = config.supersample
    shape = (views, config.height, size, config.width, size)
    *planes, coverage = (plane.reshape(shape).mean(axis=(2, 4)) for plane in planes)
    straight = [jnp.minimum(c / jnp.maximum(coverage, 1e-6), 1.0) for c in planes]
    depth = jnp.where(covered, 1.0 / jnp.where(covered, seen.inverse_depth, 1.0), jnp.inf)
    return jnp.stack([*straight, coverage], axis=-1), depth


def _albedo(
    faces: hits.Faces,
    texels: UInt32[Array, "n t"],
    camera: Camera,
    config: RasterConfig,
    face: Array,
    hit: hits.Hit,
) -> list[Array]:
    """Base colour times texture at the mip level of the sample's footprint, three planes.

    A sample is 1 / (fx fy) of the image plane at z = 1 and covers z^2 / (fx fy |ray . n|) of the
    surface. Per face |uv area| s^2 / |e1 x e2| texels lie on a unit of surface, and
    |ray . n| |e1 x e2| = |det|: the face's own area cancels.
    """
    color = hits.read(faces, face, hits.COLOR, 3)
    if not texels.shape[0]:
        return color
    focal = camera.intrinsics[:, 0, 0] * camera.intrinsics[:, 1, 1] * config.supersample**2
    covered = hits.read(faces, face, hits.TEXELS, 1)[0] * hit.depth**2
    covered = covered / (focal[:, None, None] * jnp.maximum(jnp.abs(hit.det), 1e-20))
    finest, coarsest = 1.0, 4.0 ** mipmap.coarsest_level(texels)
    level = jnp.round(0.5 * jnp.log2(jnp.clip(covered, finest, coarsest))).astype(jnp.int32)
    u, v = lax.optimization_barrier(hits.interpolate(hit, hits.read(faces, face, hits.UV, 6), 2))
    texture = faces.texture[face]
    texel = mipmap.sample(texels, jnp.maximum(texture, 0), u, v, level)[:3]
    return [c * jnp.where(texture >= 0, t, 1.0) for c, t in zip(color, texel, strict=True)]


def _irradiance(faces: hits.Faces, lights: Lights, face: Array, hit: hits.Hit) -> list[Array]:
    """Ambient plus Lambert's cosine law, on the side of the surface that is looked at."""
    normal = hits.interpolate(hit, hits.read(faces, face, hits.NORMALS, 9), 3)
    turned = jnp.where(hit.det < 0, -1.0, 1.0)
    scale = turned / jnp.sqrt(jnp.maximum(hits.dot(normal, normal), 1e-12))
    light = list(lights.ambient)
    for direction, color in zip(lights.direction, lights.color, strict=True):
        cosine = jnp.maximum(hits.dot(normal, list(direction)) * scale, 0.0)
        light = [total + c * cosine for total, c in zip(light, color, strict=True)]
    return light
