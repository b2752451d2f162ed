"""What the service's metrics were in the last hour: a bounded ring of samples, and the rates and latencies that follow from them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

SAMPLE_SECONDS = 10.0
KEPT_SECONDS = 3600.0
KEPT = int(KEPT_SECONDS / SAMPLE_SECONDS) + 1
"""How many samples an hour needs."""
LATENCIES_EVERY = 6
"""A histogram has some hundred numbers: one sample of a minute keeps them."""
EVENTS, SECONDS = "ubiquo_events", "ubiquo_request_seconds"
OUTCOMES = ("accepted", "duplicates", "rejected", "erased")

Buckets = Mapping[str, tuple[tuple[float, float], ...]]
"""By route: the upper limits in seconds, ascending, and how many answers so far took no longer."""


class Sample(NamedTuple):
    """The counters at one moment of a clock that only goes forward."""

    at: float
    events: Mapping[str, float]
    waiting: float
    latencies: Buckets | None


class Latency(NamedTuple):
    """How long one route took to answer: the number of answers, and quantiles in seconds, None beyond the last limit."""

    route: str
    answers: int
    median: float | None
    p99: float | None


class Meters:
    """A ring of samples of one registry of metrics. Whoever runs the event loop keeps ``beat`` going."""

    def __init__(self, registry: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._clock = registry, clock
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._taken = 0

    async def beat(self) -> None:
        """Take a sample now and then until cancelled."""
        while True:
            self.take()
            await asyncio.sleep(SAMPLE_SECONDS)

    def take(self) -> None:
        """Take one sample."""
        with_latencies = self._taken % LATENCIES_EVERY == 0
        self._taken += 1
        self._samples.append(self._now(with_latencies))

    def totals(self) -> dict[str, int]:
        """By outcome, how many events came since the start."""
        events = self._now(with_latencies=False).events
        return {outcome: int(events.get(outcome, 0)) for outcome in OUTCOMES}

    def value(self, name: str) -> float:
        """A metric without labels."""
        found = self._registry.get_sample_value(name)
        return 0.0 if found is None else float(found)

    def rate(self, seconds: float) -> float | None:
        """Events a second over the last *seconds*, whatever became of them; None before two moments can be compared."""
        now = self._now(with_latencies=False)
        earlier = [sample for sample in self._samples if now.at - sample.at <= seconds + SAMPLE_SECONDS / 2]
        if not earlier or now.at <= earlier[0].at:
            return None
        first = earlier[0]
        return (sum(now.events.values()) - sum(first.events.values())) / (now.at - first.at)

    def history(self) -> tuple[list[float], dict[str, list[float]], list[float]]:
        """The last hour: minutes from now (below zero), events a second by outcome, and how many waited, one value a sample."""
        held = list(self._samples)
        now = self._clock()
        minutes, waiting = [], []
        rates: dict[str, list[float]] = {outcome: [] for outcome in OUTCOMES}
        for before, after in pairwise(held):
            passed = max(after.at - before.at, 1e-9)
            minutes.append(round((after.at - now) / 60, 2))
            waiting.append(after.waiting)
            for outcome, line in rates.items():
                line.append(round((after.events.get(outcome, 0) - before.events.get(outcome, 0)) / passed, 2))
        return minutes, rates, waiting

    def latencies(self, seconds: float | None = None) -> list[Latency]:
        """How long each route took, since the start or about the last *seconds*, the busiest first."""
        now = self._now(with_latencies=True)
        before: Buckets = {}
        if seconds is not None:
            known = [each for each in self._samples if each.latencies is not None and now.at - each.at <= seconds]
            # where the service is younger, all of it counts
            before = known[0].latencies or {} if known and now.at - self._samples[0].at > seconds else {}
        found = []
        for route, buckets in (now.latencies or {}).items():
            counts = _less(buckets, before.get(route, ()))
            if counts and counts[-1][1] > 0:
                found.append(Latency(route, int(counts[-1][1]), quantile(counts, 0.5), quantile(counts, 0.99)))
        return sorted(found, key=lambda each: -each.answers)

    def _now(self, with_latencies: bool) -> Sample:
        events: dict[str, float] = {}
        latencies: dict[str, list[tuple[float, float]]] = {}
        waiting = 0.0
        names = [f"{EVENTS}_total", "ubiquo_events_waiting"] + ([f"{SECONDS}_bucket"] if with_latencies else [])
        for family in self._registry.restricted_registry(names).collect():
            for sample in family.samples:
                if sample.name == f"{EVENTS}_total":
                    events[sample.labels["outcome"]] = sample.value
                elif sample.name == "ubiquo_events_waiting":
                    waiting = sample.value
                elif sample.name == f"{SECONDS}_bucket":
                    latencies.setdefault(sample.labels["route"], []).append((float(sample.labels["le"]), sample.value))
        told = {route: tuple(sorted(buckets)) for route, buckets in latencies.items()} if with_latencies else None
        return Sample(self._clock(), events, waiting, told)


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """Where *share* of the answers end, as if those of one bucket lay evenly in it; None beyond the last limit, or for no answers.

    Args:
        buckets: upper limits, ascending, and how many lie at or below; the last limit is infinite.
        share: in (0, 1].
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    wanted, low, below = share * buckets[-1][1], 0.0, 0.0
    for limit, count in buckets:
        if count >= wanted:
            return None if limit == float("inf") else low + (limit - low) * (wanted - below) / max(count - below, 1e-9)
        low, below = limit, count
    return None


def _less(now: Iterable[tuple[float, float]], before: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    earlier = dict(before)
    return [(limit, count - earlier.get(limit, 0.0)) for limit, count in now]
