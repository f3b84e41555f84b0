"""Published checkpoints to ours and back: `python -m v3d_jax.convert SRC DST`.

SRC is V3D_512.ckpt with svd_xt.safetensors beside it, an SVD file, a diffusers folder, shards with
an index, a folder of such files, or a model of ours. DST is a model folder of ours, one file in
sgm's layout or a diffusers folder (docs/weights.md).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from v3d_jax import errors
from v3d_jax.weights import export, folder, packaged, published
from v3d_jax.weights import tensors as tensor_files

LAYOUTS: dict[str, Callable[..., None]] = {
    "ours": folder.write,
    "sgm": export.write_sgm,
    "diffusers": export.write_diffusers,
}


@dataclasses.dataclass(frozen=True)
class ConvertArgs:
    """Converts a checkpoint, one tensor at a time."""

    src: tyro.conf.Positional[Path]
    """Published checkpoint or folder of them, diffusers folder, model folder or packaged name."""
    dst: tyro.conf.Positional[Path]
    """Folder to make, or .safetensors file with --layout sgm."""
    layout: Literal["ours", "sgm", "diffusers"] = "ours"
    """Names and files of DST."""
    dtype: tensor_files.FloatName | None = None
    """Type of the weights, instead of their own; float16 leaves those beyond its range float32."""
    hints: Annotated[published.Hints, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=published.Hints
    )


def cli() -> None:
    """Entry point of `v3d-convert` and `python -m v3d_jax.convert`."""
    errors.run(main)


def main() -> None:
    """Parses the command line and runs it."""
    run(tyro.cli(ConvertArgs, prog="python -m v3d_jax.convert", description=__doc__))


def run(args: ConvertArgs) -> None:
    """Converts, with a progress bar, and prints what was made.

    Raises `UserError`; what was written so far is removed then.
    """
    _check(args)
    model = _open(args)
    with contextlib.ExitStack() as stack:
        LAYOUTS[args.layout](args.dst, model, args.dtype, _Bar(stack))
    print(f"{args.dst}: {_told(model)}")


class _Bar:
    """A progress bar that appears when the work begins, after everything has been checked."""

    def __init__(self, stack: contextlib.ExitStack):
        self.stack = stack

    def reset(self, total: int) -> None:
        bar = tqdm(desc="converting", total=total, unit="B", unit_scale=True)
        self.bar = self.stack.enter_context(bar)

    def update(self, n: int) -> None:
        self.bar.update(n)


def _open(args: ConvertArgs) -> folder.Unread:
    if published.is_published(args.src) and str(args.src) not in packaged.names():
        return published.open_model(args.src, args.hints)
    if args.hints != published.Hints():
        raise errors.UserError(f"{args.src} is a model of ours: it takes no hints on its settings")
    return packaged.open_model(str(args.src))


def _told(model: folder.Unread) -> str:
    counts = dict.fromkeys(published.FOLDERS, 0)
    for name, tensor in model.tensors.items():
        network = name.partition(".")[0]
        counts[network] = counts.get(network, 0) + math.prod(tensor.shape)
    config = model.generator
    height, width = config.frame_size
    parts = ", ".join(f"{network} {count:,}" for network, count in counts.items())
    return f"{config.num_frames} frames of {width} x {height}; parameters: {parts}"


def _check(args: ConvertArgs) -> None:
    if args.dst.resolve() == args.src.resolve():
        raise errors.UserError(f"{args.dst} is both SRC and DST: choose another name")
    single = args.dst.suffix in (".safetensors", ".ckpt", ".bin")
    if args.layout == "sgm" and args.dst.suffix != ".safetensors":
        raise errors.UserError(f"{args.dst}: a file in sgm's layout is named *.safetensors")
    if args.layout != "sgm" and single:
        raise errors.UserError(f"{args.dst} is a folder in this layout; --layout sgm makes a file")
    for name in ("frames", "head_channels", "vision_heads"):
        value = getattr(args.hints, name)
        if value is not None and value < 1:
            raise errors.UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if args.hints.size is not None and min(args.hints.size) < 1:
        raise errors.UserError("--size: two positive numbers are needed")


if __name__ == "__main__":
    cli()
