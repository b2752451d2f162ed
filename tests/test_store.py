"""The feature store: one contract for every online store; joins that lose nothing and never take an older snapshot."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from scene import NEW_YEAR, TinyShop, customer, event, told
from servers import RedisServer

from features.definitions.folds.fold import Line, Touch
from features.definitions.folds.registered import NAMES, CustomerState
from features.definitions.view import ONLINE
from features.state.clock import microseconds, moment_of
from features.state.home import Home
from features.store.customer_rows import CustomerRows
from features.store.feature_store import FeatureStore, StaleFeaturesError
from features.store.keyed_state import RowsTell

HER, OTHER = customer("1"), customer("2")
EARLIER = NEW_YEAR - timedelta(days=28)


def populate(tiny: TinyShop) -> None:
    tiny.add(
        event("a", "purchase", EARLIER - timedelta(days=3), items=[("i0", 1, 100)]),
        event("b", "purchase", NEW_YEAR - timedelta(days=3), items=[("i1", 1, 100)]),
        event("c", "purchase", NEW_YEAR - timedelta(days=2), card="2", items=[("i2", 1, 100)]),
    )


class OnlineStoreContract:
    """What serving relies on, whatever holds the rows."""

    @pytest.fixture
    def store(self, tiny: TinyShop) -> FeatureStore:
        raise NotImplementedError

    @staticmethod
    def fresh(tiny: TinyShop) -> FeatureStore:
        populate(tiny)
        store = FeatureStore(tiny.home)
        store.apply()
        for view in ("customer_activity", "customer_state"):
            store.backfill(view, {NEW_YEAR: None})
            assert store.materialize(view, NEW_YEAR) == 2
        return store

    def test_feast_reads_what_was_written_unless_a_newer_row_was_there(self, store: FeatureStore) -> None:
        rows = [{"customer_id": f"c{n}", NAMES[0]: f"{n}"} for n in range(250)]
        assert store.push("customer_state", rows[:3], NEW_YEAR + timedelta(seconds=1)) == 3
        assert store.push("customer_state", rows, NEW_YEAR) == 247
        view = store.views["customer_state"]
        asked = [f"{view.name}{ONLINE}:{view.at_column}"]
        told = store._feast.get_online_features(asked, [{"customer_id": f"c{n}"} for n in range(250)]).to_dict()
        late, at = (microseconds(NEW_YEAR + timedelta(seconds=n)) for n in (1, 0))
        assert told[view.at_column] == [late] * 3 + [at] * 247

    def test_a_row_that_is_newer_is_not_deleted_by_whoever_is_late(self, store: FeatureStore) -> None:
        later = NEW_YEAR + timedelta(seconds=1)
        store.push("customer_state", [{"customer_id": HER}], later)
        assert store.delete("customer_state", [HER, OTHER, "nobody"], NEW_YEAR) == 1
        assert [row["customer_state_at"] for row in store.online("state_v1", [HER, OTHER])] == [microseconds(later), None]
        # of a time to come: a clock was wrong
        assert store.delete("customer_state", [HER], NEW_YEAR - timedelta(days=9), is_now=False) == 0
        assert store.delete("customer_state", [HER], NEW_YEAR - timedelta(days=9)) == 1

    def test_rows_come_back_as_they_were_materialized(self, store: FeatureStore) -> None:
        her, nobody, other = (told(store, who) for who in (HER, "nobody", OTHER))
        assert her["bought_item_ids"] == ["i0", "i1"]
        assert her["bought_counts"] == [1, 1]
        assert (her["recency_days"], her["baskets_182"]) == (3, 2)
        assert moment_of(her["customer_state_at"]) == NEW_YEAR
        assert other["bought_item_ids"] == ["i2"]
        assert nobody["bought_item_ids"] is None
        assert nobody["recency_days"] is None

    def test_a_push_is_read_at_once_and_never_undone_by_an_older_one(self, store: FeatureStore) -> None:
        def row(item: str) -> dict[str, Any]:
            touch = Touch("e", "purchase", NEW_YEAR, NEW_YEAR.date(), "web", lines=(Line(item, 1, 100),))
            return {"customer_id": HER, **CustomerState().step(touch).to_row()}

        assert store.push("customer_state", [row("new")], NEW_YEAR + timedelta(seconds=2)) == 1
        assert store.push("customer_state", [row("old")], NEW_YEAR + timedelta(seconds=1)) == 0
        assert store.materialize("customer_state", NEW_YEAR) == 1
        her = told(store, HER)
        assert her["bought_item_ids"] == ["new"]
        assert her["bought_weights"] == [1.0]
        assert her["recent_item_ids"] == []

    def test_deleted_rows_are_gone_from_the_store_itself_and_the_others_stay(self, store: FeatureStore) -> None:
        assert store.delete("customer_state", [HER, "nobody"]) == 1
        her, other = told(store, HER), told(store, OTHER)
        assert her["bought_item_ids"] is None
        assert her["recency_days"] == 3, "another view's row is another matter"
        assert other["bought_item_ids"] == ["i2"]
        assert store.delete("customer_activity", [HER]) == 1
        assert store.delete("customer_activity", [HER]) == 0
        store.scrub()
        assert not self.holds(store, HER)
        assert self.holds(store, OTHER)

    def test_a_row_of_the_same_moment_is_replaced(self, store: FeatureStore) -> None:
        def row(item: str) -> dict[str, Any]:
            touch = Touch("e", "purchase", NEW_YEAR, NEW_YEAR.date(), "web", lines=(Line(item, 1, 100),))
            return {"customer_id": HER, **CustomerState().step(touch).to_row()}

        at = NEW_YEAR + timedelta(seconds=9)
        assert [store.push("customer_state", [row(item)], at) for item in ("first", "second")] == [1, 1]
        assert told(store, HER)["bought_item_ids"] == ["second"]

    def test_whoever_is_taken_out_leaves_nothing_that_another_version_wrote(self, store: FeatureStore) -> None:
        self.write_as_before(store, HER)
        store.apply()
        assert store.delete_all([HER]) == 2
        store.scrub()
        assert not self.holds(store, HER)
        assert self.holds(store, OTHER)

    @staticmethod
    def write_as_before(store: FeatureStore, customer_id: str) -> None:
        """Rows of a customer under a name that this version does not know."""
        raise NotImplementedError

    @staticmethod
    def holds(store: FeatureStore, customer_id: str) -> bool:
        """Whether the store's own files or keys still name a customer."""
        raise NotImplementedError


