"""The ports of a state that lies in memory, or in files of a memory disk, and fails as servers and networks do."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from crash_world import AgainLock, Process, Simulated, Task, World

from features.state.clock import AHEAD, EPOCH, microseconds, moment_of
from features.state.ports import DEAD_LETTERS, DECISIONS, EVENTS, IDENTIFIERS, KEPT_SECONDS, LeaseLostError, LeaseTakenError, MovedOnError
from features.state.settings import Settings
from features.state.sqlite_file import Keeping, SQLiteFile, SQLiteSession
from features.store.keyed_state import RowsTell

logger = logging.getLogger("simulation")
FAST = Keeping(("journal_mode=WAL", "synchronous=OFF"))
COPIES = 30
"""How many writes the server that takes over may lack."""
COMPACT_ABOVE = 6
"""Few, so that short runs compact too."""
files: dict[str, pa.Table] = {}
"""The data files of all tables, by name."""


class ParquetFile:
    """Stands in for pyarrow's, over ``files``."""

    def __init__(self, name: str) -> None:
        self._rows = files[name]

    def read(self) -> pa.Table:
        return self._rows

    def iter_batches(self, size: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        yield from (self._rows if columns is None else self._rows.select(columns)).to_batches(size)


# --- databases


class Server:
    """A database that all processes share: a file of a memory disk, whose transactions wait for each other on the simulated clock."""

    def __init__(self, world: World, name: str, folder: Path, tables: Sequence[sa.Table]) -> None:
        self.world, self.name, self.writer, self.revision = world, name, None, 0  # type: World, str, Session | None, int
        self.file = SQLiteFile(folder / f"{name}.db", tables, FAST)


class Database:
    """A database as one process sees it."""

    def __init__(self, server: Server, process: Process) -> None:
        self._server, self._process = server, process

    @property
    def place(self) -> str:
        return self._server.name

    @property
    def exists(self) -> bool:
        return self._server.file.exists

    def stamp(self) -> Hashable | None:
        return self._server.world.call(f"{self.place}: look", lambda: self._server.revision)

    def identity(self) -> Hashable | None:
        return self.place

    def connect(self, wait_seconds: float = 60.0, *, read_only: bool = False) -> Session:
        return self._server.world.call(f"{self.place}: connect", lambda: Session(self._server, self._process, wait_seconds))

    @contextlib.contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        with contextlib.closing(self.connect()) as session, session.writing() as connection:
            yield connection


class Session:
    """A connection; one that is cut rolls back what was begun."""

    def __init__(self, server: Server, process: Process, wait_seconds: float) -> None:
        self._server, self._world, self._wait = server, server.world, wait_seconds
        self._lock = AgainLock(server.world)
        self._inner: SQLiteSession = server.file.connect(wait_seconds)
        connection = self._inner._connection
        if not sa.event.contains(connection.engine, "before_cursor_execute", _between):
            sa.event.listen(connection.engine, "before_cursor_execute", _between)
        connection.info["session"] = self
        process.closing.append(self.close)

    @property
    def is_writing(self) -> bool:
        return self._server.writer is self

    def between(self) -> None:
        """A statement of a transaction goes to the server."""
        self._world.call(f"{self._server.name}: statement", lambda: None)

    def read(self, statement: sa.Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Any]:
        with self._lock:
            return self._world.call(f"{self._server.name}: read", lambda: self._inner.read(statement, parameters))

    @contextlib.contextmanager
    def streaming(self, statement: sa.Executable) -> Iterator[Iterator[Any]]:
        yield iter(self.read(statement))

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        with self._lock:
            self._world.call(f"{self._server.name}: begin", lambda: None)
            if not self._world.wait(lambda: self._server.writer is None, self._wait):
                raise Simulated(f"{self._server.name}: somebody else writes")
            transaction = self._inner.writing()
            connection = transaction.__enter__()
            self._server.writer = self
            try:
                yield connection
                self._world.call(f"{self._server.name}: commit", lambda: self._commit(transaction))
            except BaseException as error:
                if self._server.writer is self:
                    with contextlib.suppress(type(error)):
                        transaction.__exit__(type(error), error, error.__traceback__)
                raise
            finally:
                if self._server.writer is self:
                    self._server.writer = None

    def _commit(self, transaction: contextlib.AbstractContextManager[object]) -> None:
        self._server.writer = None
        transaction.__exit__(None, None, None)
        self._server.revision += 1

    def scrub(self) -> None:
        """Nothing: what is left behind is not looked at here."""

    def close(self) -> None:
        self._inner.close()


def _between(connection: sa.Connection, *statement: object) -> None:
    session = connection.info.get("session")
    if session is not None and session.is_writing:
        session.between()


# --- tables


class Commit:
    """What one version of a table did."""

    def __init__(self, number: int, added: Sequence[str], is_compaction: bool) -> None:
        self.digest, self.added, self.is_compaction = f"{number}", added, is_compaction


class Table:
    """A table of appended rows; a commit is made on the version that was named, or not at all.

    Args:
        is_fenced: whether it heeds the version that an append expects; without that a lease that is lost stores twice.
    """

    def __init__(self, world: World, name: str, is_fenced: bool = True) -> None:
        self._world, self._name, self._is_fenced = world, name, is_fenced
        self._commits: list[Commit] = []
        self._files: list[str] = []
        self._gone: list[tuple[float, str]] = []
        self._numbers = itertools.count()

    @property
    def place(self) -> str:
        return self._name

    @property
    def exists(self) -> bool:
        return bool(self._commits)

    def append(self, rows: pa.Table, expected_version: int | None = None) -> int:
        def effect() -> int:
            if self._is_fenced and expected_version is not None and expected_version != len(self._commits) - 1:
                raise MovedOnError(f"{self._name} does not stand at {expected_version}")
            self._commit([self._stored(rows)], is_compaction=False)
            shown = rows.to_pylist() if self._name == IDENTIFIERS else rows["event_id"].to_pylist() if self._name == EVENTS else ""
            logger.info("%.3f process %d: %s is %d: %s", self._world.now, self._world.number, self._name, len(self._commits) - 1, shown)
            return len(self._commits) - 1

        return self._world.call(f"{self._name}: append", effect)

    def version(self) -> int:
        return self._world.call(f"{self._name}: version", lambda: len(self._commits) - 1)

    def files(self) -> list[str]:
        return self._world.call(f"{self._name}: files", lambda: list(self._files))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table | None:
        found = [files[name] for name in self.files()]
        return (pa.concat_tables(found) if columns is None else pa.concat_tables(found).select(columns)) if found else None

    def commit_digest(self, number: int) -> str | None:
        return self._commits[number].digest if 0 <= number < len(self._commits) else None

    def appended_since(self, known: int) -> list[str] | None:
        def effect() -> list[str] | None:
            added = [name for commit in self._commits[known + 1 :] if not commit.is_compaction for name in commit.added]
            return added if all(name in files for name in added) else None

        return self._world.call(f"{self._name}: appended since", effect)

    def maintain(self, kept_seconds: float = KEPT_SECONDS) -> None:
        def effect() -> None:
            while self._gone and self._gone[0][0] <= self._world.now - kept_seconds / 20:
                files.pop(self._gone.pop(0)[1], None)
            if len(self._files) > COMPACT_ABOVE:
                whole = self._stored(pa.concat_tables([files[name] for name in self._files]))
                self._gone += [(self._world.now, name) for name in self._files]
                self._files = []
                self._commit([whole], is_compaction=True)

        self._world.call(f"{self._name}: maintain", effect)

    def keep_newest(self, column: str, most_bytes: int) -> bool:
        return False

    def _stored(self, rows: pa.Table) -> str:
        name = f"{self._name}-{next(self._numbers)}"
        files[name] = rows
        return name

    def _commit(self, added: list[str], is_compaction: bool) -> None:
        self._commits.append(Commit(len(self._commits), added, is_compaction))
        self._files += added


# --- leases


class Hold:
    """A lease that is held; it may be lost while its holder goes on."""

    def __init__(self, lease: Lease, name: str, shared: bool, task: Task | None) -> None:
        self._lease, self.name, self.shared, self._task = lease, name, shared, task
        self._is_lost = self._is_closed = False
        lease.holders.setdefault(name, []).append(self)
        if task is not None:
            task.held.append(self)

    def still_held(self) -> bool:
        return not self._is_lost

    def lose(self) -> None:
        self._is_lost = True
        self._free()

    def end(self) -> None:
        """The process has ended, and with it the connection."""
        self._free()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._task is not None:
            self._task.held.remove(self)
        self._free()
        if self._is_lost:
            raise LeaseLostError(f"the lease {self.name} was lost while it was held")

    def _free(self) -> None:
        held = self._lease.holders[self.name]
        if self in held:
            held.remove(self)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: object, error: object, traceback: object, /) -> None:
        try:
            self.close()
        except LeaseLostError:
            if error is None:
                raise


