"""Folds: one contract for all of them, an oracle for each, and the same online rows as a replay, however the events came."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import NEW_YEAR, TinyShop, event

from features.definitions.feature import Moment
from features.definitions.folds.cart import MOVE_LIMIT
from features.definitions.folds.daily_activity import DAY_LIMIT, DailyActivityFold
from features.definitions.folds.fold import Fold, Line, OutdatedStateError, Touch
from features.definitions.folds.history import HISTORY_HALF_LIFE_DAYS, HISTORY_LIMIT, RECENT_LIMIT
from features.definitions.folds.registered import FOLDS, CustomerState, nothing
from features.definitions.folds.session import TOUCH_LIMIT
from features.people.consent import Consents
from features.people.identity import Identities
from features.state.clock import fixed_clock
from features.state.home import Home
from features.store.feature_store import FeatureStore
from features.store.snapshots import states
from features.store.timeline import open_timeline
from serving.intake.inbox import Inbox
from serving.intake.intake import Intake

NOW = Moment(NEW_YEAR + timedelta(minutes=10), "America/New_York")
NAMES = (
    "purchase", "refund", "view_item", "select_item", "add_to_cart", "remove_from_cart", "search", "begin_checkout", "login",
    "message_sent", "store_visit",
)  # fmt: skip


def touch(name: str, minutes_ago: float, items: Sequence[Any] = (), event_id: str | None = None, **more: Any) -> Touch:
    """Something that was done so many minutes before the new year."""
    at = NEW_YEAR - timedelta(minutes=minutes_ago)
    lines = tuple(Line(*each) if isinstance(each, tuple) else Line(each, 1, 100) for each in items)
    return Touch(event_id or f"{name}-{minutes_ago}-{items}", name, at, at.astimezone(UTC).date(), lines=lines, **more)


def folded(fold: Fold[Any], touches: Sequence[Touch]) -> Any:
    state = fold.empty()
    for each in touches:
        if fold.reads is None or each.name in fold.reads:
            fold.step(state, each)
    return state


def told(name: str, *touches: Touch, at: Moment = NOW) -> dict[str, Any]:
    """What one fold tells of these events."""
    state = CustomerState()
    for each in touches:
        state.step(each)
    return state.features(at, (name,))


def nearly(state: Any) -> Any:
    """A state as plain values, sums of fractions to nine digits: their last digit depends on who is added first."""
    if isinstance(state, float):
        return float(f"{state:.9g}")
    if isinstance(state, dict):
        return {key: nearly(value) for key, value in sorted(state.items())}
    if isinstance(state, list | tuple):
        return [nearly(value) for value in state]
    return {name: nearly(getattr(state, name)) for name in state.__struct_fields__} if hasattr(state, "__struct_fields__") else state


TOUCHES = st.lists(
    st.builds(
        lambda number, name, seconds, channel, store, session, items: Touch(
            f"e{number}", name, NEW_YEAR - timedelta(seconds=seconds), (NEW_YEAR - timedelta(seconds=seconds)).date(), channel, store,
            session, f"words {seconds}", f"o{number % 3}", None, tuple(Line(item, units, 50 * units, units // 3) for item, units in items),
        ),
        st.integers(0, 10**9),
        st.sampled_from(NAMES),
        st.integers(0, 200_000),
        st.sampled_from(["web", "store", "app", None]),
        st.sampled_from(["s1", "s2", None]),
        st.sampled_from(["v1", "v2", None]),
        st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=3),
    ),
    max_size=25,
    unique_by=lambda each: each.event_id,
)  # fmt: skip


@pytest.mark.parametrize("fold", FOLDS, ids=lambda fold: fold.name)
class TestEveryFold:
    """What the intake, the replay and the reader rely on."""

    @given(touches=TOUCHES, chance=st.randoms(use_true_random=False))
    @settings(max_examples=60)
    def test_the_state_is_the_same_in_whatever_order_the_events_came(
        self, fold: Fold[Any], touches: list[Touch], chance: random.Random
    ) -> None:
        shuffled = list(touches)
        chance.shuffle(shuffled)
        assert nearly(folded(fold, touches)) == nearly(folded(fold, shuffled))

    @given(touches=TOUCHES, cut=st.integers(0, 25))
    @settings(max_examples=60)
    def test_two_customers_who_prove_to_be_one_are_who_they_would_have_been(self, fold: Fold[Any], touches: list[Touch], cut: int) -> None:
        apart = fold.joined(folded(fold, touches[:cut]), folded(fold, touches[cut:]))
        assert nearly(apart) == nearly(folded(fold, touches))

    @given(touches=TOUCHES)
    @settings(max_examples=60)
    def test_a_state_survives_being_stored(self, fold: Fold[Any], touches: list[Touch]) -> None:
        state = folded(fold, touches)
        again = fold.decode(fold.encode(state))
        assert again == state
        assert fold.encode(again) == fold.encode(state)
        assert fold.features(again, NOW) == fold.features(state, NOW)

    @given(touches=TOUCHES)
    @settings(max_examples=30)
    def test_it_tells_what_it_declares_and_nothing_else(self, fold: Fold[Any], touches: list[Touch]) -> None:
        kinds = {"integer": int, "text": str, "truth": bool, "texts": list, "integers": list, "floats": list, "float": float}
        found = fold.features(folded(fold, touches), NOW)
        assert list(found) == [output.name for output in fold.outputs] == list(fold.nothing())
        for output in fold.outputs:
            assert found[output.name] is None or isinstance(found[output.name], kinds[output.dtype]), output

    def test_joining_leaves_both_as_they_were(self, fold: Fold[Any]) -> None:
        one = folded(fold, [touch("purchase", 9, ["a"]), touch("add_to_cart", 5, ["b"]), touch("view_item", 4, ["c"])])
        other = folded(fold, [touch("purchase", 3, ["a"]), touch("add_to_cart", 2, ["b"]), touch("refund", 1, ["a"])])
        before = fold.encode(one), fold.encode(other)
        fold.joined(one, other)
        assert (fold.encode(one), fold.encode(other)) == before

    def test_a_state_of_another_definition_or_a_damaged_one_is_refused(self, fold: Fold[Any]) -> None:
        text = fold.encode(fold.empty())
        for wrong in (f"00000000:{text.partition(':')[2]}", text[:-1], "", "{}"):
            with pytest.raises(OutdatedStateError, match=fold.name):
                fold.decode(wrong)
        assert fold.decode(None) == fold.empty()

    def test_a_customer_of_whom_much_is_known_stays_bounded(self, fold: Fold[Any]) -> None:
        much = [
            touch(
                name, k * 60, [(f"i{k}-{n}", 1, 1) for n in range(5)], f"{name}-{k}", session_id=f"v{k}", store_id=f"s{k}", query="q" * 900
            )
            for k in range(3_000)
            for name in ("purchase", "view_item", "add_to_cart", "search")
        ]
        assert len(fold.encode(folded(fold, much))) < 300_000


@given(touches=TOUCHES)
def test_what_names_its_events_takes_each_in_once(touches: list[Touch]) -> None:
    once, twice = CustomerState(), CustomerState()
    for each in touches:
        once.step(each)
    for each in [*touches, *reversed(touches)]:
        twice.step(each)
    for name in ("session", "cart", "last_touch"):
        assert once.features(NOW, (name,)) == twice.features(NOW, (name,))


class TestHistory:
    @given(TOUCHES)
    def test_the_weight_is_the_sum_of_decayed_purchases(self, seen: list[Touch]) -> None:
        purchases = [each for each in seen if each.name == "purchase"]
        row = told("history", *purchases)
        for item, count, last, weight in zip(*(row[f"bought_{c}"] for c in ("item_ids", "counts", "last_at", "weights")), strict=True):
            times = [each.at for each in purchases if any(line.item_id == item for line in each.bought())]
            assert (count, last) == (len(times), max(times))
            assert weight == pytest.approx(sum(2 ** (-(last - t) / (HISTORY_HALF_LIFE_DAYS * 86_400)) for t in times), rel=1e-9)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_what_was_returned_whole_was_not_bought_even_if_the_return_came_first(self, order: tuple[int, int]) -> None:
        both = [touch("purchase", 60, [("a", 2, 200), ("b", 1, 100)]), touch("refund", 10, [("a", 2, 200)])]
        row = told("history", *(both[k] for k in order))
        assert row["bought_item_ids"] == ["b"]

    def test_what_was_returned_in_part_counts_in_part(self) -> None:
        row = told("history", touch("purchase", 60, [("a", 4, 400)]), touch("refund", 10, [("a", 1, 100)]))
        assert (row["bought_item_ids"], row["bought_counts"], row["bought_weights"]) == (["a"], [1], [0.75])

    def test_what_was_bought_with_a_coupon_is_told_beside_what_was_bought(self) -> None:
        row = told(
            "history",
            touch("purchase", 60, [("a", 1, 100, 20), ("b", 1, 100)]),
            touch("purchase", 30, [("a", 1, 100, 20), ("c", 1, 100, 20)]),
            touch("purchase", 20, ["a"]),
            touch("refund", 10, ["c"]),
        )
        assert (row["bought_item_ids"], row["bought_counts"]) == (["a", "b"], [3, 1])
        assert (row["coupon_item_ids"], row["coupon_counts"]) == (["a"], [2])

    def test_bought_again_after_a_return_it_is_there_again(self) -> None:
        row = told("history", touch("purchase", 60, ["a"]), touch("refund", 50, ["a"]), touch("purchase", 5, ["a"]))
        assert row["bought_item_ids"] == ["a"]
        assert row["bought_counts"] == [1]

    def test_what_is_kept_is_the_newest_and_costs_no_square(self) -> None:
        state = CustomerState()
        for k in range(8, 0, -1):
            state.step(touch("purchase", k * 1440, [f"i{k}-{n}" for n in range(5_000)]))
        kept = state.features(NOW, ("history",))["bought_item_ids"]
        assert len(kept) == HISTORY_LIMIT
        assert {item.split("-")[0] for item in kept} == {"i1"}

    def test_the_newest_interests_are_kept_in_their_order(self) -> None:
        row = told("history", *(touch("view_item", k, [f"i{k}"]) for k in range(RECENT_LIMIT + 5)))
        assert row["recent_item_ids"] == [f"i{k}" for k in range(RECENT_LIMIT - 1, -1, -1)]


class TestSession:
    def test_it_tells_what_was_viewed_searched_and_added_in_the_newest_visit(self) -> None:
        row = told(
            "session",
            touch("view_item", 300, ["old"], session_id="v1"),
            touch("search", 20, query="red shoes", session_id="v2"),
            touch("view_item", 15, ["a"], session_id="v2"),
            touch("view_item", 12, ["b"], session_id="v2"),
            touch("add_to_cart", 5, ["b"], session_id="v2"),
        )
        assert row["session_item_ids"] == ["b", "a"]
        assert row["session_queries"] == ["red shoes"]
        assert row["session_added_item_ids"] == ["b"]
        assert row["session_intent"] == "buying"
        assert row["session_is_open"] is True
        assert row["session_started_at"] == int((NEW_YEAR - timedelta(minutes=20)).timestamp())

    @pytest.mark.parametrize(
        ("done", "intent"),
        [
            ([("view_item", 9, ["a"])], "looking"),
            ([("search", 9, [])], "searching"),
            ([("view_item", 9, ["a"]), ("view_item", 8, ["b"]), ("view_item", 7, ["c"])], "comparing"),
            ([("add_to_cart", 9, ["a"])], "buying"),
            ([("add_to_cart", 9, ["a"]), ("purchase", 8, ["a"])], "bought"),
            ([("purchase", 9, ["a"]), ("add_to_cart", 8, ["b"])], "buying"),
        ],
    )
    def test_what_the_visit_seems_to_be_for(self, done: list[tuple[str, float, list[str]]], intent: str) -> None:
        assert told("session", *(touch(*each) for each in done))["session_intent"] == intent

    def test_without_a_name_half_an_hour_of_silence_ends_a_visit(self) -> None:
        row = told("session", touch("view_item", 100, ["a"]), touch("view_item", 60, ["b"]), touch("view_item", 40, ["c"]))
        assert row["session_item_ids"] == ["c", "b"]
        assert row["session_is_open"] is False

    def test_what_is_done_within_one_second_has_its_order(self) -> None:
        first = touch("view_item", 5, ["a"], "zzz")
        second = first._replace(event_id="aaa", occurred_at=first.occurred_at + timedelta(milliseconds=200), lines=(Line("b", 1, 0),))
        assert told("session", second, first)["session_item_ids"] == ["b", "a"]

    def test_the_newest_acts_are_kept(self) -> None:
        row = told("session", *(touch("view_item", k / 10, [f"i{k}"], session_id="v") for k in range(TOUCH_LIMIT * 2)))
        assert row["session_item_ids"] == [f"i{k}" for k in range(10)]


class TestCart:
    def test_it_is_one_across_devices_and_knows_when_it_was_touched(self) -> None:
        row = told(
            "cart",
            touch("add_to_cart", 90, [("a", 2, 200)], channel="app"),
            touch("add_to_cart", 60, [("b", 1, 50)], channel="web"),
            touch("remove_from_cart", 30, [("a", 1, 100)], channel="web"),
        )
        assert (row["cart_item_ids"], row["cart_quantities"], row["cart_minor"]) == (["a", "b"], [1, 1], 150)
        assert row["cart_touched_at"] == int((NEW_YEAR - timedelta(minutes=30)).timestamp())

    def test_an_order_empties_it_and_a_purchase_in_a_store_does_not(self) -> None:
        added = touch("add_to_cart", 60, ["a"])
        assert told("cart", added, touch("purchase", 30, ["x"], channel="store"))["cart_item_ids"] == ["a"]
        assert told("cart", added, touch("purchase", 30, ["a"], channel="web")) == {
            "cart_item_ids": [], "cart_quantities": [], "cart_minor": 0, "cart_touched_at": None,
        }  # fmt: skip
        assert told("cart", touch("purchase", 30, ["a"], channel="web"), touch("add_to_cart", 10, ["b"]), added)["cart_item_ids"] == ["b"]

    def test_what_is_taken_out_of_an_empty_cart_is_not_owed(self) -> None:
        row = told("cart", touch("remove_from_cart", 60, [("a", 5, 500)]), touch("add_to_cart", 30, ["a"]))
        assert (row["cart_item_ids"], row["cart_quantities"]) == (["a"], [1])

    def test_the_newest_changes_are_kept(self) -> None:
        row = told("cart", *(touch("add_to_cart", k, [f"i{k}"]) for k in range(MOVE_LIMIT + 50)))
        assert set(row["cart_item_ids"]) == {f"i{k}" for k in range(MOVE_LIMIT)}


class TestLastTouch:
    def test_it_tells_the_channel_the_store_and_the_time(self) -> None:
        row = told(
            "last_touch",
            touch("purchase", 90, ["a"], channel="store", store_id="s7"),
            touch("view_item", 10, ["a"], channel="web"),
            touch("message_sent", 1, channel="email"),
        )
        assert (row["last_channel"], row["last_store_id"]) == ("web", "s7")
        assert row["last_touch_at"] == int((NEW_YEAR - timedelta(minutes=10)).timestamp())
        assert row["channels_used"] == ["web", "store"], "what the shop sent is not what the customer did"


class TestDailyActivity:
    def test_a_day_holds_orders_and_what_was_paid_less_what_was_paid_back(self) -> None:
        day = 1440
        row = told(
            "daily_activity",
            touch("purchase", 3 * day, [("a", 1, 500)]),
            touch("view_item", 3 * day + 1, ["b"]),
            touch("refund", 2 * day, [("a", 1, 200)]),
            touch("purchase", 60 * day, [("z", 1, 900)]),
        )
        assert (row["active_events"], row["active_orders"], row["active_net_minor"]) == ([2, 1], [1, 0], [500, -200])

    def test_the_newest_days_are_kept(self) -> None:
        state = CustomerState()
        for k in range(DAY_LIMIT + 30):
            state.step(touch("store_visit", k * 1440))
        assert len(state._state(DailyActivityFold()).days) == DAY_LIMIT


def test_of_nobody_nothing_is_told() -> None:
    assert set(nothing().values()) == {None}
    names = [output.name for fold in FOLDS for output in fold.outputs]
    assert len(names) == len(set(names)), "no two folds tell a thing of the same name"


class KeptUpContract:
    """The online states of customers whose events came late, twice, out of order and in any batches are those of a replay."""

    @pytest.fixture
    def store(self, tiny: TinyShop) -> FeatureStore:
        raise NotImplementedError

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_they_equal_a_replay(self, store: FeatureStore, tiny: TinyShop, seed: int) -> None:
        chance = random.Random(seed)
        store.apply()
        identities = Identities(tiny.home)
        intake = Intake(
            tiny.home,
            fixed_clock(NEW_YEAR),
            Inbox(tiny.home, fixed_clock(NEW_YEAR)),
            store,
            identities,
            Consents(tiny.home, tiny.shop.consent),
        )
        said = []
        for number in range(120):
            name = chance.choice(["purchase", "refund", "view_item", "add_to_cart", "remove_from_cart", "search", "login"])
            items = [] if name in ("search", "login") else [(f"i{chance.randrange(5)}", chance.randrange(1, 4), 100)]
            at = NEW_YEAR - timedelta(minutes=chance.randrange(100_000))
            more = {"channel": chance.choice(["web", "app", "store"]), "session_id": f"v{number // 30}", "query": "q"}
            said.append(event(f"e{number}", name, at, f"{chance.randrange(3)}", items, **more))
        sent = [*said, *chance.sample(said, 40)]
        chance.shuffle(sent)
        while sent:
            size = chance.randrange(1, 25)
            assert intake.accept(sent[:size]).rejected == 0
            sent = sent[size:]
            if chance.random() < 0.5:
                intake.drain()
        intake.drain()
        at = NEW_YEAR + timedelta(hours=1)
        replayed = {customer: state for _, customer, state in states(open_timeline(tiny.home, at), [at])}
        customers = sorted(identities.customers())
        assert sorted(replayed) == customers
        moment = Moment(at, tiny.shop.timezone)
        for customer, row in zip(customers, store.online("state_v1", customers), strict=True):
            ours, theirs = CustomerState.from_row(row).features(moment), replayed[customer].features(moment)
            assert nearly(ours) == nearly(theirs)
        intake.close()


class TestKeptUpInSqlite(KeptUpContract):
    @pytest.fixture
    def store(self, tiny: TinyShop) -> FeatureStore:
        return FeatureStore(tiny.home)


class TestKeptUpInRedis(KeptUpContract):
    @pytest.fixture
    def store(self, tiny: TinyShop, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
        import redis

        host, port = redis_url.split(":")
        redis.Redis(host, int(port)).flushall()
        monkeypatch.setenv("UBIQUO_REDIS", redis_url)
        return FeatureStore(Home(tiny.home.root))
