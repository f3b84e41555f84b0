"""A small coloured solid, its views through the shader, and GLBs read back without the exporter."""

import io
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import trimesh
from PIL import Image

from v3d_jax.mesh import bake, export, rasterize, shade, surface, texels, texture, unwrap
from v3d_jax.mesh.topology import Triangles
from v3d_jax.ops import camera

SIZE, SIDE, VIEWS = 48, 64, 6
RASTER = rasterize.RasterConfig(width=SIZE, height=SIZE, rows=1 << 15, slots=1 << 16)
CONFIG = texture.TextureConfig(side=SIDE, steps=100, lpips=0.0)
WHITE = shade.Lights(jnp.ones(3), jnp.asarray([[0.0, 0, 1]]), jnp.zeros((1, 3)))
_draw = jax.jit(
    lambda mesh, lenses: shade.render(mesh, lenses, WHITE, RASTER, alpha=False), static_argnums=()
)


def solid():
    ball = trimesh.creation.icosphere(3, 0.5)
    wave = np.sin(6.0 * ball.vertices).prod(axis=1, keepdims=True)
    return Triangles(np.float32(ball.vertices * (1.0 + 0.3 * wave)), np.int32(ball.faces))


def cameras(count=VIEWS, elevation=15.0, start=0.0):
    return camera.orbit(
        count, width=SIZE, height=SIZE, elevation=elevation, start_azimuth=start, fov=40.0
    )


def pattern(points):
    """Colours of the world: waves and a hard edge."""
    points = np.asarray(points, np.float64)
    wave = 0.5 + 0.3 * np.sin(9.0 * points + [[0.0, 1.0, 2.0]])
    return np.where(points[:, 2:] > 0.1, wave, 1.0 - wave).astype(np.float32)


def painted(triangles, atlas, side=SIDE):
    """The pattern as a texture, 8 bits."""
    laid = texels.lay(atlas, side)
    values, known = np.zeros((side**2, 3), np.float32), np.zeros(side**2, bool)
    values[laid.index] = pattern(texels.interpolated(laid, triangles, triangles.vertices))
    known[laid.index] = True
    values = texels.fill(laid, triangles, side, values, known)
    return export.Painted(triangles, atlas, np.uint8(values * 255 + 0.5))


def textured(item):
    """For the shader, from the arrays themselves."""
    side = round(len(item.colors) ** 0.5)
    rgba = np.full((1, side, side, 4), 255, np.uint8)
    rgba[0, ..., :3] = item.colors.reshape(side, side, 3)
    mesh = surface.from_geometry(*item.triangles, color=(1.0, 1.0, 1.0, 1.0))
    uv = item.atlas.uv[item.atlas.faces]
    return mesh._replace(uv=uv, texture=np.zeros(1, np.int32), atlas=rgba)


def draw(mesh, lenses, render=_draw):
    """Views on white and their alpha."""
    if render is _draw:  # one size, so one program
        size = mesh.atlas.shape[-2]
        mesh = surface.pad(mesh, vertices=1024, faces=1280, materials=1, textures=1, size=size)
    found = render(jax.tree.map(jnp.asarray, mesh), lenses)
    assert not bool(found.overflow(RASTER)) or render is not _draw
    rgba = np.asarray(found.rgba)
    return rgba[..., :3] * rgba[..., 3:] + 1.0 - rgba[..., 3:], rgba[..., 3]


def targets(views, alpha, lenses):
    return bake.Targets(jnp.asarray(np.uint8(views * 255 + 0.5)), jnp.asarray(alpha >= 0.5), lenses)


def unpack(data):
    """A GLB's JSON and arrays: attributes by name, faces, texture [h,w,3] or None; file axes."""
    magic, version, length = struct.unpack("<4sII", data[:12])
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size = struct.unpack("<I", data[12:16])[0]
    tree = json.loads(data[20 : 20 + size])
    blob = data[28 + size :]

    def view(index):
        place = tree["bufferViews"][index]
        start = place.get("byteOffset", 0)
        return blob[start : start + place["byteLength"]]

    def array(index):
        accessor = tree["accessors"][index]
        kind = {5125: np.uint32, 5126: np.float32}[accessor["componentType"]]
        width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}[accessor["type"]]
        found = np.frombuffer(view(accessor["bufferView"]), kind)
        return found[: accessor["count"] * width].reshape(-1, width)

    primitive = tree["meshes"][0]["primitives"][0]
    arrays = {name: array(index) for name, index in primitive["attributes"].items()}
    faces = array(primitive["indices"]).reshape(-1, 3).astype(np.int32)
    picture = None
    if "images" in tree:
        image = Image.open(io.BytesIO(view(tree["images"][0]["bufferView"])))
        picture = np.asarray(image.convert("RGB"))
    return tree, arrays, faces, picture


def from_glb(data):
    """For the shader, out of a textured GLB: what a viewer that honours glTF shows, unlit."""
    _, arrays, faces, picture = unpack(data)
    vertices = arrays["POSITION"][:, [2, 0, 1]]
    uv = arrays["TEXCOORD_0"] * np.float32([1, -1]) + np.float32([0, 1])
    mesh = surface.from_geometry(vertices, faces, color=(1.0, 1.0, 1.0, 1.0))
    rgba = np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=-1)
    return mesh._replace(uv=uv[faces], texture=np.zeros(1, np.int32), atlas=rgba[None])


def psnr(a, b):
    return -10.0 * np.log10(np.square(np.float64(a) - b).mean(axis=(1, 2, 3)))


def atlas(side=SIDE):
    return unwrap.unwrap(solid(), side)