class Lease:
    """The leases of the installation."""

    def __init__(self, world: World) -> None:
        self._world, self.holders = world, {}  # type: World, dict[str, list[Hold]]

    @contextlib.contextmanager
    def hold(self, name: str, *, shared: bool = False) -> Iterator[Hold]:
        self._world.call(f"lease {name}: ask", lambda: None)
        self._world.wait(lambda: self._is_free(name, shared))
        with self._had(name, shared) as held:
            yield held

    def take(self, name: str, *, shared: bool = False) -> Hold:
        self._world.call(f"lease {name}: ask", lambda: None)
        if not self._is_free(name, shared):
            raise LeaseTakenError(f"another process holds the lease {name}")
        return self._had(name, shared)

    def _had(self, name: str, shared: bool) -> Hold:
        task = self._world.current
        held = Hold(self, name, shared, task)
        if task is not None and task.process is not None:
            task.process.closing.append(held.end)
        return held

    def _is_free(self, name: str, shared: bool) -> bool:
        return all(shared and each.shared for each in self.holders.get(name, ()))


# --- online rows


class Online:
    """The newest row of each customer, as Redis keeps it: one that is newer stays."""

    views: Mapping[str, Any] = {}

    def __init__(self, world: World, lease: Lease) -> None:
        self._world, self._lease = world, lease
        self.rows: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {"customer_state": {}, "customer_activity": {}}
        self.noted = self.server = 0
        self._copies: list[tuple[dict[str, dict[str, tuple[int, dict[str, Any]]]], int]] = []

    def fail_over(self, lacks: int | None = None) -> None:
        """Another server takes over, which lacks the last that was written: so many writes, or as many as chance has it."""
        if self._copies:
            # what that one lacks nobody has any more
            lost = min(int(self._world.random.expovariate(0.2)) if lacks is None else lacks, len(self._copies) - 1)
            self._copies = self._copies[: len(self._copies) - lost]
            rows, self.noted = self._copies[-1]
            self.rows = {view: dict(held) for view, held in rows.items()}
            self.server += 1
            self._world.struck["online: fail over", "last writes lost"] += 1

    def _copied(self) -> None:
        """Another server follows, by some writes."""
        self._copies = [*self._copies[1 - COPIES :], ({view: dict(held) for view, held in self.rows.items()}, self.noted)]

    def told(self) -> RowsTell:
        return self._world.call("online: read", lambda: RowsTell(moment_of(self.noted), f"{self.server}"))

    def tell(self, until: datetime, before: RowsTell | None) -> bool:
        def effect() -> bool:
            assert before is not None
            if self._world.random.random() < 5 * self._world.rate:
                # the worst moment: what was just written is not noted yet
                self.fail_over(self._world.random.randrange(1, 4))
            if before.server != f"{self.server}" or self.noted < microseconds(before.until):
                return False
            self.noted = max(self.noted, microseconds(until))
            self._copied()
            return True

        return self._world.call("online: note", effect)

    def push(self, view: str, rows: Sequence[dict[str, Any]], as_of: datetime, is_now: bool = True) -> int:
        if not rows:
            return 0
        at = microseconds(as_of)
        return sum(self._world.call(f"online: write {view}", lambda row=row: self._write(view, row, at, is_now)) for row in rows)  # type: ignore[misc]

    def _write(self, view: str, row: dict[str, Any], at: int, is_now: bool) -> bool:
        logger.info("online: %s as of %d: %s", row["customer_id"], at, row.get("history"))
        if is_due := self._is_due(view, row["customer_id"], at, is_now):
            self.rows[view][row["customer_id"]] = at, dict(row)
            self._copied()
        return is_due

    def _is_due(self, view: str, who: str, at: int, is_now: bool) -> bool:
        held = self.rows[view].get(who, (-1, {}))[0]
        return held <= at or (is_now and held > at + microseconds(EPOCH + AHEAD))

    def online(self, service: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        def effect() -> list[dict[str, Any]]:
            found = [self.rows["customer_state"].get(key, (None, {})) for key in keys]
            return [{**row, "customer_id": key, "customer_state_at": at} for key, (at, row) in zip(keys, found, strict=True)]

        return self._world.call("online: read", effect)

    def delete(self, view: str, keys: Sequence[str], until: datetime, is_now: bool = True) -> int:
        if not keys:
            return 0
        logger.info("%.3f process %d: online: delete %s %s", self._world.now, self._world.number, view, keys)
        return self._world.call(f"online: delete {view}", lambda: self._deleted(view, keys, microseconds(until), is_now))

    def _deleted(self, view: str, keys: Sequence[str], until: int, is_now: bool) -> int:
        count = sum(self._is_due(view, key, until, is_now) and self.rows[view].pop(key, None) is not None for key in keys)
        self._copied()
        return count


# --- the state


class Shared:
    """What all processes share."""

    def __init__(self, world: World, folder: Path, is_fenced: bool = True) -> None:
        self.world, self.folder = world, folder
        self.lease = Lease(world)
        self.online = Online(world, self.lease)
        self.tables = {name: Table(world, name, is_fenced) for name in (EVENTS, IDENTIFIERS, DEAD_LETTERS, DECISIONS)}
        self.servers: dict[str, Server] = {}


class State:
    """The installation as one process sees it."""

    place = "the simulated home"

    def __init__(self, shared: Shared, process: Process, is_served: bool) -> None:
        self.shared, self._process = shared, process
        self.settings = Settings(database="postgresql://simulated/state" if is_served else "", shared=True)
        self.lease, self.tables = shared.lease, shared.tables
        self.shop, self.root = shared.folder / "shop.json", shared.folder
        self.secrets = self

    def find(self) -> bytes:
        return b"a secret of the simulation that is long enough"

    def marked(self) -> bytes | None:
        return None

    def mark(self, mark: bytes) -> None:
        """Nothing: there is one secret."""

    def database(self, name: str, *tables: sa.Table) -> Database:
        server = self.shared.servers.get(name)
        if server is None:
            server = self.shared.servers[name] = Server(self.shared.world, name, self.shared.folder, tables)
        return Database(server, self._process)

    def free_bytes(self) -> int:
        return 1 << 40

    def check_room(self) -> None:
        """There is room."""


def later(start: datetime, world: World, process: Process) -> datetime:
    """What the clock of a process's machine says."""
    return start + timedelta(seconds=round(world.now + process.ahead, 6))
