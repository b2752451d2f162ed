"""The one clock: nothing else in ubiquo asks for the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

from features.state.settings import Settings

Clock = Callable[[], datetime]
"""Returns the present moment, UTC-aware."""
MAX_LEAP = timedelta(seconds=10)
"""By how much the machine's time may be set at once and be followed."""
AHEAD = timedelta(minutes=10)
"""What is known from later than this after now was stamped by a clock that was wrong."""


def system_clock() -> datetime:
    """The machine's time."""
    return datetime.now(UTC)


class WatchedClock:
    """The machine's time, followed as long as it runs evenly beside a clock that cannot be set; it never runs backwards.

    Where the machine's time leaps by more than ``MAX_LEAP`` this one goes on as if it had not, and ``leap`` tells by how much.
    The other clock is the time since the machine started, sleep included.
    """

    def __init__(self, wall: Clock = system_clock, steady: Callable[[], float] | None = None) -> None:
        self._wall, self._steady = wall, steady or _since_start
        self._lock = threading.Lock()
        self._zero, self._began = wall(), self._steady()
        self._last = self._zero
        self.leap = timedelta()
        """How far the machine's time lies ahead of this one, where that is not followed."""

    def __call__(self) -> datetime:
        """The present moment."""
        with self._lock:
            expected, said = self._zero + timedelta(seconds=self._steady() - self._began), self._wall()
            if abs(said - expected) <= MAX_LEAP:
                # a clock is drawn right in small steps all the time
                self._zero += said - expected
                self.leap, expected = timedelta(), said
            else:
                self.leap = said - expected
            self._last = max(self._last, expected)
            return self._last


def _since_start() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def fixed_clock(moment: datetime) -> Clock:
    """A clock that stands still at *moment*."""
    return lambda: moment


def running_clock(start: datetime) -> Clock:
    """A clock that reads *start* now and runs on from there; the machine's time being set does not move it."""
    zero = time.monotonic()
    return lambda: start + timedelta(seconds=time.monotonic() - zero)


def clock_of(settings: Settings, not_before: datetime | None = None) -> Clock:
    """The clock that the settings name: ``system`` (default), ``from:ISO-TIME`` or ``fixed:ISO-TIME``.

    A running clock starts no earlier than *not_before*, so that a restart does not fall behind its own log.

    Raises:
        ValueError: the setting has another form, or its time has no zone.
    """
    setting = settings.clock
    if setting == "system":
        return WatchedClock()
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


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment_of(microseconds: int) -> datetime:
    """The UTC time so many microseconds after 1970, exactly."""
    return EPOCH + timedelta(microseconds=microseconds)


def microseconds(moment: datetime) -> int:
    """Whole microseconds since 1970: how feature rows and the inbox keep a moment."""
    since = moment - EPOCH
    # a division by a duration takes three times as long, and every event is asked several times
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


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
