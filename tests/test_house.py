"""The shape of the code: floors, names, the one clock, nothing pickled."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from scene import ROOT

PACKAGES = ("features", "models", "serving", "training")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


MAY_READ_THE_ENVIRONMENT = {
    ROOT / name
    for name in (
        "features/state/settings.py",
        # what other libraries are told before they are imported, and kept from leaving behind
        "features/state/home.py", "features/store/spark_session.py", "features/state/delta.py", "training/gate.py",
        # what they tell the processes that they start
        "serving/__main__.py", "serving/demo.py",
    )
}  # fmt: skip


ENGINES = {
    "sqlite3": "features/state/sqlite_file.py", "fcntl": "features/state/file_lease.py", "deltalake": "features/state/delta.py",
    "psycopg": "features/state/postgres_server.py",
}  # fmt: skip
"""What only one file may import: the engine behind a port."""


def test_the_two_floors_are_kept() -> None:
    done = subprocess.run([str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_this_checkouts(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).is_relative_to(ROOT)


def test_every_file_keeps_the_rules_of_the_house() -> None:
    broken = [f"{path.relative_to(ROOT)}: {fault}" for path in FILES for fault in faults_of(path)]
    assert not broken, "\n".join(broken)


def faults_of(path: Path) -> list[str]:
    """What is wrong with one file: it asks for the time itself, pickles, or is named after nothing."""
    tree = ast.parse(path.read_text())
    faults = []
    if path != ROOT / "features" / "state" / "clock.py":
        called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        asked = [f.attr for f in called if isinstance(f, ast.Attribute) and f.attr in ("now", "utcnow", "today")]
        faults += [f"asks for the time with {name}(): take a clock" for name in asked]
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    faults += [f"imports {name}" for name in sorted(imported) if name.partition(".")[0] in ("pickle", "joblib", "cloudpickle", "dill")]
    for name in sorted(imported):
        door = ENGINES.get(name.partition(".")[0])
        if door is not None and path != ROOT / door:
            faults.append(f"opens {name} itself: ask a port of features.state.ports")
    if path not in MAY_READ_THE_ENVIRONMENT:
        read = [
            n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv") and ast.unparse(n.value) == "os"
        ]
        faults += ["reads the environment: take features.state.settings" for _ in read]
    if path.stem in ("utils", "util", "helpers", "helper", "common", "misc"):
        faults.append("is named after nothing")
    return faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import datetime\ndatetime.datetime.now()\n", "asks for the time"),
        ("def f():\n    from joblib import dump\n", "imports joblib"),
        ("from sqlite3 import connect\n", "opens sqlite3"),
        ("def f():\n    import fcntl\n", "opens fcntl"),
        ("import os\nhome = os.environ['HOME']\n", "reads the environment"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "file.py"
    path.write_text(text)
    assert [found for found in faults_of(path) if found.startswith(fault)]


def test_a_class_has_one_meaning_in_the_whole_house() -> None:
    named: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                named.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: places for name, places in named.items() if len(places) > 1} == {}


def test_a_command_that_needs_no_feast_does_not_import_it() -> None:
    code = "import sys, features.__main__, training.__main__, serving.__main__; sys.exit('feast' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT).returncode == 0
