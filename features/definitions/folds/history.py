"""What a customer bought and kept, and what they lately looked at."""

from __future__ import annotations

import heapq
import math
from itertools import compress
from typing import Any

import msgspec

from features.definitions.feature import Moment
from features.definitions.folds.fold import Fold, Output, Touch

HISTORY_HALF_LIFE_DAYS = 90.0
HISTORY_LIMIT = 4096
RECENT_LIMIT = 50
INTEREST = {"view_item": 1.0, "select_item": 1.0, "add_to_cart": 2.0}
"""What an interest in an item weighs beside others; a purchase goes to the history instead."""


class Bought(msgspec.Struct, array_like=True):
    """What is known of one item.

    ``weight`` is the sum over the purchases of ``2 ** (-age / 90 days)``, the age measured at the last of them, in Unix seconds;
    ``with_coupon`` counts those of them that a coupon paid a part of.
    """

    purchases: int = 0
    units: int = 0
    returned: int = 0
    last_at: int = 0
    weight: float = 0.0
    first_at: int = 0
    with_coupon: int = 0

    @property
    def kept(self) -> float:
        """Which share of what was bought was not returned."""
        return 1.0 - min(self.returned / self.units, 1.0) if self.units else 0.0


class History(msgspec.Struct):
    """Items bought or returned, and the newest interests: item, Unix seconds, weight."""

    bought: dict[str, Bought] = {}
    recent: list[tuple[str, int, float]] = []


class HistoryFold(Fold[History]):
    """Purchases less returns, and interests."""

    name = "history"
    scope = "customer"
    state = History
    reads = frozenset({"purchase", "refund", *INTEREST})
    outputs = (
        Output("bought_item_ids", "texts", "the items bought and kept"),
        Output("bought_counts", "integers", "how many purchases held each"),
        Output("bought_last_at", "integers", "when each was bought last (Unix seconds)"),
        Output("bought_first_at", "integers", "when each was bought first (Unix seconds)"),
        Output("bought_weights", "floats", "the purchases of each, halved every 90 days, at its last purchase"),
        Output("coupon_item_ids", "texts", "those of them that were ever bought with a coupon"),
        Output("coupon_counts", "integers", "how many purchases of each were with one"),
        Output("recent_item_ids", "texts", "the items looked at or put into the cart last, oldest first"),
        Output("recent_at", "integers", "when (Unix seconds)"),
        Output("recent_weights", "floats", "how much interest that shows: 1 a look, 2 the cart"),
    )

    def step(self, state: History, touch: Touch) -> None:
        """Take in a purchase, a return or an interest."""
        if touch.name in INTEREST:
            at = touch.at
            self._look(state, {(at, line.item_id, INTEREST[touch.name]) for line in touch.bought()})
            return
        at = touch.at
        units: dict[str, int] = {}
        with_coupon: set[str] = set()
        for line in touch.bought():
            units[line.item_id] = units.get(line.item_id, 0) + line.quantity
            if line.coupon_minor > 0:
                with_coupon.add(line.item_id)
        for item_id, count in units.items():
            entry = state.bought.get(item_id, Bought())
            if touch.name == "refund":
                # it may come before what it takes back
                entry.returned += count
                state.bought[item_id] = entry
            else:
                state.bought[item_id] = _together(entry, Bought(1, count, 0, at, 1.0, at, int(item_id in with_coupon)))
        _bound(state)

    def joined(self, one: History, other: History) -> History:
        """Both's purchases, and the newest of both's interests."""
        items = one.bought.keys() | other.bought.keys()
        bought = {item: _together(one.bought.get(item, Bought()), other.bought.get(item, Bought())) for item in items}
        both = History(bought, list(one.recent))
        self._look(both, {(at, item_id, weight) for item_id, at, weight in other.recent})
        _bound(both)
        return both

    def features(self, state: History, moment: Moment) -> dict[str, Any]:
        """Item by item in the order of their ids."""
        # this is on the path of every answer: names alone are sorted, and little is returned
        bought = state.bought
        items = sorted(bought)
        entries = [bought[item] for item in items]
        back = any(entry.returned or not entry.units for entry in entries)
        if back:
            pairs = [(item, entry) for item, entry in zip(items, entries, strict=True) if entry.kept > 0.0]
            items, entries = [item for item, _ in pairs], [entry for _, entry in pairs]
        with_coupon = [entry.with_coupon for entry in entries]
        told: dict[str, list[Any]] = {
            "bought_item_ids": items,
            "bought_counts": [entry.purchases for entry in entries],
            "bought_last_at": [entry.last_at for entry in entries],
            "bought_first_at": [entry.first_at for entry in entries],
            "bought_weights": [entry.weight for entry in entries],
            "coupon_item_ids": list(compress(items, with_coupon)),
            "coupon_counts": list(filter(None, with_coupon)),
            "recent_item_ids": [entry[0] for entry in state.recent],
            "recent_at": [entry[1] for entry in state.recent],
            "recent_weights": [entry[2] for entry in state.recent],
        }
        if back:
            told["bought_counts"] = [math.ceil(entry.purchases * entry.kept) for entry in entries]
            told["bought_weights"] = [entry.weight * entry.kept for entry in entries]
        return told

    @staticmethod
    def _look(state: History, looked: set[tuple[int, str, float]]) -> None:
        # the newest by when it happened, not by when it came
        looked |= {(at, item_id, weight) for item_id, at, weight in state.recent}
        state.recent = [(item_id, at, weight) for at, item_id, weight in sorted(heapq.nlargest(RECENT_LIMIT, looked))]


def _together(one: Bought, other: Bought) -> Bought:
    """Purchases of the same item, their weights measured at the last of all."""
    earlier, later = (one, other) if one.last_at <= other.last_at else (other, one)
    decay = 2.0 ** (-(later.last_at - earlier.last_at) / (86_400.0 * HISTORY_HALF_LIFE_DAYS)) if earlier.purchases else 0.0
    return Bought(
        one.purchases + other.purchases, one.units + other.units, one.returned + other.returned, later.last_at,
        later.weight + earlier.weight * decay, min(each.first_at for each in (one, other) if each.purchases or each is later),
        one.with_coupon + other.with_coupon,
    )  # fmt: skip


def _bound(state: History) -> None:
    if len(state.bought) > HISTORY_LIMIT:
        # at once: one by one it would take time with the square of what a client sends
        oldest = heapq.nsmallest(len(state.bought) - HISTORY_LIMIT, state.bought, key=lambda item: (state.bought[item].last_at, item))
        for item_id in oldest:
            del state.bought[item_id]
