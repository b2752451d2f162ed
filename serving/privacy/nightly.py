"""When files of people who were erased are purged, if not at once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from features.state.settings import SettingError


@dataclass
class Nightly:
    """A time of day, and the day on which it was last come to."""

    hour: int
    minute: int
    timezone: str
    last: date | None = None

    @classmethod
    def at(cls, text: str, timezone: str) -> Nightly | None:
        """The time that ``HH:MM`` names; None for an empty text.

        Raises:
            SettingError: it names none.
        """
        if not text:
            return None
        try:
            moment = time.fromisoformat(text)
        except ValueError:
            raise SettingError(f"UBIQUO_PURGE_AT={text!r}: give a time of day such as 03:30, or nothing for at once") from None
        return cls(moment.hour, moment.minute, timezone)

    def is_due(self, now: datetime) -> bool:
        """Whether the time has come, once a day; a service that starts later than it waits for the next."""
        local = now.astimezone(ZoneInfo(self.timezone))
        today = local.date()
        passed = (local.hour, local.minute) >= (self.hour, self.minute)
        if self.last is None:
            self.last = today if passed else today - timedelta(days=1)
            return False
        if passed and self.last < today:
            self.last = today
            return True
        return False