class TestSqlite(OnlineStoreContract):
    @pytest.fixture
    def store(self, tiny: TinyShop) -> FeatureStore:
        return self.fresh(tiny)

    @staticmethod
    def write_as_before(store: FeatureStore, customer_id: str) -> None:
        with sqlite3.connect(store._home.feast / "online.db") as online:
            online.execute("CREATE TABLE ubiquo_customer_history (entity_key BLOB, feature_name TEXT, value BLOB)")
            online.execute("INSERT INTO ubiquo_customer_history VALUES (?, 'bought_item_ids', ?)", (customer_id.encode(), b"i1"))
        online.close()

    @staticmethod
    def holds(store: FeatureStore, customer_id: str) -> bool:
        files = store._home.feast.glob("online.db*")
        return any(customer_id.encode() in path.read_bytes() for path in files)


class TestRedis(OnlineStoreContract):
    @pytest.fixture
    def store(self, tiny: TinyShop, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
        import redis

        host, port = redis_url.split(":")
        redis.Redis(host, int(port)).flushall()
        monkeypatch.setenv("UBIQUO_REDIS", redis_url)
        return self.fresh(replace(tiny, home=Home(tiny.home.root)))

    def test_what_was_lost_is_not_forgotten_by_whoever_goes_on_writing(self, store: FeatureStore) -> None:
        first, second, third = (NEW_YEAR + timedelta(seconds=n) for n in range(3))
        empty = store.told()
        assert empty is not None
        assert store.tell(first, empty)
        told = store.told()
        assert told is not None
        assert told == RowsTell(first, empty.server)
        # what was noted of the second moment went with a server
        assert not store.tell(third, told._replace(until=second))
        # another run of a server has taken over since, which may lack rows though it has the note
        assert not store.tell(third, told._replace(server="another"))
        assert store.told() == told
        assert store.tell(second, told)
        # somebody who is late takes nothing back
        assert store.tell(first, told)
        assert store.told() == told._replace(until=second)

    def test_every_run_of_a_server_names_itself(self, tiny: TinyShop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        redis = RedisServer(tmp_path)
        try:
            monkeypatch.setenv("UBIQUO_REDIS", f"127.0.0.1:{redis.port}")
            store = self.fresh(replace(tiny, home=Home(tiny.home.root)))
            before = store.told()
            redis.kill()
            redis.start()
            after = store.told()
            assert before is not None
            assert after is not None
            assert before.until == after.until
            assert before.server != after.server
            assert not store.tell(NEW_YEAR, before)
            assert store.tell(NEW_YEAR, after)
        finally:
            redis.stop()

    @staticmethod
    def write_as_before(store: FeatureStore, customer_id: str) -> None:
        import redis

        host, port = os.environ["UBIQUO_REDIS"].split(":")
        client = redis.Redis(host, int(port))
        [key] = [key for key in client.scan_iter() if customer_id.encode() in key]
        client.hset(key, "_ts:customer_history", b"1")

    @staticmethod
    def holds(store: FeatureStore, customer_id: str) -> bool:
        import redis

        host, port = os.environ["UBIQUO_REDIS"].split(":")
        return any(customer_id.encode() in key for key in redis.Redis(host, int(port)).scan_iter())


def spine(*rows: tuple[str, datetime]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["customer_id", "event_timestamp"])


def test_the_historical_join_keeps_every_row_and_its_own_snapshot(tiny: TinyShop) -> None:
    populate(tiny)
    store = FeatureStore(tiny.home)
    store.apply()
    store.backfill("customer_activity", {EARLIER: None, NEW_YEAR: None})
    asked = spine((HER, EARLIER), (OTHER, EARLIER), (HER, NEW_YEAR), ("nobody", NEW_YEAR))
    joined = store.historical(asked, "activity_v1")
    assert joined["customer_id"].tolist() == asked["customer_id"].tolist()
    assert joined["baskets_182"].tolist()[::2] == [1.0, 2.0]
    assert joined["baskets_182"].isna().tolist() == [False, True, False, True]


def test_a_missing_snapshot_is_refused_rather_than_replaced_by_an_older_one(tiny: TinyShop) -> None:
    populate(tiny)
    store = FeatureStore(tiny.home)
    store.apply()
    store.backfill("customer_activity", {EARLIER: None})
    with pytest.raises(StaleFeaturesError, match="backfill"):
        store.historical(spine((HER, NEW_YEAR)), "activity_v1")
    store.backfill("customer_activity", {NEW_YEAR: [OTHER]})
    with pytest.raises(StaleFeaturesError, match="older snapshot"):
        store.historical(spine((HER, NEW_YEAR)), "activity_v1")


def test_a_spine_that_repeats_a_key_is_refused(tiny: TinyShop) -> None:
    populate(tiny)
    with pytest.raises(ValueError, match="repeats"):
        FeatureStore(tiny.home).historical(spine((HER, NEW_YEAR), (HER, NEW_YEAR)), "activity_v1")


def test_a_snapshot_is_made_again_only_when_the_log_knows_more_by_then(tiny: TinyShop) -> None:
    populate(tiny)
    store = FeatureStore(tiny.home)
    assert store.backfill("customer_activity", {EARLIER: None, NEW_YEAR: None}) == 2
    assert store.backfill("customer_activity", {EARLIER: None, NEW_YEAR: None}) == 0
    tiny.add(event("d", "purchase", NEW_YEAR - timedelta(days=1), items=[("i0", 1, 100)]))
    assert store.backfill("customer_activity", {EARLIER: None, NEW_YEAR: None}) == 1
    assert store.snapshot("customer_activity", NEW_YEAR).exists()


def test_only_those_of_whom_anything_became_known_are_brought_up_to_date(tiny: TinyShop) -> None:
    populate(tiny)
    store = FeatureStore(tiny.home)
    store.apply()
    for view in store.customer_views():
        store.backfill(view, {NEW_YEAR: None})
        store.materialize(view, NEW_YEAR)
    later = NEW_YEAR + timedelta(days=1)
    tiny.shop = msgspec.structs.replace(tiny.shop, data_end=later)
    tiny.add(event("d", "purchase", NEW_YEAR + timedelta(hours=3), items=[("i5", 1, 100)]))
    rows = CustomerRows(tiny.home, store, tiny.log)
    assert rows.bring_up_to(later, NEW_YEAR + timedelta(hours=1)) == 1
    her, other = told(store, HER), told(store, OTHER)
    assert (her["bought_item_ids"], her["recency_days"], moment_of(her["customer_activity_at"])) == (["i0", "i1", "i5"], 1, later)
    assert moment_of(other["customer_activity_at"]) == NEW_YEAR
    for view in store.customer_views():
        store.backfill(view, {later: None})
        store.materialize(view, later)
    assert told(store, HER) == her, "a full run tells the same"


def test_rows_that_a_running_service_wrote_since_stay(tiny: TinyShop) -> None:
    populate(tiny)
    store = FeatureStore(tiny.home)
    store.apply()
    tiny.shop = msgspec.structs.replace(tiny.shop, data_end=NEW_YEAR + timedelta(days=1))
    tiny.add(event("d", "purchase", NEW_YEAR + timedelta(hours=3), card="3", items=[("i5", 1, 100)]))
    rows = CustomerRows(tiny.home, store, tiny.log)
    live = NEW_YEAR + timedelta(days=2)
    rows.rebuild([customer("3")], live)
    assert rows.bring_up_to(NEW_YEAR + timedelta(hours=1), EARLIER - timedelta(days=9)) == 3
    assert moment_of(told(store, customer("3"))["customer_state_at"]) == live
    assert told(store, HER)["bought_item_ids"] == ["i0", "i1"]
