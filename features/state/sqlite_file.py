"""A database in one SQLite file."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Executable, Table, event
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.schema import CreateIndex, CreateTable

from features.state.disk import PRIVATE_FILE, DamagedStateError, NoSpaceError, make_folder
from features.state.ports import AnyRow

_DIALECT = sqlite.dialect()
_HEAD = b"SQLite format 3\0"
WAIT_SECONDS = 60.0
MOVED_EVERY_SECONDS = 10.0
"""How often what is written ahead goes into a file that does so only when it is told to."""


class Keeping(NamedTuple):
    """How a file keeps what is written to it.

    Attributes:
        pragmas: what SQLite is told at each opening.
        replaces: whether what is replaced may stay in free pages, as somebody else writes to the file too.
    """

    pragmas: tuple[str, ...]
    replaces: bool = False


ROLLED_BACK = Keeping(("secure_delete=ON",))
"""No write-ahead log, and what is deleted is overwritten at once."""
WRITTEN_AHEAD = Keeping(("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"))
"""Readers and a writer do not wait for each other; each commit is synced."""
WRITTEN_SOON = Keeping(("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON", "wal_autocheckpoint=0"))
"""A commit outlives the process at once, and a power cut from the next ``sync`` on; it never waits for the disk itself."""
DERIVED = Keeping(("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON", "cache_size=-32000"))
"""A power cut may take back the last commits: whoever fills the file notices and fills it again."""
SHARED = Keeping(("journal_mode=WAL",), replaces=True)
"""Another library makes and writes the tables."""


class SQLiteFile:
    """The database in the file *path*, which is made at the first use with *tables*."""

    def __init__(self, path: Path, tables: Sequence[Table], keeping: Keeping) -> None:
        self._path, self._keeping = path, keeping
        made: list[CreateTable | CreateIndex] = []
        for table in tables:
            made.append(CreateTable(table, if_not_exists=True))
            made += [CreateIndex(index, if_not_exists=True) for index in table.indexes]
        self._ddl = made
        self._engines: dict[tuple[float, bool], Engine] = {}
        self._syncing = threading.Lock()
        self._synced: tuple[int, int] | None = None
        self._moved_at = 0.0
        self._mover: sqlite3.Connection | None = None

    @property
    def place(self) -> str:
        """The file."""
        return str(self._path)

    @property
    def files(self) -> tuple[Path, Path]:
        """The file and its write-ahead log, which need not be there."""
        return self._path, self._path.with_name(f"{self._path.name}-wal")

    @property
    def exists(self) -> bool:
        """Whether the file is there."""
        return self._path.exists()

    def stamp(self) -> Hashable | None:
        """What differs once anybody has changed the file; None where there is none."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def identity(self) -> Hashable | None:
        """What differs once the file was deleted and made anew; None where there is none."""
        return self._path.stat().st_ino if self._path.exists() else None

    def connect(self, wait_seconds: float = WAIT_SECONDS, *, read_only: bool = False) -> SQLiteSession:
        """A connection that waits so long for whoever writes; one *read_only* makes and changes nothing.

        Raises:
            DamagedStateError: the file is no database, or is damaged.
            NoSpaceError: the disk is full.
            OSError: the file cannot be written.
        """
        return SQLiteSession(self._engine(wait_seconds, read_only).connect(), self._keeping.replaces)

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """One transaction, on a connection of its own; it is on the disk at its end.

        Raises:
            DamagedStateError: as ``connect``, likewise the others.
        """
        with contextlib.closing(self.connect()) as session, session.writing() as connection:
            yield connection

    def sync(self) -> None:
        """Bring what was committed onto the disk, while others go on writing: the more often, the shorter they wait for it."""
        ahead = self._path.with_name(f"{self._path.name}-wal")
        with self._syncing, contextlib.suppress(FileNotFoundError):
            status = ahead.stat()
            if (written := (status.st_size, status.st_mtime_ns)) != self._synced:
                # SQLite holds no lock on its write-ahead log, so that closing this handle cancels none
                with open(ahead, "rb") as handle:
                    os.fsync(handle.fileno())
                self._synced = written
            if status.st_size and time.monotonic() - self._moved_at > MOVED_EVERY_SECONDS:
                self._moved_at = time.monotonic()
                if self._mover is None:
                    self._mover = self._opened(WAIT_SECONDS)
                # into the file itself, as far as that is possible without waiting for anybody
                self._mover.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def rewrite(self) -> None:
        """Write the file anew from its rows, at the cost of the whole file and of twice its room on the disk.

        ``scrub`` cannot reach everything. Where SQLite parts a page or packs it, copies of rows may stay in what the page leaves unused:
        ``secure_delete`` overwrites a row only where it lies when it is deleted.
        """
        with contextlib.closing(SQLiteSession(self._engine(WAIT_SECONDS, False).connect(), replaces=True)) as session:
            session.scrub()

    def discard(self) -> None:
        """Delete the file; whoever has it open goes on with what is nowhere any more."""
        for name in (self._path.name, f"{self._path.name}-wal", f"{self._path.name}-shm"):
            self._path.with_name(name).unlink(missing_ok=True)

    def _engine(self, wait_seconds: float, read_only: bool) -> Engine:
        engine = self._engines.get((wait_seconds, read_only))
        if engine is None:
            opened = self._only_read if read_only else self._opened
            engine = sa.create_engine("sqlite://", creator=lambda: opened(wait_seconds), poolclass=sa.NullPool)
            event.listen(engine, "begin", _begin)
            event.listen(engine, "handle_error", self._explain)
            self._engines[wait_seconds, read_only] = engine
        return engine

    def _only_read(self, wait_seconds: float) -> sqlite3.Connection:
        place = f"{self._path.absolute().as_uri()}?mode=ro"
        try:
            return sqlite3.connect(place, uri=True, timeout=wait_seconds, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as error:
            raise explained(error, self._path) from error

    def _opened(self, wait_seconds: float) -> sqlite3.Connection:
        make_folder(self._path.parent)
        try:
            # SQLite gives its write-ahead log the rights of the file itself; a file that is there is not opened, as closing it
            # would cancel the locks that other connections of this process hold
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE_FILE))
            if self._path.stat().st_mode & 0o077:
                self._path.chmod(PRIVATE_FILE)
            db = sqlite3.connect(self._path, timeout=wait_seconds, check_same_thread=False, isolation_level=None)
        except (sqlite3.Error, OSError) as error:
            raise explained(error, self._path) from error
        try:
            for pragma in self._keeping.pragmas:
                db.execute(f"PRAGMA {pragma}").fetchall()
            for statement in self._ddl:
                db.execute(str(statement.compile(dialect=_DIALECT)))
        except sqlite3.Error as error:
            db.close()
            raise explained(error, self._path) from error
        return db

    def _explain(self, context: ExceptionContext) -> Exception | None:
        error = context.original_exception
        told = explained(error, self._path) if isinstance(error, sqlite3.Error) else error
        return told if isinstance(told, Exception) and told is not error else None


