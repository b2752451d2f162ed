"""MLflow's artifacts where they lie now, though its database stores absolute paths: a home can be copied and moved."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

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
    engine = sa.create_engine(tracking_uri, poolclass=sa.NullPool, connect_args={"timeout": 60})
    with engine.begin() as connection:
        tables = set(sa.inspect(connection).get_table_names())
        if "experiments" not in tables:
            return 0
        location: sa.ColumnElement[str] = sa.column("artifact_location", sa.String)
        name: sa.ColumnElement[str] = sa.column("name", sa.String)
        held = sa.select(location).select_from(sa.table("experiments")).where(name.in_(experiments)).distinct()
        before = {str(old).rstrip("/") for (old,) in connection.execute(held) if old}
        places = [sa.table(table, sa.column(column, sa.String)) for table, column in _PATHS if table in tables]
        for old in before - {new, f"file://{new}"}:
            stored = [(place, path) for place in places for path in _beneath(connection, place, old)]
            moved = {path: f"{new}{path.removeprefix(old)}" for _, path in stored if path != old}
            if any(Path(now).exists() for now in moved.values()):
                for place, path in stored:
                    [column] = place.c
                    changed += connection.execute(sa.update(place).where(column == path).values({column: moved.get(path, new)})).rowcount
    return changed


def _beneath(connection: sa.Connection, place: sa.TableClause, old: str) -> list[str]:
    """The paths in the one column of *place* that are *old* or lie below it."""
    [column] = place.c
    found = connection.execute(sa.select(column).where(column.startswith(old, autoescape=True)).distinct())
    return [path for (path,) in found if path == old or path.startswith(f"{old}/")]
