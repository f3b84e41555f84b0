"""The exported file as others draw it, against our own pictures of it.

three.js in headless Chromium: needs a `chromium` (or google-chrome) on the path and the npm package
`three`, its folder in V3D_THREE or installed with `npm install --global three`. Blender: needs its
Python module `bpy`, in this interpreter or in the one that V3D_BLENDER names. Skipped without.
"""

import base64
import functools
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import painted
import pytest
from PIL import Image

from v3d_jax.mesh import export
from v3d_jax.ops import camera

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FOLDERS = ("/usr/lib/node_modules/three", "/usr/local/lib/node_modules/three")
_FLAGS = [
    *("--headless=new", "--no-sandbox", "--hide-scrollbars"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"),
    *("--virtual-time-budget=30000", "--dump-dom"),
]
_PAGE = """<!doctype html><body><script type="importmap">
{"imports": {"three": "/three/build/three.module.js"}}</script>
<script type="module">
import * as three from "three";
import {GLTFLoader} from "/three/examples/jsm/loaders/GLTFLoader.js";
const renderer = new three.WebGLRenderer({antialias: true, preserveDrawingBuffer: true});
renderer.setSize(%(size)d, %(size)d, false);
const scene = new three.Scene();
scene.background = new three.Color(0xffffff);
const lens = new three.PerspectiveCamera(%(fov)f, 1, 0.01, 100);
new GLTFLoader().load("/mesh.glb", (file) => {
  scene.add(file.scene);
  for (const place of %(places)s) {
    lens.position.set(...place);
    lens.lookAt(0, 0, 0);
    renderer.render(scene, lens);
    const picture = document.createElement("p");
    picture.textContent = renderer.domElement.toDataURL("image/png");
    document.body.append(picture);
  }
}, undefined, (error) => { document.body.append("failed: " + error); });
</script></body>"""

# Blender looks along -y at what glTF says is the front, along z.
_SCRIPT = """
import json, sys
import bpy, mathutils
job = json.loads(sys.argv[1])
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.import_scene.gltf(filepath=job["file"])
scene = bpy.context.scene
scene.world = bpy.data.worlds.new("white")
scene.world.use_nodes = True
scene.world.node_tree.nodes["Background"].inputs["Color"].default_value = (1, 1, 1, 1)
scene.render.engine, scene.cycles.device, scene.cycles.samples = "CYCLES", "CPU", 16
scene.view_settings.view_transform = "Standard"
scene.render.resolution_x = scene.render.resolution_y = job["size"]
scene.camera = bpy.data.objects.new("lens", bpy.data.cameras.new("lens"))
scene.camera.data.angle, scene.camera.data.clip_start = job["fov"] * 3.14159265 / 180, 0.01
scene.collection.objects.link(scene.camera)
scene.camera.rotation_mode = "QUATERNION"
for number, (x, y, z) in enumerate(job["places"]):
    place = mathutils.Vector((x, -z, y))
    scene.camera.location = place
    scene.camera.rotation_quaternion = (-place).to_track_quat("-Z", "Y")
    scene.render.filepath = f"{job['out']}/{number}.png"
    bpy.ops.render.render(write_still=True)
"""


def browser():
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def three():
    found = [os.environ.get("V3D_THREE"), *_FOLDERS]
    return next((one for one in found if one and (Path(one) / "build").is_dir()), None)


def blender():
    if importlib.util.find_spec("bpy"):
        return sys.executable
    return os.environ.get("V3D_BLENDER")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    """A folder that is served on this machine, and its address."""
    handler = functools.partial(_Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}/page.html"
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium on the path")
@pytest.mark.skipif(three() is None, reason="no three.js: set V3D_THREE to the npm package")
@pytest.mark.parametrize("kind", ["texture", "vertices"])
def test_three_js_shows_the_frames_colours_upright(site, kind):
    folder, address = site
    item, lenses, places = scene(kind)
    (folder / "three").symlink_to(three())
    (folder / "mesh.glb").write_bytes(export.glb(item))
    (folder / "page.html").write_text(_PAGE % {"size": 192, "fov": 40.0, "places": places})
    command = [browser(), *_FLAGS, f"--user-data-dir={folder / 'profile'}", address]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    pictures = re.findall(r"<p>data:image/png;base64,([^<]+)</p>", page)
    assert len(pictures) == 3, page[-500:]
    assert_like_ours([io.BytesIO(base64.b64decode(picture)) for picture in pictures], lenses, kind)


@pytest.mark.slow
@pytest.mark.skipif(blender() is None, reason="no Blender: set V3D_BLENDER to a Python with bpy")
@pytest.mark.parametrize("kind", ["texture", "vertices"])
def test_blender_shows_the_frames_colours_upright(tmp_path, kind):
    item, lenses, places = scene(kind)
    (tmp_path / "mesh.glb").write_bytes(export.glb(item))
    job = {"file": f"{tmp_path}/mesh.glb", "out": str(tmp_path), "size": 192, "fov": 40.0}
    command = [blender(), "-c", _SCRIPT, json.dumps({**job, "places": places})]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    assert_like_ours([tmp_path / f"{number}.png" for number in range(3)], lenses, kind)


def scene(kind):
    """Something to export, cameras around it, and their places in the file's axes."""
    solid = painted.solid()
    if kind == "texture":
        item = painted.painted(solid, painted.atlas(256), 256)
    else:
        colors = np.uint8(painted.pattern(solid.vertices) * 255 + 0.5)
        item = export.Painted(solid, None, colors)
    lenses = painted.cameras(count=3, start=10.0)
    return item, lenses, export.to_file(np.asarray(camera.position(lenses))).tolist()


def assert_like_ours(files, lenses, kind):
    found = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files])
    textured = painted.painted(painted.solid(), painted.atlas(256), 256)
    expected, _ = painted.draw(painted.textured(textured), lenses)
    small = found.reshape(3, 48, 4, 48, 4, 3).mean(axis=(2, 4)) / 255.0
    assert painted.psnr(small, expected).min() > 27.0
    # The inside of the object, away from outlines and hard edges: the same colours.
    off = np.abs(small - expected).max(axis=-1)[expected.min(axis=-1) < 0.9]
    # Viewers run from vertex to vertex in linear light.
    assert np.median(off) < (2.5 if kind == "texture" else 5.0) / 255
