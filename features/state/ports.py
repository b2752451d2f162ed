"""What every room asks for in place of files, databases and the environment. An engine stands behind each; a ``bootstrap`` chooses it.

``Home`` is the engine of one machine. Two more ports stand beside what they carry: ``EventQueue`` in ``serving.intake`` and
``KeyedState`` in ``features.store``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
from sqlalchemy import Connection, Executable, Row
from sqlalchemy import Table as SqlTable

from features.state.settings import Settings

AnyRow = Row[*tuple[Any, ...]]
"""A row of whatever columns."""
EVENTS, IDENTIFIERS, DEAD_LETTERS, DECISIONS = "events", "identifiers", "dead_letters", "decisions"
LOG, DERIVED, SERVING, IMPORT = "log", "derived", "serving", "import"
"""Leases: of whoever writes to the log; between an erasure and whoever writes what follows from the log; of the one service; of an
import, from its first batch to its report."""
KEPT_SECONDS = 600.0
"""How long a file that no version of a table needs any more is kept, for readers that have begun with it."""


class MissingStateError(RuntimeError):
    """A table, snapshot or model that a command needs does not exist yet; the message names the fix."""


class UnreachableError(OSError):
    """A server that keeps something cannot be reached now, or answers too late; the message names it."""


class LeaseTakenError(RuntimeError):
    """Somebody else holds a lease, so that it cannot be had now."""


class MovedOnError(RuntimeError):
    """A table does not stand at the version that was seen: another process has written to it, and nothing was written now.

    Look again at what it holds, and try again.
    """


class LeaseLostError(UnreachableError):
    """A lease was lost while it was held, as the way to whoever keeps it was cut: another may have had it meanwhile."""


class Held(Protocol):
    """A lease that is held until it is closed, or its process ends."""

    def still_held(self) -> bool:
        """Whether nobody else can have it; on many machines a lease is lost with the way to whoever keeps it."""

    def close(self) -> None:
        """Let go of it."""

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> Any: ...


class Lease(Protocol):
    """Who may do what only one may do at a time, or only beside others that share. Whatever a dead process held is free."""

    def hold(self, name: str, *, shared: bool = False) -> AbstractContextManager[Held]:
        """Hold the lease *name*, alone or *shared*, having waited for it.

        Raises:
            LeaseLostError: at the end; it was lost meanwhile.
        """

    def take(self, name: str, *, shared: bool = False) -> Held:
        """Hold the lease *name* at once.

        Raises:
            LeaseTakenError: somebody holds it.
        """


class Secrets(Protocol):
    """The installation's secret, and the mark of the secret that its data were made with."""

    @property
    def place(self) -> str:
        """Where the secret is to be found, in words."""

    def find(self) -> bytes | None:
        """The secret, or None where there is none yet.

        Raises:
            ValueError: it is too short.
        """

    def make(self) -> bytes:
        """A new secret, kept for good; where somebody has just made one, theirs."""

    def marked(self) -> bytes | None:
        """The mark that was noted, or None."""

    def mark(self, mark: bytes) -> None:
        """Note *mark* for good."""


class Changed(NamedTuple):
    """What a commit did to rows of a table that were there before."""

    rows: int
    """How many it changed."""
    version: int
    """Which version it made, or was made on where nothing had to be changed; others may have gone on from there."""


