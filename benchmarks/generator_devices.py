"""A sample's frames on several devices beside those of one, from the same key; see generator.py.

Limit: in float32 0.001, for frames in [0, 1]. In bfloat16 the programs round differently, and the
difference is shown without a limit.
"""

import dataclasses
from typing import Any

import generator as benchmark
import jax
import numpy as np

from v3d_jax import pipeline
from v3d_jax.ops import metrics
from v3d_jax.parallel import sampling as parallel

LIMIT = 1e-3


def frames(settings: pipeline.Settings, params: Any, image: Any) -> np.ndarray:
    """Of a whole sample; the weights lie on the host before and after."""
    mesh = pipeline.device_mesh(settings)
    params = jax.device_put(params) if mesh is None else parallel.repeat(params, mesh)
    ours = benchmark.Ours(settings, params, image)
    ours.compile()
    ours.prepare()
    return np.asarray(ours.run()[0])


def main(settings: pipeline.Settings, image: Any) -> None:
    """Prints a row a type; exits with status 1 beyond the limit."""
    for dtype in ("float32", "bfloat16"):
        split = dataclasses.replace(settings, activations=dtype)
        params = jax.device_get(benchmark.random_params(split.generator, split.dtype))
        precision = "highest" if dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            alone = frames(dataclasses.replace(split, devices=1), params, image)
            found = frames(split, params, image)
        far, likeness = np.abs(found - alone).max(), float(metrics.psnr(found, alone).mean())
        head = [
            f"frames on {settings.devices} devices",
            "deviation",
            "largest difference",
            "PSNR dB",
        ]
        row = [dtype, f"{alone.std():.3f}", f"{far:.1e}", f"{likeness:.1f}"]
        benchmark.table(head, [row])
        if dtype == "float32" and far > LIMIT:
            raise SystemExit(f"beyond the limit of {LIMIT}: {far:.1e}")
