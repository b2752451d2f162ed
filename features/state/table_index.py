"""What finds rows of a Delta table by key: an SQLite file beside the table, derived from it.

It names the version of the table that it knows, catches up with what came after, and is made anew where it cannot. So it needs no
syncing, no backup and no repair.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow.parquet as pq

from features.state import tables
from features.state.disk import DamagedStateError, open_database, roll_back

Row = TypeVar("Row")
logger = logging.getLogger("ubiquo")
_CHUNK = 500
BATCH = 20_000


class TableIndex(ABC, Generic[Row]):
    """The index of one table. Safe to call from several threads; who writes holds the lock of the table."""

    format: ClassVar[int]
    """A file of another format is made anew."""
    statements: ClassVar[Mapping[str, str]]
    """Each of its SQLite tables and what makes it."""
    columns: ClassVar[list[str] | None] = None
    """What is read of the table; None: everything."""

    def __init__(self, path: Path, table: Path) -> None:
        self._path, self._table = path, table
        self._lock = threading.Lock()
        self._db = self._opened()

    @abstractmethod
    def _insert(self, rows: Sequence[Row]) -> None:
        """Store rows, within a transaction; what is there already stays."""

    @staticmethod
    @abstractmethod
    def _from_row(row: Mapping[str, Any]) -> Row:
        """A row of the Delta table."""

    @property
    def version(self) -> int:
        """The version of the table that it knows; -1 before the first."""
        with self._lock:
            [(version,)] = self._run("SELECT version FROM mark")
        return int(version)

    def catch_up(self) -> None:
        """Take note of what was committed to the table and is not known here: after a crash, or where the file was lost."""
        with self._lock:
            [(version, digest)] = list(self._run("SELECT version, digest FROM mark"))
        current = tables.version(self._table)
        # a repair may have put another commit in the place of the one that is known
        is_known = digest is None or tables.commit_digest(self._table, version) in (digest, None)
        if version == current and is_known:
            return
        news = tables.appended_since(self._table, version) if is_known and 0 <= version < current else None
        if news is not None:
            self.add(self._read(news), current)
            return
        files = tables.files(self._table)
        if files:
            logger.warning("%s is made anew from %d files of the table", self._path.name, len(files))
        with self.changing(-1):
            for name in self.statements:
                self._db.execute(f"DELETE FROM {name}")
        self.add(self._read(files), current)

    def add(self, rows: Iterable[Row], version: int) -> None:
        """Note rows that were just appended in *version* of the table."""
        with self.changing(version):
            waiting = iter(rows)
            while some := list(itertools.islice(waiting, BATCH)):
                self._insert(some)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def changing(self, version: int) -> Iterator[None]:
        """One transaction that brings the index to *version* of the table."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("UPDATE mark SET version = ?, digest = ?", [version, tables.commit_digest(self._table, version)])
                self._db.execute("COMMIT")
            except BaseException as error:
                roll_back(self._db)
                self._heal(error)
                raise

    def scrub(self) -> None:
        """Bring the file to hold no more than its rows: what was overwritten must not stand in the write-ahead log either."""
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _select(self, query: str, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """The rows of a query with one ``IN ({})``, over any number of values."""
        for start in range(0, len(values), _CHUNK):
            some = list(values[start : start + _CHUNK])
            yield from self._run(query.format(",".join("?" * len(some))), some)

    def _run(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            self._heal(error)
            raise

    def _heal(self, error: BaseException) -> None:
        """Begin a damaged file anew, so that it is filled from the table when next caught up with."""
        if not _is_damage(error):
            return
        logger.warning("%s is damaged (%s); it is made anew", self._path, error)
        self._db.close()
        # another may have begun it anew already
        if self._path.exists() and self._path.stat().st_ino == self._inode:
            self._remove()
        self._db = self._made()

    def _read(self, files: Sequence[str]) -> Iterator[Row]:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=self.columns):
                yield from map(self._from_row, batch.to_pylist())

    def _opened(self) -> sqlite3.Connection:
        try:
            return self._made()
        except (DamagedStateError, sqlite3.DatabaseError, OSError) as error:
            if not _is_damage(error):
                raise
            logger.warning("%s cannot be read (%s); it is made anew", self._path, error)
        self._remove()
        return self._made()

    def _made(self) -> sqlite3.Connection:
        """A connection to the file, whose tables are made if they are not there, or are of another format."""
        db = self._connection()
        db.execute("BEGIN IMMEDIATE")
        try:
            there = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()]
            if "mark" not in there or db.execute("SELECT format FROM mark").fetchall() != [(self.format,)]:
                if there:
                    logger.warning("%s is of another format; it is made anew", self._path)
                for name in there:
                    db.execute(f"DROP TABLE {name}")
                db.execute("CREATE TABLE mark (format INTEGER NOT NULL, version INTEGER NOT NULL, digest TEXT)")
                db.execute("INSERT INTO mark VALUES (?, -1, NULL)", [self.format])
                for statements in self.statements.values():
                    for statement in statements.split(";"):
                        db.execute(statement)
            db.execute("COMMIT")
        except BaseException:
            roll_back(db)
            db.close()
            raise
        self._inode = self._path.stat().st_ino
        return db

    def _remove(self) -> None:
        for name in (self._path.name, f"{self._path.name}-wal", f"{self._path.name}-shm"):
            self._path.with_name(name).unlink(missing_ok=True)

    def _connection(self) -> sqlite3.Connection:
        # a power cut may take back the last transactions, and the version with them
        return open_database(
            self._path, "PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", "PRAGMA secure_delete=ON", "PRAGMA cache_size=-32000",
        )  # fmt: skip


def _is_damage(error: BaseException) -> bool:
    """Whether the file is to blame, and not the disk, a lock or a bound on open files; one that is cut short is an error of reading."""
    cause = error if isinstance(error, sqlite3.Error) else error.__cause__
    code = getattr(cause, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or code == sqlite3.SQLITE_IOERR_SHORT_READ
