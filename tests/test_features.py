"""Features: the right numbers on a log small enough to count by hand, nothing from the future, replay equals increments."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from scene import NEW_YEAR, ROOT, TinyShop, customer, event

from features.definitions.domain import domain_named, domain_names
from features.definitions.feature import Feature, Moment, compute_features, counted
from features.definitions.folds.fold import Touch
from features.definitions.folds.registered import FOLDS
from features.definitions.listing import as_markdown
from features.definitions.shopping import baskets, customers, happened
from features.definitions.view import views_of
from features.events.event import parse_event
from features.people.consent import Consents
from features.people.identity import Identities
from features.people.vault import Vault
from features.state.clock import clock_of, fixed_clock, local_midnight, moment_of, parse_as_of
from features.state.settings import Settings
from features.store.event_index import Incoming
from features.store.feature_store import FeatureStore
from features.store.snapshots import compute, states
from features.store.timeline import open_timeline
from models.inputs import Input
from models.reasons import say
from serving.decide.reader import OnlineReader
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake
from training.dataset import inputs_of

AS_OF = NEW_YEAR
SECOND = timedelta(seconds=1)
HER = customer("1")


def days(count: float) -> datetime:
    """A quarter past noon in New York, so many days before the as-of midnight's day."""
    return AS_OF - timedelta(days=count) + timedelta(hours=12, minutes=15)


def features_of(tiny: TinyShop, view: str, key: str, as_of: datetime = AS_OF, customers: list[str] | None = None) -> dict[str, Any]:
    store = FeatureStore(tiny.home)
    [(_, table)] = list(compute(open_timeline(tiny.home, as_of, customers), store.views[view], {as_of: None}))
    [row] = [r for r in table.to_pylist() if r[store.views[view].key] == key]
    return store.expanded(row, as_of)


@pytest.fixture
def shopped(tiny: TinyShop) -> TinyShop:
    tiny.add(
        event("b1", "purchase", days(100), items=[("i0", 1, 500)], store_id="s1"),
        event("b2", "purchase", days(20), items=[("i0", 2, 1000, 50), ("i1", 1, 250, 50)], store_id="s1"),
        event("b3", "purchase", days(10), items=[("i1", 1, 250)], store_id="s2"),
        event("b4", "purchase", days(10) + timedelta(hours=2), items=[("i2", 1, 100)], store_id="s2"),
        event("m1", "message_sent", days(30), campaign_id="c1"),
        event("r1", "offer_redeem", days(10), campaign_id="c1", offer_id="c1-0"),
        event("x1", "purchase", days(5), card="2", items=[("i0", 1, 500)]),
    )
    return tiny


def test_a_customers_activity_is_what_one_counts_by_hand(shopped: TinyShop) -> None:
    row = features_of(shopped, "customer_activity", HER)
    expected = {
        "recency_days": 10, "tenure_days": 100, "visit_days_total": 3, "visit_days_7": 0, "visit_days_14": 1, "visit_days_28": 2,
        "baskets_28": 3, "baskets_91": 3, "baskets_182": 4, "spend_minor_28": 1600, "spend_minor_182": 2100, "lines_28": 4,
        "gap_mean_days": 45.0, "gap_max_days": 80, "gap_last_days": 10, "gap_p90_days": pytest.approx(73.0), "stores_91": 2,
        "items_91": 3, "private_lines_91": 2, "messages_total": 1, "messages_91": 1, "redemptions_total": 1,
        "campaigns_redeemed_targeted": 1, "campaigns_redeemed_broad": 0, "campaigns_sent_targeted": 1, "days_since_redemption": 10,
        "coupon_lines_182": 2, "coupon_baskets_182": 1, "coupon_share_182": 0.25, "redemptions_faded": pytest.approx(2 ** (-(10 - 12.25 / 24) / 120)),
        "private_share_91": 0.5, "basket_minor_91": pytest.approx(1600 / 3), "recency_over_gap_mean": pytest.approx(10 / 45),
        "spend_trend": pytest.approx(1600 * 91 / (1600 * 28)),
    }  # fmt: skip
    assert {k: row[k] for k in expected} == expected


def test_an_items_popularity_halves_every_seven_days(shopped: TinyShop) -> None:
    row = features_of(shopped, "item_stats", "i0")
    ages = [(AS_OF - at).total_seconds() / 86_400 for at in (days(100), days(20), days(5))]
    assert row["popularity"] == pytest.approx(sum(2 ** (-a / 7) for a in ages), rel=1e-4)
    assert (row["buyers"], row["purchases"], row["price_minor"]) == (2, 3, pytest.approx(2000 / 3))


