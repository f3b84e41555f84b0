"""Where a compiled program's time goes on a GPU, kernel by kernel, from JAX's profiler."""

import collections
import glob
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax


def kernel_times(call: Callable[[], Any], repeats: int) -> list[tuple[str, float, float]]:
    """(name, milliseconds a call, launches a call) of every kernel, the slowest first.

    On a CPU: of the parts that its runtime names.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(call())
        found = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = list(jax.profiler.ProfileData.from_file(found[0]).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        lines = [
            line
            for plane in devices or planes
            for line in plane.lines
            if line.name.startswith("Stream" if devices else "tf_XLAPjRtCpuClient")
        ]
        spent, count = collections.Counter(), collections.Counter()
        for line in lines:
            for event in line.events:
                spent[event.name] += event.duration_ns * 1e-6 / repeats
                count[event.name] += 1 / repeats
    return [(name, spent[name], count[name]) for name, _ in spent.most_common()]


def table(title: str, times: list[tuple[str, float, float]], most: int = 40) -> str:
    """The slowest kernels as a table, and what all of them take together."""
    total = sum(spent for _, spent, _ in times)
    rows = [f"| {name[:60]} | {spent:.3f} | {count:.0f} |" for name, spent, count in times[:most]]
    head = [f"| {title}: {total:.2f} ms in {len(times)} kernels | ms | launches |", "|---|---|---|"]
    return "\n".join([*head, *rows])


def name_operations(
    times: list[tuple[str, float, float]], program: str
) -> list[tuple[str, float, float]]:
    """Puts before a kernel's name the last parts of the operation that its fusion came from."""
    origins = operations(program)
    named = []
    for name, spent, count in times:
        origin = origins.get(_plain(name))
        named.append((name if origin is None else f"{origin[-38:]} {name}", spent, count))
    return named


def within(times: list[tuple[str, float, float]], program: str, scope: str) -> float:
    """Milliseconds of the kernels whose operation lies in a `jax.named_scope`."""
    origins = operations(program)
    return sum(
        spent for name, spent, _ in times if scope in origins.get(_plain(name), "").split("/")
    )


def operations(program: str) -> dict[str, str]:
    """Of every instruction of a compiled program the operation that it came from."""
    found = re.finditer(r'%([\w.\-]+) = [^\n]*?op_name="([^"]*)"', program)
    return {_plain(match[1]): match[2] for match in found}


def _plain(name: str) -> str:
    """As the profiler writes the name of an instruction."""
    return re.sub(r"[.\-]", "_", name)
