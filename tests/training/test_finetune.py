"""Fine-tuning on a kind of objects makes the shipped model better at that kind."""

import colorsys
import csv
import itertools

import jax
import numpy as np
import pytest
import trimesh

from v3d_jax import config, render, train
from v3d_jax.weights import lpips

LEARNT, HELDOUT = 20, 10


def ring_tower(rng: np.random.Generator) -> trimesh.Scene:
    """Four to six rings on a rod, each smaller than the one below and of a colour of its own."""
    count = rng.integers(4, 7)
    radii = np.sort(rng.uniform(0.25, 0.8, count))[::-1]
    thickness = rng.uniform(0.09, 0.14)
    rod = trimesh.creation.cylinder(0.08, height=2 * thickness * (count + 1))
    rod.apply_translation([0, 0, thickness * count])
    pieces = [(rod, 0.0)]
    for level, radius in enumerate(radii):
        ring = trimesh.creation.torus(radius, thickness, major_sections=32, minor_sections=12)
        ring.apply_translation([0, 0, 2 * thickness * level])
        pieces.append((ring, 1.0))
    scene = trimesh.Scene()
    for mesh, saturation in pieces:
        color = colorsys.hsv_to_rgb(rng.uniform(), saturation * rng.uniform(0.6, 1), 0.9)
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=[*color, 1.0])
        mesh.visual = trimesh.visual.TextureVisuals(material=material)
        # glTF's y is up.
        mesh.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0]))
        scene.add_geometry(mesh)
    return scene


def write_towers(folder) -> None:
    """GLB files, and a list of the names of those that are held out."""
    folder.mkdir()
    names = [f"tower_{number:02}" for number in range(LEARNT + HELDOUT)]
    for number, name in enumerate(names):
        ring_tower(np.random.default_rng(number)).export(folder / f"{name}.glb")
    (folder / "heldout.txt").write_text("\n".join(names[LEARNT:]))


def previews(run) -> list[dict[str, float]]:
    with (run / "previews.csv").open(newline="") as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]


def finetune(tmp_path, *overrides: str) -> list[dict[str, float]]:
    """By the commands of configs/mini_finetune.py; the scores while training."""
    meshes, data = tmp_path / "meshes", tmp_path / "data"
    write_towers(meshes)
    arguments = ["--out", data, "--heldout", meshes / "heldout.txt", "--size", "256"]
    arguments += ["--views", "18", "--variants", "8"]
    render.main([str(meshes), *map(str, arguments)])
    settings = {"--data.path": data, "--run.dir": tmp_path / "run"}
    given = itertools.chain.from_iterable(settings.items())
    train.train(config.load(["configs/mini_finetune.py", *map(str, given), *overrides]))
    return previews(tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.slow
def test_five_hundred_steps_lower_the_held_out_loss(tmp_path):
    if jax.devices()[0].platform != "gpu":
        pytest.skip("needs a GPU")
    lpips.load("alex")
    before, _, after = finetune(tmp_path)
    assert (before["step"], after["step"]) == (0, 500)
    assert after["loss_heldout"] < 0.8 * before["loss_heldout"]
    assert after["psnr_heldout"] > before["psnr_heldout"] + 1.0
