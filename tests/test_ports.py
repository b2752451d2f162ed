"""What every engine behind a port must do; each engine has a class of its own here that says which it is."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from lakes import Lake
from scene import NEW_YEAR, ROOT, SECRET, Brought, surroundings

from features.state.clock import Clock, fixed_clock
from features.state.disk import DamagedStateError, NoSpaceError
from features.state.file_lease import FileLease
from features.state.home import Home
from features.state.ports import Database, Lease, LeaseLostError, LeaseTakenError, MovedOnError, Secrets, State, Table
from features.state.postgres import PostgresDatabase, PostgresKeeping
from features.state.postgres_lease import PostgresLease
from features.state.postgres_server import server_at
from features.state.settings import Settings
from features.state.sql import BIG, put, run_many
from serving.intake.event_queue import TICK, Accepted, ClocksApartError, EventQueue, Progress, Refused, Turn
from serving.intake.inbox import Inbox

THINGS = sa.Table(
    "things", sa.MetaData(), sa.Column("name", sa.Text, primary_key=True), sa.Column("size", BIG), sa.Column("content", sa.LargeBinary)
)


MIDNIGHT = fixed_clock(NEW_YEAR)


class LeaseContract:
    """Two leases of one installation, as two processes have them."""

    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Lease, Lease]:
        raise NotImplementedError

    def test_one_alone_or_many_that_share(self, pair: tuple[Lease, Lease]) -> None:
        one, other = pair
        with one.take("work"):
            for shared in (False, True):
                with pytest.raises(LeaseTakenError, match="work"):
                    other.take("work", shared=shared)
            other.take("something else").close()
        with one.take("work", shared=True), other.take("work", shared=True), pytest.raises(LeaseTakenError):
            one.take("work")
        other.take("work").close()

    def test_who_holds_waits_their_turn(self, pair: tuple[Lease, Lease]) -> None:
        one, other = pair
        order: list[str] = []
        held = one.take("work")

        def second() -> None:
            with other.hold("work"):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first")
        held.close()
        thread.join(10)
        assert order == ["first", "second"]

    def test_it_is_let_go_where_the_work_fails(self, pair: tuple[Lease, Lease]) -> None:
        one, other = pair
        with pytest.raises(ZeroDivisionError), one.hold("work"):
            _ = 1 / 0
        other.take("work").close()


class TestFileLease(LeaseContract):
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Lease, Lease]:
        return FileLease(tmp_path), FileLease(tmp_path)

    def test_what_a_killed_process_held_is_free(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys; from pathlib import Path; from features.state.file_lease import FileLease\n"
            "held = FileLease(Path(sys.argv[1])).take('work'); print('held', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=surroundings())
        assert done.stdout == "held\n"
        FileLease(tmp_path).take("work").close()


class TestPostgresLease(LeaseContract):
    @pytest.fixture
    def pair(self, postgres_url: str) -> tuple[Lease, Lease]:
        return PostgresLease(server_at(postgres_url)), PostgresLease(server_at(postgres_url))

    def test_what_a_killed_process_held_is_free(self, postgres_url: str) -> None:
        code = (
            "import os, signal, sys; from features.state.postgres_lease import *; from features.state.postgres_server import server_at\n"
            "held = PostgresLease(server_at(sys.argv[1])).take('work'); print('held', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
        )
        done = subprocess.run([sys.executable, "-c", code, postgres_url], cwd=ROOT, capture_output=True, text=True, env=surroundings())
        assert done.stdout == "held\n"
        with PostgresLease(server_at(postgres_url)).hold("work"):
            pass

    def test_one_that_was_lost_is_told(self, postgres_url: str) -> None:
        lease = PostgresLease(server_at(postgres_url))
        cut = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"

        def lose() -> None:
            with lease.hold("work") as held:
                assert held.still_held()
                with contextlib.closing(server_at(postgres_url).opened()) as other:
                    other.execute(cut)
                assert not held.still_held()
                lease.take("work").close()

        with pytest.raises(LeaseLostError, match="work was lost"):
            lose()

        def fail() -> None:
            with lease.hold("work"), contextlib.closing(server_at(postgres_url).opened()) as other:
                other.execute(cut)
                _ = 1 / 0

        with pytest.raises(ZeroDivisionError):
            fail()
        # what is kept for the next lease was lost as well
        held = lease.take("work")
        held.close()
        with contextlib.closing(server_at(postgres_url).opened()) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        lease.take("work").close()


class SecretsContract:
    @pytest.fixture
    def secrets(self, tmp_path: Path) -> Secrets:
        raise NotImplementedError

    def test_it_is_made_once(self, secrets: Secrets) -> None:
        assert secrets.find() is None
        made = secrets.make()
        assert len(made) >= 32
        assert secrets.make() == secrets.find() == made

    def test_the_mark_is_kept(self, secrets: Secrets) -> None:
        assert secrets.marked() is None
        secrets.mark(b"a digest")
        assert secrets.marked() == b"a digest"


class TestSecretsBesidePostgres(SecretsContract):
    @pytest.fixture
    def secrets(self, tmp_path: Path, postgres_url: str) -> Secrets:
        return Home(tmp_path, Settings(database=postgres_url)).secrets


class TestFileSecrets(SecretsContract):
    @pytest.fixture
    def secrets(self, tmp_path: Path) -> Secrets:
        return Home(tmp_path, Settings()).secrets

    def test_one_that_is_given_is_used_and_not_stored(self, tmp_path: Path) -> None:
        secrets = Home(tmp_path, Settings(secret=SECRET)).secrets
        assert secrets.find() == SECRET.encode()
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="32 characters"):
            Home(tmp_path, Settings(secret="short")).secrets.find()


class TableContract:
    @pytest.fixture
    def table(self, tmp_path: Path) -> Table:
        raise NotImplementedError

    @staticmethod
    def rows(*names: str) -> pa.Table:
        return pa.table({"known_at": pa.array([NEW_YEAR] * len(names), pa.timestamp("us", tz="UTC")), "who": pa.array(names, pa.string())})

    @staticmethod
    def held(table: Table) -> list[str]:
        found = table.read(["who"])
        return [] if found is None else sorted(found["who"].to_pylist())

    @pytest.fixture
    def other(self, tmp_path: Path) -> Table:
        """The same table, as another process has it."""
        raise NotImplementedError

    def test_before_the_first_row_there_is_nothing(self, table: Table) -> None:
        assert (table.exists, table.version(), table.files(), table.read()) == (False, -1, [], None)
        assert table.erase("who", ["ada.lovelace"]).rows == table.blank("who", ["ada.lovelace"]).rows == 0
        table.maintain()
        table.recover()
        assert table.repair() == []

    def test_each_append_is_a_version(self, table: Table) -> None:
        table.append(self.rows("ada.lovelace"))
        first = table.version()
        table.append(self.rows("bob.builder", "eve.online"))
        assert table.exists
        assert table.version() > first
        assert self.held(table) == ["ada.lovelace", "bob.builder", "eve.online"]
        assert table.commit_digest(first) != table.commit_digest(table.version()) is not None
        news = table.appended_since(first)
        assert news is not None
        assert set(news) < set(table.files())

    def test_what_is_overwritten_is_gone(self, table: Table) -> None:
        table.append(self.rows("ada.lovelace"))
        table.overwrite(self.rows("bob.builder"))
        assert self.held(table) == ["bob.builder"]

    def test_what_is_erased_is_in_no_version(self, table: Table) -> None:
        for name in ("ada.lovelace", "bob.builder", "ada.lovelace"):
            table.append(self.rows(name))
        before = table.version()
        assert table.erase("who", ["ada.lovelace", "nobody"]).rows == 2
        assert self.held(table) == ["bob.builder"]
        assert table.appended_since(before) is None, "rows were taken out"
        assert self.bytes_of(table).count(b"ada.lovelace") == 0

    def test_what_is_blanked_keeps_its_row(self, table: Table) -> None:
        table.append(self.rows("ada.lovelace", "bob.builder"))
        assert table.blank("who", ["ada.lovelace"]).rows == 1
        found = table.read()
        assert found is not None
        assert sorted(found["who"].to_pylist(), key=str) == [None, "bob.builder"]
        assert self.bytes_of(table).count(b"ada.lovelace") == 0

    def test_times_to_come_are_lowered(self, table: Table) -> None:
        table.append(self.rows("ada.lovelace"))
        assert table.lower(["known_at"], NEW_YEAR - timedelta(days=1)) == 1
        assert table.lower(["known_at"], NEW_YEAR) == 0

    def test_two_writers_lose_no_row_of_each_other(self, table: Table, other: Table) -> None:
        table.append(self.rows("ada.lovelace"))
        begin = threading.Barrier(2)

        def write(mine: Table, name: str) -> None:
            begin.wait()
            for k in range(4):
                mine.append(self.rows(f"{name}.{k}"))

        threads = [threading.Thread(target=write, args=each) for each in ((table, "one"), (other, "two"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self.held(table) == self.held(other) == ["ada.lovelace", *(f"{name}.{k}" for name in ("one", "two") for k in range(4))]

    def test_of_two_who_saw_the_same_version_one_writes(self, table: Table, other: Table) -> None:
        assert table.append(self.rows("ada.lovelace"), expected_version=-1) == 0
        for seen in (-1, 1, 7):
            with pytest.raises(MovedOnError, match="version"):
                other.append(self.rows("eve.online"), expected_version=seen)
        for _ in range(3):
            seen, begin, told = table.version(), threading.Barrier(2), []

            def write(mine: Table, name: str, seen: int = seen, begin: threading.Barrier = begin, told: list[Any] = told) -> None:
                begin.wait()
                try:
                    told.append(mine.append(self.rows(name), expected_version=seen))
                except MovedOnError as error:
                    told.append(error)

            threads = [threading.Thread(target=write, args=each) for each in ((table, "one"), (other, "two"))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [each for each in told if not isinstance(each, MovedOnError)] == [seen + 1]
            assert table.version() == other.version() == seen + 1
        assert len(self.held(table)) == 4

    def test_of_many_who_make_it_at_once_one_does(self, table: Table, other: Table) -> None:
        begin, told = threading.Barrier(6), []

        def make(mine: Table, name: str) -> None:
            begin.wait()
            with contextlib.suppress(MovedOnError):
                told.append((name, mine.append(self.rows(name), expected_version=-1)))

        threads = [threading.Thread(target=make, args=((table, other)[k % 2], f"maker.{k}")) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [(name, version)] = told
        assert (version, table.version()) == (0, 0)
        assert self.held(table) == self.held(other) == [name]

    def test_nothing_is_taken_out_of_what_was_not_seen(self, table: Table, other: Table) -> None:
        seen = table.append(self.rows("ada.lovelace", "bob.builder"))
        other.append(self.rows("eve.online"))
        for change in (table.erase, table.blank):
            with pytest.raises(MovedOnError):
                change("who", ["ada.lovelace"], expected_version=seen)
        with pytest.raises(MovedOnError):
            table.overwrite(self.rows("nobody"), expected_version=seen)
        assert self.held(other) == ["ada.lovelace", "bob.builder", "eve.online"]
        assert table.erase("who", ["ada.lovelace"], expected_version=table.version()).rows == 1
        assert self.held(other) == ["bob.builder", "eve.online"]

    def test_who_takes_rows_out_knows_which_version_that_made(self, table: Table, other: Table) -> None:
        seen = table.append(self.rows("ada.lovelace", "bob.builder", "eve.online"))
        # one after the other, each on what the one before has made
        for change, who, rows in (
            (table.erase, "ada.lovelace", 1), (table.erase, "nobody", 0), (table.blank, "bob.builder", 1), (table.blank, "nobody", 0),
        ):  # fmt: skip
            changed, seen = change("who", [who], expected_version=seen)
            assert changed == rows
        assert table.erase("who", [], expected_version=seen) == table.blank("who", [], expected_version=seen) == (0, seen)
        assert seen == table.version()
        other.append(self.rows("zoe"))
        added = table.appended_since(seen)
        assert added is not None
        assert pq.read_table(added)["who"].to_pylist() == ["zoe"]

    def test_many_small_files_become_few(self, table: Table, other: Table) -> None:
        names = [f"customer.{k:02}" for k in range(20)]
        for name in names:
            table.append(self.rows(name))
        known = other.version()
        table.maintain(0.0)
        assert len(table.files()) < 20
        assert self.held(other) == names
        assert other.appended_since(known) == [], "a compaction is no news"
        other.append(self.rows("zoe"))
        assert self.held(table) == [*names, "zoe"]
        assert table.keep_newest("known_at", 10) is True
        assert table.keep_newest("known_at", 10**9) is False

    @staticmethod
    def bytes_of(table: Table) -> bytes:
        """All that is stored of a table, whichever version needs it."""
        raise NotImplementedError


class TestDeltaFolder(TableContract):
    @pytest.fixture
    def table(self, tmp_path: Path) -> Table:
        return Home(tmp_path, Settings()).tables["events"]

    @pytest.fixture
    def other(self, tmp_path: Path) -> Table:
        return Home(tmp_path, Settings()).tables["events"]

    @staticmethod
    def bytes_of(table: Table) -> bytes:
        folder = Path(table.files()[0]).parent
        return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


class TestLakeTable(TableContract):
    """``table`` and ``other`` are those of two machines."""

    @pytest.fixture
    def table(self, tmp_path: Path, lake: Lake) -> Table:
        return Home(tmp_path / "one", Settings(lake=lake.address)).tables["events"]

    @pytest.fixture
    def other(self, tmp_path: Path, lake: Lake) -> Table:
        return Home(tmp_path / "other", Settings(lake=lake.address)).tables["events"]

    @staticmethod
    def bytes_of(table: Table) -> bytes:
        copies = b"".join(path.read_bytes() for path in Path(table.files()[0]).parent.iterdir())
        bucket = table.place.removeprefix("s3://").partition("/")[0]
        return copies + b"".join(Lake(os.environ["AWS_ENDPOINT_URL"], bucket).content().values())


class DatabaseContract:
    @pytest.fixture
    def database(self, tmp_path: Path) -> Database:
        raise NotImplementedError

    def test_it_is_made_at_the_first_use(self, database: Database) -> None:
        assert not database.exists
        assert database.stamp() is None
        with database.begin() as connection:
            connection.execute(sa.insert(THINGS).values(name="a", size=2**53, content=b"\0"))
        assert database.exists
        session = database.connect()
        assert session.read(sa.select(THINGS)) == [("a", 2**53, b"\0")]
        session.close()

    def test_a_transaction_that_fails_leaves_nothing(self, database: Database) -> None:
        session = database.connect()

        def broken() -> None:
            with session.writing() as connection:
                run_many(connection, sa.insert(THINGS), [("a", 1, None), ("b", 2, None)])
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            broken()
        assert session.read(sa.select(THINGS)) == []
        with pytest.raises(sa.exc.IntegrityError), session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [("a", 1, None), ("a", 2, None)])
        assert session.read(sa.select(THINGS)) == []
        session.close()

    def test_what_is_there_stays_or_gives_way_as_told(self, database: Database) -> None:
        session = database.connect()
        newest = put(THINGS)
        newest = newest.on_conflict_do_update(
            index_elements=[THINGS.c.name], set_={"size": newest.excluded.size}, where=newest.excluded.size >= THINGS.c.size
        )
        for statement, size, stays in ((put(THINGS).on_conflict_do_nothing(), 5, 5), (newest, 3, 5), (newest, 7, 7)):
            with session.writing() as connection:
                run_many(connection, statement, [("a", size, None)])
            assert session.read(sa.select(THINGS.c.size)) == [(stays,)]
        assert session.read(sa.select(THINGS.c.name).where(THINGS.c.size == sa.bindparam("size")), {"size": 7}) == [("a",)]
        session.close()

    def test_it_is_told_how_many_rows_were_put_in_and_taken_out(self, database: Database) -> None:
        with database.begin() as connection:
            once = put(THINGS).on_conflict_do_nothing()
            assert [connection.execute(once, {"name": name, "size": 1}).rowcount for name in "aba"] == [1, 1, 0]
            assert connection.execute(sa.update(THINGS).values(size=2)).rowcount == 2
            assert connection.execute(sa.delete(THINGS).where(THINGS.c.size == 1)).rowcount == 0
            assert connection.execute(sa.delete(THINGS)).rowcount == 2

    def test_any_text_can_be_asked_for(self, database: Database) -> None:
        session = database.connect()
        with session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [("a", 1, None), ("é%s:x", 2, b"\0")])
        query = sa.select(THINGS.c.size).where(THINGS.c.name.in_(sa.bindparam("names", expanding=True)))
        assert session.read(query, {"names": ["a\0b", "é%s:x", "\0", "\\"]}) == [(2,)]
        assert session.read(sa.select(THINGS.c.size).where(THINGS.c.name == sa.bindparam("name")), {"name": "a\0"}) == []
        session.close()

    def test_another_connection_sees_what_is_committed_and_that_something_changed(self, database: Database) -> None:
        one, other = database.connect(), database.connect()
        with one.writing() as connection:
            run_many(connection, sa.insert(THINGS), [("a", 1, None)])
            assert other.read(sa.select(THINGS)) == []
        assert other.read(sa.select(THINGS.c.name)) == [("a",)]
        one.close()
        other.close()
        before = database.stamp()
        with database.begin() as connection:
            run_many(connection, sa.insert(THINGS), [("b", 1, b"more" * 2_000)])
        assert database.stamp() != before

    def test_many_threads_of_one_connection_lose_nothing(self, database: Database) -> None:
        session = database.connect()

        def write(first: int) -> None:
            for k in range(20):
                with session.writing() as connection:
                    run_many(connection, sa.insert(THINGS), [(f"{first}-{k}", k, None)])
                assert session.read(sa.select(sa.func.count()).select_from(THINGS))

        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.read(sa.select(sa.func.count()).select_from(THINGS)) == [(80,)]
        session.close()

    def test_rows_come_one_by_one(self, database: Database) -> None:
        session = database.connect()
        with session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [(f"{k:03}", k, None) for k in range(500)])
        with session.streaming(sa.select(THINGS.c.size).order_by(THINGS.c.name)) as rows:
            assert [next(rows)[0], next(rows)[0]] == [0, 1]
        with session.writing() as connection:
            connection.execute(sa.delete(THINGS))
        session.close()

    def test_what_is_scrubbed_leaves_no_trace(self, database: Database) -> None:
        session = database.connect()
        with session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [("a", 1, b"personal" * 100), ("b", 1, None)])
        with session.writing() as connection:
            connection.execute(sa.delete(THINGS).where(THINGS.c.name == "a"))
        session.scrub()
        assert b"personal" not in self.bytes_of(database)
        session.close()

    def test_a_scrub_that_fails_stops_nothing(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        session = database.connect()
        with monkeypatch.context() as patch:
            self.break_scrub(session, patch)
            with pytest.raises(sa.exc.OperationalError):
                session.scrub()
        with session.writing() as connection:
            run_many(connection, sa.insert(THINGS), [("a", 1, None)])
        assert session.read(sa.select(THINGS.c.name)) == [("a",)]
        session.close()

    def test_who_writes_does_not_read_past_their_own_transaction(self, database: Database) -> None:
        session = database.connect()

        def both() -> None:
            with session.writing() as connection:
                run_many(connection, sa.insert(THINGS), [("a", 1, None)])
                session.read(sa.select(THINGS))

        with pytest.raises(RuntimeError, match="a transaction is open"):
            both()
        assert session.read(sa.select(THINGS)) == []
        session.close()

    def test_who_only_reads_makes_and_changes_nothing(self, database: Database) -> None:
        with database.begin() as connection:
            run_many(connection, sa.insert(THINGS), [("a", 1, None)])
        session = database.connect(read_only=True)
        assert session.read(sa.select(THINGS.c.name)) == [("a",)]

        def write() -> None:
            with session.writing() as connection:
                connection.execute(sa.delete(THINGS))

        with pytest.raises((OSError, sa.exc.OperationalError)):
            write()
        session.close()
        self.empty(database)
        session = database.connect(read_only=True)
        with pytest.raises(sa.exc.OperationalError):
            session.read(sa.select(THINGS))
        session.close()

    def test_discarded_it_is_made_anew(self, database: Database) -> None:
        with database.begin() as connection:
            run_many(connection, sa.insert(THINGS), [("a", 1, None)])
        before = database.identity()
        database.discard()
        assert (database.exists, database.identity()) == (False, None)
        session = database.connect()
        assert session.read(sa.select(THINGS)) == []
        assert before is not None
        session.close()

    @staticmethod
    def bytes_of(database: Database) -> bytes:
        """All that is stored of a database."""
        raise NotImplementedError

    @staticmethod
    def break_scrub(session: Any, patch: pytest.MonkeyPatch) -> None:
        """Let a scrub fail after it has begun."""
        raise NotImplementedError

    @staticmethod
    def empty(database: Database) -> None:
        """Let nothing be left of the tables, as a failed restore does."""
        raise NotImplementedError


class TestSQLiteFile(DatabaseContract):
    @pytest.fixture(params=["contacts", "hidden", "event_index", "online"])
    def database(self, tmp_path: Path, request: pytest.FixtureRequest) -> Database:
        return Home(tmp_path, Settings()).database(request.param, THINGS)

    @staticmethod
    def bytes_of(database: Database) -> bytes:
        path = Path(database.place)
        return b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))

    @staticmethod
    def break_scrub(session: Any, patch: pytest.MonkeyPatch) -> None:
        run = session._connection.exec_driver_sql

        def full(command: str) -> Any:
            run("SELECT 1").fetchall()
            return run("PRAGMA wal_checkpoint(NONSENSE") if command.startswith("PRAGMA") else run(command)

        patch.setattr(session._connection, "exec_driver_sql", full)

    @staticmethod
    def empty(database: Database) -> None:
        path = Path(database.place)
        for each in path.parent.glob(f"{path.name}-*"):
            each.unlink()
        path.write_bytes(b"")

    def test_only_its_owner_may_read_it(self, database: Database) -> None:
        Path(database.place).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        database.connect().close()
        assert Path(database.place).stat().st_mode & 0o077 == 0

    def test_a_file_that_is_none_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "contacts.db").write_bytes(b"this is no database, though it is long enough to be taken for the head of one" * 20)
        with pytest.raises(DamagedStateError, match=r"contacts\.db is damaged"):
            Home(tmp_path, Settings()).database("contacts", THINGS).connect()


class TestPostgresDatabase(DatabaseContract):
    @pytest.fixture(params=["durable", "soon", "counted"])
    def database(self, postgres_url: str, request: pytest.FixtureRequest) -> Database:
        keeping = {"durable": PostgresKeeping(), "soon": PostgresKeeping(is_durable=False), "counted": PostgresKeeping(counts=True)}
        return PostgresDatabase(server_at(postgres_url), "things", (THINGS,), keeping[request.param])

    @staticmethod
    def bytes_of(database: Database) -> bytes:
        """What lies in the table's own file; the server's write-ahead log is another matter."""
        assert isinstance(database, PostgresDatabase)
        with contextlib.closing(database.server.opened(60.0)) as connection:
            connection.execute("CHECKPOINT")
            schema = database.place.rpartition(" ")[2]
            found = connection.execute(f"SELECT pg_read_binary_file(pg_relation_filepath('{schema}.things'))").fetchall()
        return bytes(found[0][0])

    @staticmethod
    def break_scrub(session: Any, patch: pytest.MonkeyPatch) -> None:
        tidy = session._tidy

        def broken(connection: sa.Connection, table: str, rewrites: bool) -> None:
            tidy(connection, table, rewrites)
            connection.exec_driver_sql("BEGIN; SET LOCAL statement_timeout = 10; SELECT pg_sleep(1)")

        patch.setattr(session, "_tidy", broken)

    @staticmethod
    def empty(database: Database) -> None:
        with database.begin() as connection:
            THINGS.drop(connection)

    def test_the_stamp_of_one_that_is_counted_stays_the_same_while_nothing_changes(self, postgres_url: str) -> None:
        database = PostgresDatabase(server_at(postgres_url), "things", (THINGS,), PostgresKeeping(counts=True))
        database.connect()
        before = database.stamp()
        with database.begin() as connection:
            assert connection.execute(sa.select(THINGS)).fetchall() == []
        assert database.stamp() == before
        with database.begin() as connection:
            connection.execute(sa.insert(THINGS).values(name="a"))
        changed = database.stamp()
        assert changed != before
        database.discard()
        database.connect()
        assert database.stamp() not in (before, changed, None)


class TestPostgresHome(TestPostgresDatabase):
    """A database of a home whose tables follow from elsewhere: those that last are made by migrations."""

    @pytest.fixture(params=["event_index"])
    def database(self, tmp_path: Path, postgres_url: str, request: pytest.FixtureRequest) -> Database:
        return Home(tmp_path, Settings(database=postgres_url)).database(request.param, THINGS)


class EventQueueContract:
    @pytest.fixture
    def state(self, tmp_path: Path) -> State:
        raise NotImplementedError

    @staticmethod
    def opened(state: State, clock: Clock = MIDNIGHT) -> EventQueue:
        raise NotImplementedError

    @staticmethod
    def letter(second: int, size: int = 2) -> Accepted:
        return Accepted(f"e{second}", "hash", NEW_YEAR + timedelta(seconds=second), b"x" * size, "http", b"token" if second % 2 else None)

    def test_in_order_and_once_across_a_restart(self, state: State) -> None:
        queue = self.opened(state)
        assert queue.is_open
        assert queue.last_received() is None
        letters, refused = [self.letter(n) for n in range(5)], [Refused(NEW_YEAR + timedelta(seconds=9), "http", b"why")]
        done = [Future[None]() for _ in range(3)]
        brought = Brought(letters[:3]), Brought(letters[3:], refused), Brought()
        for each, future in zip(brought, done, strict=True):
            queue.submit(each, future)
        for future in done:
            future.result(10)
        assert all(each.is_stored for each in brought)
        letters = [*brought[0].entered, *brought[1].entered]
        queue.close()
        assert not queue.is_open
        again = self.opened(state)
        assert again.waiting() == letters
        assert again.waiting(2) == letters[:2]
        assert again.waiting(-1, after=letters[1].seq) == letters[2:]
        assert again.refused() == [refused[0]._replace(seq=6)]
        assert again.count_refused() == 1
        assert again.last_received() == refused[0].received_at
        again.drained(letters[:2], again.refused())
        assert (again.waiting(), again.refused(), again.last_received()) == (letters[2:], [], letters[4].received_at)
        again.scrub()
        again.close()

    def test_what_cannot_be_stored_is_told_and_keeps_nothing_else_back(self, state: State) -> None:
        queue = self.opened(state)

        class Broken(Brought):
            def enter(self, turn: Turn) -> tuple[Sequence[Accepted], Sequence[Refused]]:
                raise ZeroDivisionError

        class Again(Brought):
            def enter(self, turn: Turn) -> tuple[Sequence[Accepted], Sequence[Refused]]:
                return self._letters, ()

        first, broken, twice, later = (Future[None]() for _ in range(4))
        queue.submit(Brought([self.letter(1)]), first)
        queue.submit(Broken(), broken)
        first.result(10)
        assert isinstance(broken.exception(10), ZeroDivisionError)
        again = Again([self.letter(1)._replace(seq=1)])
        turned = Brought()
        turned.enter = lambda turn: (turn.next(), again.enter(turn))[1]  # type: ignore[method-assign]
        queue.submit(turned, twice)
        assert twice.exception(10) is not None, "a place is given once"
        queue.submit(Brought([self.letter(2)]), later)
        assert later.exception(10) is None
        assert [each.event_id for each in queue.waiting()] == ["e1", "e2"]
        queue.close()
        late: Future[None] = Future()
        queue.submit(Brought([self.letter(3)]), late)
        assert isinstance(late.exception(10), RuntimeError)

    def test_what_it_has_just_stored_is_not_followed_before_whoever_brought_it_was_told(self, state: State) -> None:
        queue, done, seen = self.opened(state), Future[None](), list[tuple[int, int]]()

        class Watching(Brought):
            def stored(self) -> None:
                seen.append((queue.followed(), queue.waiting()[-1].seq))

        queue.submit(Watching([self.letter(1), self.letter(2)]), done)
        done.result(10)
        assert seen == [(0, 2)]
        assert queue.followed() == 2
        queue.close()

    def test_large_events_are_not_all_read_at_once(self, state: State) -> None:
        queue, done = self.opened(state), Future[None]()
        queue.submit(Brought([self.letter(n, 9_000_000) for n in range(6)]), done)
        done.result(30)
        assert 1 <= len(queue.waiting()) < 6
        assert len(queue.waiting(-1)) == 6
        queue.close()

    def test_receipts_only_grow_whatever_the_clocks_of_the_machines_say(self, state: State) -> None:
        queue, moments = self.opened(state), list[datetime]()
        for _ in range(3):
            moments.append(queue.moment())
            late = self.opened(state, fixed_clock(NEW_YEAR - timedelta(minutes=5)))
            moments.append(late.moment())
            late.close()
        assert moments == sorted(set(moments))
        queue.close()

    def test_a_machine_whose_clock_is_far_behind_the_others_takes_no_turn(self) -> None:
        standing = Progress(3, NEW_YEAR + timedelta(hours=1), 0, None)
        with pytest.raises(ClocksApartError, match="set the clocks of all machines right"):
            Turn(standing, MIDNIGHT, is_shared=True)
        assert Turn(standing, MIDNIGHT).next() == (4, NEW_YEAR), "alone it does not follow what its own clock said"

    def test_every_process_follows_the_others_in_one_order(self, state: State) -> None:
        queues = [self.opened(state) for _ in range(3)]
        orders: list[list[str]] = [[] for _ in queues]

        class Counted(Brought):
            def __init__(self, letter: Accepted, order: list[str]) -> None:
                super().__init__([letter])
                self.order = order

            def stored(self) -> None:
                self.order += [letter.event_id for letter in self.entered]

        for queue, order in zip(queues, orders, strict=True):
            queue.followed_by(lambda letters, order=order: order.extend(x.event_id for x in letters), lambda *_: None)  # type: ignore[misc]

        def work(n: int) -> None:
            for k in range(40):
                done: Future[None] = Future()
                queues[n].submit(Counted(self.letter(k)._replace(event_id=f"{n}-{k}"), orders[n]), done)
                done.result(10)
                queues[n].catch_up()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for queue in queues:
            queue.catch_up()
        stored = [letter.event_id for letter in queues[0].waiting(-1)]
        assert len(stored) == 120
        assert orders == [stored] * 3
        for queue in queues:
            queue.close()

    def test_what_follows_from_a_letter_is_dated_no_earlier_than_it(self, state: State) -> None:
        one, other = self.opened(state), self.opened(state)
        dates: list[bool] = []

        class Dated(Brought):
            def enter(self, turn: Turn) -> tuple[Sequence[Accepted], Sequence[Refused]]:
                seq, at = turn.next()
                return [letter._replace(seq=seq, received_at=at) for letter in self._letters], []

        def follow(letters: Sequence[Accepted]) -> None:
            at = other.standing().received_at
            dates.extend(at is not None and letter.received_at <= at for letter in letters)

        other.followed_by(follow, lambda *_: None)
        for n in range(3):
            done: Future[None] = Future()
            one.submit(Dated([self.letter(n)]), done)
            done.result(10)
            other.catch_up()
        assert dates == [True] * 3
        one.close()
        other.close()

    def test_of_whom_features_are_to_be_computed_is_known_to_all_until_it_is_done(self, state: State) -> None:
        one, other = self.opened(state), self.opened(state)

        def move(n: int, *touched: str) -> datetime:
            done: Future[None] = Future()
            one.submit(Brought([self.letter(n)]), done)
            done.result(10)
            letters = one.waiting()
            one.drained(letters, [], set(touched))
            return letters[-1].received_at

        assert (other.to_compute(), other.has_to_compute()) == ([], False)
        first = move(0, "bob", "ada")
        assert (other.to_compute(), other.has_to_compute()) == (["ada", "bob"], True)
        later = move(1, "bob", "eve")
        # a tick after its receipt all of it is known
        other.computed(["ada", "bob", "eve"], first + 2 * TICK)
        assert one.to_compute() == ["bob", "eve"], "of these more came meanwhile"
        one.forget(["eve", "nobody"])
        other.computed(["bob"], later + 2 * TICK)
        assert (one.to_compute(), one.has_to_compute()) == ([], False)
        one.close()
        other.close()

    def test_a_full_disk_keeps_nobody_from_a_moment(self, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise NoSpaceError("the disk is nearly full")

        queue = self.opened(state)
        monkeypatch.setattr(Home, "check_room", full)
        # an erasure needs one, and makes room
        assert queue.moment() >= MIDNIGHT()
        queue.close()

    def test_who_falls_behind_is_told_that_something_is_missing(self, state: State) -> None:
        one, other = self.opened(state), self.opened(state)
        seen: list[str] = []
        told: list[tuple[int, bool]] = []
        other.followed_by(
            lambda letters: seen.extend(x.event_id for x in letters), lambda standing, missing: told.append((standing.moved, missing))
        )
        for n in range(4):
            done: Future[None] = Future()
            one.submit(Brought([self.letter(n)]), done)
            done.result(10)
            if n == 0:
                other.catch_up()
            if n == 2:
                one.drained(one.waiting(), [])
        other.catch_up()
        assert (seen, told) == (["e0", "e3"], [(3, True)])
        one.drained(one.waiting(), [])
        other.catch_up()
        other.catch_up()
        assert told == [(3, True), (4, False)]
        one.close()
        other.close()


class TestInboxInPostgres(EventQueueContract):
    @pytest.fixture
    def state(self, tmp_path: Path, postgres_url: str) -> State:
        return Home(tmp_path, Settings(database=postgres_url))

    @staticmethod
    def opened(state: State, clock: Clock = MIDNIGHT) -> EventQueue:
        return Inbox(state, clock)


class TestInbox(EventQueueContract):
    @pytest.fixture
    def state(self, tmp_path: Path) -> State:
        return Home(tmp_path, Settings())

    @staticmethod
    def opened(state: State, clock: Clock = MIDNIGHT) -> EventQueue:
        return Inbox(state, clock)

    def test_what_waits_in_an_inbox_of_before_keeps_its_order(self, tmp_path: Path) -> None:
        (tmp_path / "home").mkdir()
        with sqlite3.connect(tmp_path / "home" / "inbox.db") as old:
            old.execute(
                "CREATE TABLE waiting (received_at INTEGER PRIMARY KEY, event_id TEXT NOT NULL, content_hash TEXT NOT NULL,"
                " payload BLOB NOT NULL, source TEXT NOT NULL, personal BLOB)"
            )
            old.execute("CREATE TABLE refused (received_at INTEGER PRIMARY KEY, source TEXT NOT NULL, token BLOB NOT NULL)")
            old.executemany("INSERT INTO waiting VALUES (?, ?, 'hash', x'7b7d', 'http', NULL)", [(30, "b"), (10, "a")])
            old.execute("INSERT INTO refused VALUES (20, 'http', x'00')")
        for _ in range(2):
            queue = self.opened(Home(tmp_path / "home", Settings()))
            assert [(letter.event_id, letter.seq) for letter in queue.waiting()] == [("a", 1), ("b", 2)]
            assert [each.seq for each in queue.refused()] == [3]
            queue.close()
