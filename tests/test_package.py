"""What the README and the metadata promise of the package."""

import importlib.metadata
import re
from pathlib import Path

import v3d_jax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_begins_with_the_two_commands():
    first_screen = "\n".join(README.splitlines()[:22])
    blocks = re.findall(r"```bash\n(.*?)\n```", first_screen, re.DOTALL)
    assert blocks == [
        "pip install . && python -m v3d_jax.sample",
        "pip install '.[test]' && pytest",
    ]


def test_files_and_modules_named_in_the_readme_exist():
    for path in re.findall(r"(?:configs|docs|launch|v3d_jax)/[\w./]+\w", README):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m v3d_jax\.(\w+)", README):
        assert (ROOT / "v3d_jax" / f"{module}.py").is_file(), module


def test_installed_metadata():
    metadata = importlib.metadata.metadata("v3d_jax")
    assert metadata["Version"] == v3d_jax.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) >= {"cuda", "tpu", "parity", "test", "dev"}