def test_nothing_from_the_future_changes_a_feature(shopped: TinyShop) -> None:
    as_of = days(8)
    views = ("customer_activity", "customer_state")
    before = [features_of(shopped, v, HER, as_of) for v in views]
    shopped.add(event("late", "purchase", as_of, items=[("i3", 1, 100)]))
    shopped.add(event("told later", "purchase", days(50), items=[("i4", 1, 100)]), known_at=as_of)
    assert [features_of(shopped, v, HER, as_of) for v in views] == before
    assert features_of(shopped, "customer_state", HER)["bought_item_ids"] != before[1]["bought_item_ids"]


def test_the_micro_batch_of_one_customer_equals_the_batch_of_all(shopped: TinyShop) -> None:
    for view in ("customer_activity", "customer_state"):
        assert features_of(shopped, view, HER) == features_of(shopped, view, HER, customers=[HER])


def test_an_evening_basket_falls_on_the_stores_own_day(tiny: TinyShop) -> None:
    # half past midnight UTC on the 20th is the evening of the 19th in New York
    tiny.add(event("b", "purchase", datetime(2017, 12, 20, 0, 30, tzinfo=UTC), items=[("i0", 1, 100)]))
    row = features_of(tiny, "customer_activity", HER)
    assert row["recency_days"] == 13
    assert row["evening_share_91"] == 1.0


def test_a_day_is_the_shops_day_on_both_sides_of_the_clock_change() -> None:
    zone = "America/New_York"
    assert parse_as_of("2017-11-05", zone) == datetime(2017, 11, 5, 4, tzinfo=UTC)
    assert parse_as_of("2017-11-06", zone) == local_midnight(datetime(2017, 11, 6).date(), zone) == datetime(2017, 11, 6, 5, tzinfo=UTC)
    with pytest.raises(ValueError, match="2017-12-04"):
        parse_as_of("2017-11-06T00:00:00", zone)


def test_a_running_clock_never_starts_before_its_own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UBIQUO_CLOCK", f"from:{NEW_YEAR.isoformat()}")
    later = NEW_YEAR + timedelta(days=1)
    clock = clock_of(Settings.from_environment(), later)
    assert later <= clock() <= clock() < later + timedelta(minutes=1)
    monkeypatch.setenv("UBIQUO_CLOCK", "tomorrow")
    with pytest.raises(ValueError, match="UBIQUO_CLOCK"):
        clock_of(Settings.from_environment())


