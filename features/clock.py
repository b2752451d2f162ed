"""The one clock: nothing else in ubiquo asks for the time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

Clock = Callable[[], datetime]
"""Returns the present moment, UTC-aware."""


def system_clock() -> datetime:
    """The machine's time."""
    return datetime.now(UTC)


def fixed_clock(moment: datetime) -> Clock:
    """A clock that stands still at *moment*."""
    return lambda: moment


def running_clock(start: datetime) -> Clock:
    """A clock that reads *start* now and runs on from there; the machine's time being set does not move it."""
    zero = time.monotonic()
    return lambda: start + timedelta(seconds=time.monotonic() - zero)


def clock_from_environment(not_before: datetime | None = None) -> Clock:
    """The clock that ``UBIQUO_CLOCK`` names: ``system`` (default), ``from:ISO-TIME`` or ``fixed:ISO-TIME``.

    A running clock starts no earlier than *not_before*, so that a restart does not fall behind its own log.

    Raises:
        ValueError: the variable has another form, or its time has no zone.
    """
    setting = os.environ.get("UBIQUO_CLOCK", "system")
    if setting == "system":
        return system_clock
    kind, _, text = setting.partition(":")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if kind not in ("from", "fixed") or moment is None or moment.tzinfo is None:
        raise ValueError(f"UBIQUO_CLOCK={setting!r}: use 'system', 'from:2018-01-01T05:00:00Z' or 'fixed:2018-01-01T05:00:00Z'")
    moment = moment.astimezone(UTC)
    if kind == "fixed":
        return fixed_clock(moment)
    return running_clock(max(moment, not_before) if not_before else moment)


def microseconds(moment: datetime) -> int:
    """Whole microseconds since 1970: how feature rows and the inbox keep a moment."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def local_midnight(day: date, timezone: str) -> datetime:
    """The start of *day* in *timezone*, as a UTC time."""
    return datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(timezone)).astimezone(UTC)


def parse_as_of(text: str, timezone: str) -> datetime:
    """Read a date (the start of that day in the shop's zone) or a time with its zone.

    Raises:
        ValueError: the text is neither; the message shows both forms.
    """
    try:
        if len(text) == 10:
            return local_midnight(date.fromisoformat(text), timezone)
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = datetime.min
    if moment.tzinfo is None:
        raise ValueError(f"as-of {text!r} is not a date like 2017-12-04 nor a time with its zone like 2017-12-04T05:00:00Z")
    return moment.astimezone(UTC)
