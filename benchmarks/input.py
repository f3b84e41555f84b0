"""Clips a second that the loader gives one host, beside what a training step takes.

    python benchmarks/input.py --clips-per-s 168
    python benchmarks/input.py --data data/orbits --batch 32 --threads 1 4 8 --workers 0 4
    python benchmarks/input.py --data data/rooms --sources 3

Without --data a synthetic data set of --orbits noisy discs of --size pixels is written to a
temporary folder: noise compresses badly, so real frames are read faster. Four kinds of clips are
measured: latents in memory, the same with --pictures decoded frames a clip, with 1 to --sources
source views beside these (as a scene model learns from), and whole clips decoded from PNG. One
table row each: median clips a second over the batches after warm-up, megabytes a second of what a
batch holds, and with --clips-per-s (that host's share of the training's speed, as its log.csv has
it) how many times faster than the step the loader is. Below 1 the step waits.
"""

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from v3d_jax.data import latents, loader, orbits, png, posed

VIEWS = 18


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="an orbit data set; synthetic by default")
    parser.add_argument("--orbits", type=int, default=48, help="of the synthetic data set")
    parser.add_argument("--size", type=int, default=256, help="pixels of synthetic frames")
    parser.add_argument("--batch", type=int, default=32, help="clips of this host")
    parser.add_argument("--frames", type=int, default=18, help="of a clip")
    parser.add_argument("--pictures", type=int, default=1, help="decoded frames beside latents")
    parser.add_argument("--sources", type=int, default=3, help="source views of a scene, at most")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="processes")
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--clips-per-s", type=float, help="what a training step takes")
    return parser.parse_args()


def synthetic(path: Path, count: int, size: int) -> None:
    """Orbits of discs that cover half of a frame, in a colour with a little noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / (size - 1) - 0.5
    disc = (np.hypot(x, y) < 0.4).astype(np.uint8)[..., None]

    cameras = np.tile(np.eye(4, dtype=np.float32), (VIEWS, 1, 1))
    cameras[:, 0, 3] = 0.1 * np.arange(VIEWS)  # those of scenes are not at one place

    def frame() -> bytes:
        noise = rng.integers(0, 8, (size, size, 3), dtype=np.uint8)
        rgb = rng.integers(0, 248, 3, dtype=np.uint8) + noise
        return png.encode(np.concatenate([rgb * disc, 255 * disc], axis=-1).astype(np.uint8))

    def records():
        for number in range(count):
            yield (
                "train",
                orbits.Orbit(
                    name=f"disc-{number}",
                    variant=0,
                    frames=[frame() for _ in range(VIEWS)],
                    world_to_camera=cameras,
                    intrinsics=np.tile(np.eye(3, dtype=np.float32), (VIEWS, 1, 1)),
                    azimuths=np.arange(VIEWS, dtype=np.float32) * (360 / VIEWS),
                    elevation=0.0,
                ),
            )

    orbits.build(path, records(), views=VIEWS, size=size)


def in_memory(source: orbits.Source) -> latents.LatentCache:
    """Latents of the size that the frames would have, all different."""
    count, views, side = len(source), source.views, source.size // 8
    rng = np.random.default_rng(0)
    return latents.LatentCache(
        latents=rng.standard_normal((count, views, side, side, 4), np.float32).astype(np.float16),
        images=rng.integers(0, 256, (count, views, 128, 128, 3), dtype=np.uint8),
        azimuths=np.zeros((count, views), np.float32),
        elevations=np.zeros(count, np.float32),
        names=[str(number) for number in range(count)],
        source=source,
    )


def speed(
    clips: loader.Clips, settings: loader.LoaderConfig, pictures: int, batches: int
) -> tuple[float, int]:
    """Median clips a second of a batch after warm-up, and bytes of a batch."""
    # What is read ahead is handed out at once, and must not be counted.
    ahead = settings.prefetch + settings.threads * (1 + settings.workers)
    with contextlib.closing(loader.batches(clips, settings, pictures=pictures)) as stream:
        for _ in range(ahead):
            batch = next(stream)
        # Threads finish in bursts of one batch each: the time of several is divided.
        group = max(1, settings.threads, settings.workers)
        taken = []
        for _ in range(max(3, batches // group)):
            start = time.perf_counter()
            for _ in range(group):
                batch = next(stream)
            taken.append((time.perf_counter() - start) / group)
    return settings.batch_size / statistics.median(taken), sum(a.nbytes for a in batch.values())


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = args.data
        if path is None:
            path = Path(folder) / "data"
            synthetic(path, args.orbits, args.size)
        source = orbits.source(path)
        frames, cache = loader.FrameClips(source), in_memory(source)
        scenes = posed.PosedClips([cache], posed.SourceConfig(1, args.sources))
        kinds = (
            ("latents in memory", cache, 0),
            (f"latents, {args.pictures} pictures a clip", cache, args.pictures),
            (f"the same and up to {args.sources} sources", scenes, args.pictures),
            ("PNG frames", frames, 0),
        )
        print(f"{len(source)} orbits of {source.views} views, {source.size} pixels")
        print("| clips | threads | processes | clips/s | MB/s | times the step |")
        print("|---|---|---|---|---|---|")
        for (name, clips, pictures), threads, workers in itertools.product(
            kinds, args.threads, args.workers
        ):
            settings = dataclasses.replace(
                loader.LoaderConfig(args.batch, args.frames), threads=threads, workers=workers
            )
            rate, size = speed(clips, settings, pictures, args.batches)
            step = f"{rate / args.clips_per_s:.2f}" if args.clips_per_s else "-"
            flow = rate / args.batch * size / 1e6
            print(f"| {name} | {threads} | {workers} | {rate:.1f} | {flow:.1f} | {step} |")


if __name__ == "__main__":
    main()
