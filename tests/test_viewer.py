"""The exported file in three.js, drawn by headless Chromium, against our own pictures of it.

Needs a `chromium` (or google-chrome) on the path and the npm package `three`: its folder in
V3D_THREE, or installed with `npm install --global three`. Skipped without them.
"""

import base64
import functools
import http.server
import io
import os
import re
import shutil
import subprocess
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


def browser():
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def three():
    found = [os.environ.get("V3D_THREE"), *_FOLDERS]
    return next((one for one in found if one and (Path(one) / "build").is_dir()), None)


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
    solid = painted.solid()
    if kind == "texture":
        item = painted.painted(solid, painted.atlas(256), 256)
    else:
        colors = np.uint8(painted.pattern(solid.vertices) * 255 + 0.5)
        item = export.Painted(solid, None, colors)
    lenses = painted.cameras(count=3, start=10.0)
    places = export.to_file(np.asarray(camera.position(lenses))).tolist()
    (folder / "three").symlink_to(three())
    (folder / "mesh.glb").write_bytes(export.glb(item))
    (folder / "page.html").write_text(_PAGE % {"size": 192, "fov": 40.0, "places": places})
    command = [browser(), *_FLAGS, f"--user-data-dir={folder / 'profile'}", address]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    pictures = re.findall(r"<p>data:image/png;base64,([^<]+)</p>", page)
    assert len(pictures) == 3, page[-500:]
    found = np.stack([decoded(picture) for picture in pictures])
    textured = painted.painted(solid, painted.atlas(256), 256)
    expected, _ = painted.draw(painted.textured(textured), lenses)
    small = found.reshape(3, 48, 4, 48, 4, 3).mean(axis=(2, 4))
    assert painted.psnr(small, expected).min() > 27.0
    # The inside of the object, away from outlines and hard edges: the same colours.
    off = np.abs(small - expected).max(axis=-1)[expected.min(axis=-1) < 0.9]
    # Viewers run from vertex to vertex in linear light.
    assert np.median(off) < (2.5 if kind == "texture" else 5.0) / 255


def decoded(text):
    image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    return np.asarray(image, np.float32) / 255.0
