"""Whatever comes in, the work that it causes is bounded by its size."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import parse
from limits.strategies import FixedWindowRateLimiter
from scene import NEW_YEAR, ROOT

from features.events.event import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_ID,
    MAX_ITEMS,
    MAX_LONG_TEXT,
    MAX_NUMBER_CHARACTERS,
    MAX_NUMBER_DIGITS,
    MAX_TEXT,
    MAX_TRAITS,
    MAX_VALUES,
    Event,
    RejectedEvent,
    bounded,
    parse_event,
)
from features.events.identifiers import MAX_IDENTIFIER, IdentifierError, PersonalSearch, holds_personal, normalise, shortened
from features.sources import ga4, segment
from features.sources.money import minor, number
from serving.http import rates
from serving.http.problems import HttpProblem
from serving.http.rates import Counters
from serving.http.trackers import TRACKERS

NOW = datetime(2018, 1, 1, 12, tzinfo=UTC)
SHORT_AND_HUGE = [
    "1e99999999", "-1e99999999", "1e300000", "1e40000", "0e99999999", "1e-99999999", "1e13", "9" * 14, "9" * 5000, 10**14, 10**4000, 1e300,
    "Infinity", "-Infinity", "NaN", "sNaN", "", "two", True, None, [], {},
]  # fmt: skip
"""Numbers, and what is none, that are short to write."""


def segment_product(**product: Any) -> dict[str, Any]:
    return {
        "type": "track", "event": "Order Completed", "userId": "u1", "messageId": "m1",
        "properties": {"currency": "USD", "products": [{"product_id": "1", **product}]},
    }  # fmt: skip


def ga4_item(**item: Any) -> dict[str, Any]:
    [said] = ga4.messages(
        {"client_id": "c1", "events": [{"name": "purchase", "params": {"currency": "USD", "items": [{"item_id": "1", **item}]}}]}
    )
    return said


def nested(depth: int, inside: Any = 1) -> Any:
    """An object within *depth* - 1 others."""
    for _ in range(depth):
        inside = {"a": inside}
    return inside


# --- numbers


@pytest.mark.parametrize("value", SHORT_AND_HUGE, ids=lambda value: repr(value)[:16])
@pytest.mark.parametrize("field", ["quantity", "price", "discount"])
def test_a_number_without_measure_is_refused_with_its_field(value: Any, field: str) -> None:
    if value is None and field != "quantity":
        return
    for adapter, message, place in (
        (segment, segment_product(**{field: value}), f"properties.products[0].{field}"),
        (ga4, ga4_item(**{field: value}), f"params.items[0].{field}"),
    ):
        with pytest.raises(RejectedEvent) as rejected:
            adapter.to_event(message, NOW, "USD")  # type: ignore[attr-defined]
        assert rejected.value.field.startswith((place, place.replace("params", "event.params")))


def test_the_error_tells_the_limit() -> None:
    with pytest.raises(RejectedEvent, match=f"{MAX_NUMBER_DIGITS} digits before the point"):
        number("1e99999999", "price")
    with pytest.raises(RejectedEvent, match=f"hold {MAX_NUMBER_CHARACTERS} characters"):
        number("1" * 65, "price")


@pytest.mark.parametrize(
    ("value", "cents"),
    [
        ("19.99", 1999),
        (19.99, 1999),
        (0.1 + 0.2, 30),
        (1.1102230246251565e-16, 0),
        (5e-324, 0),
        ("9" * 10, 999999999900),
        (0, 0),
        ("1e3", 100000),
    ],
)
def test_what_honest_clients_send_is_taken(value: Any, cents: int) -> None:
    assert minor(number(value, "price"), "USD", "price") == cents


@given(st.one_of(st.text(max_size=80), st.from_regex(r"-?[0-9.]{1,20}[eE]-?[0-9]{1,12}"), st.floats(), st.integers(), st.booleans()))
def test_a_number_is_small_whatever_it_was(value: Any) -> None:
    with contextlib.suppress(RejectedEvent):
        found = number(value, "price")
        assert abs(found) < Decimal(10) ** MAX_NUMBER_DIGITS
        assert len(str(minor(abs(found), "USD", "price"))) <= MAX_NUMBER_DIGITS + 2


# --- messages


def walks(message: Any) -> bool:
    try:
        bounded(message)
    except RejectedEvent:
        return False
    return True


@pytest.mark.parametrize(
    ("fits", "exceeds"),
    [
        (nested(MAX_DEPTH), nested(MAX_DEPTH + 1)),
        (nested(2), nested(900)),
        ([0] * (MAX_VALUES - 1), [0] * MAX_VALUES),
        ({"a": "x" * MAX_LONG_TEXT}, {"a": "x" * (MAX_LONG_TEXT + 1)}),
        ({"x" * MAX_ID: 1}, {"x" * (MAX_ID + 1): 1}),
        (["x" * 8_000] * (MAX_CHARACTERS // 8_000), ["x" * 8_000] * (MAX_CHARACTERS // 8_000 + 1)),
        (10**40 - 1, 10**40),
        (-1e39, -1e41),
        (0.5, float("inf")),
        (0.5, float("nan")),
        ("\U0001f600", "\ud83d"),
        ([None, True], [NOW]),
        ({"a": 1}, {1: "a"}),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_a_message_is_taken_up_to_its_bounds(fits: Any, exceeds: Any) -> None:
    assert walks(fits)
    assert not walks(exceeds)


def test_a_bound_is_told_with_its_place() -> None:
    with pytest.raises(RejectedEvent, match=f"hold {MAX_LONG_TEXT} characters") as rejected:
        bounded({"properties": {"products": [{"name": "x" * 9_000}]}})
    assert rejected.value.field == "properties.products[0].name"
    with pytest.raises(RejectedEvent) as rejected:
        bounded({"ada@example.org": {"+44 20 7946 0018": "x" * 9_000}})
    assert rejected.value.field == "[...].[...]"


scraps: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(SHORT_AND_HUGE[:9]) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
large: Any = st.one_of(
    st.builds(lambda scrap, n: [scrap] * n, scraps, st.integers(0, 3_000)),
    st.builds(lambda scrap, n: {f"k{k}": scrap for k in range(n)}, scraps, st.integers(0, 3_000)),
    st.builds(lambda text, n: text * n, st.text(min_size=1, max_size=8), st.integers(0, 30_000)),
    st.builds(lambda text, n: {text * n: text * n}, st.text(min_size=1, max_size=3), st.integers(0, 30_000)),
    st.builds(nested, st.integers(0, 300), scraps),
    scraps,
)


def steps(work: Callable[[], Any]) -> int:
    """How many functions are called; those that count, compare or search run within bounds of their own."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        with contextlib.suppress(RejectedEvent):
            work()
    finally:
        sys.setprofile(None)
    return count


