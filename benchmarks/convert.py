"""Peak memory, time and exactness of `v3d_jax.convert` at the published sizes.

    python benchmarks/convert.py --work DIR

writes checkpoints with the names and shapes of the published ones and random values into DIR, a
case at a time, converts them in processes of their own, compares what comes back from a round trip
with the values that were drawn, to the bit, and removes all that it made. A row is one conversion:
gigabytes of the source, seconds, gigabytes of memory at the peak, and their ratio. `load` reads a
file as `--model` of `sample` does. Needs Linux, 36 GB in DIR, and 9 GB of memory for `load`.
"""

import dataclasses
import functools
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import published_files as files  # noqa: E402

from v3d_jax.nn import generator  # noqa: E402
from v3d_jax.weights import clip as clip_names  # noqa: E402
from v3d_jax.weights import containers, sgm, tensors  # noqa: E402

Case = Literal["pair", "svd", "svd-bfloat16", "diffusers-float16", "load"]
# The high-water mark starts anew with the program, unlike the one that the system hands to parents.
PEAK = "print([x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')][0])"
CONVERT = f"from v3d_jax import convert; convert.main(); {PEAK}"
LOAD = f"import sys; from v3d_jax.weights import packaged; packaged.load(sys.argv[1]); {PEAK}"
SVD_NAMES = (sgm.UNET, sgm.AUTOENCODER, clip_names.SVD + clip_names.OPEN_CLIP)


@dataclasses.dataclass(frozen=True)
class Args:
    """What to measure."""

    work: Path
    """Folder for the checkpoints; it must not exist and is removed."""
    cases: tuple[Case, ...] = ("pair", "svd", "svd-bfloat16", "diffusers-float16", "load")
    """Which sources."""
    reduced: bool = False
    """Use the small model of the tests, to try this out."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """The folder, the model's sizes, and what convert must be told of them."""

    work: Path
    config: generator.GeneratorConfig
    hints: tuple[str, ...]

    def convert(self, source: Path, target: str, *arguments: str) -> Path:
        """Converts, prints a row, and returns the target's path."""
        path = self.work / target
        self.row(CONVERT, source, f"{source.name} to {target}", str(path), *arguments)
        return path

    def row(self, program: str, source: Path, name: str, *arguments: str) -> None:
        """Runs a program on a source and prints what it took."""
        start = time.perf_counter()
        command = [sys.executable, "-c", program, str(source), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        peak = 1024 * int(done.stdout.split()[-1])
        held = size(source)
        print(
            f"| {name} | {held / 1e9:.2f} | {seconds:.0f} | {peak / 1e9:.2f} | {peak / held:.3f} |",
            flush=True,
        )


def values(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Values of about a network's size, drawn with the tensor's name as the seed."""
    if name.startswith("quant_conv."):  # another one would be folded into its neighbour
        identity = np.eye(shape[0]).reshape(shape) if len(shape) == 4 else np.zeros(shape)
        return identity.astype(dtype)
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    return np.asarray(np.float32(0.02) * drawn + np.float32(len(shape) == 1), dtype)


def lazy(named: Mapping[str, tuple[int, ...]], dtype: Any) -> dict[str, tensors.Lazy]:
    """Tensors that are drawn when they are written."""
    return {
        name: tensors.Lazy(
            tuple(shape), np.dtype(dtype), functools.partial(values, name, tuple(shape), dtype)
        )
        for name, shape in named.items()
    }


def size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    found = [path] if path.is_file() else [x for x in path.rglob("*") if x.is_file()]
    return sum(file.stat().st_size for file in found)


def compare(found: Mapping[str, Any], dtype: Any, names: tuple[str, ...] = ("",)) -> None:
    """Holds the tensors whose names begin so to the values that were drawn, to the bit."""
    count = 0
    for name, tensor in found.items():
        if name.startswith(names):
            drawn = values(name, tuple(tensor.shape), dtype)
            if np.asarray(tensor).tobytes() != drawn.tobytes():
                raise SystemExit(f"{name} came back changed")
            count += 1
    print(f"{count} tensors came back to the bit", flush=True)


def pair(bench: Bench) -> None:
    """V3D's checkpoint and SVD's tower to ours, and from there to the other layouts and back."""
    folder = bench.work / "pair"
    source = files.lightning(
        folder / "V3D_512.ckpt", lazy(files.sgm_shapes(bench.config), np.float32)
    )
    tensors.write(folder / "svd_xt.safetensors", lazy(files.svd_shapes(bench.config), np.float32))
    ours = bench.convert(source, "ours", *bench.hints)
    shutil.rmtree(folder)
    single = bench.convert(ours, "sgm.safetensors", "--layout", "sgm")
    compare(containers.open_file(single).tensors, np.float32, SVD_NAMES)
    single.unlink()
    there = bench.convert(ours, "diffusers", "--layout", "diffusers")
    again = bench.convert(there, "again")
    shutil.rmtree(there)
    for file in sorted(ours.glob("*.safetensors")):
        first, second = (tensors.open_file(one / file.name)[0] for one in (ours, again))
        if list(first) != list(second):
            raise SystemExit(f"{file.name} holds other tensors")
        for name, tensor in first.items():
            if np.asarray(tensor).tobytes() != np.asarray(second[name]).tobytes():
                raise SystemExit(f"{name} came back changed")
    print("ours through diffusers: the same bits", flush=True)


def svd(bench: Bench, dtype: Any = np.float32) -> None:
    """An SVD file to ours and back."""
    source = bench.work / "svd_xt.safetensors"
    tensors.write(source, lazy(files.svd_shapes(bench.config), dtype))
    ours = bench.convert(source, "ours", *bench.hints)
    source.unlink()
    single = bench.convert(ours, "sgm.safetensors", "--layout", "sgm")
    compare(containers.open_file(single).tensors, dtype, SVD_NAMES)


def diffusers(bench: Bench) -> None:
    """A diffusers folder in half precision to ours and back."""
    source, dtype = bench.work / "svd", np.float16
    named = files.diffusers_shapes(bench.config)
    files.diffusers_folder(
        source, bench.config, {name: lazy(x, dtype) for name, x in named.items()}, tensors.write
    )
    height, width = bench.config.frame_size
    ours = bench.convert(source, "ours", "--size", str(height), str(width))
    shutil.rmtree(source)
    there = bench.convert(ours, "diffusers", "--layout", "diffusers")
    for name in named:
        compare(containers.open_folder(there / name).tensors, dtype)


def load(bench: Bench) -> None:
    """Reading an SVD file into float32 arrays."""
    source = bench.work / "svd_xt.safetensors"
    tensors.write(source, lazy(files.svd_shapes(bench.config), np.float32))
    bench.row(LOAD, source, f"{source.name} read")


CASES: dict[str, Callable[[Bench], None]] = {
    "pair": pair,
    "svd": svd,
    "svd-bfloat16": functools.partial(svd, dtype=ml_dtypes.bfloat16),
    "diffusers-float16": diffusers,
    "load": load,
}


def main(args: Args) -> None:
    """Runs the cases and prints a row for every conversion."""
    config = files.REDUCED if args.reduced else generator.V3D_512
    height, width = config.frame_size
    hints = ["--frames", str(config.num_frames), "--size", str(height), str(width)]
    hints += ["--head-channels", str(config.unet.head_channels)]
    args.work.mkdir(parents=True)
    print("| conversion | source GB | seconds | peak GB | peak / source |\n|---|---|---|---|---|")
    try:
        for case in args.cases:
            work = args.work / case
            work.mkdir()
            CASES[case](Bench(work, config, tuple(hints)))
            shutil.rmtree(work)
    finally:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
