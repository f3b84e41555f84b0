"""Maps between the tensors of published checkpoints and our parameters, exactly once each.

A key map is a list of rules, one a tensor of theirs: its name, the dotted path of ours, and how one
becomes the other. Maps are built from the network's settings by re-rooting the tables of its parts
(`under`), so every name is known before a file is opened, and both directions come from one table.
Theirs are PyTorch layouts (O output, I input channels); ours are channels-last.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v3d_jax.errors import UserError
from v3d_jax.weights import folder
from v3d_jax.weights.tensors import Lazy, same_type

LISTED = 20

Arrays = tuple[np.ndarray, ...]


class Transform(NamedTuple):
    """One tensor of theirs to one or more of ours (`read`), and back (`write`)."""

    read: Callable[[np.ndarray], Arrays]
    write: Callable[[Arrays], np.ndarray]


class Rule(NamedTuple):
    """One tensor of theirs, by name, and those of ours that it holds (nearly always one)."""

    source: str
    target: tuple[str, ...]
    transform: Transform


class KeyMismatch(UserError):  # noqa: N818
    """Tensors that do not fit a key map; the attributes hold every name, the message the first."""

    def __init__(self, where: str, missing: list[str], unexpected: list[str], misshapen: list[str]):
        groups = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        found = [
            f"{len(names)} {what}: {_listed(names)}" for what, names in groups.items() if names
        ]
        super().__init__(f"{where} does not fit the model: {'; '.join(found)}")
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen


def _single(
    read: Callable[[np.ndarray], np.ndarray], write: Callable[[np.ndarray], np.ndarray]
) -> Transform:
    return Transform(lambda x: (read(x),), lambda xs: write(xs[0]))


SAME = _single(lambda x: x, lambda x: x)
# [O, I] and [I, O].
LINEAR = _single(lambda x: x.T, lambda x: x.T)
# [O, I, H, W] and [H, W, I, O].
CONV = _single(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# A 1x1 convolution that is a linear layer here: [O, I, 1, 1] and [I, O].
POINTWISE = _single(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
# A convolution over frames: [O, I, 3, 1, 1] and [3, I, O].
TEMPORAL = _single(
    lambda x: x[:, :, :, 0, 0].transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)[..., None, None]
)


def stacked(transform: Transform, parts: int) -> Transform:
    """Several of our tensors stacked along the first axis of theirs, such as q, k and v."""

    def read(x: np.ndarray) -> Arrays:
        return tuple(transform.read(part)[0] for part in np.split(x, parts))

    def write(xs: Arrays) -> np.ndarray:
        return np.concatenate([transform.write((x,)) for x in xs])

    return Transform(read, write)


def rule(source: str, target: str | tuple[str, ...], transform: Transform = SAME) -> Rule:
    """A rule for one tensor."""
    return Rule(source, (target,) if isinstance(target, str) else target, transform)


def layer(source: str, target: str, transform: Transform, *, bias: bool = True) -> list[Rule]:
    """The rules of a linear or convolution layer: weight and kernel, bias and bias."""
    rules = [rule(f"{source}.weight", f"{target}.kernel", transform)]
    return [*rules, rule(f"{source}.bias", f"{target}.bias")] if bias else rules


def norm(source: str, target: str) -> list[Rule]:
    """The rules of a normalisation layer: weight and scale, bias and bias."""
    return [
        rule(f"{source}.weight", f"{target}.scale"),
        rule(f"{source}.bias", f"{target}.bias"),
    ]


def under(source: str, target: str, rules: Sequence[Rule]) -> list[Rule]:
    """The same rules inside a module: prefixes, with their dots, for both sides."""
    return [
        Rule(source + theirs, tuple(target + name for name in ours), transform)
        for theirs, ours, transform in rules
    ]


def strip(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}


def shapes(rules: Sequence[Rule], params: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of theirs, for parameters that may be abstract.

    Raises ValueError unless the rules name each tensor of theirs and each of ours exactly once.
    """
    known = {name: tuple(leaf.shape) for name, leaf in folder.flatten(params).items()}
    sources = [source for source, _, _ in rules]
    targets = [name for _, target, _ in rules for name in target]
    for what, names in (("source", sources), ("target", targets)):
        if len(set(names)) != len(names):
            raise ValueError(f"key map: some {what} has two rules")
    if set(targets) != set(known):
        raise ValueError(f"key map: {_listed(sorted(set(targets) ^ set(known)))} on one side only")
    return {
        source: transform.write(tuple(_hollow(known[name]) for name in target)).shape
        for source, target, transform in rules
    }


def check(
    rules: Sequence[Rule], tensors: Mapping[str, Any], params: Any, where: str = "checkpoint"
) -> None:
    """Holds a checkpoint's tensors to the rules and to the shapes of `params`.

    Raises `KeyMismatch` (a `UserError`) naming all tensors that are missing, unexpected or
    misshapen; `where` names the file in it.
    """
    expected = shapes(rules, params)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} not {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or unexpected or misshapen:
        raise KeyMismatch(where, missing, unexpected, misshapen)


def ours(rules: Sequence[Rule], tensors: Mapping[str, Any]) -> dict[str, Lazy]:
    """Our parameters, by name, of a checkpoint's tensors in their types; nothing is read yet."""
    found = {}
    for source, target, transform in rules:
        tensor = tensors[source]
        for part, (name, shape) in enumerate(
            zip(target, _read_shapes(transform, tensor.shape), strict=True)
        ):
            read = functools.partial(_read_part, transform, tensor, part)
            found[name] = Lazy(shape, np.dtype(tensor.dtype), read)
    return found


def theirs(rules: Sequence[Rule], params: Mapping[str, Any]) -> dict[str, Lazy]:
    """A checkpoint's tensors of our parameters by name; the inverse of `ours`."""
    found = {}
    for source, target, transform in rules:
        parts = tuple(params[name] for name in target)
        shape = transform.write(tuple(_hollow(part.shape) for part in parts)).shape
        dtype = same_type(parts)
        found[source] = Lazy(shape, dtype, functools.partial(_write, transform, parts, dtype))
    return found


def read(
    rules: Sequence[Rule], tensors: Mapping[str, Any], params: Any, where: str = "checkpoint"
) -> Any:
    """Our parameters from a checkpoint's tensors, in the tree and dtypes of `params`.

    `params` is an nnx State or the same tree as dicts, and may be abstract. Raises as `check`.
    """
    check(rules, tensors, params, where)
    found = ours(rules, tensors)
    leaves = [
        jnp.asarray(np.ascontiguousarray(found[name]), leaf.dtype)
        for name, leaf in folder.flatten(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def write(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
    """A checkpoint's tensors from our parameters; the inverse of `read`."""
    shapes(rules, params)
    leaves = {name: np.asarray(leaf) for name, leaf in folder.flatten(params).items()}
    return {name: np.ascontiguousarray(x) for name, x in theirs(rules, leaves).items()}


def _read_part(transform: Transform, tensor: Any, part: int) -> np.ndarray:
    return transform.read(np.asarray(tensor))[part]


def _write(transform: Transform, parts: tuple[Any, ...], dtype: np.dtype) -> np.ndarray:
    return transform.write(tuple(np.asarray(part).astype(dtype, copy=False) for part in parts))


def _hollow(shape: Sequence[int]) -> np.ndarray:
    """Views of one zero: a transform shows the shape without the memory."""
    return np.broadcast_to(np.zeros((), np.float32), tuple(shape))


def _read_shapes(transform: Transform, shape: Sequence[int]) -> list[tuple[int, ...]]:
    return [part.shape for part in transform.read(_hollow(shape))]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