PLACES = [
    "properties",
    "traits",
    "context",
    "userId",
    "messageId",
    "timestamp",
    "event",
    "previousId",
    "externalIds",
    "products",
    "quantity",
    "name",
]


def message_with(place: str, value: Any) -> dict[str, Any]:
    common = {"type": "track", "event": "Order Completed", "userId": "u1", "messageId": "m1"}
    if place == "externalIds":
        return {**common, "context": {place: value}}
    if place in ("products", "quantity"):
        return segment_product(quantity=value) if place == "quantity" else {**common, "properties": {"products": value}}
    return {**common, place: value}


@given(large, st.sampled_from(PLACES), st.sampled_from(segment.CALLS))
def test_the_work_of_a_message_is_bounded_by_its_size(value: Any, place: str, call: str) -> None:
    said = {**message_with(place, value), "type": call}
    try:
        size = len(msgspec.json.encode(said))
    except (ValueError, RecursionError):
        size = 100_000
    if size > 100_000:
        return
    budget = 10_000 + 40 * size
    assert steps(lambda: parse_event(segment.to_event(said, NOW, "USD"), NOW, "USD", "GB")) <= budget
    google = {"client_id": "c", "event": {"name": "purchase", "params": {place: value, "items": value}}, "user_properties": value}
    assert steps(lambda: parse_event(ga4.to_event(google, NOW, "USD"), NOW, "USD", "GB")) <= 3 * budget
    canonical = {
        "event_id": "e",
        "name": "search",
        "occurred_at": NOW.isoformat(),
        "query": value,
        "traits": value,
        "items": value,
        place: value,
    }
    assert steps(lambda: parse_event(canonical, NOW, "USD", "GB")) <= 3 * budget


