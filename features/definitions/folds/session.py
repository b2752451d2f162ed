"""The visit under way: what was viewed, searched and put into the cart, and what that seems to be for."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from features.definitions.feature import Moment
from features.definitions.folds.fold import Fold, Output, Touch, take_newest

SESSION_GAP_SECONDS = 1_800
"""After so long without an event a visit is over, unless its client says that it is the same session."""
TOUCH_LIMIT = 100
ITEMS_OF_EVENT = 10
QUERY_CHARACTERS = 200
SHOWN_ITEMS, SHOWN_QUERIES = 10, 5
_KINDS = {
    "view_item": "view", "select_item": "view", "search": "search", "add_to_cart": "add", "begin_checkout": "checkout", "purchase": "buy",
}  # fmt: skip


class Act(NamedTuple):
    """One thing done: when (Unix milliseconds), by which event, of which kind, on which item or for which words, in which session."""

    at_ms: int
    key: str
    kind: str
    what: str
    session_id: str


class Session(msgspec.Struct):
    """The newest acts of a customer, oldest first."""

    acts: list[Act] = []


class SessionFold(Fold[Session]):
    """The newest visit, told from the customer's newest acts."""

    name = "session"
    scope = "session"
    state = Session
    reads = frozenset(_KINDS)
    outputs = (
        Output("session_started_at", "integer", "when the newest visit began (Unix seconds)"),
        Output("session_last_at", "integer", "when something was done in it last (Unix seconds)"),
        Output("session_is_open", "truth", "whether it is still under way"),
        Output("session_item_ids", "texts", "the items viewed in it, the last first"),
        Output("session_queries", "texts", "what was searched for in it, the last first"),
        Output("session_added_item_ids", "texts", "the items put into the cart in it, the last first"),
        Output("session_intent", "text", "looking, searching, comparing, buying, or bought"),
    )

    def step(self, state: Session, touch: Touch) -> None:
        """Take in what was done."""
        kind = _KINDS[touch.name]
        about = [""]
        if kind == "search":
            about = [(touch.query or "")[:QUERY_CHARACTERS]]
        elif kind in ("view", "add"):
            about = [line.item_id for line in touch.lines[:ITEMS_OF_EVENT]]
        for what in about:
            take_newest(state.acts, Act(touch.at_ms, touch.key, kind, what, touch.session_id or ""), TOUCH_LIMIT)

    def joined(self, one: Session, other: Session) -> Session:
        """The newest acts of both."""
        both = Session(list(one.acts))
        for act in other.acts:
            take_newest(both.acts, act, TOUCH_LIMIT)
        return both

    def features(self, state: Session, moment: Moment) -> dict[str, Any]:
        """What the newest visit tells."""
        acts = newest_visit(state.acts)
        if not acts:
            return dict(self.nothing())
        viewed, queries, added = (_last_first([a.what for a in acts if a.kind == kind]) for kind in ("view", "search", "add"))
        return {
            "session_started_at": acts[0].at_ms // 1000,
            "session_last_at": acts[-1].at_ms // 1000,
            "session_is_open": moment.as_of.timestamp() - acts[-1].at_ms / 1000 <= SESSION_GAP_SECONDS,
            "session_item_ids": viewed[:SHOWN_ITEMS],
            "session_queries": queries[:SHOWN_QUERIES],
            "session_added_item_ids": added[:SHOWN_ITEMS],
            "session_intent": _intent(acts, len(viewed)),
        }


def newest_visit(acts: list[Act]) -> list[Act]:
    """The acts of the last visit, oldest first: those of its session, or without any gap of half an hour."""
    found: list[Act] = []
    for act in reversed(acts):
        if found:
            named = act.session_id and found[-1].session_id
            if (act.session_id != found[-1].session_id) if named else (found[-1].at_ms - act.at_ms > SESSION_GAP_SECONDS * 1000):
                break
        found.append(act)
    return found[::-1]


def _last_first(values: list[str]) -> list[str]:
    return list(dict.fromkeys(reversed(values)))


def _intent(acts: list[Act], viewed: int) -> str:
    kinds = [act.kind for act in acts]
    if "buy" in kinds and not {"add", "checkout"} & set(kinds[len(kinds) - kinds[::-1].index("buy") :]):
        return "bought"
    if {"add", "checkout"} & set(kinds):
        return "buying"
    if viewed >= 3:
        return "comparing"
    return "searching" if "search" in kinds else "looking"
