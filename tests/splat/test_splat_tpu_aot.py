"""Ahead-of-time compilation for TPUs on a machine that has none (extra `tpu-aot`)."""

import json
import os
import subprocess
import sys
from importlib import util

import pytest

PROGRAM = """
import functools, json, sys, time
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from v3d_jax.ops import target
from v3d_jax.ops.camera import Camera
from v3d_jax.splat import rasterize
from v3d_jax.splat.gaussians import Gaussians

name, direction, compositing, views, slots = *sys.argv[1:4], *map(int, sys.argv[4:])
jax.config.update("jax_platforms", "cpu")
topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
place = SingleDeviceSharding(topology.devices[0])
number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=place)
count, size = 100_000, jax.ShapeDtypeStruct((views,), jnp.int32, sharding=place)
fields = ((count, 3), (count, 4), (count, 3), (count,), (count, 1, 3))
gaussians = Gaussians(*(number(field) for field in fields))
camera = Camera(number((views, 4, 4)), number((views, 3, 3)), size, size)
config = rasterize.RasterConfig(512, 512, slots, compositing=compositing)

def loss(gaussians, camera, background):
    r = rasterize.rasterize(gaussians, camera, config, background)
    return jnp.sum(r.color ** 2) + jnp.sum(r.alpha)

program = loss if direction == "forward" else jax.grad(loss, argnums=(0, 2))
with target.traced_for("tpu"):
    traced = jax.jit(program).trace(gaussians, camera, number((3,)))
    lowered = traced.lower(lowering_platforms=("tpu",))
start = time.perf_counter()
compiled = lowered.compile()
cost = compiled.cost_analysis()
print(json.dumps({
    "kind": topology.devices[0].device_kind,
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
    "seconds": round(time.perf_counter() - start, 1),
    "flops": cost["flops"],
    "bytes accessed": cost["bytes accessed"],
    "kernels": sum("splat_" in line and "tpu_custom_call" in line
                   for line in compiled.as_text().splitlines()),
}))
"""
V5E, V5P, V6E = (
    ("v5e:2x2", "v5litepod-4", "TPU v5 lite"),
    ("v5p:2x2x1", "v5p-8", "TPU v5"),
    ("v6e:2x2", "v6e-4", "TPU v6 lite"),
)


def compile_for(topology, accelerator, *arguments):
    """What the compiler says of the rasterizer of 100,000 Gaussians at 512 x 512."""
    if util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install '.[tpu-aot]'")
    environment = os.environ | {
        "XLA_FLAGS": "",  # the tests' are a CPU's
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no TPU that processes could want
    }
    # libtpu reads its description of the machine once a process
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.tpu_aot
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("topology", "accelerator", "kind"), [V5E, V6E])
def test_compiles_for_tpu(topology, accelerator, kind, direction):
    found = compile_for(topology, accelerator, direction, "xla", 1, 1 << 19)
    assert found["kind"] == kind
    assert found["temporary"] < 4e9


@pytest.mark.tpu_aot
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("topology", "accelerator", "kind"), [V5E, V5P, V6E])
def test_kernels_compile_for_tpu_at_18_views(topology, accelerator, kind, direction):
    found = compile_for(topology, accelerator, direction, "pallas", 18, 6_600_000)
    print(topology, direction, found)
    assert found["kind"] == kind
    assert found["temporary"] < 4e9
    assert found["kernels"] == (1 if direction == "forward" else 3)
