"""The fold over a customer's events: what intake applies to each live event, and what backfill replays."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

HISTORY_HALF_LIFE_DAYS = 90.0
HISTORY_LIMIT = 4096
RECENT_LIMIT = 50
INTEREST = {"view_item": 1.0, "select_item": 1.0, "add_to_cart": 2.0}
"""What an interest in an item weighs beside others; a purchase goes to the history instead."""


class Touch(NamedTuple):
    """The part of an event that a fold reads."""

    name: str
    occurred_at: datetime
    channel: str | None
    item_ids: list[str]


@dataclass
class History:
    """What one customer bought and lately looked at.

    ``bought`` maps an item to how many purchases held it, when the last one was (Unix seconds), and the sum over its
    purchases of ``2 ** (-age / 90 days)``, the age measured at the last of them.
    """

    bought: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    recent: list[tuple[str, int, float]] = field(default_factory=list)
    last_event_at: int = 0
    last_channel: str = ""

    def to_row(self) -> dict[str, Any]:
        """The list-valued feature row that the stores hold; the same in whatever order the events came."""
        bought = sorted(self.bought.items())
        return {
            "bought_item_ids": [item for item, _ in bought],
            "bought_counts": [entry[0] for _, entry in bought],
            "bought_last_at": [entry[1] for _, entry in bought],
            "bought_weights": [entry[2] for _, entry in bought],
            "recent_item_ids": [entry[0] for entry in self.recent],
            "recent_at": [entry[1] for entry in self.recent],
            "recent_weights": [entry[2] for entry in self.recent],
            "last_event_at": self.last_event_at,
            "last_channel": self.last_channel,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> History:
        """The inverse of ``to_row``; an unknown customer's row of nulls gives an empty history."""
        if row.get("bought_item_ids") is None:
            return cls()
        bought = zip(row["bought_counts"], row["bought_last_at"], row["bought_weights"], strict=True)
        recent = zip(row["recent_item_ids"], row["recent_at"], row["recent_weights"], strict=True)
        return cls(
            bought=dict(zip(row["bought_item_ids"], bought, strict=True)),
            recent=list(recent),
            last_event_at=row["last_event_at"],
            last_channel=row["last_channel"],
        )


def fold_history(state: History, touch: Touch) -> History:
    """Take one more event into *state*, which is changed in place and returned.

    The order in which events come makes no difference but for rounding, as long as no more items were bought than are kept.
    """
    at = int(touch.occurred_at.timestamp())
    # of two at the same moment one always wins, whichever came first
    state.last_event_at, state.last_channel = max((state.last_event_at, state.last_channel), (at, touch.channel or ""))
    if touch.name == "purchase":
        for item_id in dict.fromkeys(touch.item_ids):
            state.bought[item_id] = _bought_again(state.bought.get(item_id), at)
        if len(state.bought) > HISTORY_LIMIT:
            # at once: one by one it would take time with the square of what a client sends
            oldest = heapq.nsmallest(len(state.bought) - HISTORY_LIMIT, state.bought, key=lambda item: (state.bought[item][1], item))
            for item_id in oldest:
                del state.bought[item_id]
    elif touch.name in INTEREST:
        # the newest by when it happened, not by when it came
        looked = {(at, item_id, INTEREST[touch.name]) for item_id in touch.item_ids}
        newest = heapq.nlargest(RECENT_LIMIT, [*((at, item_id, weight) for item_id, at, weight in state.recent), *looked])
        state.recent = [(item_id, at, weight) for at, item_id, weight in reversed(newest)]
    return state


def _bought_again(entry: tuple[int, int, float] | None, at: int) -> tuple[int, int, float]:
    if entry is None:
        return 1, at, 1.0
    count, last_at, weight = entry
    decay = 2.0 ** (-abs(at - last_at) / (86_400.0 * HISTORY_HALF_LIFE_DAYS))
    # a purchase that arrives late is itself the older one
    return (count + 1, at, weight * decay + 1.0) if at >= last_at else (count + 1, last_at, weight + decay)
