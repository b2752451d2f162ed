"""MLflow's artifacts where they lie now, though its database stores absolute paths: a home can be copied and moved."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

_SQLITE = "sqlite:///"
_PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
    ("logged_models", "artifact_location"),
)


def follow(tracking_uri: str, artifact_location: str | None, experiments: list[str]) -> int:
    """Let a registry in an SQLite file name its artifacts in *artifact_location*, wherever it came from; returns how many paths changed.

    Without it a copied home would read the artifacts of the home that it was copied from, and an erasure in the copy would rewrite
    them there. Nothing changes unless some of them lie in the new place: a location that was changed on purpose keeps what is in the
    old one.
    """
    file = Path(tracking_uri.removeprefix(_SQLITE))
    if not tracking_uri.startswith(_SQLITE) or artifact_location is None or not file.exists():
        return 0
    new, changed = artifact_location.rstrip("/"), 0
    with contextlib.closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()}
        if "experiments" not in tables:
            return 0
        query = f"SELECT DISTINCT artifact_location FROM experiments WHERE name IN ({','.join('?' * len(experiments))})"
        before = {str(old).rstrip("/") for (old,) in db.execute(query, experiments).fetchall() if old}
        for old in before - {new, f"file://{new}"}:
            db.execute("BEGIN IMMEDIATE")
            stored = [
                (table, column, path)
                for table, column in _PATHS
                if table in tables
                for (path,) in db.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {column} LIKE ?", (f"{old}%",)).fetchall()
                if path == old or path.startswith(f"{old}/")
            ]
            moved = {path: f"{new}{path.removeprefix(old)}" for _, _, path in stored if path != old}
            if any(Path(now).exists() for now in moved.values()):
                for table, column, path in stored:
                    changed += db.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (moved.get(path, new), path)).rowcount
            db.execute("COMMIT")
    return changed
