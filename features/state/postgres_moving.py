"""Moving the lasting databases of a home from its files to a PostgreSQL server, so that a run that is killed goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy import Table
from sqlalchemy.exc import DataError

from features.state.home import DERIVED_ONES, LASTING, Home
from features.state.moving import moved_to, note_moved
from features.state.ports import DERIVED, IMPORT, LOG, SERVING, AnyRow, DatabaseSession, MissingStateError
from features.state.postgres import OWN, PostgresDatabase
from features.state.postgres_migrations import bring_up
from features.state.postgres_server import PostgresServer
from features.state.postgres_state import PostgresState
from features.state.sql import BIG, run_many

BATCH = 500
"""How many rows go over in one transaction."""
MOVING = Table(
    "moving",
    sa.MetaData(schema=OWN),
    sa.Column("database", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("home", sa.Text, nullable=False),
    sa.Column("last", sa.Text, nullable=False),
    sa.Column("rows", BIG, nullable=False),
    sa.Column("is_done", sa.Boolean, nullable=False),
)
"""How far each table has come over, and from which home."""
_KNOWN = sa.select(MOVING.c.last, MOVING.c.rows, MOVING.c.is_done)


class MovingError(MissingStateError):
    """The databases of a home cannot be moved as asked; the message says why, and the fix."""


class MovedTable(NamedTuple):
    """A table that was moved, and compared row by row."""

    database: str
    table: str
    rows: int


Tell = Callable[[str, str, int], object]
"""Is told of each batch: database, table, and how many of its rows are over."""


def move(home: Home, url: str, tell: Tell = lambda database, table, rows: None) -> list[MovedTable]:
    """Copy every lasting database of *home* to the server at *url*, compare both, and note that the server counts from now on.

    Raises:
        LeaseTakenError: a service runs on the home, or something else writes to it.
        MovingError: it was moved before, or the server holds the state of another home, or a comparison failed.
        UnreachableError: the server does not answer; what was copied stays, and the next run goes on.
    """
    if home.settings.database:
        raise MovingError("UBIQUO_DATABASE is set: leave it out for the move, so that no command uses the server before all is there")
    if (to := moved_to(home.root)) is not None:
        raise MovingError(f"the databases of {home.root} were moved to {to} before: set UBIQUO_DATABASE to it")
    there = PostgresState(url)
    with contextlib.ExitStack() as held:
        for lease in (home.lease, there.lease()):
            for name in (SERVING, LOG, DERIVED, IMPORT):
                held.enter_context(lease.take(name))
        bring_up(there.server)
        pairs = list(_pairs(home, there))
        _check_target(home, there.server, pairs)
        for pair in pairs:
            pair.copy(tell)
        moved = [pair.compare() for pair in pairs]
        note_moved(home.root, there.server.place)
    for name in DERIVED_ONES:
        # made anew on the server, and here after a way back
        home.file_of(name).discard()
    return moved


def drop_files(home: Home) -> int:
    """Delete the files whose content was moved, as nothing that is erased from now on is erased there; returns how many there were.

    Raises:
        MovingError: they were not moved.
    """
    if moved_to(home.root) is None:
        raise MovingError(f"the databases of {home.root} were not moved: they are all there is")
    files = [file for name in LASTING if (file := home.file_of(name)).exists]
    for file in files:
        file.discard()
    return len(files)


class _Pair:
    """One table in a file and on the server."""

    def __init__(self, home: Home, name: str, table: Table, source: DatabaseSession, target: PostgresDatabase) -> None:
        self.name, self.table, self._source, self._target = name, table, source, target
        self._home = _mark_of(home)
        self._key = list(table.primary_key.columns)
        self._where = sa.and_(MOVING.c.database == name, MOVING.c.name == table.name)

    @property
    def place(self) -> str:
        """The table, in words."""
        return f"{self.name}.{self.table.name}"

    def is_empty(self) -> bool:
        """Whether the server holds nothing of it, and never has."""
        session = self._target.connect()
        return not session.read(sa.select(*self._key).limit(1)) and not session.read(_KNOWN.where(self._where))

    def copy(self, tell: Tell) -> None:
        """Bring over what is not there yet, in the order of the primary key."""
        session = self._target.connect()
        insert = sa.insert(self.table)
        while True:
            with session.writing() as connection:
                known = connection.execute(_KNOWN.where(self._where)).one_or_none()
                if known is not None and known.is_done:
                    return
                query = sa.select(self.table).order_by(*self._key).limit(BATCH)
                if known is not None:
                    query = query.where(sa.tuple_(*self._key) > sa.tuple_(*(sa.literal(each) for each in json.loads(known.last))))
                rows = self._source.read(query)
                try:
                    run_many(connection, insert, [tuple(row) for row in rows])
                except DataError as error:
                    raise MovingError(f"{self.place}: a row cannot be stored on the server ({error.orig}): {self._named(rows)}") from error
                last = json.dumps([rows[-1]._mapping[each] for each in self._key]) if rows else "[]" if known is None else known.last
                count, is_done = len(rows) + (0 if known is None else known.rows), len(rows) < BATCH
                if is_done:
                    self._go_on_counting(connection)
                connection.execute(sa.delete(MOVING).where(self._where))
                row = (self.name, self.table.name, self._home, last, count, is_done)
                run_many(connection, sa.insert(MOVING), [row])
            tell(self.name, self.table.name, count)

    def _named(self, rows: Sequence[AnyRow]) -> str:
        """The rows that hold what a text on the server cannot."""
        odd = [row for row in rows if any(isinstance(value, str) and "\0" in value for value in row)]
        return "; ".join(f"{[row._mapping[each] for each in self._key]!r} holds a character of the number 0" for row in odd[:3])

    def _go_on_counting(self, connection: sa.Connection) -> None:
        """Have the server number the next row after the last, where it numbers rows."""
        for column in self._key:
            place = {"place": f"{OWN}_{self.name}.{self.table.name}", "column": column.name}
            sequence = connection.execute(sa.text("SELECT pg_get_serial_sequence(:place, :column)"), place).scalar()
            if sequence is not None:
                last = connection.execute(sa.select(sa.func.coalesce(sa.func.max(column), 0))).scalar_one()
                connection.execute(sa.text("SELECT setval(:sequence, :next, false)"), {"sequence": sequence, "next": int(last) + 1})

    def compare(self) -> MovedTable:
        """See that both hold the same rows.

        Raises:
            MovingError: they do not.
        """
        query = sa.select(self.table).order_by(*self._key)
        (here, count), (there, arrived) = _digest(self._source, query), _digest(self._target.connect(), query)
        if (here, count) != (there, arrived):
            raise MovingError(
                f"{self.place}: the file holds {count} rows and the server {arrived}, or not the same ones. Somebody has written to one of "
                "them since they were copied: move to an empty database"
            )
        return MovedTable(self.name, self.table.name, count)


def _digest(session: DatabaseSession, query: sa.Select[Any]) -> tuple[str, int]:
    """A digest of the rows of a query, in their order, and how many there are."""
    digest, count, encode = hashlib.blake2b(digest_size=16), 0, msgspec.msgpack.Encoder().encode
    with session.streaming(query) as rows:
        for row in rows:
            digest.update(encode(tuple(row)))
            count += 1
    return digest.hexdigest(), count


def _pairs(home: Home, there: PostgresState) -> Iterator[_Pair]:
    for name in LASTING:
        file = home.file_of(name)
        if not file.exists:
            continue
        source = file.connect(read_only=True)
        target = there.database(name, (), is_lasting=True, is_durable=True, counts=False)
        known = _tables_of(there.server, name)
        for held in _names(source):
            if held not in known:
                raise MovingError(
                    f"{file.place} holds a table {held} that this release does not know: move it with the release that made it"
                )
            yield _Pair(home, name, known[held], source, target)


def _tables_of(server: PostgresServer, name: str) -> dict[str, Table]:
    """The tables on the server, as the code names them: without a schema."""
    found, bare = sa.MetaData(), sa.MetaData()
    with server.engine.connect() as connection:
        found.reflect(connection, schema=f"{OWN}_{name}")
    tables = {}
    for table in found.tables.values():
        columns = [sa.Column(each.name, each.type, primary_key=each.primary_key) for each in table.columns]
        tables[table.name] = Table(table.name, bare, *columns)
    return tables


def _names(source: DatabaseSession) -> list[str]:
    query = sa.text("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name")
    return [str(name) for (name,) in source.read(query)]


def _mark_of(home: Home) -> str:
    """What tells one home from another: the mark of its secret."""
    return (home.secrets.marked() or b"").decode()


def _check_target(home: Home, server: PostgresServer, pairs: Sequence[_Pair]) -> None:
    """See that the server holds nothing, or what an earlier run has brought there from this home.

    Raises:
        MovingError: it holds something else.
    """
    with server.engine.connect() as connection:
        homes = set(connection.execute(sa.select(MOVING.c.home)).scalars())
    if homes - {_mark_of(home)} or (not homes and any(not pair.is_empty() for pair in pairs)):
        raise MovingError(f"{server.place} holds the state of another home: move to an empty database")
