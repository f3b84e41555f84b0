"""Frames and a field to files, as the command lines will call it."""

import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import painted
import pytest
import trimesh

from v3d_jax import errors, meshing, splatting
from v3d_jax.data import output, views
from v3d_jax.mesh import extract, texels, texture, topology, unwrap
from v3d_jax.nn import lpips

ARGS = meshing.MeshArgs(
    faces=1_280, texture_size=painted.SIDE, texture_steps=100, mesh_resolution=64
)
ISOLATED = """
import sys
import v3d_jax.meshing
from jax._src import xla_bridge
heavy = {"trimesh", "skimage", "fast_simplification", "xatlas", "scipy.ndimage", "scipy.spatial"}
print(xla_bridge.backends_are_initialized(), sorted(heavy & set(sys.modules)))
"""


def ball(points):
    return jnp.linalg.norm(points, axis=-1) - 0.5


def colour(points):
    return 0.5 + 0.3 * jnp.sin(9.0 * points)


def fit_field(frames, key, seconds):
    seconds["sdf"] = 1.5
    return meshing.Field(ball, extract.Box(np.float32([-1, -1, -1]), 2.0), {"steps": 7})


@pytest.fixture(scope="module")
def frames():
    """Views of a coloured ball, with alpha."""
    sphere = trimesh.creation.icosphere(3, 0.5)
    whole = topology.Triangles(np.float32(sphere.vertices), np.int32(sphere.faces))
    atlas = unwrap.unwrap(whole, painted.SIDE)
    laid = texels.lay(atlas, painted.SIDE)
    points = texels.interpolated(laid, whole, whole.vertices)
    values = np.zeros((painted.SIDE**2, 3), np.float32)
    values[laid.index] = colour(points)
    known = np.zeros(len(values), bool)
    known[laid.index] = True
    values = texels.fill(laid, whole, painted.SIDE, values, known)
    item = painted.export.Painted(whole, atlas, np.uint8(values * 255 + 0.5))
    views, alpha = painted.draw(painted.textured(item), painted.cameras())
    straight = np.where(alpha[..., None] > 0, views - 1 + alpha[..., None], 1.0)
    straight = straight / np.maximum(alpha, 1e-3)[..., None]
    pictures = np.uint8(np.clip(straight, 0, 1) * 255 + 0.5)
    return splatting.Frames(pictures, np.uint8(alpha * 255 + 0.5), painted.cameras())


@pytest.fixture(scope="module")
def made(frames):
    seconds = {}
    return meshing.reconstruct(ARGS, frames, fit_field, 0, seconds), seconds


