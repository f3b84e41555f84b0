"""Imports run downwards only: the house of docs/method.md, held by parsing every import."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "v3d_jax"
ENTRY = ("sample", "reconstruct", "train", "render", "convert", "evaluate")
LAYERS = (
    ("ops",),
    ("parallel",),
    ("nn", "diffusion", "splat", "sdf", "mesh"),
    ("weights", "checkpoint", "data"),
    (
        "pipeline",
        "scene_pipeline",
        "config",
        "state",
        "training",
        "console",
        "unbounded",
        "splatting",
        "surfacing",
        "meshing",
        "scenes",
        "evaluation",
    ),
    ENTRY,
)
METHODS = LAYERS[2]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ANYWHERE = {"errors"}
HEAVY = {"grain", "tensorflow_datasets", "trimesh", "array_record"}


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_imports(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("v3d_jax.")}
    return names - ANYWHERE - {"__version__"}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path):
    own = module_name(path)
    if own in ANYWHERE:
        assert package_imports(path) == set()
        return
    assert own in LEVEL, f"{own} has no place in the house"
    for name in package_imports(path) - {own}:
        assert name in LEVEL, f"{path} imports {name}, which has no place in the house"
        assert LEVEL[name] <= LEVEL[own], f"{path} imports upwards: {name}"
        both_methods = own in METHODS and name in METHODS
        assert not both_methods, f"{path}: one method imports another: {name}"
        assert own not in ENTRY or name not in ENTRY, f"{path}: entry points do not import another"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda p: p.name)
def test_ops_import_jax_and_numpy_only(path: Path):
    outside = {name.split(".")[0] for name in imports(path)} - {"v3d_jax"}
    standard = {"collections", "contextlib", "contextvars", "dataclasses", "functools", "math"}
    standard |= {"typing"}
    assert outside - standard <= {"jax", "numpy", "jaxtyping"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_diffusion_never_sees_networks(path: Path):
    if module_name(path) == "diffusion":
        assert not any(name.startswith(("flax", "v3d_jax.nn")) for name in imports(path))
