"""No event can leave the identity graph, or those who come after it, in a bad state."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, TinyShop, event

from features.events.event import parse_event
from features.people.identity import Identities
from features.people.identity_graph import IdentityGraph
from features.people.identity_state import Step

KEYS = st.sampled_from([f"{kind}:{n}" for kind in ("loyalty_card", "user_id", "email", "device", "cookie", "receipt") for n in "abc"])
LESSONS = st.lists(st.tuples(st.lists(KEYS, max_size=4, unique=True), st.lists(KEYS, max_size=2)), max_size=12)


def state(graph: IdentityGraph) -> dict[str, Any]:
    held = {name: value for name, value in vars(graph).items() if name != "_undo"}
    return copy.deepcopy(held)


def check_whole(graph: IdentityGraph) -> None:
    owners = graph.owners()
    for key, owner in owners.items():
        if owner is not None:
            assert key in graph.members(owner)
    for customer in graph.customers():
        assert all(owners[key] == customer for key in graph.members(customer))


@given(LESSONS)
def test_whatever_is_said_the_graph_stays_whole_and_follows_from_its_steps(lessons: list[tuple[list[str], list[str]]]) -> None:
    graph = IdentityGraph()
    for n, (keys, previous) in enumerate(lessons):
        graph.learn(keys, previous, f"e{n}", NEW_YEAR + timedelta(seconds=n))
        check_whole(graph)
    again = IdentityGraph()
    for step in graph.news:
        again.apply(step)
    assert again.owners() == graph.owners()
    assert again.customers() == graph.customers()


@given(LESSONS, st.integers(0, 6))
def test_a_lesson_that_breaks_off_leaves_nothing_behind(lessons: list[tuple[list[str], list[str]]], after: int) -> None:
    graph = IdentityGraph()
    for n, (keys, previous) in enumerate(lessons[:-1]):
        graph.learn(keys, previous, f"e{n}", NEW_YEAR + timedelta(seconds=n))
    before = state(graph)
    left = after

    def breaking(step: Step) -> None:
        nonlocal left
        if left == 0:
            raise KeyError("an error that nobody has met yet")
        left -= 1
        IdentityGraph.record(graph, step)

    graph.record = breaking  # type: ignore[method-assign]
    broke = False
    if lessons:
        try:
            graph.learn(*lessons[-1], "last", NEW_YEAR + timedelta(days=1))
        except KeyError:
            broke = True
    del graph.record
    if broke:
        assert state(graph) == before


def test_a_cookie_that_is_its_own_past_is_no_poison(tiny: TinyShop) -> None:
    identities = Identities(tiny.home)
    said = [
        {**event("a", "alias", NEW_YEAR, None), "identifiers": {"cookie": "B"}, "previous": {"cookie": "B"}},
        event("z", "purchase", NEW_YEAR, "zoe", ["i1"]),
        {**event("y", "identify", NEW_YEAR, None), "identifiers": {"user_id": "bob", "cookie": "B"}},
        {**event("i", "identify", NEW_YEAR, None), "identifiers": {"user_id": "ann", "cookie": "B"}},
    ]
    for raw in said:
        sealed = identities.vault.seal(parse_event(raw, NEW_YEAR)).event
        identities.learn(sealed, NEW_YEAR)
    assert identities.resolve({"user_id": "ann"}) != identities.resolve({"user_id": "bob"})
    assert identities.resolve({"cookie": "B"}) is None


def test_an_event_that_cannot_be_taken_in_becomes_a_dead_letter_and_the_others_are_stored(
    tiny: TinyShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = IdentityGraph._learn

    def poisoned(self: IdentityGraph, keys: Any, previous: Any, event_id: str, known_at: Any) -> str | None:
        owner = whole(self, keys, previous, event_id, known_at)
        if event_id == "bad":
            raise KeyError("an error that nobody has met yet")
        return owner

    monkeypatch.setattr(IdentityGraph, "_learn", poisoned)
    batch = [event("good", "purchase", NEW_YEAR, "1", ["i1"]), event("bad", "login", NEW_YEAR, "2"), event("fine", "login", NEW_YEAR, "3")]
    report = tiny.add(*batch)
    assert (report.appended, report.conflicting) == (2, 1)
    assert tiny.log.count() == 2
    [letter] = tiny.log.letters.read()
    assert letter["field"] == "identifiers"
    assert Identities(tiny.home).resolve({"loyalty_card": "2"}) is None
