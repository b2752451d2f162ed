"""Each notebook runs from a fresh kernel on the small cut, shows its plots, and holds no logic of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from scene import ROOT, surroundings

from features.state.home import Home

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTS_AT_LEAST = {"churn": 4, "customers": 6, "days_to_next_order": 4, "next_best_offer": 4, "recommendations": 3}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_promises(path: Path, trained: Home) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute(env={**surroundings(), "UBIQUO_HOME": str(trained.root)})
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    plots = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(plots) >= PLOTS_AT_LEAST[path.stem]
    assert not [output for output in outputs if output.output_type == "error"]


def test_there_is_one_a_model_and_one_for_the_customers() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(PLOTS_AT_LEAST)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_logic_and_no_output(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs, "outputs are not committed"
        tree = ast.parse(cell.source.removeprefix("%matplotlib inline"))
        forbidden = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Lambda, ast.Try, ast.With, ast.If)
        assert not [node for node in ast.walk(tree) if isinstance(node, forbidden)], cell.source
