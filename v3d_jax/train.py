"""Trains a model: `python -m v3d_jax.train configs/mini.py [--overrides] [--plan v5e-256]`.

The same loop trains the autoencoder and the video model; the config gives it the objective. The
device is never waited for between two logged steps: metrics stay on it until then. A run that is
stopped (SIGTERM, Ctrl-C, `--run.time-limit`) saves and goes on where it was when called again.
With `--plan` nothing is trained: the step is compiled for a machine that need not be here.
"""

import collections
import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from v3d_jax import __version__, checkpoint, config, console, errors, state
from v3d_jax.data import loader
from v3d_jax.parallel import mesh as meshes
from v3d_jax.parallel import multihost, sharding
from v3d_jax.training import plan, record
from v3d_jax.training.objective import Objective, fit

PLAN = "--plan"


def train(settings: config.TrainConfig) -> state.TrainState:
    """Runs until the last step, the time limit or a signal; returns the state it ended with.

    Raises `UserError` for settings and data that cannot be used, and when the loss or the gradient
    is not finite; the newest checkpoint is then of an earlier step.
    """
    run, batch_size = settings.run, settings.data.loader.batch_size
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(record.StopRequest(run.time_limit))

        # Processes and devices, before anything else touches them.
        multihost.initialize(settings.multihost)
        mesh = meshes.make(settings.mesh)
        sharding.check_batch(
            mesh, batch_size, settings.optim.accumulate, settings.data.loader.num_frames
        )

        # The run's folder, the data, the model.
        folder = Path(run.dir)
        if multihost.is_main():
            config.open_run(settings)
        objective = settings.objective()
        optimizer = state.optimizer(settings.optim)
        rate = state.learning_rate(settings.optim, run.steps)
        checkpoints = stack.enter_context(
            contextlib.closing(checkpoint.Checkpoints(folder / "checkpoints", run.keep))
        )
        train_state, loader_state = begin(settings, objective, optimizer, checkpoints, mesh)
        start, first = int(train_state.step), loader_state["global_next_index"]
        placements = jax.tree.map(lambda leaf: leaf.sharding, train_state)
        everywhere = sharding.replicated(mesh)
        frozen_placements = sharding.weights(objective.frozen, mesh)
        frozen = sharding.put(objective.frozen, frozen_placements)
        # The draws of step k are those of fold_in(key, k): they need no place in a checkpoint.
        key = jax.jit(jax.random.key, out_shardings=everywhere)(run.seed)

        train_step = state.sharded_step(
            objective.loss, optimizer, settings.optim, mesh, placements, frozen_placements
        )
        preview = jax.jit(sharding.on_mesh(objective.preview, mesh), out_shardings=everywhere)
        preview_batch = sharding.put(objective.preview_batch, everywhere)

        say(f"{run.dir}: {count(train_state.params) / 1e6:.2f} M parameters, {mesh.size} devices")
        say(f"step {start} of {run.steps}; the first step compiles")
        log = stack.enter_context(
            record.Record(
                folder,
                start=start,
                steps=run.steps,
                batch_size=batch_size,
                names=objective.clips.name,
                rate=rate,
            )
        )
        batches = stack.enter_context(
            contextlib.closing(batches_ahead(objective, settings.data.loader, mesh, first))
        )

        if preview_batch and start == 0 and run.init_from is not None:
            # What the model could do before: that by which to judge what it learns.
            log.preview(0, *preview(train_state.ema, frozen, preview_batch, key), objective.heldout)
        trace = stack.enter_context(record.Trace(folder / "profile", run.profile_steps))
        step = start
        while step < run.steps and not stop.requested(ask=step % run.log_every == 0):
            trace.advance(step - start, train_state)
            batch, orbits = next(batches)
            # A numpy scalar, because every process puts it on devices of its own.
            now = np.float32(rate(step))
            train_state, metrics = train_step(train_state, frozen, batch, key, now)
            step += 1
            log.add(step, metrics, orbits)
            if step == start + 1:
                log.restart_clock()
            if step % run.log_every == 0:
                log.flush()
            if preview_batch and (step % run.sample_every == 0 or step == run.steps):
                log.flush()
                shown = preview(train_state.ema, frozen, preview_batch, key)
                log.preview(step, *shown, objective.heldout)
            if step % run.save_every == 0:
                log.flush()
                place = {"global_next_index": first + (step - start) * batch_size}
                checkpoints.save(train_state, place)
                log.restart_clock()

        log.flush()
        checkpoints.save(train_state, {"global_next_index": first + (step - start) * batch_size})
        if run.export or step == run.steps:
            export(settings, objective, train_state)
    return train_state