def test_the_field_is_fitted_to_solid_frames(frames):
    given = []

    def stop(frames, key, seconds):
        given.append(frames)
        raise errors.UserError("that is enough")

    pane = frames._replace(alpha=frames.alpha // 4 * 3)
    with pytest.raises(errors.UserError, match="that is enough"):
        meshing.reconstruct(ARGS, pane, stop, 0, {})
    inner = views.opaque(pane.images, pane.alpha)[1]
    assert (pane.alpha.max(), given[0].alpha.max()) == (189, 255)
    np.testing.assert_array_equal(given[0].alpha, inner)


def test_on_a_gpu_colours_are_fitted_by_lpips_in_float32(frames, monkeypatch):
    """In bfloat16 its gradient is mostly rounding."""
    told = {}

    def stop(*_, **given):
        told.update(given)
        raise errors.UserError("that is enough")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(splatting, "load_lpips", lambda *_: "weights")
    monkeypatch.setattr(meshing.bake, "bake", stop)
    sphere = trimesh.creation.icosphere(1, 0.5)
    surface = topology.Triangles(np.float32(sphere.vertices), np.int32(sphere.faces))
    given = (surface, None, frames, np.arange(painted.VIEWS), jax.random.key(0), {})
    with pytest.raises(errors.UserError, match="that is enough"):
        meshing._colored(texture.TextureConfig(), *given)
    widths = (3, *13 * (4,))
    pairs = itertools.pairwise(widths)
    convs = [lpips.Conv(jnp.zeros((3, 3, i, o)), jnp.zeros(o)) for i, o in pairs]
    params = lpips.LPIPSParams(tuple(convs), 5 * (jnp.zeros(4),))
    made = jax.eval_shape(told["perceptual"].features, params, jnp.zeros((1, 32, 32, 3)))
    assert {leaf.dtype for leaf in made} == {jnp.dtype(jnp.float32)}
    assert told["params"] == "weights"


def test_report_and_renders(made, frames):
    result, seconds = made
    report = json.loads(json.dumps(result.report))
    assert report["psnr"] > 30.0
    assert report["ssim"] > 0.95
    assert (report["watertight"], report["pieces"], report["field"]) == (True, 1, {"steps": 7})
    assert 1_200 < report["faces"] <= 1_400 < report["extracted_faces"]
    assert set(seconds) == {*meshing.STAGES, "sdf"}
    assert result.renders.shape == frames.images.shape
    assert result.shown.tolist() == list(range(painted.VIEWS))
    assert report["colours"] == "texture"
    assert 0.5 < report["seen"] <= 1.0


def test_files_are_written_whole(made, tmp_path):
    args = meshing.MeshArgs(mesh_formats="obj, ply")
    meshing.check(args)
    item = output.Mesh(made[0].painted, made[0].renders, meshing.formats(args))
    path = tmp_path / "out"
    output.write_reconstruction(path, made[0].renders, {}, mesh=item)
    names = {"mesh.glb", "mesh.obj", "mesh.mtl", "mesh.png", "mesh.ply"}
    assert {file.name for file in path.iterdir()} == names | {"preview.png", "report.json"}
    _, arrays, faces, picture = painted.unpack((path / "mesh.glb").read_bytes())
    assert picture.shape == (painted.SIDE, painted.SIDE, 3)
    welded, index = np.unique(arrays["POSITION"], axis=0, return_inverse=True)
    assert topology.is_watertight(topology.Triangles(welded, index.reshape(-1)[faces]))


def test_without_xatlas_vertices_are_coloured_and_a_note_says_so(frames, monkeypatch, capsys):
    monkeypatch.setattr(unwrap, "available", lambda: False)
    result = meshing.reconstruct(ARGS, frames, fit_field, 0, {})
    assert result.report["colours"] == "vertices"
    assert result.report["psnr"] > 25.0
    assert result.painted.atlas is None
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes[0] == (
        "note: xatlas is not installed (pip install xatlas): colours are those of vertices"
    )
    with pytest.raises(errors.UserError, match="needs xatlas: pip install xatlas"):
        meshing.check(meshing.MeshArgs(colours="texture"))


def test_too_many_frames_are_thinned_out_evenly(frames, monkeypatch, capsys):
    monkeypatch.setattr(meshing, "_MOST_PIXELS", 3 * painted.SIZE**2)
    assert meshing._shown(frames).tolist() == [0, 2, 5]
    assert "3 of 6 frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faces": 10}, "--faces 10: at least 100 is needed"),
        ({"faces": 10**7}, "--faces 10000000: at most 1000000 is possible"),
        ({"texture_size": 1001}, "--texture-size 1001: a multiple of 8 is needed"),
        ({"mesh_resolution": 8}, "--mesh-resolution 8: at least 32 is needed"),
        ({"texture_steps": -1}, "--texture-steps -1: at least 0 is needed"),
        (
            {"mesh_formats": "stl"},
            "--mesh-formats: 'stl' is not available; there is: glb, obj, ply",
        ),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(errors.UserError) as caught:
        meshing.check(meshing.MeshArgs(**changes))
    assert str(caught.value) == message


def test_frames_and_fields_that_show_nothing(frames):
    empty = frames._replace(alpha=np.zeros_like(frames.alpha))
    with pytest.raises(errors.UserError, match="show no object"):
        meshing.reconstruct(ARGS, empty, fit_field, 0, {})

    def nothing(frames, key, seconds):
        return fit_field(frames, key, seconds)._replace(sdf=lambda p: jnp.ones(len(p)))

    with pytest.raises(errors.UserError, match="no surface"):
        meshing.reconstruct(ARGS, frames, nothing, 0, {})


def test_the_near_plane_follows_the_worlds_unit(frames):
    surface = painted.solid()
    assert meshing._near(surface, frames) == 2.0**-6
    small = [frames.cameras.world_to_camera.at[:, :3, 3].multiply(1e-3), *frames.cameras[1:]]
    shrunk = frames._replace(cameras=type(frames.cameras)(*small))
    tiny = surface._replace(vertices=surface.vertices * np.float32(1e-3))
    assert meshing._near(tiny, shrunk) == 2.0**-16


def test_the_key_follows_the_seed(frames):
    keys = []

    def remember(frames, key, seconds):
        keys.append(jax.random.key_data(key).tolist())
        raise errors.UserError("stop")

    for seed in (0, 0, 1):
        with pytest.raises(errors.UserError, match="stop"):
            meshing.reconstruct(ARGS, frames, remember, seed, {})
    assert keys[0] == keys[1] != keys[2]


def test_importing_starts_nothing():
    run = subprocess.run(
        [sys.executable, "-c", ISOLATED], capture_output=True, text=True, check=True
    )
    assert run.stdout == "False []\n"
