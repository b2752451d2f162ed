"""What SQLAlchemy Core leaves open: numbers wide enough everywhere, rows put in only if new, and many rows at the price of the driver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import BigInteger, Connection, Dialect, Insert, Integer, Table
from sqlalchemy.dialects.sqlite import Insert as InsertOrKeep
from sqlalchemy.dialects.sqlite import insert as _insert
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.dml import UpdateBase

BIG = BigInteger().with_variant(Integer(), "sqlite")
"""A whole number of 64 bits. SQLite has no other, and looks rows up by their place only where the key is of its own type."""


def put(table: Table) -> InsertOrKeep:
    """An insert that can say what holds on a conflict (``on_conflict_do_nothing``, ``on_conflict_do_update``)."""
    return _insert(table)


def run_many(connection: Connection, statement: Insert | UpdateBase, rows: Sequence[tuple[Any, ...]]) -> None:
    """Run *statement* once for each of *rows*, whose values stand in the order of its parameters: for an insert its table's columns.

    SQLAlchemy would take several microseconds a row to put names to values and take them off again. Keep the statement: it is translated
    once, as an object.
    """
    if not rows:
        return
    text, names = _compiled(statement, connection.dialect)
    if connection.dialect.positional:
        connection.exec_driver_sql(text, list(rows))
    else:
        connection.exec_driver_sql(text, [dict(zip(names, row, strict=True)) for row in rows])


@lru_cache(maxsize=64)
def _compiled(statement: Executable, dialect: Dialect) -> tuple[str, tuple[str, ...]]:
    compiled = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
    return str(compiled), tuple(compiled.positiontup or compiled.bind_names.values())
