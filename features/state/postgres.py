"""Databases in PostgreSQL: each a schema of one database of a server, all over one pool of connections."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Executable, Table
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.schema import CreateIndex, CreateSchema, CreateTable, DropSchema

from features.state.ports import AnyRow
from features.state.postgres_server import (
    MAINTAIN_SECONDS,
    READ_SECONDS,
    WRITE_SECONDS,
    PostgresServer,
    UnreachableDatabaseError,
    from_pool,
    has_failed,
    is_idle,
    is_missing,
    raw,
)
from features.state.sql import schema_of

WAIT_SECONDS = 60.0
LEAST_SECONDS, LOOK_SECONDS = 0.25, 0.5
"""The shortest time that an answer is waited for, and how long to be told whether anything has changed."""
OWN = "ubiquo"
"""The schema of what concerns all databases, and the beginning of every other schema's name."""
REVISIONS = sa.Table(
    "revisions",
    sa.MetaData(schema=OWN),
    sa.Column("database", sa.Text, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
)
"""How often each database was changed of which it is asked."""
MADE_BY_ONE = "making"
STREAMED_ROWS = 200
REWRITTEN_BYTES = 64_000_000
"""A table that is larger is not written anew to leave no trace: its old bytes stay in free space until that is used again."""


@dataclass(frozen=True)
class PostgresKeeping:
    """How the tables of one database are kept.

    Attributes:
        is_durable: whether a commit is on the server's disk when it returns; else it outlives the process at once, and a crash of the
            server from the next ``sync`` on.
        counts: whether its changes are counted, so that ``stamp`` stays the same as long as nothing has changed.
        make: makes what the database needs, where it is not made of the tables that its user names.
    """

    is_durable: bool = True
    counts: bool = False
    make: Callable[[PostgresServer], None] | None = None


class PostgresDatabase:
    """The database *name*: a schema of its own with *tables*, which are made at the first use."""

    def __init__(self, server: PostgresServer, name: str, tables: Sequence[Table], keeping: PostgresKeeping) -> None:
        self.server, self._name, self._tables, self._keeping = server, name, tables, keeping
        self._schema = f"{OWN}_{name}"
        # how many rows an insert has put in is asked too, and told by the driver only until its cursor is closed
        self._engine = server.engine.execution_options(schema_translate_map={None: self._schema}, preserve_rowcount=True)
        self._making = threading.Lock()
        self._is_made = self._is_there = False
        self._unsynced = 0

    @property
    def place(self) -> str:
        """The server, the database there and the schema."""
        return f"{self.server.place}, schema {self._schema}"

    @property
    def exists(self) -> bool:
        """Whether the schema is there; once it was seen it is not looked for again."""
        if not self._is_there:
            self._is_there = self.identity() is not None
        return self._is_there

    def identity(self) -> Hashable | None:
        """What differs once the schema was deleted and made anew; None where there is none."""
        rows = self._session().read(sa.text("SELECT oid FROM pg_namespace WHERE nspname = :name"), {"name": self._schema})
        return int(rows[0][0]) if rows else None

    def stamp(self) -> Hashable | None:
        """What differs once anybody has changed it; None where it does not exist."""
        if not self.exists:
            return None
        # a request may wait for it
        session = self._session(patience=LOOK_SECONDS)
        if not self._keeping.counts:
            # of the whole server: nobody asks for it often
            return str(session.read(sa.text("SELECT pg_current_wal_insert_lsn()"))[0][0])
        rows = session.read(_REVISION, {"name": self._name})
        return tuple(rows[0]) if rows else None

    def connect(self, wait_seconds: float = WAIT_SECONDS, *, read_only: bool = False) -> PostgresSession:
        """A session that waits so long for whoever writes, and no longer for an answer; one *read_only* makes and changes nothing.

        Raises:
            UnreachableDatabaseError: the server does not answer.
            NoSpaceError: its disk is full.
        """
        if not read_only:
            self._make()
        return self._session(wait_seconds, read_only, min(READ_SECONDS, max(LEAST_SECONDS, wait_seconds)))

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """One transaction, which is on the server's disk at its end.

        Raises:
            UnreachableDatabaseError: as ``connect``, likewise the others.
        """
        with self.connect().writing() as connection:
            yield connection

    def sync(self) -> None:
        """Bring onto the server's disk what this process has committed and that does not lie there yet."""
        known = self._unsynced
        if self._keeping.is_durable or not known:
            return
        # a commit that waits for the disk waits for all that came before it
        self._session(patience=WRITE_SECONDS).read(sa.text("SELECT pg_logical_emit_message(true, 'ubiquo', 'sync')"))
        with self._making:
            self._unsynced -= known

    def discard(self) -> None:
        """Delete the schema; who has a session goes on once the next is opened, which makes it anew."""
        with self._making:
            with self._alone() as connection:
                connection.execute(DropSchema(self._schema, cascade=True, if_exists=True))
            self._is_made = self._is_there = False

    def look_again(self) -> None:
        """See at the next ``connect`` whether it is there."""
        with self._making:
            self._is_made = self._is_there = False

    def committed(self) -> None:
        """Note that something was committed."""
        with self._making:
            self._unsynced += 1

    def _session(self, wait_seconds: float = WAIT_SECONDS, read_only: bool = False, patience: float | None = None) -> PostgresSession:
        words = f"BEGIN{' READ ONLY' if read_only else ''}; SET LOCAL lock_timeout = {max(1, round(wait_seconds * 1000))}"
        words += "" if self._keeping.is_durable else "; SET LOCAL synchronous_commit = off"
        words += "" if read_only else f"; SELECT pg_advisory_xact_lock({lock_number(f'database:{self._name}')})"
        ends = "COMMIT"
        if self._keeping.counts and not read_only:
            ends = (
                f"UPDATE {OWN}.revisions SET revision = revision + 1 WHERE database = '{self._name}' "
                "AND pg_current_xact_id_if_assigned() IS NOT NULL; COMMIT"
            )
        return PostgresSession(self, self._engine, words, ends, wait_seconds, READ_SECONDS if patience is None else patience)

    def _make(self) -> None:
        if self._is_made:
            return
        with self._making:
            if self._is_made:
                return
            if self._keeping.make is not None:
                self._keeping.make(self.server)
            else:
                self._make_tables()
            self._is_made = self._is_there = True

    def _make_tables(self) -> None:
        with self._alone() as connection:
            # looked at first: to make what is there needs more rights, and tells the server's log
            if not sa.inspect(connection).has_schema(self._schema):
                connection.execute(CreateSchema(self._schema, if_not_exists=True))
            for table in self._tables:
                connection.execute(CreateTable(table, if_not_exists=True))
                for index in table.indexes:
                    connection.execute(CreateIndex(index, if_not_exists=True))
            if self._keeping.counts:
                make_revisions(connection, [self._name])

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Connection]:
        with alone(self.server, self._engine) as connection:
            yield connection


