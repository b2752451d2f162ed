"""The shape of the code: floors, names, the one clock, nothing pickled."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scene import ROOT

PACKAGES = ("features", "models", "serving", "training")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_the_two_floors_are_kept() -> None:
    done = subprocess.run([str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_this_checkouts(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).is_relative_to(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_clock_asks_for_the_time(path: Path) -> None:
    if path == ROOT / "features" / "clock.py":
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    asked = [f.attr for f in calls if isinstance(f, ast.Attribute) and f.attr in ("now", "utcnow", "today")]
    assert not asked


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_pickled_and_no_file_is_named_after_nothing(path: Path) -> None:
    imported = re.findall(r"^\s*(?:import|from) (pickle|joblib|cloudpickle|dill)\b", path.read_text(), re.M)
    assert not imported
    assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc")