class SQLiteSession:
    """A connection to an SQLite file that stays open; any thread may use it, one at a time."""

    def __init__(self, connection: Connection, replaces: bool) -> None:
        self._connection, self._replaces = connection, replaces
        self._lock = threading.RLock()

    def read(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[AnyRow]:
        """The rows of a query."""
        with self._lock:
            self._see_that_nothing_is_written()
            try:
                return self._connection.execute(statement, parameters or {}).fetchall()
            finally:
                # SQLAlchemy has begun what SQLite has not
                self._connection.rollback()

    @contextlib.contextmanager
    def streaming(self, statement: Executable) -> Iterator[Iterator[AnyRow]]:
        """The rows of a query, one by one; nobody else can use the connection meanwhile."""
        with self._lock:
            self._see_that_nothing_is_written()
            try:
                with contextlib.closing(self._connection.execute(statement)) as rows:
                    yield iter(rows)
            finally:
                self._connection.rollback()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction, which is on the disk at its end, or undone where it raises; none of another process comes in between."""
        with self._lock:
            self._see_that_nothing_is_written()
            self._connection.info[_WRITES] = True
            try:
                with self._connection.begin():
                    yield self._connection
            finally:
                if not self._connection.closed:
                    self._connection.info[_WRITES] = False
                    self._end()

    def scrub(self) -> None:
        """Bring the file to hold no more than its rows: what was overwritten must not stand in the write-ahead log either."""
        with self._lock:
            self._see_that_nothing_is_written()
            try:
                for command in (*(("VACUUM",) if self._replaces else ()), "PRAGMA wal_checkpoint(TRUNCATE)"):
                    result = self._connection.exec_driver_sql(command)
                    if result.returns_rows:
                        result.fetchall()
            finally:
                # what a full disk left begun would keep every later transaction from beginning
                self._end()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    def _see_that_nothing_is_written(self) -> None:
        if self._connection.info.get(_WRITES):
            raise RuntimeError("a transaction is open on this connection: read and write through what it gave")

    def _end(self) -> None:
        self._connection.rollback()
        raw = self._connection.connection.dbapi_connection
        # SQLAlchemy takes a commit that failed for the end of the transaction, and SQLite may not
        if raw is not None and raw.in_transaction:
            raw.rollback()


_WRITES = "writes"


def _begin(connection: Connection) -> None:
    if connection.info.get(_WRITES):
        # at once for writing: a transaction that begins by reading could find that it is too late
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def explained(error: Exception, path: Path) -> Exception:
    """What an error of SQLite or of the system about *path* means to whoever runs the service."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DamagedStateError(f"{path} is damaged ({error}): put it back from a backup, or follow 'Damage' in docs/operations.md")
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) in (28, 122):
        return NoSpaceError(f"the disk of {path} is full ({error}): make room, and go on")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR) or isinstance(error, OSError):
        return OSError(f"{path} cannot be written ({error}): see that its folder is there, writable and not full")
    return error


def is_damage(error: BaseException) -> bool:
    """Whether the file is to blame, and not the disk, a lock or a bound on open files; one that is cut short is an error of reading.

    In PostgreSQL tables that are damaged, or gone as somebody has discarded them, are.
    """
    while error is not None:
        if getattr(error, "sqlstate", None) in ("XX001", "XX002", "42P01", "3F000"):
            return True
        code = getattr(error, "sqlite_errorcode", 0)
        if code:
            return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or code == sqlite3.SQLITE_IOERR_SHORT_READ
        error = getattr(error, "orig", None) or error.__cause__  # type: ignore[assignment]
    return False


def is_database(path: Path) -> bool:
    """Whether a file is a database of SQLite's."""
    with path.open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD


def copy_database(source: Path, to: Path) -> None:
    """Copy a database as it is at one moment, while others write to it; no other connection of this process may have it open.

    Raises:
        DamagedStateError: it cannot be read as what it is.
    """
    os.close(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE_FILE))
    try:
        opened = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=WAIT_SECONDS)
        with contextlib.closing(opened) as here, contextlib.closing(sqlite3.connect(to)) as copy:
            here.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
            [(told,)] = copy.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.DatabaseError as error:
        raise DamagedStateError(f"{source} cannot be copied: {error}") from error
    if told != "ok":
        raise DamagedStateError(f"{source} is damaged ({told}): follow 'Damage' in docs/operations.md")
