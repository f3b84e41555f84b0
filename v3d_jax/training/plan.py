"""Whether a training step fits a machine, found before the machine is at hand.

The step that `v3d_jax.train` would run is compiled ahead of time for the machine's devices from
shapes alone: no data, no weights, no accelerator.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from v3d_jax import config, errors, pipeline, state
from v3d_jax.nn import autoencoder
from v3d_jax.ops import target
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import program, sharding, topology
from v3d_jax.parallel.program import Collective
from v3d_jax.parallel.topology import Topology
from v3d_jax.state import Params, TrainState
from v3d_jax.training import conditioning, parts, perceptual, scene, video

# Less search for the fastest program and for the smallest: a plan is not run.
_QUICK = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}


class Memory(NamedTuple):
    """Bytes on one device: what lies there from step to step, and what one step takes besides."""

    parameters: int
    optimizer: int
    average: int
    frozen: int
    batch: int
    temporaries: int


class Plan(NamedTuple):
    """One device's share of one step.

    `flops` are those of matrix products and convolutions, recomputed ones included, shared out
    evenly. Where the compiler refused the program, there are no `collectives`, and the temporaries
    are what it said it would need.
    """

    topology: Topology
    mesh: dict[str, int]
    clips: int
    memory: Memory
    flops: float
    collectives: list[Collective]
    compiled: bool

    @property
    def fits(self) -> bool:
        """Whether a device's memory takes it all."""
        return self.compiled and sum(self.memory) <= self.topology.chip.memory


def make(settings: config.TrainConfig, name: str) -> Plan:
    """Compiles the step for the topology of this name; takes minutes at the published size.

    Must come before anything that touches a device. Raises `UserError` for an unknown name, for
    settings that do not fit the mesh or have no plan, and where the compiler is not installed.
    """
    wanted = topology.find(name)
    if not isinstance(settings, config.VideoTrainConfig):
        raise errors.UserError("--plan is for video models: name a config of one")
    return measure(settings, wanted, topology.devices(wanted))


def measure(settings: config.VideoTrainConfig, wanted: Topology, devices: Any) -> Plan:
    """The plan of a step on these devices, which may be none that are here."""
    mesh = meshes.make(settings.mesh, devices)
    clips = settings.data.loader.batch_size
    sharding.check_batch(mesh, clips, settings.optim.accumulate, settings.data.loader.num_frames)
    parts.check(
        settings.parts,
        settings.train_only,
        settings.perceptual.weight > 0.0,
        settings.run.init_from,
        parts.of(settings.model),
    )
    traced, memory = trace(settings, mesh, devices[0].platform)
    flops = program.flops(traced.jaxpr) / mesh.size
    found, temporaries, compiled = [], 0, True
    try:
        platform = "cuda" if devices[0].platform == "gpu" else devices[0].platform
        lowered = traced.lower(lowering_platforms=(platform,))
        step = lowered.compile(_QUICK if devices[0].platform == "tpu" else None)
    except jax.errors.JaxRuntimeError as error:
        compiled, temporaries = False, _temporaries(error, sum(memory))
    else:
        used = step.memory_analysis()
        outputs = max(used.output_size_in_bytes - used.alias_size_in_bytes, 0)
        temporaries = used.temp_size_in_bytes + outputs + used.generated_code_size_in_bytes
        found = program.collectives(step.as_text())
    memory = memory._replace(temporaries=temporaries)
    return Plan(wanted, dict(mesh.shape), clips, memory, flops, found, compiled)


def trace(settings: config.VideoTrainConfig, mesh: Mesh, platform: str) -> tuple[Any, Memory]:
    """The step traced on shapes, and the memory of its arguments."""
    optimizer, dtype = state.optimizer(settings.optim), jnp.dtype(settings.dtype)

    def fresh(key: jax.Array) -> TrainState:
        made = parts.random(settings.model, dtype, key, settings.parts)
        learnt = parts.split(made, settings.train_only)[0]
        return state.create(learnt, optimizer, settings.optim.params)

    key = jax.eval_shape(lambda: jax.random.key(0))
    begun, frozen, batch = jax.eval_shape(fresh, key), abstract_frozen(settings), inputs(settings)
    placed = sharding.weights(begun, mesh)
    resting = sharding.weights(frozen, mesh)
    loss = video.make_loss(
        pipeline.Settings(settings.model, settings.sampling, activations=settings.dtype),
        settings.loss,
        settings.perceptual,
        settings.condition,
        settings.parts,
        _conditioner(settings),
    )
    step = state.sharded_step(loss, optimizer, settings.optim, mesh, placed, resting)
    with target.traced_for(platform):
        traced = step.trace(begun, frozen, batch, key, jax.ShapeDtypeStruct((), jnp.float32))
    size = program.bytes_per_device
    memory = Memory(
        parameters=size(begun.params, placed.params),
        optimizer=size(begun.opt_state, placed.opt_state),
        average=size(begun.ema, placed.ema),
        frozen=size(frozen, resting),
        batch=size(batch, jax.tree.map(lambda _: sharding.batch(mesh), batch)),
        temporaries=0,
    )
    return traced, memory


