"""What finds rows of a table by key: a database beside the table, derived from it.

It names the version of the table that it knows, catches up with what came after, and is made anew where it cannot. So it needs no
syncing, no backup and no repair.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy import Column, Connection, Executable, Integer, MetaData, Text

from features.state.ports import AnyRow, Database, DatabaseSession, Table
from features.state.sql import table_names
from features.state.sqlite_file import is_damage

Entry = TypeVar("Entry")
logger = logging.getLogger("ubiquo")
CHUNK = 500
BATCH = 20_000


MARK = sa.Table(
    "mark", MetaData(), Column("format", Integer, nullable=False), Column("version", Integer, nullable=False), Column("digest", Text)
)
"""What an index knows; the one SQL table that the database of an index is to be opened with."""


class TableIndex(ABC, Generic[Entry]):
    """The index of one table. Safe to call from several threads; who writes holds the lease of the table."""

    format: ClassVar[int]
    """A database of another format is made anew."""
    sql: ClassVar[tuple[sa.Table, ...]]
    """Its SQL tables, beside ``MARK``."""
    columns: ClassVar[list[str] | None] = None
    """What is read of the table; None: everything."""

    def __init__(self, database: Database, table: Table) -> None:
        self._database, self._table = database, table
        self._lock = threading.RLock()
        self._session = self._opened()

    @abstractmethod
    def _insert(self, connection: Connection, rows: Sequence[Entry]) -> None:
        """Store rows; what is there already stays."""

    @staticmethod
    @abstractmethod
    def _from_row(row: Mapping[str, Any]) -> Entry:
        """A row of the table."""

    @property
    def version(self) -> int:
        """The version of the table that it knows; -1 before the first."""
        [(version,)] = self._read(sa.select(MARK.c.version))
        return int(version)

    def catch_up(self) -> None:
        """Take note of what was committed to the table and is not known here: after a crash, or where the database was lost."""
        [(version, digest)] = self._read(sa.select(MARK.c.version, MARK.c.digest))
        current = self._table.version()
        # a repair may have put another commit in the place of the one that is known
        is_known = digest is None or self._table.commit_digest(version) in (digest, None)
        if version == current and is_known:
            return
        news = self._table.appended_since(version) if is_known and 0 <= version < current else None
        if news is not None:
            self.add(self._rows(news), current)
            return
        files = self._table.files()
        if files:
            logger.warning("%s is made anew from %d files of the table", self._database.place, len(files))
        with self.changing(-1) as connection:
            for table in self.sql:
                connection.execute(sa.delete(table))
        self.add(self._rows(files), current)

    def add(self, rows: Iterable[Entry], version: int) -> None:
        """Note rows that were just appended in *version* of the table."""
        with self.changing(version) as connection:
            waiting = iter(rows)
            while some := list(itertools.islice(waiting, BATCH)):
                self._insert(connection, some)

    def close(self) -> None:
        """Let go of the database."""
        self._session.close()

    @contextlib.contextmanager
    def changing(self, version: int) -> Iterator[Connection]:
        """One transaction that brings the index to *version* of the table."""
        with self._lock:
            try:
                with self._session.writing() as connection:
                    yield connection
                    connection.execute(sa.update(MARK).values(version=version, digest=self._table.commit_digest(version)))
            except BaseException as error:
                self._heal(error)
                raise

    def scrub(self) -> None:
        """Leave no trace of what was deleted."""
        with self._lock:
            self._session.scrub()

    def _chunked(self, statement: Executable, values: Sequence[Any], connection: Connection | None = None) -> Iterator[AnyRow]:
        """The rows of a statement that asks whether something is one of ``:values``, over any number of them."""
        for start in range(0, len(values), CHUNK):
            some = {"values": list(values[start : start + CHUNK])}
            yield from self._read(statement, some) if connection is None else connection.execute(statement, some).fetchall()

    def _read(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[AnyRow]:
        with self._lock:
            try:
                return self._session.read(statement, parameters)
            except Exception as error:
                self._heal(error)
                raise

    def _heal(self, error: BaseException) -> None:
        """Begin a damaged database anew, so that it is filled from the table when next caught up with."""
        if not is_damage(error):
            return
        logger.warning("%s is damaged (%s); it is made anew", self._database.place, error)
        self._session.close()
        # another may have begun it anew already
        if self._database.identity() == self._identity:
            self._database.discard()
        self._session = self._made()

    def _rows(self, files: Sequence[str]) -> Iterator[Entry]:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=self.columns):
                yield from map(self._from_row, batch.to_pylist())

    def _opened(self) -> DatabaseSession:
        try:
            return self._made()
        except Exception as error:
            if not is_damage(error):
                raise
            logger.warning("%s cannot be read (%s); it is made anew", self._database.place, error)
        self._database.discard()
        return self._made()

    def _made(self) -> DatabaseSession:
        """A connection to the database, whose tables are emptied if they are of another format."""
        session = self._database.connect()
        try:
            if session.read(sa.select(MARK.c.format)) != [(self.format,)]:
                self._begin_anew(session)
        except BaseException:
            session.close()
            raise
        self._identity = self._database.identity()
        return session

    def _begin_anew(self, session: DatabaseSession) -> None:
        with session.writing() as connection:
            known = connection.execute(sa.select(MARK.c.format)).fetchall()
            if known == [(self.format,)]:
                # another process was faster
                return
            if known:
                logger.warning("%s is of another format; it is made anew", self._database.place)
            for name in table_names(connection):
                sa.Table(name, MetaData()).drop(connection)
            for table in (MARK, *self.sql):
                table.create(connection)
            connection.execute(sa.insert(MARK).values(format=self.format, version=-1, digest=None))
