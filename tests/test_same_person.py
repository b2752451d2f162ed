"""Who proves to be the same, or not: the next answer knows both pasts once, and the rows come out like the log whatever happens meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from scene import NEW_YEAR, TinyShop, customer, event
from test_intake import batch

from features.definitions.feature import Moment
from features.people.consent import Consents
from features.people.identity import Identities
from features.state.clock import fixed_clock
from features.store.customer_rows import CustomerRows
from features.store.feature_store import FeatureStore
from features.store.snapshots import states
from features.store.timeline import open_timeline
from serving.decide.reader import OnlineReader
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake

ADA, BOB, COOKIE, TABLET = {"user_id": "ada"}, {"user_id": "bob"}, {"cookie": "c"}, {"device": "tablet"}
Tell = Callable[..., Any]


@pytest.fixture
def intake(tiny: TinyShop) -> Intake:
    store = FeatureStore(tiny.home)
    store.apply()
    return Intake(
        tiny.home,
        fixed_clock(NEW_YEAR),
        Inbox(tiny.home, fixed_clock(NEW_YEAR)),
        store,
        Identities(tiny.home),
        Consents(tiny.home, tiny.shop.consent),
    )


@pytest.fixture
def tell(intake: Intake) -> Tell:
    reader = OnlineReader(FeatureStore(intake._home), "America/New_York", intake.recent)
    views, folds = ("customer_activity", "customer_state"), ("history", "cart", "daily_activity")

    def told(who: dict[str, str], what: str = "bought_item_ids", at: datetime = NEW_YEAR + timedelta(minutes=1)) -> Any:
        return reader.features("customer_v1", views, folds, intake.identities.resolve(who), at).get(what)

    return told


def did(name: str, who: dict[str, str], *items: str) -> dict[str, Any]:
    lines = [{"item_id": item, "amount_minor": 100} for item in items]
    return {**batch(1)[0], "name": name, "identifiers": who, "currency": "USD", "items": lines}


def moved_on(intake: Intake) -> None:
    intake.drain()
    intake.refresh_aggregates()


def test_a_past_counts_once_where_the_other_has_none(intake: Intake, tell: Tell) -> None:
    assert intake.accept([did("purchase", COOKIE, "i7")]).accepted == 1
    moved_on(intake)
    assert intake.accept([did("login", ADA), did("login", {**ADA, **COOKIE})]).accepted == 2
    assert (tell(ADA), tell(ADA, "bought_counts"), tell(ADA, "recency_days")) == (["i7"], [1], 0)
    moved_on(intake)
    assert (tell(ADA), tell(ADA, "bought_counts"), tell(ADA, "recency_days")) == (["i7"], [1], 0)


def test_three_who_are_one_are_one_at_once(intake: Intake, tell: Tell) -> None:
    other = {"cookie": "d"}
    assert intake.accept([did("purchase", who, item) for who, item in ((ADA, "i1"), (COOKIE, "i2"), (other, "i3"))]).accepted == 3
    moved_on(intake)
    assert intake.accept([did("login", {**COOKIE, "device": "phone"}), did("login", {**other, "device": "phone"})]).accepted == 2
    assert intake.accept([did("login", {**ADA, **COOKIE})]).accepted == 1
    assert tell(ADA) == ["i1", "i2", "i3"]
    moved_on(intake)
    assert tell(ADA) == ["i1", "i2", "i3"]


def test_what_falls_apart_again_before_it_is_stored_is_not_theirs(intake: Intake, tell: Tell) -> None:
    assert intake.accept([did("purchase", ADA, "i3"), did("purchase", TABLET, "i7"), did("view_item", BOB, "i1")]).accepted == 3
    moved_on(intake)
    # both sign in on the tablet: it is nobody's
    assert intake.accept([did("login", {**ADA, **TABLET}), did("login", {**BOB, **TABLET})]).accepted == 2
    assert tell(ADA) == ["i3"]
    moved_on(intake)
    assert tell(ADA) == ["i3"]


def test_one_who_signs_in_while_rows_are_written_keeps_their_past(intake: Intake, tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert intake.accept([did("purchase", ADA, "i3"), did("purchase", COOKIE, "i7")]).accepted == 2
    moved_on(intake)
    assert intake.accept([did("view_item", {"cookie": "other"}, "i1")]).accepted == 1
    take = intake.identities.take_disturbed

    def meanwhile() -> set[str]:
        monkeypatch.undo()
        assert intake.accept([did("login", {**ADA, **COOKIE})]).accepted == 1
        return take()

    monkeypatch.setattr(intake.identities, "take_disturbed", meanwhile)
    with intake._drain._moving:
        intake._drain._drain_some()
    for _ in range(2):
        moved_on(intake)
        assert tell(ADA) == ["i3", "i7"]


def test_nor_does_a_slow_disk_lose_it(intake: Intake, tell: Tell) -> None:
    assert intake.accept([did("purchase", ADA, "i3"), did("purchase", COOKIE, "i7")]).accepted == 2
    moved_on(intake)
    assert intake.accept([did("view_item", {"cookie": "other"}, "i1")]).accepted == 1
    commit, begun, go_on = intake.inbox._commit, threading.Event(), threading.Event()

    def slow(jobs: Any) -> None:
        begun.set()
        assert go_on.wait(30)
        return commit(jobs)

    intake.inbox._commit = slow  # type: ignore[method-assign]
    signing_in = threading.Thread(target=lambda: intake.accept([did("login", {**ADA, **COOKIE})]))
    signing_in.start()
    assert begun.wait(30)
    intake.drain()
    go_on.set()
    signing_in.join()
    for k in range(3):
        moved_on(intake)
        assert tell(ADA) == ["i3", "i7"]
        assert intake.accept([did("view_item", ADA, f"i{k}")]).accepted == 1


def test_what_waits_while_rows_of_a_later_moment_are_written_is_not_lost(intake: Intake, tell: Tell, tiny: TinyShop) -> None:
    assert intake.accept([did("purchase", ADA, "i3")]).accepted == 1
    moved_on(intake)
    assert intake.accept([did("purchase", ADA, "i7")]).accepted == 1
    later = NEW_YEAR + timedelta(seconds=30)
    CustomerRows(tiny.home, FeatureStore(tiny.home), tiny.log).bring_up_to(later, NEW_YEAR - timedelta(days=1))
    for _ in range(2):
        moved_on(intake)
        assert tell(ADA) == ["i3", "i7"]
        assert intake.accept([did("view_item", ADA, "i1")]).accepted == 1
    her = intake.identities.resolve(ADA)
    assert her is not None
    at = NEW_YEAR + timedelta(hours=1)
    intake.drain()
    [replayed] = [state for _, who, state in states(open_timeline(tiny.home, at), [at]) if who == her]
    moment = Moment(at, tiny.shop.timezone)
    assert replayed.features(moment, ("history",))["recent_item_ids"] == tell(ADA, "recent_item_ids")


def test_lines_of_one_item_in_one_event_all_count_in_the_cart(intake: Intake, tell: Tell) -> None:
    assert intake.accept([did("add_to_cart", ADA, "i3", "i3")]).accepted == 1
    assert (tell(ADA, "cart_quantities"), tell(ADA, "cart_minor")) == ([2], 200)


def test_who_has_withdrawn_has_no_row_of_before(intake: Intake, tiny: TinyShop) -> None:
    assert intake.accept([did("purchase", {"loyalty_card": "1"}, "i3")]).accepted == 1
    moved_on(intake)
    store = FeatureStore(tiny.home)
    assert store.online("customer_v1", [customer("1")])[0]["customer_state_at"] is not None
    tiny.add(event("no", "consent_update", NEW_YEAR - timedelta(hours=1), consent={"purposes": {"personalization": False}}))
    CustomerRows(tiny.home, store, tiny.log).bring_up_to(NEW_YEAR + timedelta(minutes=5), NEW_YEAR - timedelta(days=1))
    [row] = store.online("customer_v1", [customer("1")])
    assert (row["customer_state_at"], row["customer_activity_at"]) == (None, None)


def test_whoever_signs_in_leaves_nothing_behind_in_memory(intake: Intake) -> None:
    for k in range(20):
        visitor = {"cookie": f"visitor-{k}"}
        assert intake.accept([did("login", {"user_id": f"user-{k}"})]).accepted == 1
        assert intake.accept([did("view_item", visitor, "i1"), did("login", {"user_id": f"user-{k}", **visitor})]).accepted == 2
    moved_on(intake)
    assert not intake.recent.minted
    assert not intake.recent._formers
    assert not intake.recent._touches
