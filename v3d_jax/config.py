"""A training run's settings: one dataclass an experiment, files that assign them, overrides.

A file in `configs/` assigns `config` an instance of one of the three classes; every field can then
be overridden from the command line, as in `--optim.lr 1e-5`.
"""

import json
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from v3d_jax import errors
from v3d_jax.diffusion.loss import LossConfig
from v3d_jax.diffusion.sampler import SamplingConfig
from v3d_jax.nn.autoencoder import AutoencoderConfig
from v3d_jax.nn.generator import MINI, SCENE_MINI, GeneratorConfig
from v3d_jax.parallel.mesh import MeshConfig
from v3d_jax.parallel.multihost import MultihostConfig
from v3d_jax.state import OptimConfig
from v3d_jax.training import autoencoder, objective, parts, scene, video
from v3d_jax.training.autoencoder import AutoencoderLossConfig
from v3d_jax.training.cached import CachedLatentsConfig
from v3d_jax.training.conditioning import ConditionConfig
from v3d_jax.training.objective import DataConfig
from v3d_jax.training.perceptual import PerceptualConfig
from v3d_jax.training.scene import SceneConfig
from v3d_jax.weights import settings


@dataclass(frozen=True)
class RunConfig:
    """How long a run lasts and what it writes.

    The folder `dir` takes config.json, log.csv, previews.csv, samples/ and checkpoints/, profile/
    where it is asked for, and at the end model/. Calling again continues from the newest
    checkpoint. A run may be cut into pieces: after `time_limit` seconds, or on SIGTERM, it saves
    and ends.
    """

    dir: str = "runs/mini"
    steps: int = 100_000
    seed: int = 0
    log_every: int = 50
    sample_every: int = 2_000
    save_every: int = 2_000
    keep: int = 2  # checkpoints
    time_limit: float | None = None  # seconds since the start, compilation included
    export: str | None = None  # write the averaged weights here whenever the run ends
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    init_from: str | None = None  # start from this exported model's weights
    profile_steps: int = 0  # trace so many steps, from the tenth on, into profile/
    accept_changes: bool = False  # continue although settings changed


@dataclass(frozen=True)
class VideoTrainConfig:
    """Trains the UNet and the image tower on the latents of a frozen autoencoder.

    Only `parts` learn: the others are those of `run.init_from`. "decoder", the autoencoder's,
    learns from the perceptual term alone. `train_only` are shell patterns of weights' dotted paths,
    such as `unet.*.temporal.*`: of `parts` only what matches one learns.
    """

    model: GeneratorConfig = MINI
    latents: CachedLatentsConfig = field(default_factory=CachedLatentsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    multihost: MultihostConfig = field(default_factory=MultihostConfig)
    parts: tuple[video.Part, ...] = video.PARTS
    train_only: tuple[str, ...] = ()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; weights are float32

    def objective(self) -> objective.Objective:
        """Opens the data, and encodes it if that has not been done."""
        return video.build(
            self.model,
            self.loss,
            self.perceptual,
            self.condition,
            self.sampling,
            self.data,
            self.latents,
            jnp.dtype(self.dtype),
            self.parts,
            self.run.init_from,
            self.train_only,
        )


@dataclass(frozen=True)
class SceneTrainConfig(VideoTrainConfig):
    """Trains a scene model on latents of clips with known cameras.

    Its `parts` have the PixelNeRF besides, and `run.init_from` may be a model of objects, whose
    UNet then gets the channels for the features.
    """

    model: GeneratorConfig = SCENE_MINI
    parts: tuple[video.Part, ...] = parts.SCENE_PARTS
    scene: SceneConfig = field(default_factory=SceneConfig)

    def objective(self) -> objective.Objective:
        """Opens the data, and encodes it if that has not been done."""
        return scene.build(
            self.model,
            self.loss,
            self.perceptual,
            self.condition,
            self.scene,
            self.sampling,
            self.data,
            self.latents,
            jnp.dtype(self.dtype),
            self.parts,
            self.run.init_from,
            self.train_only,
        )


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """Trains the temporal autoencoder on clips of frames."""

    model: AutoencoderConfig = MINI.autoencoder
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    multihost: MultihostConfig = field(default_factory=MultihostConfig)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; weights are float32

    def objective(self) -> objective.Objective:
        """Opens the data, and the weights of LPIPS."""
        if self.mesh.frames > 1:
            raise errors.UserError("--mesh.frames is for video models: here clips are not split")
        return autoencoder.build(self.model, self.loss, self.data, jnp.dtype(self.dtype))


TrainConfig = VideoTrainConfig | AutoencoderTrainConfig


def load(arguments: Sequence[str]) -> TrainConfig:
    """The settings of `CONFIG.py [--overrides]`, a command line without the program's name.

    Raises `UserError` if the file is missing, fails, or assigns no training settings; tyro itself
    reports unknown overrides and exits with status 2.
    """
    import tyro

    if not arguments or arguments[0].startswith("-"):
        raise errors.UserError("name a config file first, such as configs/mini.py")
    path = Path(arguments[0])
    if not path.is_file():
        raise errors.UserError(f"{path} is no file: name a config file, such as configs/mini.py")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise errors.UserError(f"{path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise errors.UserError(
            f"{path} must assign `config` a VideoTrainConfig, a SceneTrainConfig or an "
            "AutoencoderTrainConfig"
        )
    program = f"python -m v3d_jax.train {path}"
    try:
        return tyro.cli(
            type(config),
            default=config,
            args=list(arguments[1:]),
            prog=program,
            # A scene model's settings have fields where an object model's have none.
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:
        raise errors.UserError(f"these settings do not fit together: {error}") from None


def open_run(config: TrainConfig) -> Path:
    """The run's folder, made if it is new, with config.json in it.

    Raises `UserError` if it holds checkpoints of other settings (those of `run`, `mesh` and
    `multihost` may change, the seed and the number of steps excepted), or something else.
    """
    folder = Path(config.run.dir)
    described = describe(config)
    written = folder / "config.json"
    begun = any((folder / "checkpoints").glob("[0-9]*"))
    if begun and written.exists() and not config.run.accept_changes:
        changed = _changes(_identity(json.loads(written.read_text())), _identity(described))
        if changed:
            raise errors.UserError(
                f"{folder} holds a run of other settings ({'; '.join(changed[:4])}): choose "
                "another --run.dir, or go on regardless with --run.accept-changes"
            )
    if folder.exists() and any(folder.iterdir()) and not written.exists():
        raise errors.UserError(f"{folder} exists and is not a run: choose another --run.dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".config.json.partial"
        aside.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        aside.replace(written)
    except OSError as error:
        raise errors.UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    return folder


def describe(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON, as saved with the run and with the model it makes."""
    return {"experiment": type(config).__name__, **settings.to_json(config)}


def _identity(described: dict[str, Any]) -> dict[str, Any]:
    """The settings that make the numbers, by dotted name."""
    kept = {name: value for name, value in described.items() if name not in ("mesh", "multihost")}
    kept["run"] = {name: described["run"][name] for name in ("seed", "steps")}
    return _flat(kept)


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = sorted(before | after)
    return [
        f"{name} was {before.get(name)}, now {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
