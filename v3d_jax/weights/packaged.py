"""Models that travel inside the package, and what `--model NAME_OR_PATH` means."""

import difflib
import os
from pathlib import Path

import v3d_jax
from v3d_jax import errors
from v3d_jax.weights import folder, published

ASSETS = Path(v3d_jax.__file__).parent / "assets"


def names() -> tuple[str, ...]:
    """The packaged models: folders of `v3d_jax/assets` that hold a model's `config.json`."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{folder.CONFIG}")))


def named(name_or_path: str | None, scenes: bool) -> str:
    """What was named, or where nothing was the packaged model of scenes, or else of objects."""
    return name_or_path or ("scene_mini" if scenes else "mini")


def path(name: str) -> Path:
    """The folder of a packaged model; `UserError` names those there are if it is none of them."""
    if name in names():
        return ASSETS / name
    there = f"packaged: {', '.join(names())}" if names() else "this install packages no model"
    close = difflib.get_close_matches(name, names(), 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise errors.UserError(
        f"unknown model {name!r}: {hint}give a packaged name, a model folder or a published"
        f" checkpoint ({there})"
    )


def resolve(name_or_path: str | os.PathLike) -> Path:
    """The model folder that a name or a path stands for; an existing folder wins over a name."""
    given = Path(name_or_path)
    if (given / folder.CONFIG).is_file():
        return given
    if given.is_dir() and str(name_or_path) not in names():
        raise errors.UserError(f"{given} is not a model folder: it has no {folder.CONFIG}")
    return path(str(name_or_path))


def folder_of(name_or_path: str | os.PathLike) -> Path:
    """The path, or where nothing lies there and it is a packaged model's name, that one's folder.

    For what reads parts of models, and says itself what it cannot read.
    """
    given = Path(name_or_path)
    return path(str(given)) if not given.exists() and str(given) in names() else given


def open_model(name_or_path: str | os.PathLike) -> folder.Unread:
    """Opens a packaged model, a model folder or a published checkpoint; no weights are read yet."""
    given = Path(name_or_path)
    if str(name_or_path) not in names() and published.is_published(given):
        return published.open_model(given)
    return folder.open_folder(resolve(name_or_path))


def load(name_or_path: str | os.PathLike) -> folder.Model:
    """Loads what `open_model` opens."""
    return folder.read(open_model(name_or_path))
