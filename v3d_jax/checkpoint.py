"""Checkpoints of training, with Orbax v1 behind three functions: save, restore, restore_ema.

A checkpoint is the folder `<run>/checkpoints/<step>` with the parts `params`, `opt_state`, `ema`
(arrays; each restores alone) and `meta` (the step and the data loader's position). It appears
under its name only when complete. No file in it is larger than 12 MiB. The train state is any
NamedTuple of `step` and those three, as in `v3d_jax.state`.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1

from v3d_jax import errors

# A file is closed once it passes the target, by at most one chunk.
_FILE_BYTES = 8 * 2**20
_CHUNK_BYTES = 4 * 2**20


class Restored(NamedTuple):
    """What a checkpoint holds: the train state, and where the loader stood."""

    state: Any
    loader: dict[str, int]


class Checkpoints:
    """The checkpoints of one run; closing waits for the one being written."""

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        policies = v1.training
        # A relative path fails in Orbax only once the writing thread runs.
        self._folder = Path(folder).resolve()
        self._checkpointer = v1.training.Checkpointer(
            self._folder,
            context=_context(),
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: Any, loader: dict[str, int]) -> None:
        """Starts writing; returns once the arrays are copied, so that they may be donated.

        Raises `UserError` where this checkpoint or the one before cannot be written; those that are
        complete stay as they are.
        """
        step = int(state.step)
        if step == self.latest:
            return
        parts = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema}
        meta = {"step": step, "loader": dict(loader)}
        with self._writing():
            self._checkpointer.save_checkpointables_async(step, {**parts, "meta": meta})

    def restore(self, abstract: Any, step: int | None = None) -> Restored:
        """The newest checkpoint, or the given step's, placed as `abstract`'s shardings say.

        Raises `UserError` if there is none or if its arrays are not those of `abstract`.
        """
        parts = {
            "params": abstract.params,
            "opt_state": abstract.opt_state,
            "ema": abstract.ema,
            "meta": None,
        }
        found = self._load(parts, step)
        meta = found["meta"]
        state = abstract._replace(
            step=_count(meta["step"], abstract.step),
            params=found["params"],
            opt_state=found["opt_state"],
            ema=found["ema"],
        )
        return Restored(state, {name: int(k) for name, k in meta["loader"].items()})

    def restore_ema(self, abstract: Any, step: int | None = None) -> Any:
        """The averaged weights alone, for sampling; errors as in `restore`."""
        return self._load({"ema": abstract}, step)["ema"]

    def close(self) -> None:
        """Waits for the checkpoint being written; errors as in `save`."""
        with self._writing():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore makes a ValueError of a full disk
            raise errors.UserError(
                f"cannot write a checkpoint to {self._folder} ({_line(error)}); "
                f"make room and call again: the run goes on from checkpoint {self.latest}"
            ) from error

    def _load(self, parts: dict[str, Any], step: int | None) -> dict[str, Any]:
        step = self.latest if step is None else step
        if step not in [known.step for known in self._checkpointer.checkpoints]:
            which = f" {step}" if step else ""
            raise errors.UserError(f"{self._folder} holds no checkpoint{which}")
        try:
            for name, abstract in parts.items():
                if abstract is not None:
                    _check_files(self._folder / str(step) / name)
            stored = self._checkpointer.checkpointables_metadata(step).metadata
            for name, abstract in parts.items():
                if abstract is not None:
                    _check(f"checkpoint {step}, {name}", stored[name], abstract)
            return self._checkpointer.load_checkpointables(step, parts)
        except errors.UserError:
            raise
        except Exception as error:  # Orbax fails on damaged files in many ways
            raise errors.UserError(self._damaged(step, error)) from error

    def _damaged(self, step: int, error: Exception) -> str:
        known = sorted(other.step for other in self._checkpointer.checkpoints)
        before = [other for other in known if other < step]
        then = f"go on from checkpoint {before[-1]}" if before else "start anew"
        where = self._folder / str(step)
        return f"checkpoint {step} cannot be read ({_line(error)}): remove {where} to {then}"


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with the shardings of an equal tree: a target of `restore`."""
    return jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        tree,
        shardings,
    )


def _count(step: int, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    value = np.asarray(step, abstract.dtype)
    return jax.make_array_from_callback((), abstract.sharding, lambda _: value)


def _context() -> v1.Context:
    context = v1.Context()
    context.array.saving.ocdbt_target_data_file_size = _FILE_BYTES
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    return context


def _check_files(part: Path) -> None:
    """Raises `ValueError` if a file is shorter than the index of `part` says; reads no arrays.

    Orbax reads all arrays at once. Where one of them fails Python reports all those beside it,
    pages of text, whenever it collects what was left of them.
    """
    store = tensorstore.KvStore.open(f"{part.as_uri()}/").result()
    index = tensorstore.ocdbt.dump(store).result()
    nodes = [index["versions"][-1]["root"]["location"]]
    while nodes:
        node = nodes.pop()
        _check_reference(part, node)
        for entry in tensorstore.ocdbt.dump(store, node).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
            elif "indirect_value" in entry:
                _check_reference(part, entry["indirect_value"])


def _check_reference(part: Path, reference: str) -> None:
    _, base, name, offset, length = reference.split(":")
    file, wanted = f"{base}{name}", int(offset) + int(length)
    size = (part / file).stat().st_size
    if size < wanted:
        raise ValueError(f"{part.name}/{file} has {size} bytes, not the {wanted} of its index")


def _check(where: str, stored: Any, wanted: Any) -> None:
    """Compares names and shapes; Orbax's own message for a mismatch names neither."""
    stored, wanted = _shapes(stored), _shapes(wanted)
    if not stored:  # what Orbax makes of an index that it cannot read
        raise ValueError(f"{where} is empty")
    differing = [
        f"{name} is {stored.get(name, 'missing')}, the settings make it {shape}"
        for name, shape in wanted.items()
        if stored.get(name) != shape
    ]
    differing += [f"{name} is not in the settings" for name in stored if name not in wanted]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise errors.UserError(f"{where}: {'; '.join(differing[:4])}{more}")


def _line(error: Exception) -> str:
    """The start of a message that may be pages long."""
    text = " ".join(str(error).split())
    return text if len(text) < 200 else f"{text[:200]}..."


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in paths
    }
