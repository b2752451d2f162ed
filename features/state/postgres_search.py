"""What the tables of an installation hold on a PostgreSQL server, as bytes: so that it can be searched as files are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from features.state.postgres import OWN
from features.state.postgres_server import MAINTAIN_SECONDS, PostgresServer, raw

ROWS_AT_ONCE = 1_000
_COLUMNS = sa.text(
    "SELECT table_schema, table_name, column_name FROM information_schema.columns "
    "WHERE (table_schema = :own OR table_schema LIKE :own || '\\_%') AND data_type IN ('text', 'bytea', 'character varying') "
    "ORDER BY table_schema, table_name, ordinal_position"
)


def tables_of(server: PostgresServer) -> dict[str, list[tuple[str, str, str]]]:
    """The tables that hold text or bytes, in words, with schema, table and column of each."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    with server.engine.connect() as connection:
        for schema, table, column in connection.execute(_COLUMNS, {"own": OWN}):
            found.setdefault(f"{server.place}, table {schema}.{table}", []).append((schema, table, column))
    return found


def contents(server: PostgresServer, columns: list[tuple[str, str, str]]) -> Iterator[bytes]:
    """All that one table holds in these columns, some rows at a time, each value on a line of its own."""
    schema, table = columns[0][:2]
    query: sa.Select[*tuple[Any, ...]] = sa.select(*(sa.column(column) for _, _, column in columns)).select_from(
        sa.table(table, schema=schema)
    )
    with server.engine.connect() as connection, _reading(connection):
        rows = connection.execute(query.execution_options(stream_results=True, max_row_buffer=ROWS_AT_ONCE))
        for some in rows.partitions(ROWS_AT_ONCE):
            values = (value for row in some for value in row if value is not None)
            yield b"\n".join(value.encode() if isinstance(value, str) else bytes(value) for value in values)


@contextlib.contextmanager
def _reading(connection: Connection) -> Iterator[None]:
    raw(connection).patience = MAINTAIN_SECONDS
    connection.exec_driver_sql("BEGIN READ ONLY")
    try:
        yield
    finally:
        if not connection.invalidated:
            connection.exec_driver_sql("ROLLBACK")