class Table(Protocol):
    """One table of rows that are appended in atomic commits, each of which makes a version.

    A lease may be lost in the middle of work. Who writes what follows from a version that they saw names it as *expected_version*:
    the commit is made on exactly that version, or else ``MovedOnError`` is raised and nothing was written.
    """

    @property
    def place(self) -> str:
        """Where it lies, in words."""

    @property
    def exists(self) -> bool:
        """Whether anything was ever stored in it, readable or not."""

    def append(self, rows: pa.Table, expected_version: int | None = None) -> int:
        """Append *rows* in one commit, which is stored for good when this returns; the first makes the table. Returns its version.

        Raises:
            MovedOnError: the table does not stand at *expected_version* (-1: there is none).
        """

    def overwrite(self, rows: pa.Table, expected_version: int | None = None) -> int:
        """Put *rows* in the place of the whole table, in one commit; returns its version. Raises as ``append`` does."""

    def version(self) -> int:
        """The current version, whoever made it; -1 if there is no table."""

    def files(self) -> list[str]:
        """The Parquet files on this machine that make up the current version; none if there is no table."""

    def held(self) -> AbstractContextManager[list[str]]:
        """Every file that is stored of it, whichever version needs it, on this machine for as long as the context lasts."""

    def read(self, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The rows of the current version, or None if there is no table."""

    def commit_digest(self, number: int) -> str | None:
        """A digest of the commit of that number, as another may take its place after a repair; None where it is gone."""

    def appended_since(self, known: int) -> list[str] | None:
        """The files that were appended after version *known*; None where rows were taken out since, or commits are gone."""

    def maintain(self, kept_seconds: float = KEPT_SECONDS) -> None:
        """Make many small files few, and delete what nobody has needed for *kept_seconds*. Hold the table's lease."""

    def erase(self, column: str, values: Sequence[str], expected_version: int | None = None) -> Changed:
        """Delete the rows whose *column* is one of *values*, and every older version. Hold the table's lease.

        Raises as ``append`` does.
        """

    def blank(self, column: str, values: Sequence[str], expected_version: int | None = None) -> Changed:
        """Set *column* to null where it is one of *values*, and delete every older version.

        Raises as ``append`` does.
        """

    def lower(self, columns: Sequence[str], most: datetime) -> int:
        """Set each of the time *columns* to *most* where the first of them is later; returns how many rows."""

    def keep_newest(self, column: str, most_bytes: int) -> bool:
        """Delete the older half by the time *column* of a table that holds more than *most_bytes*; returns whether it did."""

    def recover(self) -> None:
        """Take back what a power cut left half written. Hold the table's lease.

        Raises:
            DamagedStateError: what was stored for good is missing or cut short.
        """

    def repair(self) -> list[str]:
        """Give up what cannot be read; returns what was given up. Hold the table's lease."""


class DatabaseSession(Protocol):
    """A connection to a database that stays open; any thread may use it, one at a time."""

    def read(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[AnyRow]:
        """The rows of a query."""

    def streaming(self, statement: Executable) -> AbstractContextManager[Iterator[AnyRow]]:
        """The rows of a query, one by one."""

    def writing(self) -> AbstractContextManager[Connection]:
        """One transaction, stored for good at its end; undone where it raises."""

    def scrub(self) -> None:
        """Leave no trace of what was deleted or overwritten."""

    def close(self) -> None:
        """Let go of it."""


class Database(Protocol):
    """A few SQL tables, made at the first use. Errors are ``DamagedStateError``, ``NoSpaceError`` and ``OSError``, which name the place.

    Other errors are SQLAlchemy's.
    """

    @property
    def place(self) -> str:
        """Where it lies, in words."""

    @property
    def exists(self) -> bool:
        """Whether anything was ever written to it."""

    def stamp(self) -> Hashable | None:
        """What differs once anybody has changed it; None where it does not exist."""

    def connect(self, wait_seconds: float = 60.0, *, read_only: bool = False) -> DatabaseSession:
        """A connection that waits so long for whoever writes; one *read_only* makes and changes nothing."""

    def begin(self) -> AbstractContextManager[Connection]:
        """One transaction, on a connection of its own."""

    def identity(self) -> Hashable | None:
        """What differs once it was deleted and made anew; None where it does not exist."""

    def sync(self) -> None:
        """Bring onto the disk what is kept so that a commit outlives the process, and not yet a power cut."""

    def discard(self) -> None:
        """Delete it: what follows from elsewhere is made anew there."""


class State(Protocol):
    """All that one installation keeps, behind its ports."""

    @property
    def settings(self) -> Settings:
        """What the installation is set to."""

    @property
    def place(self) -> str:
        """Where it lies, in words."""

    @property
    def lease(self) -> Lease:
        """Who may do what only one may do."""

    @property
    def secrets(self) -> Secrets:
        """The installation's secret."""

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables of the log, by name."""

    def database(self, name: str, *tables: SqlTable) -> Database:
        """The database *name*, which holds *tables*."""

    def free_bytes(self) -> int:
        """How much more can be stored."""

    def check_room(self) -> None:
        """See that there is room for more.

        Raises:
            NoSpaceError: there is hardly any.
        """


def deriving(state: State) -> AbstractContextManager[object]:
    """Hold this from the first read of customers' rows to the last write of what follows from them: no erasure comes in between."""
    return state.lease.hold(DERIVED, shared=True)
