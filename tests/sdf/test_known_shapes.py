"""Fits of shapes whose surface is known: how near, how smooth, and of what topology."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import known_shapes
import numpy as np
import pytest

from v3d_jax.sdf import field, fit
from v3d_jax.sdf.targets import Targets

CHAMFER = {"box": 0.006}


def fitted(config, name, size, *, textured=True, seed=0):
    """The fitted field's signed distance as a numpy function, from a sphere as start."""
    shape = known_shapes.SHAPES[name]
    views = known_shapes.see(shape, size, textured=textured)
    seen = Targets(jnp.asarray(views.images), jnp.asarray(views.masks), views.cameras)
    state = fit.run(config, seen, jax.random.key(seed), chunk=config.steps)
    distance = jax.jit(functools.partial(field.sdf, config.field, state.parameters))
    return lambda points: np.concatenate(
        [np.asarray(distance(jnp.asarray(some))) for some in np.array_split(points, 16)]
    )


def judge(score, name, chamfer, normals, iou):
    print(name, score)
    assert score.chamfer <= chamfer
    assert score.normals >= normals
    assert score.iou >= iou
    assert score.euler == known_shapes.EULER[name]
    assert score.parts == 1
    assert score.watertight


@pytest.mark.slow
def test_preview_finds_a_torus_with_its_hole():
    score = known_shapes.score(fitted(fit.PREVIEW, "torus", 128), known_shapes.torus, side=96)
    judge(score, "torus", 0.004, 0.97, 0.95)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize("name", known_shapes.SHAPES)
def test_recipe_finds_shapes(name, textured, seed):
    distance = fitted(fit.V3D, name, 512, textured=textured, seed=seed)
    score = known_shapes.score(distance, known_shapes.SHAPES[name])
    judge(score, name, CHAMFER.get(name, 0.004), 0.97, 0.97)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torus", "box"])
def test_analytic_normals_are_no_worse_than_differences(name):
    apart = {}
    for normals in ("analytic", "central"):
        config = replace(fit.V3D, field=replace(fit.V3D.field, normals=normals))
        distance = fitted(config, name, 512)
        apart[normals] = known_shapes.score(distance, known_shapes.SHAPES[name]).chamfer
    assert apart["analytic"] <= 1.1 * apart["central"]