_REVISION = sa.text(
    f"SELECT n.oid, r.revision FROM {OWN}.revisions r, pg_namespace n WHERE r.database = :name AND n.nspname = '{OWN}_' || r.database"
)


class PostgresSession:
    """Reads and transactions of one database, each on a connection of the pool; any thread may use it, one at a time writes."""

    def __init__(self, database: PostgresDatabase, engine: sa.Engine, begins: str, ends: str, wait_seconds: float, patience: float) -> None:
        self._database, self._engine, self._begins, self._ends = database, engine, begins, ends
        self._wait_seconds, self._patience = wait_seconds, patience
        self._lock = threading.RLock()
        self._writes: int | None = None

    def read(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[AnyRow]:
        """The rows of a query: one message to the server and one back; asked again where a connection of the pool was lost meanwhile.

        Raises:
            UnreachableDatabaseError: the server does not answer.
        """
        self._see_that_nothing_is_written()
        with self._looking_again():
            try:
                return self._read(statement, parameters or {})
            except UnreachableDatabaseError as error:
                if error.is_silent:
                    raise
            except DataError:
                # no text here holds a character of the number 0, so that one that does equals none
                if parameters is None or (parameters := _equal_to_none(parameters)) is None:
                    raise
            return self._read(statement, parameters or {})

    def _read(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[AnyRow]:
        self._database.server.see_that_it_answers()
        with from_pool(self._engine) as connection:
            raw(connection).patience = self._patience
            return connection.execute(statement, parameters).fetchall()

    @contextlib.contextmanager
    def streaming(self, statement: Executable) -> Iterator[Iterator[AnyRow]]:
        """The rows of a query, which the server hands over some at a time, all as they stood when it began."""
        self._see_that_nothing_is_written()
        with self._begun("BEGIN READ ONLY; SET LOCAL idle_in_transaction_session_timeout = 0", WRITE_SECONDS) as connection:
            # of the statement: those of a connection would stay with it
            streamed = statement.execution_options(stream_results=True, max_row_buffer=STREAMED_ROWS)
            with contextlib.closing(connection.execute(streamed)) as rows:
                yield iter(rows)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction, which is stored at its end, or undone where it raises; none of another process comes in between.

        Raises:
            OperationalError: somebody else writes for longer than the session waits.
            UnreachableDatabaseError: the server does not answer; at the end of the transaction: it is not known whether it is stored.
        """
        with self._lock:
            self._see_that_nothing_is_written()
            with self._looking_again(), self._begun(self._begins, self._wait_seconds + WRITE_SECONDS) as connection:
                self._writes = threading.get_ident()
                try:
                    yield connection
                finally:
                    self._writes = None
                if has_failed(raw(connection)):
                    raise RuntimeError("a statement of the transaction failed and was passed over: nothing of it is stored")
                connection.exec_driver_sql(self._ends)
        self._database.committed()

    def scrub(self) -> None:
        """Leave no row behind that was deleted or overwritten: what PostgreSQL keeps of it until it tidies up.

        A table of up to ``REWRITTEN_BYTES`` is written anew, if nobody uses it just then. What the server's write-ahead log and the free
        space of larger tables still hold is overwritten as they are used again.
        """
        with self._lock:
            self._see_that_nothing_is_written()
            with from_pool(self._engine) as connection:
                raw(connection).patience = MAINTAIN_SECONDS
                for table, size in self._sizes(connection):
                    self._tidy(connection, table, rewrites=size <= REWRITTEN_BYTES)

    def close(self) -> None:
        """Nothing: the pool keeps the connections."""

    def _sizes(self, connection: Connection) -> list[tuple[str, int]]:
        rows = connection.execute(_SIZES, {"schema": schema_of(connection)}).fetchall()
        return [(str(name), int(size)) for name, size in rows]

    @staticmethod
    def _tidy(connection: Connection, table: str, rewrites: bool) -> None:
        if rewrites:
            # unless somebody uses it just then
            connection.exec_driver_sql(f"VACUUM (FULL, SKIP_LOCKED) {table}")
        # to give space back it would wait for readers
        connection.exec_driver_sql(f"VACUUM (TRUNCATE FALSE) {table}")

    @contextlib.contextmanager
    def _begun(self, begins: str, patience: float) -> Iterator[Connection]:
        connection = self._taken(begins, patience)
        try:
            yield connection
        finally:
            with contextlib.suppress(Exception):
                if not connection.invalidated and not is_idle(raw(connection)):
                    connection.exec_driver_sql("ROLLBACK")
            connection.close()

    def _taken(self, begins: str, patience: float) -> Connection:
        """A connection whose transaction has begun; one that the pool kept and that was lost meanwhile is replaced."""
        self._database.server.see_that_it_answers()
        for is_last in (False, True):
            connection = from_pool(self._engine)
            try:
                raw(connection).patience = patience
                connection.exec_driver_sql(begins)
                raw(connection).patience = WRITE_SECONDS
                return connection
            except BaseException as error:
                with contextlib.suppress(Exception):
                    if not connection.invalidated:
                        connection.exec_driver_sql("ROLLBACK")
                connection.close()
                if is_last or not isinstance(error, UnreachableDatabaseError) or error.is_silent:
                    raise
        raise AssertionError

    @contextlib.contextmanager
    def _looking_again(self) -> Iterator[None]:
        """Have the next session see whether the tables are there, where one was not: another process may have discarded them."""
        try:
            yield
        except OperationalError as error:
            if is_missing(error):
                self._database.look_again()
            raise

    def _see_that_nothing_is_written(self) -> None:
        if self._writes == threading.get_ident():
            raise RuntimeError("a transaction is open on this connection: read and write through what it gave")


def _equal_to_none(parameters: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The same parameters with texts that nothing equals in place of those that the server cannot read; None where all can be read."""

    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [told(each) for each in value]
        return uuid.uuid4().hex if isinstance(value, str) and "\0" in value else value

    changed = {name: told(value) for name, value in parameters.items()}
    return None if changed == parameters else changed


_SIZES = sa.text(
    "SELECT format('%I.%I', schemaname, tablename), pg_total_relation_size(format('%I.%I', schemaname, tablename)::regclass) "
    "FROM pg_tables WHERE schemaname = :schema ORDER BY 1"
)


def lock_number(name: str) -> int:
    """The number of the advisory lock of a name; other installations have databases of their own."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


@contextlib.contextmanager
def alone(server: PostgresServer, engine: sa.Engine | None = None) -> Iterator[Connection]:
    """One transaction in which nobody else makes schemas and tables."""
    with (engine or server.engine).connect() as connection:
        raw(connection).patience = MAINTAIN_SECONDS
        connection.exec_driver_sql(f"BEGIN; SELECT pg_advisory_xact_lock({lock_number(MADE_BY_ONE)})")
        try:
            yield connection
            connection.exec_driver_sql("COMMIT")
        except BaseException:
            with contextlib.suppress(Exception):
                if not connection.invalidated:
                    connection.exec_driver_sql("ROLLBACK")
            raise


def make_revisions(connection: Connection, names: Sequence[str]) -> None:
    """Have the changes of these databases counted from now on."""
    connection.execute(CreateSchema(OWN, if_not_exists=True))
    connection.execute(CreateTable(REVISIONS, if_not_exists=True))
    for name in names:
        connection.exec_driver_sql(f"INSERT INTO {OWN}.revisions VALUES ('{name}', 0) ON CONFLICT DO NOTHING")