# --- texts


@pytest.mark.parametrize(
    "pattern", ["a", "@", "a@", "a@b.", '"@', '"@a.b', "+1 ", "+", "%25", "%2", "1 ", "(1", "_a", "020 7946 0018 ", "0 1", "\u0315\u0300"]
)
def test_the_search_for_what_is_personal_calls_little(pattern: str) -> None:
    text = (pattern * MAX_TEXT)[:MAX_TEXT]
    PersonalSearch("GB").blotted("020 7946 0018", MAX_TEXT)  # the country's plan is read once
    assert steps(lambda: PersonalSearch("GB").blotted(text, MAX_TEXT)) < 100_000
    assert steps(lambda: holds_personal(text)) < 10_000


def canonical(**fields: Any) -> dict[str, Any]:
    return {"event_id": "e1", "name": "custom", "occurred_at": NOW.isoformat(), **fields}


@pytest.mark.parametrize(
    ("fits", "exceeds", "field"),
    [
        ({"items": [{"item_id": "i"}] * MAX_ITEMS}, {"items": [{"item_id": "i"}] * (MAX_ITEMS + 1)}, "items"),
        ({"traits": {str(k): "" for k in range(MAX_TRAITS)}}, {"traits": {str(k): "" for k in range(MAX_TRAITS + 1)}}, "traits"),
        ({"traits": {"a": "x" * MAX_TEXT}}, {"traits": {"a": "x" * (MAX_TEXT + 1)}}, "traits[...]"),
        ({"traits": {"x" * MAX_ID: "a"}}, {"traits": {"x" * (MAX_ID + 1): "a"}}, "traits"),
        ({"query": "x" * MAX_TEXT}, {"query": "x" * (MAX_TEXT + 1)}, "query"),
        ({"session_id": "x" * MAX_ID}, {"session_id": "x" * (MAX_ID + 1)}, "session_id"),
        ({"session_id": "\U0001f600"}, {"session_id": "\ud83d"}, "$"),
        ({}, {"x" * 100_000: 1}, "$"),
        ({}, {"items": [{"item_id": "i", "quantity": 10**4000}]}, "items[0].quantity"),
        ({}, {"items": nested(900)}, "items"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_an_event_is_taken_up_to_its_bounds(fits: dict[str, Any], exceeds: dict[str, Any], field: str) -> None:
    assert isinstance(parse_event(canonical(**fits), NOW), Event)
    with pytest.raises(RejectedEvent) as rejected:
        parse_event(canonical(**exceeds), NOW)
    assert rejected.value.field == field
    assert len(str(rejected.value)) < 1_000


@pytest.mark.parametrize("kind", ["email", "phone", "user_id"])
def test_an_identifier_is_measured_before_it_is_normalised(kind: Any) -> None:
    with pytest.raises(IdentifierError, match=f"{kind}: an identifier may hold {MAX_IDENTIFIER} characters"):
        normalise(kind, "a@" * 500_000)


@given(st.text("ab @%.", max_size=60), st.integers(1, 40))
def test_a_cut_leaves_no_half_of_an_address(text: str, most: int) -> None:
    cut = shortened(text, most)
    assert len(cut) <= most
    assert text.startswith(cut)
    if cut != text and ("@" in cut.rpartition(" ")[2]):
        assert cut.rpartition(" ")[2] in text.split(" ")


# --- bodies


def test_a_request_of_googles_protocol_is_no_larger_than_the_protocol_allows() -> None:
    body = msgspec.json.encode({"client_id": "c", "events": [{"name": "x"}] * 25, "user_properties": {"a": "x" * ga4.MAX_BYTES}})
    with pytest.raises(HttpProblem, match=f"{ga4.MAX_BYTES} bytes"):
        TRACKERS["/mp/collect"].messages({}, body)


@pytest.mark.parametrize("context", [{"a": "x" * 5_000}, nested(100), {"a": [0] * 30_000}], ids=["long", "deep", "wide"])
def test_what_a_batch_says_of_all_its_messages_is_bounded(context: Any) -> None:
    [said] = TRACKERS["/v1/batch"].messages({}, msgspec.json.encode({"batch": [{"type": "track"}], "context": context}))
    assert said == {"type": "track"}


ATTACKS = """
import contextlib, json, sys
from datetime import UTC, datetime
from features.sources import ga4, segment
from features.events.event import RejectedEvent, parse_event
from features.events.identifiers import IdentifierError, normalise
now = datetime(2018, 1, 1, 12, tzinfo=UTC)
ways = {"segment": segment.to_event, "ga4": ga4.to_event, "canonical": lambda said, at, currency: said}
for way, said in json.load(sys.stdin):
    with contextlib.suppress(RejectedEvent):
        parse_event(ways[way](said, now, "USD"), now, "USD", "GB")
with contextlib.suppress(IdentifierError):
    normalise("email", "a" * 1_000_000 + "@")
print("done")
"""


def test_messages_that_held_a_worker_for_minutes_are_done_with_at_once() -> None:
    attacks: list[tuple[str, Any]] = [
        *(("segment", segment_product(**{field: value})) for field in ("quantity", "price") for value in SHORT_AND_HUGE[:9]),
        *(("ga4", ga4_item(**{field: value})) for field in ("quantity", "price") for value in SHORT_AND_HUGE[:9]),
        ("segment", {**segment_product(), "properties": {"currency": "USD", "products": [{"product_id": "1", "price": "1e40000"}] * 200}}),
        *(("canonical", canonical(traits={"note": text * 1_000_000})) for text in ("a", "+1 ", "@")),
        *(("canonical", canonical(query=text * 1_000_000)) for text in ("a", "%25", "1 ")),
        ("canonical", canonical(traits={"_a" * 500_000: "1"})),
        ("canonical", canonical(traits={f"{k}{'_a' * 120}": "x" * MAX_TEXT for k in range(MAX_TRAITS)})),
        ("segment", {"type": "identify", "userId": "u", "traits": {"_a" * 10_000: "a" * 10_000}}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", ATTACKS], input=json.dumps(attacks), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_message_at_all_its_bounds_is_still_an_event() -> None:
    said = {"type": "track", "event": "custom", "userId": "u1", "properties": {f"k{k}": f"call {k}" for k in range(MAX_TRAITS - 1)}}
    assert len(parse_event(segment.to_event(said, NEW_YEAR, "USD"), NEW_YEAR, "USD", "GB").traits) == MAX_TRAITS


class TestRates:
    """So many requests a window and no more, whoever else asks."""

    @given(
        steps=st.lists(st.tuples(st.floats(0.0, 0.7), st.sampled_from(["a", "b"])), max_size=60),
        amount=st.integers(1, 4),
    )
    def test_a_window_begins_with_its_first_request_and_lets_so_many_through(self, steps: list[tuple[float, str]], amount: int) -> None:
        now = 100.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rates.time, "monotonic", lambda: now)
            counters = Counters()
            limiter, limit = FixedWindowRateLimiter(counters), parse(f"{amount}/second")
            begun: dict[str, tuple[float, int]] = {}
            for pause, who in steps:
                now += pause
                start, count = begun.get(who, (float("-inf"), 0))
                if now >= start + 1.0:
                    start, count = now, 0
                begun[who] = start, count + 1
                left = limiter.get_window_stats(limit, who).remaining
                assert left == max(0, amount - count)
                assert limiter.hit(limit, who) == (count < amount)

    def test_what_has_passed_is_forgotten(self) -> None:
        now = 100.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rates.time, "monotonic", lambda: now)
            counters = Counters()
            for number in range(1_000):
                counters.incr(f"address {number}", 1)
            now += rates.TIDY_SECONDS + 1.0
            counters.incr("another", 1)
            assert counters.reset() == 1
            assert counters.get("another") == 0
            assert counters.incr("another", 1) == 1
            counters.clear("another")
            assert counters.get("another") == 0
