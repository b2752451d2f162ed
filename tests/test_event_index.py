"""Events found by id and by identifier: as the log has them, whatever happened to the file that finds them."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scene import NEW_YEAR, TinyShop, event
from scene import customer as customer_of

from features.definitions.folds.fold import Touch
from features.people.consent import Consents
from features.people.hidden import Hidden
from features.people.identity import Identities
from features.state import delta_writes
from features.state.disk import DamagedStateError
from features.state.tables import DeltaFolder
from features.store.duckdb_compute import DuckDBCompute
from features.store.event_index import EventIndex
from features.store.event_log import EventLog, connect
from features.store.feature_store import FeatureStore
from features.store.folding import states_of
from features.store.identity_rebuild import rebuild
from features.store.prepared_compute import Prepared, PreparedCompute, Statements
from features.store.profile import profile
from features.store.snapshots import compute
from features.store.timeline import open_timeline

START = NEW_YEAR - timedelta(days=30)
FOREVER = datetime(9998, 1, 1, tzinfo=UTC)
COLUMNS = (
    "event_id",
    "customer_id",
    "known_at",
    "local_date",
    "local_hour",
    "channel",
    "items",
    "traits",
    "identifiers",
    "source",
    "content_hash",
)


def lived(shop: TinyShop) -> None:
    """A tablet that two share, a visitor who signs up, a card that is replaced, consent that is given, refused and declared, and nobody."""

    def add(name: str, kind: str, day: int, items: Any = (), declared: list[str] | None = None, **identifiers: str) -> None:
        more = {key: identifiers.pop(key) for key in list(identifiers) if key in ("previous", "consent")}
        raw = {**event(name, kind, START + timedelta(days=day), None, items, channel="web"), "identifiers": identifiers, **more}
        rows = shop.incoming(raw)
        shop.log.append([row._replace(declared_purposes=declared, known_at=row.event.occurred_at) for row in rows], Identities(shop.home))

    add("a1", "view_item", 1, ["i1"], cookie="visitor")
    add("a2", "purchase", 2, [("i1", 2, 300), ("i2", 1, 50)], cookie="visitor", user_id="ada", email="ada@shop.org")
    add("t1", "view_item", 3, ["i3"], device="tablet", user_id="ada")
    add("t2", "view_item", 4, ["i4"], device="tablet", loyalty_card="bob")
    add("t3", "view_item", 5, ["i5"], device="tablet")
    add("b1", "purchase", 6, [("i6", 1, 100)], ["analytics"], loyalty_card="bob")
    add("b2", "purchase", 7, [("i6", 1, 100)], ["personalization"], loyalty_card="bob")
    add("c1", "consent_update", 8, user_id="ada", consent={"purposes": {"personalization": True}})  # type: ignore[arg-type]
    add("c2", "consent_update", 9, loyalty_card="eve", consent={"purposes": {"personalization": False}})  # type: ignore[arg-type]
    add("e1", "purchase", 10, [("i7", 1, 100)], loyalty_card="eve")
    add("x1", "purchase", 11, [("i8", 1, 100)])
    add("n1", "alias", 12, loyalty_card="new", previous={"loyalty_card": "bob"})  # type: ignore[arg-type]


@pytest.fixture
def shop(tiny: TinyShop) -> TinyShop:
    lived(tiny)
    return tiny


@pytest.fixture
def index(shop: TinyShop) -> Iterator[EventIndex]:
    with contextlib.closing(shop.log.index) as opened:
        yield opened


def in_the_log(shop: TinyShop) -> dict[str, dict[str, Any]]:
    query = "SELECT * FROM read_parquet(?)"
    rows = connect().execute(query, [shop.log.files()]).to_arrow_table().to_pylist()
    return {row["event_id"]: row for row in rows}


def check(shop: TinyShop, index: EventIndex) -> None:
    rows = in_the_log(shop)
    assert index.hashes_of([*rows, "unknown"]) == {name: row["content_hash"] for name, row in rows.items()}
    keys = {f"{pair['key']}:{pair['value']}" for row in rows.values() for pair in row["identifiers"]}
    for key in keys:
        wanted = {name for name, row in rows.items() if key in {f"{pair['key']}:{pair['value']}" for pair in row["identifiers"]}}
        found = index.of([key])
        assert index.counts([key]).get(key, 0) == len(wanted)
        assert {each.event.event_id for each in found} == wanted
        moments = [each.event.occurred_at for each in found]
        assert moments == sorted(moments, reverse=True)
        table = shop.log.to_arrow(found).to_pylist()
        assert {row["event_id"]: row for row in table} == {name: rows[name] for name in wanted}, "as the log has them, to the last field"
    assert {each.event.event_id for each in index.of(keys)} == {name for name, row in rows.items() if row["identifiers"]}


class TestIndex:
    def test_it_finds_what_the_log_holds(self, shop: TinyShop, index: EventIndex) -> None:
        check(shop, index)

    def test_a_crash_between_log_and_index_is_caught_up_with(self, shop: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
        log, identities = shop.log, Identities(shop.home)

        def crash(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(EventIndex, "add", crash)
        late = shop.incoming(event("late", "login", START, "1"))
        with pytest.raises(KeyboardInterrupt):
            log.append(late, identities)
        monkeypatch.undo()
        assert not log.hashes_of(["late"])
        assert log.append(late, identities).repeated == 1
        check(shop, log.index)

    @pytest.mark.parametrize("harm", ["gone", "garbage", "cut", "another format"])
    def test_a_file_that_is_lost_or_damaged_is_made_anew(self, shop: TinyShop, harm: str, caplog: pytest.LogCaptureFixture) -> None:
        shop.log.close()
        path = shop.home.event_index
        for each in path.parent.glob("events.index-*"):
            each.unlink()
        if harm == "gone":
            path.unlink()
        elif harm == "garbage":
            path.write_bytes(b"this is no database, though it is long enough to be taken for the head of one" * 20)
        elif harm == "cut":
            path.write_bytes(path.read_bytes()[:5_000])
        else:
            with contextlib.closing(sqlite3.connect(path)) as old, old:
                old.execute("UPDATE mark SET format = 0")
        log = shop.log
        log.catch_up()
        check(shop, log.index)
        assert "made anew" in caplog.text

    def test_compaction_is_no_news(self, shop: TinyShop, caplog: pytest.LogCaptureFixture) -> None:
        for k in range(40):
            shop.add(event(f"e{k}", "login", START, "1"))
        shop.log.maintain(kept_seconds=0.0)
        shop.add(event("after", "login", START, "1"))
        check(shop, shop.log.index)
        assert "made anew" not in caplog.text

    def test_what_is_erased_is_gone_here_too(self, shop: TinyShop) -> None:
        hers = Identities(shop.home).vault.key("loyalty_card", "eve")
        assert shop.log.erase(["c2", "e1"]) == 2
        check(shop, shop.log.index)
        assert not shop.log.index.of([hers])
        for path in shop.home.event_index.parent.glob("events.index*"):
            assert hers.partition(":")[2].encode() not in path.read_bytes()

    def test_rows_that_something_else_took_out_are_not_found_any_more(self, shop: TinyShop) -> None:
        DeltaFolder(shop.home.events).erase("event_id", ["e1"])
        log = shop.log
        log.catch_up()
        check(shop, log.index)
        assert not log.hashes_of(["e1"])

    def test_a_page_that_is_damaged_while_it_is_used_is_made_anew(self, shop: TinyShop) -> None:
        for first in range(0, 300, 100):
            shop.add(*(event(f"e{k}", "login", START, f"card-{k}") for k in range(first, first + 100)))
        log = shop.log
        log.index.scrub()
        path = shop.home.event_index
        size = path.stat().st_size
        with open(path, "r+b") as file:
            # all but the first two pages, which name the tables and the mark
            file.seek(8_192)
            file.write(b"\xff" * (size - 8_192))
        fresh = shop.log
        with pytest.raises(DamagedStateError):
            fresh.hashes_of([f"e{k}" for k in range(300)])
        fresh.catch_up()
        check(shop, fresh.index)

    def test_what_was_given_up_by_a_repair_is_not_taken_for_stored(self, shop: TinyShop) -> None:
        from deltalake import DeltaTable

        shop.add(event("one", "login", START, "1"))
        shop.add(event("two", "login", START, "1"))
        folder = shop.home.events
        last = folder / "_delta_log" / f"{DeltaTable(str(folder)).version():020}.json"
        last.write_bytes(last.read_bytes()[:50])
        with_one = [path for path in folder.glob("*.parquet") if "one" in pq.ParquetFile(path).read()["event_id"].to_pylist()]
        with_one[0].unlink()
        log = shop.log
        assert log.repair()
        log.append(shop.incoming(event("one", "login", START, "1"), event("two", "login", START, "1")), Identities(shop.home))
        assert {"one", "two"} <= in_the_log(shop).keys(), "they came in again, and are stored"
        check(shop, log.index)


class TestByKey:
    """Reading a few customers by key gives what reading the whole log gives."""

    @pytest.mark.parametrize("day", [1, 4, 5, 7, 9, 12, 29])
    def test_a_few_customers_events_are_those_of_the_whole_log(self, shop: TinyShop, day: int) -> None:
        identities, moment = Identities(shop.home), START + timedelta(days=day, hours=1)
        for customer in identities.customers():
            by_key = open_timeline(shop.home, moment, [customer], identities=identities)
            whole = open_timeline(shop.home, moment, [customer])
            found = [
                opened.before(moment).events.order_by("event_id").select(*COLUMNS).to_pyarrow().to_pylist() for opened in (by_key, whole)
            ]
            assert found[0] == found[1]
            lines = [opened.before(moment).lines.order_by("event_id", "item_id").to_pyarrow().to_pylist() for opened in (by_key, whole)]
            assert lines[0] == lines[1]

    def test_what_was_put_into_sql_once_gives_the_same_rows_at_every_moment(self, shop: TinyShop) -> None:
        identities, prepared, zone = Identities(shop.home), Prepared(shop.home), ZoneInfo(shop.shop.timezone)
        views = [view for view in FeatureStore(shop.home).views.values() if view.key == "customer_id"]
        seen = set()
        for day in (4, 29, 200, 4):
            # after the clock change too, and at another hour of the shop's day
            moment = START + timedelta(days=day, hours=day % 5)
            for some in (identities.customers(), identities.customers()[:1]):
                for view in views:
                    found = []
                    for few in (None, partial(prepared.begin, moment)):
                        with contextlib.closing(open_timeline(shop.home, moment, some, identities=identities, few=few)) as opened:
                            [(_, table)] = compute(opened, view, {moment: None})
                            found.append(table)
                    assert found[0].equals(found[1]), (view.name, day)
                    seen |= {(view.name, moment.astimezone(zone).utcoffset(), len(found[0]))}
        assert len(seen) >= 4, "some have rows and some have none, before and after the clock change"
        prepared.close()

    def test_what_is_hidden_in_between_is_in_no_row_that_was_prepared(self, shop: TinyShop) -> None:
        identities, prepared, moment = Identities(shop.home), Prepared(shop.home), START + timedelta(days=30)

        def told() -> list[str]:
            few, everybody = partial(prepared.begin, moment), identities.customers()
            with contextlib.closing(open_timeline(shop.home, moment, everybody, identities=identities, few=few)) as opened:
                rows: list[str] = opened.compute.asked("ids", lambda: opened.events.select("event_id"))["event_id"].to_pylist()
            return rows

        before = told()
        Hidden(shop.home).add([], [], before[:1])
        assert sorted(told()) == sorted(before[1:])
        Hidden(shop.home).remove([], [], before[:1])
        assert sorted(told()) == sorted(before)
        prepared.close()

    def test_a_definition_that_names_its_moment_is_no_ones_at_another(self, shop: TinyShop) -> None:
        identities, prepared = Identities(shop.home), Prepared(shop.home)
        view = replace(
            FeatureStore(shop.home).views["customer_activity"],
            compute=lambda opened, as_of: (
                opened.events.filter(opened.events.occurred_at < ibis.timestamp(as_of)).group_by("customer_id").aggregate(n=ibis._.count())
            ),
            columns={"n": "integer"},
        )
        identified = identities.customers()
        numbers = []
        for day in (2, 30, 2):
            moment = START + timedelta(days=day)
            with contextlib.closing(
                open_timeline(shop.home, moment, identified, identities=identities, few=partial(prepared.begin, moment))
            ) as opened:
                [(_, table)] = compute(opened, view, {moment: None})
                numbers.append(sum(table["n"].to_pylist()))
        assert numbers[0] == numbers[2] < numbers[1]
        prepared.close()

    def test_two_at_once_each_have_their_own(self, shop: TinyShop) -> None:
        prepared, moment = Prepared(shop.home), START + timedelta(days=9)
        one, other = prepared.begin(moment), prepared.begin(moment)
        assert isinstance(one, PreparedCompute)
        assert not isinstance(other, PreparedCompute)
        other.close()
        one.close()
        assert prepared.begin(moment) is one
        one.close()
        (shop.home.catalogue / "items.parquet").touch()
        again = prepared.begin(moment)
        assert again is not one, "what was read of the catalogue is read again"
        again.close()
        prepared.close()

    @pytest.mark.parametrize("is_prepared", [True, False])
    def test_many_rows_are_stepped_through_in_order_and_none_twice(self, shop: TinyShop, is_prepared: bool) -> None:
        engine = PreparedCompute(shop.home, Statements(), lambda: None) if is_prepared else DuckDBCompute(shop.home)
        numbers = list(range(60_000))
        random.Random(0).shuffle(numbers)
        rows = pa.table({"group": [f"g{n % 300:03}" for n in numbers], "n": numbers, "items": [[{"item": str(n)}] for n in numbers]})
        for _ in range(3):
            table = engine.given("many", rows)
            found = pa.Table.from_batches(engine.stepped(lambda table=table: table, "group", ["group", "n"], iter))  # type: ignore[misc]
            assert found.equals(rows.sort_by([("group", "ascending"), ("n", "ascending")])), "the parts came in another order"
            engine.let_go("many")
        engine.close()
        if isinstance(engine, PreparedCompute):
            engine.dispose()

    def test_events_that_come_in_another_order_are_no_rows(self) -> None:
        touch = Touch("e", "view_item", START, START.date())
        events = [(customer, START, touch) for customer in ("a", "b", "a")]
        with pytest.raises(RuntimeError, match="did not come in order"):
            list(states_of(events, [FOREVER]))
        assert [customer for _, customer, _ in states_of(sorted(events, key=lambda each: each[0]), [FOREVER])] == ["a", "b"]

    def test_a_profile_shows_what_may_be_used_and_counts_the_rest(self, shop: TinyShop) -> None:
        identities, consents = Identities(shop.home), Consents(shop.home, shop.shop.consent)
        shown = {}
        for customer in identities.customers():
            told = profile(shop.home, identities, consents, shop.log.contacts, customer)
            opened = open_timeline(shop.home, FOREVER, [customer], consents=consents)
            wanted = opened.events.order_by(opened.events.occurred_at.desc()).to_pyarrow().to_pylist()
            assert [each["occurred_at"] for each in told["events"]] == [each["occurred_at"] for each in wanted]
            carry = shop.log.index.of(identities.members(customer))
            assert told["withheld"] == len(carry) - len(wanted)
            shown[customer] = len(wanted)
        assert sorted(shown.values(), reverse=True)[:2] == [4, 3], "ada's and bob's"

    def test_the_latest_come_first_and_no_more_than_asked_for(self, shop: TinyShop) -> None:
        identities, consents = Identities(shop.home), Consents(shop.home, shop.shop.consent)
        ada = identities.resolve({"user_id": "ada"})
        assert ada is not None
        told = profile(shop.home, identities, consents, shop.log.contacts, ada, limit=2)
        assert [each["occurred_at"].day for each in told["events"]] == [(START + timedelta(days=day)).day for day in (8, 3)]
        assert told["withheld"] == 0


class TestSteps:
    """How a customer came to be is looked up, and is what the whole table says."""

    @staticmethod
    def check(shop: TinyShop) -> None:
        identities = Identities(shop.home)
        assert identities.customers()
        for customer in identities.customers():
            keys, former = identities.members(customer), identities.former(customer)
            wanted = [step for step in identities.steps() if step.identity_key in keys or step.customer_id == customer]
            assert identities.story(customer) == sorted(wanted, key=lambda step: step.known_at)
            theirs = {step.identity_key for step in identities.steps() if step.customer_id in {customer, *former}}
            assert identities.lost(customer) == sorted(key for key in theirs if identities.owner_of([key]) is None)

    def test_it_is_what_the_table_says(self, shop: TinyShop) -> None:
        self.check(shop)

    @pytest.mark.parametrize("harm", ["gone", "behind"])
    def test_a_file_that_is_lost_or_behind_catches_up(self, shop: TinyShop, harm: str) -> None:
        path = shop.home.step_index
        if harm == "gone":
            for each in path.parent.glob(f"{path.name}*"):
                each.unlink()
        else:
            with contextlib.closing(sqlite3.connect(path)) as index, index:
                index.execute("DELETE FROM steps WHERE seq > 3")
                index.execute("UPDATE mark SET version = 0")
        shop.add(event("later", "login", START, "someone new"))
        self.check(shop)

    def test_worked_out_anew_it_is_told_anew(self, shop: TinyShop) -> None:
        rebuild(shop.home, shop.shop.timezone)
        self.check(shop)

    def test_what_is_erased_is_gone_here_too(self, shop: TinyShop) -> None:
        identities = Identities(shop.home)
        ada = identities.resolve({"user_id": "ada"})
        assert ada is not None
        keys = identities.members(ada)
        event_ids = [each.event.event_id for each in shop.log.index.of(keys)]
        assert identities.erase(keys, [ada, *identities.former(ada)], event_ids) > 0
        self.check(shop)
        assert not {step.event_id for step in identities.steps()} & set(event_ids), "nor do others' rows name events of theirs"
        content = b"".join(path.read_bytes() for path in shop.home.step_index.parent.glob("identifiers.index*"))
        assert not [key for key in keys if key.partition(":")[2].encode() in content]
        assert ada.encode() not in content


def test_two_logs_of_one_home_share_their_index(tiny: TinyShop) -> None:
    one, other = tiny.log, tiny.log
    assert isinstance(one, EventLog)
    one.append(tiny.incoming(event("a", "login", START, "1")), Identities(tiny.home))
    assert set(other.hashes_of(["a"])) == {"a"}
    other.append(tiny.incoming(event("b", "login", START, "1")), Identities(tiny.home))
    assert set(one.hashes_of(["a", "b"])) == {"a", "b"}


def test_a_few_customers_are_found_by_key_after_the_log_was_compacted_too(tiny: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(9):
        tiny.add(event(f"e{k}", "purchase", NEW_YEAR - timedelta(days=k + 1), items=[("i0", 1, 100)]))
    log, identities = tiny.log, Identities(tiny.home)
    log.catch_up()
    before = log.version()
    monkeypatch.setattr(delta_writes, "COMPACT_ABOVE_FILES", 4)
    DeltaFolder(tiny.home.events).maintain(0.0)
    assert log.version() > before, "it was compacted, and the index does not know yet"

    def whole(home: Any) -> Any:
        raise AssertionError("the whole log is read")

    monkeypatch.setattr("features.store.timeline._steps", whole)
    with contextlib.closing(open_timeline(tiny.home, NEW_YEAR, [customer_of("1")], identities=identities)) as opened:
        assert opened.events.count().execute() == 9
