"""What a program costs, read from its trace and from its compiled text.

FLOPs come from the trace: a compiled program's own count leaves out fused kernels and takes loops
for one turn. Collectives come from the compiled program, the only place where they are.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

Count = collections.Counter[str]

_COLLECTIVE = re.compile(
    r"= (?P<shape>.+?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all"
    r"|ragged-all-to-all|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=\{?([^}\s,]+(?:, ?%[^},\s]+)*)"
)
_END = re.compile(r"\}(, execution_thread=.*)?\s*$")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")


class Collective(NamedTuple):
    """One kind of communication of one device in one run of the program.

    `bytes` is the size of the results, summed over all.
    """

    kind: str
    count: int
    bytes: int


def bytes_per_device(tree: Any, placements: Any) -> int:
    """Bytes that a tree of arrays or abstract arrays takes on one device."""

    def size(leaf: Any, placement: jax.sharding.Sharding) -> int:
        return math.prod(placement.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, placements)))


def collectives(text: str) -> list[Collective]:
    """Every kind of communication in a compiled program's text, those in loops once a turn."""
    computations = dict(_computations(text))
    turns = _turns(computations)
    # One that overlaps with computation is written in several functions, with the same channel.
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for name, lines in computations.items():
        for line in lines:
            if one := _COLLECTIVE.search(line):
                channel = _CHANNEL.search(line)
                key = (one["kind"], channel[1] if channel else line)
                times, size = found.get(key, (1, 0))
                found[key] = max(times, turns[name]), max(size, _result_bytes(one))
    counts, sizes = Count(), Count()
    for (kind, _), (times, size) in found.items():
        counts[kind] += times
        sizes[kind] += times * size
    return [Collective(kind, counts[kind], sizes[kind]) for kind in sorted(counts)]


def flops(jaxpr: Any) -> float:
    """Of matrix products and convolutions in a trace, over all devices; loops count every turn.

    A loop that ends on a condition counts one turn, of branches the largest counts.
    """
    return sum((_flops(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns), 0.0)


def _flops(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
        taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        # A transposed convolution multiplies with the zeros between its inputs only on paper.
        spread = math.prod(params["lhs_dilation"])
        return 2.0 * taps * math.prod(eqn.outvars[0].aval.shape) / spread
    if name.startswith("dot_product_attention_"):
        # cuDNN's: scores and their sums, or the scores again and four gradients.
        (b, queries, heads, channels), keys = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
        products = 5.0 if "bwd" in name else 2.0
        return products * 2.0 * b * heads * queries * keys * channels
    inner = [flops(jaxpr) for jaxpr in _inner(params)]
    if not inner:
        return 0.0
    if name == "cond":
        return max(inner)
    return sum(inner) * _repeats(name, params)


def _repeats(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        # Newer JAX calls them newly_manual_axes.
        axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            if hasattr(entry, "eqns") or hasattr(getattr(entry, "jaxpr", None), "eqns"):
                yield entry


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Names of a program's functions and their lines; the one that is run is called ENTRY."""
    name, lines = None, []
    for line in text.splitlines():
        # Lines of a kernel's settings may begin with a brace as well.
        if _END.match(line):
            if name is not None:
                yield name, lines
            name, lines = None, []
        elif name is not None:
            lines.append(line)
        elif header := _HEADER.match(line):
            name = "ENTRY" if line.startswith("ENTRY") else header["name"]


def _turns(computations: dict[str, list[str]]) -> Count:
    """How often each function is run; a loop whose number of turns is unknown counts one."""
    calls: dict[str, Count] = {}
    for name, lines in computations.items():
        calls[name] = Count()
        for line in lines:
            trips, body = _TRIPS.search(line), _BODY.search(line)
            for group in _CALLED.findall(line):
                for called in group.split(","):
                    called = called.strip().lstrip("%")
                    repeated = trips and body and called == body[1]
                    calls[name][called] += int(trips[1]) if repeated else 1
    turns = Count({"ENTRY": 1})
    # Functions are written before their callers, so callers are complete in the reverse order.
    for name in reversed(computations):
        for called, times in calls[name].items():
            turns[called] += turns[name] * times
    return turns


def _result_bytes(found: re.Match[str]) -> int:
    arrays = [_array_bytes(*array) for array in _ARRAY.findall(found["shape"])]
    if not found["start"] or found["kind"] == "all-reduce":
        return sum(arrays)
    # What starts gives its operands, as many results, and for permutations two counters.
    counters = 2 if found["kind"] == "collective-permute" and len(arrays) > 2 else 0
    arrays = arrays[: len(arrays) - counters]
    return sum(arrays[len(arrays) // 2 :])


def _array_bytes(kind: str, shape: str) -> int:
    sides = [int(side) for side in shape.split(",") if side]
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return int(np.ceil(math.prod(sides) * bits / 8))