def _conditioner(settings: config.VideoTrainConfig) -> conditioning.Conditioner | None:
    """What conditions a scene model; None for models of objects."""
    if not isinstance(settings, config.SceneTrainConfig):
        return None
    return functools.partial(scene.condition, settings.scene)


def abstract_frozen(settings: config.VideoTrainConfig) -> video.Frozen:
    """Shapes of what training leaves alone."""
    model, dtype = settings.model, jnp.dtype(settings.dtype)

    def encoder_and_decoder(key: jax.Array) -> Params:
        module = autoencoder.Autoencoder(model.autoencoder, dtype=dtype, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module))

    networks = perceptual.load(settings.perceptual, model.frame_size)
    return video.Frozen(
        jax.eval_shape(encoder_and_decoder, jax.random.key(0)),
        jax.eval_shape(lambda: networks),
        video.abstract_rest(model, dtype, settings.parts, settings.train_only),
        jax.ShapeDtypeStruct((), jnp.float32),
    )


def inputs(settings: config.VideoTrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of cached latents, as `data.loader` gives them; of scenes, with views."""
    clips, frames = settings.data.loader.batch_size, settings.data.loader.num_frames
    side, pictures = settings.latents.cache.image_size, settings.perceptual.pictures
    shapes = {
        "latents": ((frames, *settings.model.latent_shape[1:]), jnp.float16),
        "image": ((side, side, 3), jnp.uint8),
        "azimuth": ((frames,), jnp.float32),
        "elevation": ((), jnp.float32),
        "index": ((), jnp.int32),
    }
    if video.keeps_tokens(settings.model, settings.latents, settings.parts):
        shapes["tokens"] = ((1, settings.model.vision.output_dim), jnp.float32)
    height, width = settings.model.frame_size
    if isinstance(settings, config.SceneTrainConfig):
        sources = settings.scene.sources.max_sources
        shapes |= {
            "small": ((frames, side, side, 3), jnp.uint8),
            "sources": ((sources, height, width, 3), jnp.uint8),
            "source_places": ((sources,), jnp.int32),
            "valid": ((sources,), jnp.bool_),
            "world_to_camera": ((frames, 4, 4), jnp.float32),
            "intrinsics": ((frames, 3, 3), jnp.float32),
        }
    if pictures:
        shapes["pictures"] = ((pictures, height, width, 3), jnp.uint8)
        shapes["places"] = ((pictures,), jnp.int32)
    return {
        name: jax.ShapeDtypeStruct((clips, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }


def report(plan: Plan) -> str:
    """The plan as lines to read; GB are 10^9 bytes."""
    chip, memory = plan.topology.chip, plan.memory
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    devices = plan.topology.count
    lines = [
        f"{plan.topology.name}: {devices} chips as {axes}; {plan.clips} clips a step",
        "memory of a chip, GB:",
        *(f"  {name:12} {size / 1e9:9.3f}" for name, size in memory._asdict().items()),
        f"  {'sum':12} {sum(memory) / 1e9:9.3f} of {chip.memory / 1e9:.3f}",
        f"work of a chip and step: {plan.flops / 1e12:.2f} TFLOP, "
        f"{plan.flops / chip.flops:.3f} s at its peak of {chip.flops / 1e12:.0f} TFLOP/s",
        *(f"{one.kind}: {one.count} a step, {one.bytes / 1e9:.3f} GB" for one in plan.collectives),
    ]
    verdict = "fits" if plan.fits else "does not fit"
    if not plan.compiled:
        verdict += ": the compiler ran out of memory"
    return "\n".join([*lines, verdict])


_SIZES = re.compile(r"(Used|temporaries) \(?([\d.]+)([KMGT])\)? (?:of|exceeds)")


def _temporaries(error: Exception, arguments: int) -> int:
    """Bytes that a compiler said a program would take besides its arguments, from its refusal.

    Re-raises errors that say nothing of memory.
    """
    text = str(error)
    found = _SIZES.search(text)
    if "RESOURCE_EXHAUSTED" not in text or found is None:
        raise error
    size = int(float(found[2]) * 1024 ** ("KMGT".index(found[3]) + 1))
    return size - arguments if found[1] == "Used" else size
