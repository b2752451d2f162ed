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

from features import tables
from features.disk import DamagedStateError, NoSpaceError, open_database, roll_back

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
            [(version,)] = self._db.execute("SELECT version FROM mark").fetchall()
        return int(version)

    def catch_up(self) -> None:
        """Take note of what was committed to the table and is not known here: after a crash, or where the file was lost."""
        version, current = self.version, tables.version(self._table)
        if version == current:
            return
        news = tables.appended_since(self._table, version) if 0 <= version < current else None
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
                self._db.execute("UPDATE mark SET version = ?", [version])
                self._db.execute("COMMIT")
            except BaseException:
                roll_back(self._db)
                raise

    def scrub(self) -> None:
        """Bring the file to hold no more than its rows: what was overwritten must not stand in the write-ahead log either."""
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _select(self, query: str, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """The rows of a query with one ``IN ({})``, over any number of values."""
        for start in range(0, len(values), _CHUNK):
            some = list(values[start : start + _CHUNK])
            yield from self._db.execute(query.format(",".join("?" * len(some))), some).fetchall()

    def _read(self, files: Sequence[str]) -> Iterator[Row]:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(BATCH):
                yield from map(self._from_row, batch.to_pylist())

    def _opened(self) -> sqlite3.Connection:
        try:
            db = self._connection()
            stands = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'mark'").fetchall() == [(1,)]
            if stands and db.execute("SELECT format FROM mark").fetchall() == [(self.format,)]:
                return db
            db.close()
        except NoSpaceError:
            raise
        except (DamagedStateError, sqlite3.DatabaseError, OSError) as error:
            # a file that is cut short is told as an error of the disk
            logger.warning("%s cannot be read (%s); it is made anew", self._path, error)
        for name in (self._path.name, f"{self._path.name}-wal", f"{self._path.name}-shm"):
            self._path.with_name(name).unlink(missing_ok=True)
        db = self._connection()
        made = "; ".join(("CREATE TABLE mark (format INTEGER NOT NULL, version INTEGER NOT NULL)", *self.statements.values()))
        db.executescript(f"BEGIN; {made}; INSERT INTO mark VALUES ({self.format}, -1); COMMIT;")
        return db

    def _connection(self) -> sqlite3.Connection:
        # a power cut may take back the last transactions, and the version with them
        return open_database(
            self._path, "PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", "PRAGMA secure_delete=ON", "PRAGMA cache_size=-32000",
        )  # fmt: skip
