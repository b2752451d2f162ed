"""Numbers as clients send them, bounded before they are reckoned with, and amounts in major units to whole minor units."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from functools import cache
from typing import Any

from iso4217 import Currency

from features.events.event import MAX_NUMBER_CHARACTERS, MAX_NUMBER_DIGITS, MAX_NUMBER_PLACES, RejectedEvent


def number(value: Any, place: str, what: str = "a number") -> Decimal:
    """The number that *value* is, or is the text of.

    Raises:
        RejectedEvent: it is none, or has more digits than one may have; ``field`` is *place*.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise RejectedEvent(place, f"must be {what}")
    if isinstance(value, int) and abs(value) >= 10**MAX_NUMBER_DIGITS:
        raise RejectedEvent(place, f"may have {MAX_NUMBER_DIGITS} digits: send a smaller number")
    text = str(value)
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise RejectedEvent(place, f"a number may hold {MAX_NUMBER_CHARACTERS} characters: round it")
    try:
        found = Decimal(text)
    except InvalidOperation:
        raise RejectedEvent(place, f"must be {what}") from None
    exponent = found.as_tuple().exponent
    if not isinstance(exponent, int):
        raise RejectedEvent(place, f"must be {what}")
    # 1e99999999 is short to write; written out it fills the memory
    if exponent < -MAX_NUMBER_PLACES or found.adjusted() >= MAX_NUMBER_DIGITS:
        raise RejectedEvent(place, f"may have {MAX_NUMBER_DIGITS} digits before the point and {MAX_NUMBER_PLACES} after it")
    return found


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
