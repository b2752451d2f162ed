"""Amounts in major units, as clients send them, to whole minor units."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from functools import cache

from iso4217 import Currency

from features.events import RejectedEvent


def minor(amount: Decimal, currency: str | None, place: str) -> int:
    """*amount* in minor units of *currency*, halves rounded up.

    Raises:
        RejectedEvent: no currency is named, or no such one exists; ``field`` is *place*, or ``currency``.
    """
    if currency is None:
        raise RejectedEvent(place, "an amount needs a currency: send properties.currency")
    return int((amount * 10 ** _exponent(currency)).quantize(Decimal(1), ROUND_HALF_UP))


@cache
def _exponent(currency: str) -> int:
    try:
        return int(Currency(currency).exponent or 0)
    except ValueError:
        raise RejectedEvent("currency", "is no ISO 4217 currency such as USD") from None
