"""One PostgreSQL server as a process sees it: connections of which none waits for ever, and what its errors mean."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any
from weakref import WeakSet

import psycopg
import sqlalchemy as sa
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool

from features.state.disk import DamagedStateError, NoSpaceError
from features.state.patience import is_impatient
from features.state.ports import UnreachableError

CONNECT_SECONDS = 3
READ_SECONDS = 2.0
"""How long a server may be silent while it answers a query: a request waits for it."""
WRITE_SECONDS = 10.0
"""How long it may be silent within a transaction, at its end, or before the first of many rows."""
MAINTAIN_SECONDS = 600.0
"""How long it may be silent while it tidies a table or makes one."""
KEPT_CONNECTIONS, MOST_CONNECTIONS = 8, 32
"""How many connections of the pool stay open when nobody needs them, and how many a process opens at most."""
STRETCHED = 10
"""So many times as long as it may be silent a server may take for a statement, as long as it tells that it works on it."""
_ON_THE_SERVER = {
    "synchronous_commit": "on",
    # whoever's machine is gone holds no lock for long
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "client_connection_check_interval": "5000",
    # nor does one that hangs in the middle of a transaction, which keeps every other writer waiting
    "idle_in_transaction_session_timeout": "10000",
}
_ON_THIS_MACHINE: dict[str, Any] = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "ubiquo",
}
_NO_TABLE, _READ_ONLY = ("42P01", "3F000"), "25006"
_ENDED = ("57P01", "57P02", "57P03", "57P05", "25P03")


class UnreachableDatabaseError(UnreachableError):
    """The database server cannot be reached, or has ended the connection; the message names it and the fix.

    Attributes:
        is_silent: whether it was waited for, or asked for a connection, in vain: to ask again at once would end the same way.
    """

    is_silent = False


class PatientConnection(psycopg.Connection[Any]):
    """A connection that is given up once the server is silent for ``patience`` seconds, however the network hangs.

    Before it is, the server is asked on another one: what takes long there, and is worked on, is waited for.
    """

    patience = WRITE_SECONDS
    server: PostgresServer
    asks = True

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """Let a call go on until it is done.

        Raises:
            OperationalError: the server was silent for too long; the connection is closed.
        """
        return super().wait(self._watched(gen), *args, **kwargs)

    def _watched(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        # the driver comes back here ten times a second, heard or not
        began = heard = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    heard = time.monotonic()
                elif (now := time.monotonic()) - heard > self.patience:
                    # whoever is waited for does not ask whether it is at work
                    asks = self.asks and not is_impatient()
                    if now - began > STRETCHED * self.patience or not asks or not self.server.works_on(self):
                        self.close()
                        raise SilentServerError(f"no answer within {self.patience:g} seconds")
                    heard = time.monotonic()
                wanted = gen.send(ready)
        except StopIteration as done:
            if (server := getattr(self, "server", None)) is not None:
                server.is_silent = False
            return done.value


_SILENT_HOLDERS = sa.text(
    "SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a WHERE a.datname = current_database() AND a.application_name = 'ubiquo' "
    "AND a.xact_start IS NOT NULL AND a.wait_event = 'ClientRead' AND a.state_change < clock_timestamp() - interval '10 seconds' "
    "AND EXISTS (SELECT 1 FROM pg_locks held JOIN pg_locks wanted USING (locktype, database, classid, objid, objsubid) "
    "WHERE held.pid = a.pid AND held.granted AND NOT wanted.granted AND held.locktype = 'advisory')"
)
"""Ends whoever holds a lock that others wait for, within a transaction whose client has said nothing for ten seconds."""


class SilentServerError(psycopg.OperationalError):
    """A server said nothing for too long."""


class PostgresServer:
    """The connections of this process to one database of a PostgreSQL server.

    Args:
        url: ``postgresql://user:password@host:port/database``; what it says of time limits goes before what is set here.
    """

    def __init__(self, url: str) -> None:
        told = make_url(url)
        self.place = f"PostgreSQL at {told.host or 'this machine'}:{told.port or 5432}, database {told.database or told.username}"
        """Where it is, in words; without a password."""
        self._url = url
        self.is_current = False
        """Whether the tables were found to be those that this code knows."""
        self.is_silent = False
        """Whether it did not answer when it was last asked."""
        self.engine = sa.create_engine(
            "postgresql+psycopg://", creator=self.opened, poolclass=QueuePool, pool_size=KEPT_CONNECTIONS, pool_use_lifo=True,
            max_overflow=MOST_CONNECTIONS - KEPT_CONNECTIONS, pool_timeout=WRITE_SECONDS, pool_reset_on_return=None,
            isolation_level="AUTOCOMMIT", use_native_hstore=False,
        )  # fmt: skip
        event.listen(self.engine, "handle_error", self._explain)
        _SERVERS.add(self)

    def see_that_it_answers(self) -> None:
        """Wait for no server that has just been silent, on a thread that somebody waits for.

        Raises:
            UnreachableDatabaseError: it has.
        """
        if self.is_silent and is_impatient():
            raise self.lost(SilentServerError("it has just been asked in vain"))

    def opened(self, patience: float = WRITE_SECONDS, **on_the_server: str) -> PatientConnection:
        """A connection outside the pool, which commits each statement unless it is told otherwise.

        Raises:
            UnreachableDatabaseError: there is none to be had.
        """
        self.see_that_it_answers()
        options = " ".join(f"-c {name}={value}" for name, value in {**_ON_THE_SERVER, **on_the_server}.items())
        said = psycopg.conninfo.conninfo_to_dict(self._url)
        try:
            told = {**_ON_THIS_MACHINE, **said, "options": f"{options} {said.get('options', '')}".strip()}
            connection = PatientConnection.connect(make_conninfo(**told), autocommit=True)
        except psycopg.Error as error:
            why = " ".join(str(error).split())
            found = UnreachableDatabaseError(
                f"{self.place} cannot be used ({why}): see that it runs, that this machine reaches it, and what UBIQUO_DATABASE says"
            )
            found.is_silent = self.is_silent = True
            raise found from error
        self.is_silent = False
        connection.patience, connection.server = patience, self
        return connection

    def time(self) -> datetime:
        """What the server's clock says."""
        with self.engine.connect() as connection:
            [(at,)] = connection.execute(sa.text("SELECT clock_timestamp()")).fetchall()
        told: datetime = at.astimezone(UTC)
        return told

    def relieve(self) -> int:
        """End the transactions of silent clients for whose locks others wait; returns how many.

        The server's own bound on idle transactions misses those that are cut in the middle of a message or a copy.
        """
        with self.engine.connect() as connection:
            return len(connection.execute(_SILENT_HOLDERS).fetchall())

    def works_on(self, connection: PatientConnection) -> bool:
        """Whether the server can be reached, and tells that it is at work on what was asked on *connection*."""
        try:
            with contextlib.closing(self.opened(READ_SECONDS)) as other:
                other.asks = False
                found = other.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", (connection.info.backend_pid,))
                return found.fetchone() is not None
        except (psycopg.Error, OSError):
            return False

    def forget(self) -> None:
        """Let go of the pool without ending its connections: they are another process's too."""
        self.engine.dispose(close=False)

    def close(self) -> None:
        """End the connections of the pool that nobody uses."""
        self.engine.dispose()

    def explained(self, error: psycopg.Error, statement: str | None = None) -> Exception:
        """What an error of the server means to whoever runs the service."""
        state, why = error.sqlstate or "", " ".join(str(error).split())
        if state == "53100":
            return NoSpaceError(f"the disk of {self.place} is full ({why}): make room there, and go on")
        if state in ("XX001", "XX002"):
            return DamagedStateError(f"{self.place} is damaged ({why}): put it back from a backup")
        if state in _NO_TABLE or state == _READ_ONLY:
            return OperationalError(statement, None, error)
        return error

    def lost(self, error: BaseException) -> UnreachableDatabaseError:
        """What it means that a connection was lost."""
        told = " ".join(str(error).split())
        found = UnreachableDatabaseError(
            f"{self.place} does not answer ({told}): what was asked was not done, or it is not known whether it was. See that the server "
            "runs and that this machine reaches it; nothing need be started anew"
        )
        found.is_silent = isinstance(error, SilentServerError)
        self.is_silent = self.is_silent or found.is_silent
        return found

    def _explain(self, context: ExceptionContext) -> Exception | None:
        error = context.original_exception
        if not isinstance(error, psycopg.Error):
            return None
        if context.is_disconnect or error.sqlstate in _ENDED or (error.sqlstate or "").startswith("08"):
            context.is_disconnect = True
            return self.lost(error)
        told = self.explained(error, context.statement)
        return None if told is error else told


