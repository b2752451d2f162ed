"""Features: the right numbers on a log small enough to count by hand, nothing from the future, replay equals increments."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, TinyShop, customer, event

from features.definitions.folds import History, Touch, fold_history
from features.state.clock import clock_from_environment, local_midnight, parse_as_of
from features.store.snapshots import compute, histories
from features.store.timeline import open_timeline

AS_OF = NEW_YEAR
HER = customer("1")


def days(count: float) -> datetime:
    """A quarter past noon in New York, so many days before the as-of midnight's day."""
    return AS_OF - timedelta(days=count) + timedelta(hours=12, minutes=15)


def features_of(tiny: TinyShop, view: str, key: str, as_of: datetime = AS_OF, customers: list[str] | None = None) -> dict[str, Any]:
    [(_, table)] = list(compute(open_timeline(tiny.home, as_of, customers), view, {as_of: None}))
    name = "item_id" if view == "item_stats" else "customer_id"
    [row] = [r for r in table.to_pylist() if r[name] == key]
    return row


@pytest.fixture
def shopped(tiny: TinyShop) -> TinyShop:
    tiny.add(
        event("b1", "purchase", days(100), items=[("i0", 1, 500)], store_id="s1"),
        event("b2", "purchase", days(20), items=[("i0", 2, 1000), ("i1", 1, 250)], store_id="s1"),
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
        "private_share_91": 0.5, "basket_minor_91": pytest.approx(1600 / 3), "recency_over_gap_mean": pytest.approx(10 / 45),
        "spend_trend": pytest.approx(1600 * 91 / (1600 * 28)),
    }  # fmt: skip
    assert {k: row[k] for k in expected} == expected


def test_an_items_popularity_halves_every_seven_days(shopped: TinyShop) -> None:
    row = features_of(shopped, "item_stats", "i0")
    ages = [(AS_OF - at).total_seconds() / 86_400 for at in (days(100), days(20), days(5))]
    assert row["popularity"] == pytest.approx(sum(2 ** (-a / 7) for a in ages), rel=1e-4)
    assert (row["households"], row["purchases"], row["price_minor"]) == (2, 3, pytest.approx(2000 / 3))


def test_nothing_from_the_future_changes_a_feature(shopped: TinyShop) -> None:
    as_of = days(8)
    views = ("customer_activity", "customer_history")
    before = [features_of(shopped, v, HER, as_of) for v in views]
    shopped.add(event("late", "purchase", as_of, items=[("i3", 1, 100)]))
    shopped.add(event("told later", "purchase", days(50), items=[("i4", 1, 100)]), known_at=as_of)
    assert [features_of(shopped, v, HER, as_of) for v in views] == before
    assert features_of(shopped, "customer_history", HER)["bought_item_ids"] != before[1]["bought_item_ids"]


def test_the_micro_batch_of_one_customer_equals_the_batch_of_all(shopped: TinyShop) -> None:
    for view in ("customer_activity", "customer_history"):
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
    clock = clock_from_environment(not_before=later)
    assert later <= clock() <= clock() < later + timedelta(minutes=1)
    monkeypatch.setenv("UBIQUO_CLOCK", "tomorrow")
    with pytest.raises(ValueError, match="UBIQUO_CLOCK"):
        clock_from_environment()


touches = st.lists(
    st.builds(
        Touch,
        st.sampled_from(["purchase", "view_item", "login", "add_to_cart"]),
        st.datetimes(datetime(2017, 1, 1), datetime(2017, 12, 31)).map(lambda d: d.replace(tzinfo=UTC)),
        st.sampled_from(["web", "store", None]),
        st.lists(st.sampled_from(["a", "b", "c"]), max_size=3),
    ),
    max_size=30,
)


@given(touches)
def test_the_folded_weight_is_the_sum_of_decayed_purchases_in_any_order(seen: list[Touch]) -> None:
    history = History()
    for touch in seen:
        history = fold_history(history, touch)
    for item, (count, last, weight) in history.bought.items():
        times = [int(t.occurred_at.timestamp()) for t in seen if t.name == "purchase" and item in t.item_ids]
        assert (count, last) == (len(times), max(times))
        assert weight == pytest.approx(sum(2 ** (-(last - t) / (90 * 86_400)) for t in times), rel=1e-9)


@given(touches)
def test_a_history_survives_its_own_row(seen: list[Touch]) -> None:
    history = History()
    for touch in seen:
        history = fold_history(history, touch)
    assert History.from_row(history.to_row()) == history


def test_replay_at_many_moments_equals_replay_at_each(shopped: TinyShop, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_timeline(shopped.home, AS_OF)
    moments = [days(k) for k in (60, 15, 9, 1)]
    together = [(moment, customer, history.to_row()) for moment, customer, history in histories(opened, sorted(moments))]
    customers = list(dict.fromkeys(customer for _, customer, _ in together))
    assert customers == sorted(customers), "one customer after the other"
    for few in (1, 2, 3):
        monkeypatch.setattr("features.store.snapshots.EVENTS_AT_ONCE", few)
        assert [(m, c, h.to_row()) for m, c, h in histories(opened, sorted(moments))] == together, "however few events fit at once"
    for moment in moments:
        alone = [(customer, history.to_row()) for _, customer, history in histories(opened, [moment])]
        assert alone == [(customer, row) for at, customer, row in together if at == moment]


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
