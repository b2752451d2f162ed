"""What SQLAlchemy Core leaves open: numbers wide enough everywhere, rows put in only if new, and many rows at the price of the driver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Connection, Dialect, Insert, Integer, Table
from sqlalchemy.dialects.postgresql import Insert as InsertOrKeep
from sqlalchemy.dialects.postgresql import insert as _insert
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.dml import UpdateBase

BIG = BigInteger().with_variant(Integer(), "sqlite")
"""A whole number of 64 bits. SQLite has no other, and looks rows up by their place only where the key is of its own type."""


COPIED_ROWS = 200
"""From so many rows on a server is sent them in the words that it restores backups with: ten times as fast."""


def put(table: Table) -> InsertOrKeep:
    """An insert that can say what holds on a conflict: ``on_conflict_do_nothing``, or ``on_conflict_do_update`` of named columns.

    SQLite has taken over PostgreSQL's words.
    """
    return _insert(table)


def schema_of(connection: Connection) -> str | None:
    """The schema that the tables of a connection's database lie in; None where the database has no other."""
    names: dict[str | None, str | None] = connection.get_execution_options().get("schema_translate_map") or {}
    return names.get(None)


def table_names(connection: Connection) -> list[str]:
    """The tables of a connection's database."""
    return sa.inspect(connection).get_table_names(schema=schema_of(connection))


def run_many(connection: Connection, statement: Insert | UpdateBase, rows: Sequence[tuple[Any, ...]]) -> None:
    """Run *statement* once for each of *rows*, whose values stand in the order of its parameters: for an insert its table's columns.

    SQLAlchemy would take several microseconds a row to put names to values and take them off again. Keep the statement: it is translated
    once, as an object.
    """
    if not rows:
        return
    if len(rows) >= COPIED_ROWS and connection.dialect.name == "postgresql" and type(statement) is Insert:
        from features.state.postgres_server import copy_rows

        copy_rows(connection, statement.table, schema_of(connection), rows)
        return
    text, names = _compiled(statement, connection.dialect, schema_of(connection))
    if connection.dialect.positional:
        connection.exec_driver_sql(text, list(rows))
    else:
        connection.exec_driver_sql(text, [dict(zip(names, row, strict=True)) for row in rows])


@lru_cache(maxsize=128)
def _compiled(statement: Executable, dialect: Dialect, schema: str | None) -> tuple[str, tuple[str, ...]]:
    names = {} if schema is None else {"schema_translate_map": {None: schema}, "render_schema_translate": True}
    compiled = statement.compile(dialect=dialect, **names)  # type: ignore[attr-defined]
    return str(compiled), tuple(compiled.positiontup or compiled.bind_names.values())
