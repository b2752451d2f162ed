"""Words and numbers as the reader's language writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

from babel import Locale
from babel.core import negotiate_locale
from babel.dates import format_date, format_datetime, format_timedelta
from babel.numbers import format_currency, format_decimal, format_percent, get_currency_precision

from serving.console.catalog import catalog
from serving.console.phrases import reason

LANGUAGES: Mapping[str, str] = {"en": "English", "it": "Italiano"}
"""The languages that there are, each by its own name; what is written in the code is English."""


def language_of(chosen: str | None, accepted: str) -> str:
    """The language to answer in: the one *chosen* before, else the best of the header ``Accept-Language``, else English."""
    if chosen is not None and chosen in LANGUAGES:
        return chosen
    wanted = [part.partition(";")[0].strip().replace("-", "_") for part in accepted.split(",") if part.strip()]
    found = negotiate_locale(wanted, list(LANGUAGES))
    return found if found is not None and found in LANGUAGES else "en"


@dataclass(frozen=True)
class Words:
    """What a page says and how it writes numbers, money and times.

    Attributes:
        language: one of ``LANGUAGES``.
        zone: the shop's time zone.
        currency: the shop's, ISO 4217.
    """

    language: str
    zone: str = "UTC"
    currency: str = "USD"

    def say(self, text: str) -> str:
        """*text* in the reader's language; English where it was not translated."""
        return catalog(self.language).get(text, text)

    def reason(self, text: str) -> str:
        """What a model said, in the reader's language."""
        return reason(text, self.language)

    def many(self, one: str, more: str, n: int) -> str:
        """*one* or *more*, whichever *n* asks for."""
        return self.say(one if n == 1 else more)

    @property
    def locale(self) -> Locale:
        """The locale that numbers are written by."""
        return Locale.parse(self.language)

    def number(self, value: float | None, digits: int = 0) -> str:
        """A number with so many digits after the point at most."""
        return "–" if value is None else format_decimal(round(value, digits), locale=self.locale)

    def percent(self, share: float | None, digits: int = 0) -> str:
        """A share of one as a percentage."""
        pattern = "#,##0" + ("." + "0" * digits if digits else "") + "%"
        return "–" if share is None else format_percent(share, pattern, locale=self.locale)

    def money(self, minor: float | None) -> str:
        """Minor units of the shop's currency."""
        if minor is None:
            return "–"
        value = Decimal(round(minor)) / 10 ** get_currency_precision(self.currency)
        return format_currency(value, self.currency, locale=self.locale)

    def day(self, moment: datetime | date | None) -> str:
        """A day of the shop."""
        if moment is None:
            return "–"
        return format_date(self._there(moment) if isinstance(moment, datetime) else moment, "medium", locale=self.locale)

    def moment(self, at: datetime | float | None) -> str:
        """A time of the shop, from a moment or Unix seconds."""
        if at is None:
            return "–"
        told = datetime.fromtimestamp(at, UTC) if isinstance(at, int | float) else at
        told = self._there(told)
        return format_datetime(told, "d MMM y, HH:mm", tzinfo=told.tzinfo, locale=self.locale)

    def _there(self, moment: datetime) -> datetime:
        """The moment in the shop's zone; as it is at the ends of the calendar, where 9999-12-31 says that there is no end."""
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        try:
            return moment.astimezone(ZoneInfo(self.zone))
        except OverflowError:
            return moment

    def ago(self, at: datetime | None, now: datetime) -> str:
        """How long ago it was, roughly."""
        return "–" if at is None else format_timedelta(at - now, add_direction=True, locale=self.locale)

    def filters(self) -> dict[str, Callable[..., str]]:
        """What templates may write after a bar."""
        return {
            "number": self.number,
            "percent": self.percent,
            "money": self.money,
            "day": self.day,
            "moment": self.moment,
            "reason": self.reason,
        }