def test_replay_at_many_moments_equals_replay_at_each(shopped: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_timeline(shopped.home, AS_OF)
    moments = [days(k) for k in (60, 15, 9, 1)]
    together = [(moment, customer, state.to_row()) for moment, customer, state in states(opened, sorted(moments))]
    customers = list(dict.fromkeys(customer for _, customer, _ in together))
    assert customers == sorted(customers), "one customer after the other"
    for few in (1, 2, 3):
        monkeypatch.setattr("features.store.duckdb_compute.ROWS_AT_ONCE", few)
        assert [(m, c, s.to_row()) for m, c, s in states(opened, sorted(moments))] == together, "however few events fit at once"
    for moment in moments:
        alone = [(customer, state.to_row()) for _, customer, state in states(opened, [moment])]
        assert alone == [(customer, row) for at, customer, row in together if at == moment]


class TestDeclarations:
    """A feature is one declaration; adding one breaks neither the snapshots nor whoever was trained before."""

    NEW = Feature("left_handed_visits", "integer", counted(baskets, lambda rows, at: rows.count()), "{:.0f} visits", inputs_of=("churn",))

    @pytest.fixture
    def added(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
        grocery = domain_named("grocery")

        def add() -> None:
            more = replace(grocery, customer=(*grocery.customer, self.NEW))
            monkeypatch.setattr("features.definitions.domains.grocery.DOMAIN", more)
            views_of.cache_clear()

        views_of.cache_clear()
        yield add
        monkeypatch.undo()
        views_of.cache_clear()

    def test_the_views_the_inputs_the_gate_the_reasons_and_the_catalogue_know_it(self, added: Callable[[], None]) -> None:
        added()
        domain = domain_named("grocery")
        assert views_of("grocery")["customer_activity"].columns["left_handed_visits"] == "integer"
        [taken] = [each for each in inputs_of(domain, "churn") if each.name == "left_handed_visits"]
        assert (taken.low, taken.high) == (0.0, None)
        assert say(taken, 3.0, "USD") == "3 visits"
        assert "| customer | left_handed_visits | integer | baskets | at least 0 | churn | {:.0f} visits |" in as_markdown(domain)
        assert taken not in inputs_of(domain, "next-best-offer")

    def test_snapshots_of_the_old_columns_are_made_anew_by_themselves(self, shopped: TinyShop, added: Callable[[], None]) -> None:
        spine = pd.DataFrame({"customer_id": [HER], "event_timestamp": [AS_OF]})
        old = FeatureStore(shopped.home)
        old.apply()
        assert old.backfill("customer_activity", {AS_OF: None}) == 1
        assert old.backfill("customer_state", {AS_OF: None}) == 1
        before = old.historical(spine, "activity_v1")
        old.materialize("customer_activity", AS_OF)
        added()
        new = FeatureStore(shopped.home)
        new.apply()
        [online] = new.online("activity_v1", [HER])
        assert online["left_handed_visits"] is None, "an online row of before still answers"
        assert online["baskets_91"] == 3
        assert new.backfill("customer_activity", {AS_OF: None}) == 1
        assert new.backfill("customer_state", {AS_OF: None}) == 0, "what did not change stands"
        after = new.historical(spine, "activity_v1")
        assert after["left_handed_visits"].tolist() == [4]
        assert after.drop(columns="left_handed_visits").equals(before)
        assert len(list((shopped.home.snapshots / "customer_activity").glob("*"))) == 1

    def test_a_state_of_another_version_of_a_fold_is_made_anew_from_the_log(self, shopped: TinyShop) -> None:
        store, identities = FeatureStore(shopped.home), Identities(shopped.home)
        store.apply()
        intake = Intake(
            shopped.home,
            fixed_clock(AS_OF),
            Inbox(shopped.home, fixed_clock(AS_OF)),
            store,
            identities,
            Consents(shopped.home, shopped.shop.consent),
        )
        intake.accept([event("live", "purchase", days(1), items=[("i5", 1, 100)])])
        intake.drain()
        [row] = store.online("state_v1", [HER])
        old = {"customer_id": HER, **{fold.name: row[fold.name] for fold in FOLDS}, "cart": "0ld:{}"}
        store.push("customer_state", [old], moment_of(row["customer_state_at"]))
        reader = OnlineReader(store, shopped.shop.timezone, intake.recent)
        asked = ("state_v1", ("customer_state",), ("history", "cart"), HER)
        assert reader.features(*asked, AS_OF + SECOND)["bought_item_ids"] is None, "it answers, in a general way"
        intake.refresh_aggregates()
        assert reader.features(*asked, AS_OF + 2 * SECOND)["bought_item_ids"] == ["i0", "i1", "i2", "i5"]
        intake.close()

    @pytest.mark.parametrize("name", domain_names())
    def test_every_domain_computes_what_it_declares(self, shopped: TinyShop, name: str) -> None:
        msgspec.structs.replace(shopped.shop, domain=name).save(shopped.home)
        store = FeatureStore(shopped.home)
        store.apply()
        for view in store.views:
            store.backfill(view, {AS_OF: None})
            key = store.views[view].key
            entity = "i0" if key == "item_id" else HER
            spine = pd.DataFrame({key: [entity], "event_timestamp": [AS_OF]})
            service = {"customer_activity": "activity_v1", "customer_state": "state_v1", "item_stats": "items_v1"}[view]
            assert len(store.historical(spine, service)) == 1
        domain = domain_named(name)
        row = features_of(shopped, "customer_activity", HER)
        for feature in domain.customer:
            value = row[feature.name]
            within = value is None or ((feature.low is None or value >= feature.low) and (feature.high is None or value <= feature.high))
            assert within, feature
            assert not feature.phrase or say(Input(feature.name, feature.phrase), 1.0, "USD"), "its phrase can be said"


def test_what_was_paid_back_was_not_spent(shopped: TinyShop) -> None:
    before = features_of(shopped, "customer_activity", HER)
    shopped.add(event("back", "refund", days(9), items=[("i0", 1, 500)]))
    after = features_of(shopped, "customer_activity", HER)
    assert (before["spend_minor_28"], after["spend_minor_28"]) == (1600, 1100)
    assert after["visit_days_28"] == before["visit_days_28"], "to bring something back is no purchase"
    assert after["basket_minor_91"] == before["basket_minor_91"], "an average basket is of what was bought"
    assert "i0" in features_of(shopped, "customer_state", HER)["bought_item_ids"], "three were bought and one came back"


def test_what_does_not_fit_into_memory_spills_into_the_home_and_is_gone_afterwards(
    shopped: TinyShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = shopped.home.root / "spill-of-a-process-that-was-killed"
    left.mkdir()
    (left / "in-use").touch()
    beside = open_timeline(shopped.home, AS_OF)
    with contextlib.closing(open_timeline(shopped.home, AS_OF)) as opened:
        connection = opened.events.get_backend().con
        connection.execute("SET memory_limit='40MB'")
        connection.execute("CREATE TEMP TABLE much AS SELECT range AS n, md5(range::VARCHAR) AS text FROM range(2000000)").fetchall()
        spilt = [path for path in shopped.home.root.glob("spill-*/tables/*") if path.is_file()]
        assert spilt, "it lies on the disk"
        assert connection.execute("SELECT count(DISTINCT n) FROM much").fetchall() == [(2_000_000,)]
    assert not left.exists()
    assert len(list(shopped.home.root.glob("spill-*"))) == 1, "that of the one that is still open"
    assert beside.events.count().execute() > 0
    beside.close()
    assert not list(shopped.home.root.glob("spill-*"))


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)


def test_the_feature_of_the_guide_works_as_it_is_printed(shopped: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"Feature": Feature, "counted": counted, "baskets": baskets, "LEAVING": ("churn",)}
    exec(snippets()[0], names)
    feature = names["NIGHTS"]
    assert isinstance(feature, Feature)
    grocery = domain_named("grocery")
    shopped.add(event("night", "purchase", days(3) + timedelta(hours=11), items=[("i0", 1, 1)]))
    found = compute_features([*grocery.customer, feature], customers, "customer_id", open_timeline(shopped.home, AS_OF), AS_OF)
    assert dict(zip(*found.select("customer_id", feature.name).to_pyarrow().to_pydict().values(), strict=True))[HER] == 1


def test_the_events_of_a_domain_in_the_guide_are_counted(shopped: TinyShop) -> None:
    names: dict[str, Any] = {"Feature": Feature, "counted": counted, "happened": happened, "LEAVING": ("churn",)}
    exec(snippets()[2] + snippets()[3], names)
    wish = event("wish", "add_to_wishlist", days(3), items=[("i0", 1, 1)])
    sealed, content_hash, personal = Vault.open(shopped.home).seal(parse_event(wish, AS_OF, own=names["EVENTS"]))
    shopped.log.append([Incoming(sealed, content_hash, days(3), AS_OF, "test", personal=personal)], Identities(shopped.home))
    grocery, feature = domain_named("grocery"), names["WISHED"]
    found = compute_features([*grocery.customer, feature], customers, "customer_id", open_timeline(shopped.home, AS_OF), AS_OF)
    assert dict(zip(*found.select("customer_id", feature.name).to_pyarrow().to_pydict().values(), strict=True))[HER] == 1
    assert replace(grocery, events=names["EVENTS"]).events == names["EVENTS"]
    for wrong in ({"purchase": ()}, {"Plan renewed": ()}, {"plan_renewed": ("colour",)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(grocery, events=wrong)


def test_the_fold_of_the_guide_works_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = (
        "from typing import Any\nimport msgspec\nfrom features.definitions.feature import Moment\n"
        "from features.definitions.folds.fold import Fold, Output, Touch\n"
    )
    (tmp_path / "visits.py").write_text(needs + snippets()[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    fold = importlib.import_module("visits").VisitsFold()
    state, other = fold.empty(), fold.empty()
    for each, stores in ((state, "aab"), (other, "b")):
        for k, store in enumerate(stores):
            fold.step(each, Touch(f"e{k}", "store_visit", AS_OF, AS_OF.date(), store_id=store))
    assert fold.features(state, Moment(AS_OF, "UTC")) == {"stores_visited": ["a", "b"]}
    assert fold.joined(state, other).stores == {"a": 2, "b": 2}
    assert fold.decode(fold.encode(state)) == state
