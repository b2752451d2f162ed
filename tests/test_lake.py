"""The tables of the log on object storage: what several machines see of each other, and what a store that fails costs."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lakes import Gate, Lake
from scene import NEW_YEAR, SECRET, TinyShop, command, copy_home, event, eventually, start_service, stop_service

from features.people.identity import Identities
from features.state import lake_cache, lake_store, lake_tables
from features.state.disk import DamagedStateError
from features.state.home import Home
from features.state.lake_store import LakeError
from features.state.ports import DERIVED, EVENTS, IMPORT, MovedOnError, Table
from features.state.settings import SettingError, Settings
from features.store.event_log import EventLog
from features.store.feature_store import FeatureStore
from serving.privacy.holdings import Subject
from serving.privacy.proof import prove


def rows(*names: str) -> pa.Table:
    return pa.table({"known_at": pa.array([NEW_YEAR] * len(names), pa.timestamp("us", tz="UTC")), "who": pa.array(names, pa.string())})


def held(table: Table) -> list[str]:
    found = table.read(["who"])
    return [] if found is None else sorted(found["who"].to_pylist())


@pytest.fixture
def gate(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """What stands between every client of ours and the store."""
    gate = Gate(lake.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", gate.url)
    yield gate
    gate.close()


@pytest.fixture
def table(lake: Lake, tmp_path: Path) -> Table:
    return Home(tmp_path / "one", Settings(lake=lake.address)).tables[EVENTS]


@pytest.fixture
def other(lake: Lake, tmp_path: Path) -> Table:
    """The same table on another machine."""
    return Home(tmp_path / "other", Settings(lake=lake.address)).tables[EVENTS]


def copies(table: Table) -> set[str]:
    return {path.name for path in Path(table.files()[0]).parent.glob("*.parquet")}


def is_commit(request: bytes) -> bool:
    line = request.partition(b"\r\n")[0]
    return line.startswith(b"PUT") and b"_delta_log" in line and b".json" in line


class TestSettings:
    @pytest.mark.parametrize("said", ["bucket/prefix", "s3://", "s3://Bucket/x", "s3://bucket/prefix/", "s3://bucket/a b", "http://bucket"])
    def test_an_address_that_is_none_is_told(self, said: str) -> None:
        with pytest.raises(SettingError, match=r"UBIQUO_LAKE.*s3://BUCKET/PREFIX"):
            Settings.from_environment({"UBIQUO_LAKE": said})

    def test_an_address_is_taken(self) -> None:
        for said in ("s3://bucket", "s3://my-bucket.eu/some/prefix_1"):
            assert Settings.from_environment({"UBIQUO_LAKE": said}).lake == said

    def test_a_home_is_not_begun_anew_where_its_tables_lie_elsewhere(self, tmp_path: Path, lake: Lake) -> None:
        Home(tmp_path, Settings()).tables[EVENTS].append(rows("ada"))
        with pytest.raises(SettingError, match="lie in its own folder: unset it, or move them: python -m features lake --to"):
            _ = Home(tmp_path, Settings(lake=lake.address)).tables
        Home(tmp_path / "new", Settings(lake=lake.address)).tables[EVENTS].append(rows("ada"))
        for settings in (Settings(), Settings(lake="s3://elsewhere/x")):
            with pytest.raises(SettingError, match=f"set UBIQUO_LAKE={lake.address}"):
                _ = Home(tmp_path / "new", settings).tables


class TestCopies:
    def test_a_file_is_fetched_once(self, table: Table, other: Table, gate: Gate) -> None:
        for name in ("ada", "bob", "eve"):
            table.append(rows(name))
        asked: list[bytes] = []
        gate.meets = asked.append
        first = other.files()
        assert held(other) == ["ada", "bob", "eve"]
        assert sum(b".parquet" in each.partition(b"\r\n")[0] and each.startswith(b"GET") for each in asked) == 3
        asked.clear()
        assert other.files() == first
        assert other.version() == 2
        assert len(asked) == 2, "each time one request, which lists the commits"

    def test_a_copy_that_was_cut_short_is_fetched_again(self, table: Table) -> None:
        table.append(rows("ada"))
        [path] = map(Path, table.files())
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert [Path(each).read_bytes() for each in table.files()] == [whole]

    def test_what_one_machine_erases_leaves_the_copies_of_another_by_itself(
        self, table: Table, other: Table, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lake_tables, "LOOK_SECONDS", 0.1)
        monkeypatch.setattr(lake_cache, "ERASED_SECONDS", 0.3)
        table.append(rows("ada", "bob"))
        before = other.files()
        table.erase("who", ["ada"])
        assert not set(map(Path, before)) & set(Path(before[0]).parent.parent.glob("one/**/*.parquet"))
        eventually(lambda: not Path(before[0]).exists(), 30)
        assert held(other) == ["bob"]

    def test_on_the_machine_that_erases_they_go_at_once(self, table: Table) -> None:
        table.append(rows("ada", "bob"))
        before = set(table.files())
        table.erase("who", ["ada"])
        assert not any(Path(path).exists() for path in before)
        assert copies(table) == {Path(path).name for path in table.files()}

    def test_whoever_has_begun_with_what_was_compacted_can_end(self, table: Table, other: Table) -> None:
        for k in range(20):
            table.append(rows(f"customer.{k}"))
        before = other.files()
        table.maintain()
        assert len(other.files()) < len(before)
        assert all(Path(path).exists() for path in before)

    def test_what_lies_here_from_a_process_that_ended_goes_too(
        self, table: Table, lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table.append(rows("ada", "bob"))
        machine = Home(tmp_path / "other", Settings(lake=lake.address))
        [copy] = machine.tables[EVENTS].files()
        table.erase("who", ["ada"])
        Home(machine.root, machine.settings).tables[EVENTS].version()
        assert Path(copy).exists(), "somebody may read it yet"
        monkeypatch.setattr(lake_cache, "ERASED_SECONDS", 0.0)
        Home(machine.root, machine.settings).tables[EVENTS].version()
        assert not Path(copy).exists()


class TestFailures:
    def test_an_answer_that_is_lost_costs_no_row_and_doubles_none(self, table: Table, gate: Gate) -> None:
        table.append(rows("ada"))
        lost: list[bytes] = []

        def lose(request: bytes) -> bool:
            if is_commit(request) and len(lost) < 2:
                lost.append(request)
                return True
            return False

        gate.deaf = lose
        assert table.append(rows("bob")) == 1
        assert table.append(rows("eve"), expected_version=1) == 2
        assert len(lost) == 2
        assert held(table) == ["ada", "bob", "eve"]
        lost.clear()
        assert table.erase("who", ["ada", "bob"]).rows == 2
        assert lost
        assert held(table) == ["eve"]

    def test_a_store_that_is_away_is_told_of_and_nothing_is_half(self, table: Table, other: Table, gate: Gate, lake: Lake) -> None:
        table.append(rows("ada"))
        gate.shut = True
        for ask in (lambda: table.append(rows("bob")), table.version, table.files, table.recover, lambda: table.erase("who", ["ada"])):
            with pytest.raises(LakeError, match=f"the object store of {table.place}"):
                ask()
        gate.shut = False
        assert held(table) == held(other) == ["ada"]
        table.append(rows("bob"))
        assert held(other) == ["ada", "bob"]

    def test_a_store_that_stalls_in_the_middle_of_an_append_leaves_nothing_half(
        self, table: Table, other: Table, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for what in ("request", "silence"):
            monkeypatch.setitem(lake_store.SECONDS, what, 1)
        table.append(rows("ada"))
        stalled, go_on = threading.Event(), threading.Event()

        def stall(request: bytes) -> None:
            if is_commit(request) or stalled.is_set():
                stalled.set()
                go_on.wait(60)

        gate.meets = stall
        with pytest.raises(LakeError, match=f"the object store of {table.place}"):
            table.append(rows("bob"))
        gate.meets = lambda request: None
        # what was on its way arrives late: the store has it, whole, or has not
        go_on.set()
        eventually(lambda: held(other) in (["ada"], ["ada", "bob"]), 5)
        before = held(other)
        table.append(rows("eve"))
        assert held(table) == held(other) == sorted([*before, "eve"])

    def test_whoever_was_held_up_for_long_commits_nothing_that_was_cleared_away(self, table: Table, other: Table, gate: Gate) -> None:
        table.append(rows("ada"))
        reached, go_on = threading.Event(), threading.Event()

        def hold_up(request: bytes) -> None:
            if is_commit(request) and not reached.is_set():
                reached.set()
                assert go_on.wait(60)

        gate.meets = hold_up
        told: list[Any] = []
        slow = threading.Thread(target=lambda: told.append(table.append(rows("bob"))))
        slow.start()
        assert reached.wait(30)
        assert other.erase("who", []).rows == 0, "what no version needs is cleared away: the other's file too"
        go_on.set()
        slow.join(60)
        assert held(table) == held(other) == ["ada", "bob"]
        table.recover()

    def test_what_is_missing_is_named_and_can_be_given_up(self, table: Table, other: Table, lake: Lake) -> None:
        table.append(rows("ada"))
        table.append(rows("bob"))
        [gone] = set(map(Path, table.files())) - {Path(each) for each in table.files()[1:]}
        [name] = [each for each in lake.names() if each.endswith(gone.name)]
        lake.delete(name)
        for look in (table.recover, other.files):
            with pytest.raises(DamagedStateError, match=f"{gone.name}.*python -m features repair"):
                look()
        assert table.repair() == [f"{table.place}/{gone.name}"]
        table.recover()
        assert len(held(other)) == 1
        assert table.repair() == []

    def test_a_command_tells_it_in_one_line(self, tmp_path: Path, lake: Lake, gate: Gate, tiny: TinyShop) -> None:
        gate.shut = True
        done = command("features", "status", home=tiny.home.root, UBIQUO_LAKE=lake.address, AWS_MAX_RETRIES="0")
        assert done.returncode == 1
        assert f"error: the object store of {lake.address}" in done.stdout
        assert "Traceback" not in done.stdout + done.stderr


class TestCheck:
    def test_a_store_that_keeps_conditional_writes_is_fit(self, lake: Lake, tmp_path: Path) -> None:
        done = command("features", "lake", "--to", lake.address, "--check", home=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [name for name in lake.names() if "check" in name and not name.endswith("/")] == [], "nothing of it stays"
        assert list(tmp_path.iterdir()) == []

    def test_a_store_that_ignores_them_is_refused(self, lake: Lake, gate: Gate, tiny: TinyShop) -> None:
        gate.changed = lambda request: re.sub(rb"(?i)if-none-match: \*\r\n", b"", request)
        done = command("features", "lake", "--to", lake.address, home=tiny.home.root)
        assert done.returncode == 1
        assert "keeps no conditional writes" in done.stdout
        assert not (tiny.home.root / "lake").exists()


def test_a_log_whose_lease_was_lost_appends_nothing(lake: Lake, tiny: TinyShop, tmp_path: Path) -> None:
    """Two machines bring the same event in at once, as each believes that it holds the lease."""
    machines = [Home(tmp_path / name, Settings(lake=lake.address, secret=SECRET)) for name in ("one", "other")]
    logs = [EventLog(home, "America/New_York") for home in machines]
    logs[0].append(tiny.incoming(event("e0", "login", NEW_YEAR - timedelta(days=3))), Identities(machines[0]))
    identities = [Identities(home) for home in machines]
    batch = tiny.incoming(event("e1", "login", NEW_YEAR - timedelta(days=2)))
    late = logs[1].index
    seen = late.hashes_of
    late.catch_up()

    def beaten(event_ids: Any) -> dict[str, str]:
        found = seen(event_ids)
        logs[0].append(batch, identities[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(late, "hashes_of", beaten)
        with pytest.raises(MovedOnError):
            logs[1].append(batch, identities[1])
    assert logs[1].append(batch, identities[1]).repeated == 1
    assert [log.count() for log in logs] == [2, 2]


def betrayed(lake: Lake, home: Home, subject: Subject) -> list[str]:
    """Where anything of a customer is left, in the home, its copies or any object of the bucket."""
    told = [each.file for each in prove(home, subject).found]
    traces = {key.partition(":")[2] for key in subject.keys} | {*subject.customer_ids, *subject.event_ids}
    for name, content in lake.content().items():
        # what is compressed is looked at value by value
        text = str(pq.read_table(pa.BufferReader(content)).to_pylist()) if name.endswith(".parquet") else content.decode("latin-1")
        told += [name for trace in traces if trace in text]
    return told


def test_a_shop_moves_to_a_lake_and_lives_there(trained: Home, lake: Lake, gate: Gate, tmp_path: Path) -> None:
    home = copy_home(trained, tmp_path / "home")
    before = EventLog(home, "America/New_York").count()

    def break_off(request: bytes) -> None:
        # the store answers one request at a time: not in the middle of one's body
        if request.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ")):
            gate.shut = gate.shut or len([name for name in lake.names() if "/log/events/" in name]) > 3

    gate.meets = break_off
    broken = command("features", "lake", "--to", lake.address, home=home.root)
    assert broken.returncode == 1
    assert "the object store of" in broken.stdout
    assert not (home.root / "lake").exists(), "the home goes on with its folder"
    gate.meets, gate.shut = lambda request: None, False
    early = command("features", "lake", "--to", lake.address, "--drop-folder", home=home.root)
    assert (early.returncode, "they stay" in early.stdout) == (1, True)
    for lease in (IMPORT, DERIVED):
        with home.lease.hold(lease):
            kept_out = command("features", "lake", "--to", lake.address, home=home.root)
        assert (kept_out.returncode, f"another process holds {lease}" in kept_out.stdout) == (1, True)
    moved = command("features", "lake", "--to", lake.address, home=home.root)
    assert moved.returncode == 0, moved.stdout + moved.stderr
    assert f"events: version {home.table_folders[EVENTS].version()}, {before} rows" in moved.stdout
    again = command("features", "lake", "--to", lake.address, home=home.root)
    assert (again.returncode, "already" in again.stdout) == (1, True)
    forgotten = command("features", "status", home=home.root)
    assert forgotten.returncode == 1
    assert f"set UBIQUO_LAKE={lake.address}" in forgotten.stdout
    assert f"{before} events" in command("features", "status", home=home.root, UBIQUO_LAKE=lake.address).stdout
    dropped = command("features", "lake", "--to", lake.address, "--drop-folder", home=home.root)
    assert dropped.returncode == 0, dropped.stdout + dropped.stderr
    assert not any(folder.exists for folder in home.table_folders.values())
    lives_on(Home(home.root, Settings(lake=lake.address, secret=SECRET)), lake, gate, before)


def lives_on(home: Home, lake: Lake, gate: Gate, before: int) -> None:
    """Events are logged, also those that came while the store was away; whoever is erased is in no object and in no copy."""
    log = EventLog(home, "America/New_York")
    who = {"identifiers": {"email": "countess.lovelace@example.org"}}
    seen = {"name": "view_item", "channel": "web", "items": [{"item_id": "937292"}], **who}
    service = start_service(home, UBIQUO_LAKE=lake.address)
    try:
        service.ask("events", {"event_id": "seen-at-the-lake-1", "occurred_at": NEW_YEAR.isoformat(), **seen})
        eventually(lambda: log.count() == before + 1, 180)
        asked = {**who, "listing": "also_like", "limit": 3}
        service.ask("recommendations", asked)
        gate.shut = True
        service.ask("events", {"event_id": "seen-at-the-lake-2", "occurred_at": NEW_YEAR.isoformat(), **seen})
        # a machine that is busy with other tests may have it wait, and say so
        eventually(lambda: service.post("/v1/recommendations", asked)[0] == 200)
        eventually(lambda: "the object store of" in (home.root / f"service-{service.port}.log").read_text())
        gate.shut = False
        eventually(lambda: log.count() == before + 2, 180)
        told = service.ask("profile", who)
        subject = Subject.of(home, Identities(home), log.contacts, told["customer_id"])
        assert subject is not None
        assert prove(home, subject).found
        status, text = service.get(f"/v1/customers/{told['customer_id']}", "DELETE")
        while status == 202:
            status, text = service.get(json.loads(text)["ask"])
        receipt = json.loads(text)
        assert (status, receipt["proof"]["found"]) == (200, [])
        assert receipt["places"]["events"] == 2
    finally:
        stop_service(service)
    assert log.count() == before
    assert betrayed(lake, home, subject) == []


def test_features_are_those_that_a_home_of_its_own_would_give(tiny: TinyShop, lake: Lake, tmp_path: Path) -> None:
    at_the_lake = TinyShop(Home(tmp_path / "there", Settings(lake=lake.address, secret=SECRET)), tiny.shop)
    shutil.copytree(tiny.home.root, at_the_lake.home.root)
    made = []
    for shop in (tiny, at_the_lake):
        for k in range(6):
            shop.add(event(f"e{k}", "purchase", NEW_YEAR - timedelta(days=k + 1), f"{1 + k % 2}", items=[("i0", 1, 100 + k)]))
        store = FeatureStore(shop.home)
        store.apply()
        store.backfill("customer_activity", {NEW_YEAR: None})
        assert store.materialize("customer_activity", NEW_YEAR) == 2
        made.append(pq.read_table(store.snapshot("customer_activity", NEW_YEAR)).to_pylist())
    assert made[0] == made[1]
    assert not any((at_the_lake.home.root / "log" / name).exists() for name in ("events", "identifiers"))
