"""By which channel and when a message is likeliest to be answered, within what the policy allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from models.sending import SendingRates
from serving.decide.contact import QuietHours

AHEAD_HOURS = 24
"""How far ahead a time is looked for."""
AT_RANDOM = 0.05
"""The share of messages whose hour is drawn evenly, so that each hour is known to be tried."""


def own_messages(row: Mapping[str, Any], channel: str, zone: ZoneInfo) -> list[tuple[int, bool]]:
    """The messages of one channel that a feature row tells of: the hour of the week, and whether the message was answered."""
    names = ("contacted_at", "contacted_by", "contacted_decisions")
    at, by, decisions = (row.get(name) or () for name in names)
    answered = set(row.get("answered_decisions") or ()) - {""}
    # of a message without a decision it is not known whether it was answered
    sent = ((moment, each) for moment, through, each in zip(at, by, decisions, strict=True) if through == channel and each)
    return [(hour_of_week(datetime.fromtimestamp(int(moment), UTC).astimezone(zone)), each in answered) for moment, each in sent]


def responses(rates: SendingRates, channels: Sequence[str], row: Mapping[str, Any], zone: ZoneInfo) -> dict[str, float]:
    """By channel how much likelier the customer answers there than messages are answered on average."""
    told = {channel: float(rates.of(channel, own_messages(row, channel, zone)).mean()) for channel in channels}
    average = float(np.mean(list(rates.rates.values()))) if rates.rates else 0.0
    return {channel: rate / average if average > 0 else 1.0 for channel, rate in told.items()}


def best_time(
    rates: SendingRates | None,
    channel: str,
    row: Mapping[str, Any],
    now: datetime,
    zone: ZoneInfo,
    quiet: QuietHours | None,
    rng: np.random.Generator,
) -> tuple[datetime, float]:
    """When within the next day a message is likeliest to be answered, out of quiet hours, and the chance with which that hour was chosen.

    The hours are those of *zone*, the customer's own. Without rates it is now.
    """
    if rates is None:
        return now, 1.0
    local = now.astimezone(zone)
    # adding hours in UTC, so that a clock that is put forward skips none and repeats none
    first = local.replace(minute=0, second=0, microsecond=0).astimezone(UTC)
    times = [now.astimezone(UTC), *(first + timedelta(hours=k) for k in range(1, AHEAD_HOURS))]
    open_ = [at for at in times if quiet is None or not quiet.holds(channel, at.astimezone(zone))]
    if not open_:
        return now, 1.0
    by_hour = rates.of(channel, own_messages(row, channel, zone))
    likely = np.array([by_hour[hour_of_week(at.astimezone(zone))] for at in open_])
    best = int(np.argmax(likely))
    drawn = int(rng.integers(len(open_))) if rng.random() < AT_RANDOM else best
    return open_[drawn], AT_RANDOM / len(open_) + (1.0 - AT_RANDOM if drawn == best else 0.0)


def hour_of_week(local: datetime) -> int:
    """The hour of the week, from Monday's first."""
    return local.weekday() * 24 + local.hour
