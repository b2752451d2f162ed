"""Each notebook runs from a fresh kernel on the small cut, shows its plots, and holds no logic of its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from scene import ROOT, surroundings

from features.state.home import Home
from training import readings

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["churn", "customers", "days_to_next_order", "next_best_offer", "recommendations"]
FIGURE = re.compile(r'<img alt="[^"]+" src="data:image/png;base64,[^"]+"><p>(?P<sentence>[^<]+)</p>')


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_reads_its_figures_aloud(path: Path, trained: Home) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute(env={**surroundings(), "UBIQUO_HOME": str(trained.root)})
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [FIGURE.search(output.get("data", {}).get("text/html", "")) for output in outputs]
    sentences = [found["sentence"] for found in shown if found]
    assert 2 <= len(sentences) <= 4
    # what is read aloud is of this data: it holds a number, and is one sentence
    assert all(re.search(r"\d", sentence) and sentence.endswith(".") for sentence in sentences), sentences


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_with_one_sentence_of_what_it_shows(path: Path) -> None:
    title, opening = nbformat.read(path, as_version=4).cells[0].source.split("\n\n")[:2]
    assert title.startswith("# ")
    assert opening.startswith("Shows ")
    assert opening.count(".") == 1


@pytest.mark.parametrize("kind", ["calibration", "lift", "effects", "errors", "spread"])
def test_every_axis_says_what_it_measures(kind: str) -> None:
    rng = np.random.default_rng(3)
    scores = rng.random(400)
    labels, days = rng.random(400) < scores, rng.random(400) * 28
    customers = [f"c{k}" for k in range(400)]
    made = {
        "calibration": lambda: readings.calibration_reading(labels, scores),
        "lift": lambda: readings.lift_reading(customers, labels, scores, draws=20),
        "effects": lambda: readings.effects_reading(pd.DataFrame({"a": scores, "b": days}), np.column_stack([scores, days]), "log-odds"),
        "errors": lambda: readings.errors_reading(days, days + rng.normal(size=400), 28.0),
        "spread": lambda: readings.spread_reading(scores * labels, "recall"),
    }
    figure, sentence = made[kind]()
    assert sentence.endswith(".")
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes if axes.get_visible())


def test_there_is_one_a_model_and_one_for_the_customers() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_logic_and_no_output(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs, "outputs are not committed"
        tree = ast.parse(cell.source)
        forbidden = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Lambda, ast.Try, ast.With, ast.If)
        assert not [node for node in ast.walk(tree) if isinstance(node, forbidden)], cell.source
