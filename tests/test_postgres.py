"""State on a PostgreSQL server: its tables, and what holds when the server, or the way to it, fails."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from postgres import PostgresCluster, programs
from scene import NEW_YEAR, SECRET
from servers import Proxy
from sqlalchemy.exc import OperationalError

from features.people.contacts import Contacts
from features.people.hidden import Hidden
from features.people.tombstones import Tombstones
from features.people.vault import Personal, Vault
from features.state import postgres_server
from features.state.clock import fixed_clock
from features.state.disk import DamagedStateError, NoSpaceError
from features.state.home import LASTING, Home
from features.state.migrations import FOLDER, HEAD, REVISIONS
from features.state.ports import Database
from features.state.postgres import REVISIONS as REVISIONS_TABLE
from features.state.postgres import PostgresDatabase, PostgresKeeping
from features.state.postgres_lease import PostgresLease
from features.state.postgres_migrations import NewerStateError, revision_of
from features.state.postgres_moving import MOVING
from features.state.postgres_server import UnreachableDatabaseError, server_at
from features.state.settings import SettingError, Settings
from features.state.sql import BIG, put, run_many
from serving.decide.ledger import Ledger, Promise
from serving.decide.rules import Rules
from serving.intake.event_queue import Accepted, Refused, Turn
from serving.intake.inbox import Inbox
from serving.journeys.runs import Runs
from serving.privacy.keys import Audit, Keys

THINGS = sa.Table("things", sa.MetaData(), sa.Column("name", sa.Text, primary_key=True), sa.Column("size", BIG))
_ALL = sa.select(THINGS.c.name).order_by(THINGS.c.name)


class _Event:
    """One event on its way into the inbox."""

    def __init__(self, event_id: str) -> None:
        self._event_id = event_id

    def enter(self, turn: Turn) -> tuple[Sequence[Accepted], Sequence[Refused]]:
        seq, at = turn.next()
        return [Accepted(self._event_id, "hash", at, b"{}", "http", seq=seq)], ()

    def stored(self) -> None:
        """Nothing follows from it."""


class _Asked(Home):
    """A home that notes which tables its databases are to hold."""

    asked: dict[str, tuple[sa.Table, ...]]

    def database(self, name: str, *tables: sa.Table) -> Database:
        self.__dict__.setdefault("asked", {})[name] = tables
        return super().database(name, *tables)


def _everything(home: Home) -> None:
    """Use every lasting database once."""
    vault = Vault(SECRET.encode())
    Inbox(home, fixed_clock(NEW_YEAR)).close()
    Contacts(home, vault).close()
    Tombstones(home, vault).add(["email:x"], NEW_YEAR)
    Hidden(home).add(["email:x"], [], [])
    Audit(home, vault).note(NEW_YEAR, "key", "read", "customer", "done")
    assert Keys(home).listed() == []
    assert not Ledger(home).gives
    Runs(home).close()
    assert Rules(home).listed() == []


def test_the_migrations_make_what_the_code_asks_for(tmp_path: Path, postgres_url: str) -> None:
    home = _Asked(tmp_path, Settings(database=postgres_url))
    _everything(home)
    assert set(home.asked) == set(LASTING)
    known = sa.MetaData()
    for name, tables in home.asked.items():
        for table in tables:
            table.to_metadata(known, schema=f"ubiquo_{name}")
    for own in (REVISIONS_TABLE, MOVING):
        own.to_metadata(known)
    mine = {"ubiquo", *(f"ubiquo_{name}" for name in LASTING)}
    with server_at(postgres_url).engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "compare_type": True,
                "version_table_schema": "ubiquo",
                "include_name": lambda name, kind, _: kind != "schema" or name in mine,
            },
        )
        assert compare_metadata(context, known) == []
    script = ScriptDirectory(str(FOLDER))
    assert script.get_current_head() == HEAD
    assert {each.revision for each in script.walk_revisions()} == set(REVISIONS)


def test_a_database_of_a_newer_release_is_not_touched(tmp_path: Path, postgres_url: str) -> None:
    Inbox(Home(tmp_path, Settings(database=postgres_url)), fixed_clock(NEW_YEAR)).close()
    server_at.cache_clear()
    server = server_at(postgres_url)
    with contextlib.closing(server.opened()) as connection:
        connection.execute("UPDATE ubiquo.alembic_version SET version_num = 'r9999'")
    with pytest.raises(NewerStateError, match=r"revision r9999.*newer"):
        Inbox(Home(tmp_path, Settings(database=postgres_url)), fixed_clock(NEW_YEAR))
    assert revision_of(server) == "r9999"


def test_many_that_begin_at_once_make_the_tables_once(tmp_path: Path, postgres_url: str) -> None:
    failed: list[BaseException] = []

    def begin(number: int) -> None:
        # as processes do: each with a pool of its own
        server = postgres_server.PostgresServer(postgres_url)
        try:
            from features.state.postgres_migrations import bring_up

            for name, make in (("rules", bring_up), ("event_index", None)):
                PostgresDatabase(server, name, (THINGS,), PostgresKeeping(make=make)).connect()
        except BaseException as error:
            failed.append(error)
        finally:
            server.close()

    threads = [threading.Thread(target=begin, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert revision_of(server_at(postgres_url)) == HEAD


@pytest.mark.parametrize("url", ["mysql://x@host/db", "postgresql://host:port/db", "postgresql://user:hunter2@host:5432", "host:5432"])
def test_a_url_that_cannot_be_used_is_told_without_its_password(url: str) -> None:
    with pytest.raises(SettingError, match="UBIQUO_DATABASE must read postgresql://") as told:
        Settings.from_environment({"UBIQUO_DATABASE": url})
    assert "hunter2" not in str(told.value)


def test_a_server_that_is_not_there_is_named_with_the_fix(tmp_path: Path) -> None:
    home = Home(tmp_path, Settings(database="postgresql://ubiquo:hunter2@127.0.0.1:1/state"))
    database = home.database("rules", THINGS)
    with pytest.raises(UnreachableDatabaseError, match=r"127\.0\.0\.1:1, database state cannot be used.*UBIQUO_DATABASE") as told:
        database.connect()
    assert "hunter2" not in f"{told.value} {database.place} {told.value.__cause__}"


@pytest.fixture
def proxy(postgres: PostgresCluster) -> Iterator[Proxy]:
    between = Proxy(postgres.port)
    yield between
    between.close()


def _through(proxy: Proxy, url: str) -> str:
    head, _, database = url.rpartition("/")
    return f"{head.rpartition(':')[0]}:{proxy.port}/{database}"


def test_a_network_that_hangs_holds_nobody_up_for_ever(postgres_url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_at(_through(proxy, postgres_url))
    database = PostgresDatabase(server, "things", (THINGS,), PostgresKeeping(counts=True))
    for limit in ("READ_SECONDS", "WRITE_SECONDS"):
        monkeypatch.setattr(f"features.state.postgres.{limit}", 0.5)
    monkeypatch.setattr("features.state.postgres_lease.WRITE_SECONDS", 0.5)
    monkeypatch.setattr("features.state.postgres_lease.ASKED_AGAIN_SECONDS", 0.5)
    session = database.connect(wait_seconds=0.5)
    lease = PostgresLease(server)
    held = lease.take("work")

    def write() -> None:
        with session.writing() as connection:
            run_many(connection, put(THINGS).on_conflict_do_nothing(), [("a", 1)])

    def stall_within() -> None:
        with session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [("b", 1)])
            proxy.passes.clear()

    def stream() -> None:
        with session.streaming(_ALL) as rows:
            list(rows)

    calls: dict[str, Any] = {
        "read": lambda: session.read(_ALL), "stamp": database.stamp, "write": write, "stream": stream,
        "take": lambda: lease.take("other"), "hold": lambda: lease.hold("another").__enter__(),
    }  # fmt: skip
    # connections of the pool are at hand, and are used when the network hangs
    session.read(_ALL)
    write()
    lease.take("more").close()
    proxy.passes.clear()
    ended: dict[str, BaseException | None] = {}

    def call(name: str) -> None:
        try:
            calls[name]()
            ended[name] = None
        except BaseException as error:
            ended[name] = error

    threads = [threading.Thread(target=call, args=(name,), daemon=True) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {name: type(error) for name, error in ended.items()} == dict.fromkeys(calls, UnreachableDatabaseError)
    assert any("does not answer (no answer within 0.5 seconds)" in str(error) for error in ended.values())
    proxy.passes.set()
    session.read(_ALL)
    with pytest.raises(UnreachableDatabaseError):
        stall_within()
    assert not held.still_held()
    # no connection of the pool is left: one that is made anew hangs as well
    server.close()
    with pytest.raises(UnreachableDatabaseError, match="cannot be used"):
        session.read(_ALL)
    proxy.passes.set()
    proxy.cut()
    # by itself again; what the caller was not told to be stored may be there or not, but whole
    write_again = {name for (name,) in session.read(_ALL)}
    assert write_again <= {"a", "b"}
    server.close()


def test_what_takes_long_on_the_server_is_waited_for(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.state.postgres.READ_SECONDS", 0.3)
    session = PostgresDatabase(server_at(postgres_url), "things", (THINGS,), PostgresKeeping()).connect()
    session.read(_ALL)
    assert session.read(sa.text("SELECT 1 FROM pg_sleep(1.5)")) == [(1,)]
    with pytest.raises(UnreachableDatabaseError, match=r"no answer within 0\.3 seconds"):
        session.read(sa.text("SELECT 1 FROM pg_sleep(30)"))


def test_a_connection_that_was_cut_is_replaced(postgres_url: str, proxy: Proxy) -> None:
    server = server_at(_through(proxy, postgres_url))
    session = PostgresDatabase(server, "things", (THINGS,), PostgresKeeping()).connect()
    with session.writing() as connection:
        run_many(connection, sa.insert(THINGS), [("a", 1)])
    proxy.cut()
    assert session.read(_ALL) == [("a",)]
    proxy.cut()
    with session.writing() as connection:
        run_many(connection, sa.insert(THINGS), [("b", 1)])
    proxy.cut()
    with session.streaming(_ALL) as rows:
        assert list(rows) == [("a",), ("b",)]

    def cut_within() -> None:
        with session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [("c", 1)])
            proxy.cut()
            run_many(connection, sa.insert(THINGS), [("d", 1)])

    with pytest.raises(UnreachableDatabaseError, match="does not answer"):
        cut_within()
    assert session.read(_ALL) == [("a",), ("b",)], "a transaction is never begun again behind its user's back"
    server.close()


def test_who_writes_is_waited_for_only_so_long(postgres_url: str) -> None:
    database = PostgresDatabase(server_at(postgres_url), "things", (THINGS,), PostgresKeeping())
    one, other = database.connect(), database.connect(wait_seconds=0.2)

    def late() -> None:
        with other.writing():
            pytest.fail("two write at a time")

    with one.writing() as connection:
        connection.execute(sa.insert(THINGS).values(name="a"))
        with pytest.raises(OperationalError, match="lock timeout"):
            late()
    with other.writing() as connection:
        assert connection.execute(_ALL).fetchall() == [("a",)]


def test_a_failure_that_is_passed_over_is_told(postgres_url: str) -> None:
    session = PostgresDatabase(server_at(postgres_url), "things", (THINGS,), PostgresKeeping()).connect()

    def pass_over() -> None:
        with session.writing() as connection:
            connection.execute(sa.insert(THINGS).values(name="a"))
            with contextlib.suppress(sa.exc.IntegrityError):
                connection.execute(sa.insert(THINGS).values(name="a"))

    with pytest.raises(RuntimeError, match="nothing of it is stored"):
        pass_over()
    assert session.read(_ALL) == []


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [("53100", NoSpaceError, "make room there"), ("XX001", DamagedStateError, "from a backup"), ("57014", OperationalError, "")],
)
def test_what_the_server_says_is_told_with_what_to_do(postgres_url: str, code: str, kind: type[Exception], told: str) -> None:
    session = PostgresDatabase(server_at(postgres_url), "things", (THINGS,), PostgresKeeping()).connect()

    def fail() -> None:
        with session.writing() as connection:
            connection.execute(sa.insert(THINGS).values(name="a"))
            connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{code}'; END $$")

    with pytest.raises(kind, match=f"so it is.*{told}"):
        fail()
    assert session.read(_ALL) == []


def test_a_role_that_may_make_schemas_is_enough(postgres: PostgresCluster, postgres_url: str, tmp_path: Path) -> None:
    name = postgres_url.rpartition("/")[2]
    with contextlib.closing(server_at(postgres_url).opened()) as connection:
        connection.execute(f"CREATE ROLE plain_{name} LOGIN")
        connection.execute(f"GRANT CREATE ON DATABASE {name} TO plain_{name}")
    url = postgres_url.replace("ubiquo@", f"plain_{name}@")
    home = Home(tmp_path, Settings(database=url, secret=SECRET))
    _everything(home)
    contacts = Contacts(home, Vault(SECRET.encode()))
    contacts.remember([(Personal("email:x", "first_name", "Ada"), NEW_YEAR)])
    # takes rows out, and out of the table's own file
    assert contacts.erase(["email:x"]) == 1
    ledger = Ledger(home)
    assert ledger.reserve(Promise(["c"], "d", "email", ["o"], NEW_YEAR, timedelta(days=1), {}, timedelta(days=1)))
    ledger.sync()
    assert home.database("event_index", THINGS).connect().read(_ALL) == []
    assert home.database("event_index", THINGS).stamp() is not None
    assert home.database("rules").stamp() is not None
    held = home.lease.take("work")
    assert held.still_held()
    held.close()
    server_at(url).close()
    with contextlib.closing(server_at(postgres_url).opened()) as connection:
        connection.execute(f"DROP OWNED BY plain_{name}")
        connection.execute(f"DROP ROLE plain_{name}")


def test_more_readers_than_connections_wait_their_turn(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_server, "KEPT_CONNECTIONS", 1)
    monkeypatch.setattr(postgres_server, "MOST_CONNECTIONS", 2)
    monkeypatch.setattr(postgres_server, "WRITE_SECONDS", 1.0)
    server = postgres_server.PostgresServer(postgres_url)
    session = PostgresDatabase(server, "things", (THINGS,), PostgresKeeping()).connect()
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda _: session.read(_ALL), range(200))) == [[]] * 200
        with session.streaming(_ALL), session.streaming(_ALL), pytest.raises(UnreachableDatabaseError, match="2 connections"):
            session.read(_ALL)
    assert session.read(_ALL) == []
    server.close()


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[PostgresCluster]:
    """A server that may be killed."""
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    cluster = PostgresCluster(folder)
    yield cluster
    cluster.stop()


def test_a_server_that_is_killed_keeps_what_was_committed_and_nothing_half(own_cluster: PostgresCluster, tmp_path: Path) -> None:
    url = own_cluster.new_database()
    server = server_at(url)
    database = PostgresDatabase(server, "things", (THINGS,), PostgresKeeping())
    session = database.connect()
    lease = PostgresLease(server)
    inbox = Inbox(Home(tmp_path, Settings(database=url)), fixed_clock(NEW_YEAR))

    def submit(event_id: str) -> Future[None]:
        done: Future[None] = Future()
        inbox.submit(_Event(event_id), done)
        return done

    done = submit("e1")
    done.result(20)
    with session.writing() as connection:
        run_many(connection, sa.insert(THINGS), [(f"{k:03}", k) for k in range(100)])
    held = lease.take("work")

    def killed_within() -> None:
        with session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [("half", 1)])
            own_cluster.kill()
            run_many(connection, sa.insert(THINGS), [("other half", 1)])

    with pytest.raises(UnreachableDatabaseError):
        killed_within()
    with pytest.raises(UnreachableDatabaseError, match=r"cannot be used.*see that it runs"):
        session.read(_ALL)
    assert not held.still_held()
    lost = submit("e2")
    assert isinstance(lost.exception(20), UnreachableDatabaseError)
    own_cluster.start()
    assert session.read(sa.select(sa.func.count()).select_from(THINGS)) == [(100,)]
    again = submit("e3")
    again.result(20)
    assert [each.event_id for each in inbox.waiting()] == ["e1", "e3"]
    inbox.close()
    # between transactions: nobody was using the server
    own_cluster.kill()
    own_cluster.start()
    with session.writing() as connection:
        run_many(connection, sa.insert(THINGS), [("after", 1)])
    assert session.read(_ALL)[-1] == ("after",)
    lease.take("work").close()
    server.close()


def test_what_is_stored_soon_outlives_the_server_once_it_is_synced(own_cluster: PostgresCluster) -> None:
    server = server_at(own_cluster.new_database())
    database = PostgresDatabase(server, "things", (THINGS,), PostgresKeeping(is_durable=False))
    with database.begin() as connection:
        run_many(connection, sa.insert(THINGS), [("a", 1)])
    database.sync()
    own_cluster.kill()
    own_cluster.start()
    assert database.connect().read(_ALL) == [("a",)]
    server.close()


def test_a_process_that_was_forked_uses_connections_of_its_own(postgres_url: str) -> None:
    import os

    session = PostgresDatabase(server_at(postgres_url), "things", (THINGS,), PostgresKeeping()).connect()
    lease = PostgresLease(server_at(postgres_url))
    held = lease.take("work")
    session.read(_ALL)
    pid = os.fork()
    if pid == 0:
        ended = 1
        try:
            for k in range(20):
                with session.writing() as connection:
                    run_many(connection, sa.insert(THINGS), [(f"child {k}", 1)])
            lease.take("other").close()
            ended = 0
        finally:
            os._exit(ended)
    for k in range(20):
        with session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [(f"parent {k}", 1)])
    assert os.waitpid(pid, 0)[1] == 0
    assert len(session.read(_ALL)) == 40
    assert held.still_held()
    held.close()


def test_a_read_is_one_message_and_a_transaction_one_more(postgres_url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    pass_on = Proxy._pass_on

    def counting(self: Proxy, one: socket.socket, other: socket.socket) -> None:
        from_server = one.getpeername()[1] == self._target

        class Counted:
            def recv(self, size: int) -> bytes:
                content = one.recv(size)
                if from_server and content:
                    said.append(len(content))
                return content

        pass_on(self, Counted(), other)  # type: ignore[arg-type]

    monkeypatch.setattr(Proxy, "_pass_on", counting)
    server = server_at(_through(proxy, postgres_url))
    session = PostgresDatabase(server, "things", (THINGS,), PostgresKeeping(counts=True)).connect()
    insert = sa.insert(THINGS)

    def answers(call: Any) -> int:
        before = len(said)
        call()
        time.sleep(0.05)
        return len(said) - before

    def write() -> None:
        with session.writing() as connection:
            connection.execute(insert, {"name": f"{time.monotonic_ns()}", "size": 1})

    # a statement that is asked often is prepared once
    for _ in range(12):
        session.read(_ALL)
        write()
    assert answers(lambda: session.read(_ALL)) == 1
    assert answers(write) == 3, "it begins, writes and ends"
    server.close()