def begin(
    settings: config.TrainConfig,
    objective: Objective,
    optimizer: Any,
    checkpoints: checkpoint.Checkpoints,
    mesh: Mesh,
) -> checkpoint.Restored:
    """The newest checkpoint's state and place in the data; else new ones, placed on the mesh.

    New weights are random, or those of the model that `run.init_from` names.
    """

    def fresh(seed: Any) -> state.TrainState:
        # A key of its own, so that the weights and the first step's noise have nothing in common.
        key = jax.random.fold_in(jax.random.key(seed), 2**31)
        return state.create(objective.init(key), optimizer, settings.optim.params)

    abstract = jax.eval_shape(fresh, settings.run.seed)
    placements = sharding.weights(abstract, mesh)
    if checkpoints.latest is not None:
        return checkpoints.restore(checkpoint.abstract_like(abstract, placements))
    if settings.run.init_from is None:
        train_state = jax.jit(fresh, out_shardings=placements)(settings.run.seed)
    else:
        params = objective.load(Path(settings.run.init_from))
        params = fit(params, abstract.ema, settings.run.init_from)
        held = settings.optim.params
        create = functools.partial(state.create, optimizer=optimizer, held=held)
        train_state = jax.jit(create, out_shardings=placements)(
            sharding.put(params, placements.params)
        )
    return checkpoint.Restored(train_state, {"global_next_index": 0})


def batches_ahead(
    objective: Objective, settings: loader.LoaderConfig, mesh: Mesh, first: int, ahead: int = 2
) -> Iterator[tuple[Any, np.ndarray]]:
    """Batches on the devices from clip number `first` of the stream, with their orbits' indices.

    While a step runs, the copies of the next `ahead` batches are under way.
    """
    source = loader.batches(
        objective.clips,
        settings,
        pictures=objective.pictures,
        rank=jax.process_index(),
        world=jax.process_count(),
    )
    source.set_state({"global_next_index": first})
    waiting: collections.deque[tuple[Any, np.ndarray]] = collections.deque()
    with contextlib.closing(source):
        for batch in source:
            waiting.append((sharding.put_batch(batch, mesh), batch["index"]))
            if len(waiting) > ahead:
                yield waiting.popleft()


def export(
    settings: config.TrainConfig, objective: Objective, train_state: state.TrainState
) -> None:
    """Writes the averaged weights as a model, to `run.export` or into the run's folder."""
    folder = Path(settings.run.export or Path(settings.run.dir) / "model")
    ema = multihost.to_host(train_state.ema)
    if multihost.is_main():
        folder.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "version": __version__,
            "steps": int(train_state.step),
            "training": config.describe(settings),
        }
        objective.export(folder, ema, metadata, settings.run.export_dtype)
        say(f"wrote {folder}")


def count(params: state.Params) -> int:
    """Parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def say(text: str) -> None:
    """Prints a line, in one process."""
    if multihost.is_main():
        print(text, flush=True)


def main() -> None:
    """Parses the command line; trains, or with `--plan TOPOLOGY` says whether a step would fit.

    The exit status of a plan that does not fit is 2.
    """
    arguments = sys.argv[1:]
    if PLAN not in arguments:
        settings = config.load(arguments)
        # A run that goes on, after minutes or weeks, need not compile its step again.
        console.enable_cache()
        train(settings)
        return
    place = arguments.index(PLAN)
    if place + 1 == len(arguments):
        raise errors.UserError(f"{PLAN} needs the name of a topology, such as v5e-256")
    name = arguments[place + 1]
    # Whatever accelerators are here, the plan is made without them.
    jax.config.update("jax_platforms", "cpu")
    planned = plan.make(config.load(arguments[:place] + arguments[place + 2 :]), name)
    say(plan.report(planned))
    if not planned.fits:
        sys.exit(errors.USER_ERROR_STATUS)


def cli() -> None:
    """The command `v3d-train`."""
    errors.run(main)


if __name__ == "__main__":
    cli()