def copy_rows(connection: Connection, table: Any, schema: str | None, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert many rows, whose values stand in the order of the table's columns, in one message.

    Raises:
        IntegrityError: a row is there already, or misses something; likewise what else the server says.
    """
    quote = connection.dialect.identifier_preparer.quote
    place = ".".join(quote(part) for part in (schema, table.name) if part)
    statement = f"COPY {place} ({', '.join(quote(column.name) for column in table.columns)}) FROM STDIN"
    driver = raw(connection)
    try:
        with driver.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            for row in rows:
                copy.write_row(row)
    except psycopg.Error as error:
        if driver.closed:
            connection.invalidate(error)
            raise driver.server.lost(error) from error
        told = driver.server.explained(error, statement)
        if told is error:
            told = sa.exc.DBAPIError.instance(statement, None, error, psycopg.Error, dialect=connection.dialect)
        raise told from error


def raw(connection: Connection) -> PatientConnection:
    """The driver's own connection."""
    found = connection.connection.dbapi_connection
    if not isinstance(found, PatientConnection):
        raise TypeError("this is no connection to PostgreSQL")
    return found


def from_pool(engine: sa.Engine) -> Connection:
    """A connection of the pool, waited for.

    Raises:
        UnreachableDatabaseError: there is none to be had, or all are in use for too long.
    """
    try:
        return engine.connect()
    except sa.exc.TimeoutError:
        found = UnreachableDatabaseError(
            f"all {MOST_CONNECTIONS} connections of this process to its database have been in use for {WRITE_SECONDS:g} seconds: ask again"
        )
        found.is_silent = True
        raise found from None


def has_failed(connection: PatientConnection) -> bool:
    """Whether a statement of the transaction has failed, so that nothing of it can be stored."""
    return connection.info.transaction_status == TransactionStatus.INERROR


def is_error(error: BaseException) -> bool:
    """Whether the server or the way to it is to blame."""
    return isinstance(error, psycopg.Error)


def is_missing(error: OperationalError) -> bool:
    """Whether a table or schema is not there."""
    return getattr(error.orig, "sqlstate", None) in _NO_TABLE


def is_idle(connection: PatientConnection) -> bool:
    """Whether no transaction is open."""
    return connection.info.transaction_status == TransactionStatus.IDLE


_SERVERS: WeakSet[PostgresServer] = WeakSet()


@cache
def server_at(url: str) -> PostgresServer:
    """The one server of this process at a URL."""
    return PostgresServer(url)


def _forget_all() -> None:
    for server in _SERVERS:
        with contextlib.suppress(Exception):
            server.forget()


os.register_at_fork(after_in_child=_forget_all)
