"""What a customer did day by day: events, orders, and what they paid less what they were paid back."""

from __future__ import annotations

import heapq
from datetime import timedelta
from typing import Any

import msgspec

from features.definitions.feature import Moment
from features.definitions.folds.fold import DONE_TO_THEM, Fold, Output, Touch

DAY_LIMIT = 400
SHOWN_DAYS = 28


class Day(msgspec.Struct, array_like=True):
    """One of the shop's own days: what the customer did, how often they bought, and the net amount in minor units."""

    events: int = 0
    orders: int = 0
    net_minor: int = 0


class DailyActivity(msgspec.Struct):
    """By day (ISO 8601) what was done on it; the newest 400 days."""

    days: dict[str, Day] = {}


class DailyActivityFold(Fold[DailyActivity]):
    """A roll-up by day."""

    name = "daily_activity"
    scope = "customer"
    state = DailyActivity
    outputs = (
        Output("active_dates", "texts", "the days of the last 28 on which the customer did anything, oldest first"),
        Output("active_events", "integers", "how much they did on each"),
        Output("active_orders", "integers", "how many purchases on each"),
        Output("active_net_minor", "integers", "what they paid on each, less what they were paid back (minor units)"),
    )

    def step(self, state: DailyActivity, touch: Touch) -> None:
        """Take in one event."""
        if touch.name in DONE_TO_THEM:
            return
        day = state.days.setdefault(touch.local_date.isoformat(), Day())
        day.events += 1
        if touch.name in ("purchase", "refund"):
            amount = sum(line.amount_minor for line in touch.lines)
            day.orders += touch.name == "purchase"
            day.net_minor += amount if touch.name == "purchase" else -amount
        _bound(state)

    def joined(self, one: DailyActivity, other: DailyActivity) -> DailyActivity:
        """The sums of both, day by day."""
        both = DailyActivity({day: Day(d.events, d.orders, d.net_minor) for day, d in one.days.items()})
        for name, theirs in other.days.items():
            day = both.days.setdefault(name, Day())
            day.events, day.orders, day.net_minor = day.events + theirs.events, day.orders + theirs.orders, day.net_minor + theirs.net_minor
        _bound(both)
        return both

    def features(self, state: DailyActivity, moment: Moment) -> dict[str, Any]:
        """The last 28 days, today included."""
        since = (moment.today - timedelta(days=SHOWN_DAYS - 1)).isoformat()
        shown = {name: day for name, day in sorted(state.days.items()) if name >= since}
        return {
            "active_dates": list(shown),
            "active_events": [day.events for day in shown.values()],
            "active_orders": [day.orders for day in shown.values()],
            "active_net_minor": [day.net_minor for day in shown.values()],
        }


def _bound(state: DailyActivity) -> None:
    for name in heapq.nsmallest(len(state.days) - DAY_LIMIT, state.days):
        del state.days[name]
