"""Ahead-of-time compilation for TPUs on a machine that has none (extra `tpu-aot`)."""

import json
import os
import subprocess
import sys
from importlib import util

import pytest

PROGRAM = """
import functools, json, sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from v3d_jax.ops.camera import Camera
from v3d_jax.splat import rasterize
from v3d_jax.splat.gaussians import Gaussians

jax.config.update("jax_platforms", "cpu")
topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
place = SingleDeviceSharding(topology.devices[0])
number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=place)
count, size = 100_000, jax.ShapeDtypeStruct((1,), jnp.int32, sharding=place)
fields = ((count, 3), (count, 4), (count, 3), (count,), (count, 1, 3))
gaussians = Gaussians(*(number(field) for field in fields))
camera = Camera(number((1, 4, 4)), number((1, 3, 3)), size, size)
config = rasterize.RasterConfig(width=512, height=512, slots=1 << 19)

def loss(gaussians, camera, background):
    r = rasterize.rasterize(gaussians, camera, config, background)
    return jnp.sum(r.color ** 2) + jnp.sum(r.alpha)

program = loss if sys.argv[2] == "forward" else jax.grad(loss, argnums=(0, 2))
traced = jax.jit(program).trace(gaussians, camera, number((3,)))
compiled = traced.lower(lowering_platforms=("tpu",)).compile()
memory = compiled.memory_analysis().temp_size_in_bytes
print(json.dumps({"kind": topology.devices[0].device_kind, "temporary": memory}))
"""


@pytest.mark.tpu_aot
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("topology", "accelerator", "kind"),
    [("v5e:2x2", "v5litepod-4", "TPU v5 lite"), ("v6e:2x2", "v6e-4", "TPU v6 lite")],
)
def test_compiles_for_tpu(topology, accelerator, kind, direction):
    if util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install '.[tpu-aot]'")
    environment = os.environ | {
        "XLA_FLAGS": "",  # the tests' are a CPU's
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": accelerator,
    }
    # libtpu reads its description of the machine once a process
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, direction],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kind"] == kind
    assert found["temporary"] < 4e9
