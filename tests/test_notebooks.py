"""Notebooks run from their first cell to their last, as they are and without Jupyter."""

import ast
import importlib
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    written = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in written if cell["cell_type"] == "code"]


def code(path: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_is_there(path):
    found = [node for node in ast.walk(ast.parse(code(path))) if isinstance(node, ast.ImportFrom)]
    assert found
    for node in found:
        for alias in node.names:
            parent = importlib.import_module(node.module)
            if not hasattr(parent, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_made(path):
    """It was run to its end: no cell failed, and there are pictures."""
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    exec(compile(code(path), str(path), "exec"), {})
