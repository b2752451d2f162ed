"""What journeys would have done with past events: nothing is decided and nothing leaves."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from serving.journeys.plan import JourneyPlan, Plans, seconds_of
from serving.journeys.runner import CALLED_OFF, CONVERTED, DONE

BEGAN = "began"
END = datetime.max.replace(tzinfo=UTC)
Key = tuple[str, str]
"""A customer and a journey."""


class _At(NamedTuple):
    """Where a run is: the operation (-1 before the first), when it is due, and whether it is a wait that has begun."""

    position: int
    due: datetime
    waits: bool = False


class Replay:
    """Runs of past events in memory: one a customer and journey.

    Conditions are taken to hold, and every message to go out; journeys that are looked at every day are left out.

    Attributes:
        counts: by journey, how many began, came to each offer, and ended how.
    """

    def __init__(self, plans: Plans) -> None:
        self._plans = plans
        self._active: dict[Key, _At] = {}
        self._last: dict[Key, datetime] = {}
        self.counts: dict[str, dict[str, int]] = {name: {} for name in plans.plans}

    def run(self, events: Iterable[tuple[str, datetime, str]]) -> dict[str, dict[str, int]]:
        """Take in events (customer, time and name) in the order of their time, and let everything come to its end."""
        for customer, at, name in events:
            for journey, plan in self._plans.plans.items():
                self._hear(plan, (customer, journey), at, name)
        for customer, journey in list(self._active):
            self._go_on(self._plans.plans[journey], (customer, journey), END)
        return self.counts

    def _hear(self, plan: JourneyPlan, key: Key, at: datetime, name: str) -> None:
        self._go_on(plan, key, at)
        start, held = plan.journey.start, self._active.get(key)
        if held is None:
            if name in start.on and self._may_begin(plan, key, at):
                self._last[key] = at
                self._count(plan, BEGAN)
                self._active[key] = _At(-1, at + _length(start.after))
        elif held.position == -1:
            if name in (*start.unless, *plan.journey.stop_on):
                self._end(plan, key, CALLED_OFF)
            elif name in start.on:
                self._active[key] = _At(-1, at + _length(start.after))
        elif name in plan.journey.stop_on and held.position < plan.conversion:
            self._count(plan, CONVERTED)
            self._active[key] = _At(plan.conversion, at)
        elif held.waits and name in plan.operations[held.position].until:
            self._active[key] = _At(held.position + 1, at)

    def _may_begin(self, plan: JourneyPlan, key: Key, at: datetime) -> bool:
        last, again = self._last.get(key), plan.journey.again_after
        return last is None or again is None or at - last >= _length(again)

    def _go_on(self, plan: JourneyPlan, key: Key, until: datetime) -> None:
        """Do what was due before *until*."""
        while (held := self._active.get(key)) is not None and held.due < until:
            operation = plan.operations[max(held.position, 0)]
            if held.position == -1:
                self._active[key] = _At(0, held.due)
            elif operation.kind == "end":
                # of who has converted that was counted then
                self._end(plan, key, DONE if held.position < plan.conversion else None)
            elif operation.kind == "wait" and not held.waits:
                self._active[key] = _At(held.position, held.due + timedelta(seconds=operation.seconds), True)
            else:
                if operation.kind == "offer":
                    self._count(plan, f"{held.position}: {operation.told()}")
                self._active[key] = _At(operation.target if operation.kind == "go" else held.position + 1, held.due)

    def _end(self, plan: JourneyPlan, key: Key, how: str | None) -> None:
        if how is not None:
            self._count(plan, how)
        del self._active[key]

    def _count(self, plan: JourneyPlan, what: str) -> None:
        told = self.counts[plan.journey.name]
        told[what] = told.get(what, 0) + 1


def _length(duration: str | None) -> timedelta:
    return timedelta(seconds=seconds_of(duration)) if duration else timedelta()
