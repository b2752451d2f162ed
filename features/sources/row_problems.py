"""What may be wrong with a row of a mapped import, as SQL: the field in the mapping, the reason with its fix, and the value to show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from features.catalogue.tables import LINK_FORM, LINKS, MAX_LINK
from features.events.event import EARLIEST, FUTURE_TOLERANCE, REQUIRED_FIELDS, Channel
from features.sources.mapping import Mapping
from features.sources.mapping_parts import TimePart
from features.state.clock import system_clock

NEEDS_ITEMS = tuple(name for name, fields in REQUIRED_FIELDS.items() if "items" in fields)
ISO = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?)?\s?(Z|[+-]\d{2}(:?\d{2})?)?$"
_SLASHED = r"^\d{1,2}[./-]\d{1,2}[./-]\d{2,4}"
Problem = tuple[str, str, str, str]
"""The field in the mapping, when it is wrong, the reason with its fix, and the value to show."""


def quoted(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def named(column: str) -> str:
    """A column's name in SQL."""
    return '"' + column.replace('"', '""') + '"'


def said_time(time: TimePart) -> str:
    """What a row says of a time, in SQL: one column, or a date and a time of day with a blank between; null where one is empty."""
    return "(" + " || ' ' || ".join(named(c) for c in time.used) + ")"


def problems(mapping: Mapping) -> Iterator[Problem]:
    """Everything that is looked for, the first that is found being told."""
    yield from _event_problems(mapping)
    yield from _item_problems(mapping)


def _event_problems(mapping: Mapping) -> Iterator[Problem]:
    event = mapping.event
    for place, text in mapping.texts():
        column = {"event.id": "_u_id", "item.id": "_u_item_id"}.get(place, "_u_" + place.split(".", 1)[1])
        raw = " || '-' || ".join(named(c) for c in text.used) or "NULL"
        if place.startswith("event.identifiers."):
            column = f"_u_id_{place.rsplit('.', 1)[1]}"
        elif place.startswith("event.traits."):
            column = f"_u_trait_{list(event.traits).index(place.removeprefix('event.traits.'))}"
        elif place.startswith("item.attributes."):
            column = f"_u_attr_{place.rsplit('.', 1)[1]}"
        if text.values:
            yield place, f"{column} IS NULL AND {raw} IS NOT NULL", f"is not among the values of {place}: add it there", raw
        elif text.is_integer:
            yield place, f"{column} IS NULL AND {raw} IS NOT NULL", "is not a whole number", raw
        longest = 1024 if place.startswith(("event.query", "event.traits")) else 200
        if place.removeprefix("item.attributes.") in LINKS:
            longest = MAX_LINK
            told = "is no link: write it like https://shop.example/milk.jpg"
            yield place, f"NOT regexp_matches({column}, {quoted(LINK_FORM)})", told, f"left({column}, 80)"
        yield place, f"length({column}) > {longest}", f"is longer than {longest} characters", f"left({column}, 80)"
    allowed = {"_u_name": ("event.name", mapping.event_names()), "_u_channel": ("event.channel", get_args(Channel))}
    for column, (place, names) in allowed.items():
        if column == "_u_name" or event.channel is not None:
            known = ", ".join(map(quoted, names))
            yield place, f"{column} NOT IN ({known})", f"is not one of ubiquo's: translate it by {place}.values", column
    yield "event.id", "_u_id IS NULL", "is empty: every event needs an id", "NULL"
    yield "event.name", "_u_name IS NULL", "is empty: every event needs a name", "NULL"
    for place, time in mapping.times():
        yield from _time_problems(place, time)
    latest = (system_clock() + FUTURE_TOLERANCE).isoformat()
    at = said_time(event.occurred_at)
    yield "event.occurred_at", f"_u_occurred_at < '{EARLIEST.isoformat()}'", f"lies before {EARLIEST.year}", at
    yield "event.occurred_at", f"_u_occurred_at > '{latest}'", "lies in the future: is the format or the zone wrong?", at
    if event.known_at.time is not None:
        known_at = said_time(event.known_at.time)
        yield "event.known_at", "_u_known_at < _u_occurred_at", "lies before the event: nothing is known before it happens", known_at
    own = mapping.shop.currency
    yield "event.currency", "_u_currency IS NULL", f"is empty: the shop counts in {own}", "NULL"
    yield (
        "event.currency",
        f"_u_currency <> {quoted(own)}",
        f"the shop counts in {own} and sums cannot mix: convert, or import apart",
        "_u_currency",
    )


def _time_problems(place: str, time: TimePart) -> Iterator[Problem]:
    column, raw = ("_u_occurred_at" if place == "event.occurred_at" else "_u_known_at"), said_time(time)
    for each in time.used:
        yield place, f"{named(each)} IS NULL", "is empty" if len(time.used) == 1 else f"is empty: {each}", "NULL"
    if time.format is not None:
        yield place, f"{column} IS NULL", f"does not fit the format {time.format}", raw
        return
    asks = f"day or month first? set {place}.format, e.g. %d/%m/%Y or %m/%d/%Y"
    yield place, f"{column} IS NULL AND regexp_matches({raw}, '{_SLASHED}')", asks, raw
    if time.timezone is None:
        naive = f"{column} IS NULL AND regexp_matches({raw}, '{ISO}')"
        yield place, naive, f"does not tell its time zone: set {place}.timezone", raw
    yield place, f"{column} IS NULL", f"is no time like 2011-12-09T12:50:00: set {place}.format", raw


def _item_problems(mapping: Mapping) -> Iterator[Problem]:
    item = mapping.item
    needing = ", ".join(map(quoted, NEEDS_ITEMS))
    if item is None:
        yield "item", f"_u_name IN ({needing})", "an event of this name needs items: map item.id", "_u_name"
        return
    yield "item.id", f"_u_item_id IS NULL AND _u_name IN ({needing})", "is empty: an event of this name needs an item", "NULL"
    for name, attribute in mapping.attributes().items():
        if attribute.holds == "number":
            told = f"_u_attr_{name}"
            decimal = f"is no number with the decimal sign {mapping.files.decimal!r}: see files.decimal and files.thousands"
            yield f"item.attributes.{name}", f"_u_is_item AND {told} IS NOT NULL AND _u_number_{name} IS NULL", decimal, told
    if "price_minor" in item.attributes:
        place, told = "item.attributes.price_minor", "_u_number_price_minor"
        yield (
            place,
            f"_u_is_item AND NOT {told} BETWEEN 0 AND 1000000000000",
            "is no price in minor units, such as 399",
            "_u_attr_price_minor",
        )
    for measure in ("quantity", "amount", "discount", "coupon"):
        part, column = getattr(item, measure), f"_u_{measure}"
        if part is None:
            continue
        place, raw = f"item.{measure}", named(part.column)
        # a line that is no item may hold anything
        yield place, f"_u_is_item AND {raw} IS NULL", "is empty", "NULL"
        decimal = f"is no number with the decimal sign {mapping.files.decimal!r}: see files.decimal and files.thousands, or skip such rows"
        yield place, f"_u_is_item AND {column} IS NULL", decimal, raw
        yield place, f"_u_is_item AND abs({column}) > 1000000000", "is too large to be true", raw
        if measure == "quantity":
            yield place, f"_u_is_item AND NOT _u_refund AND {column} < 0", "is negative: name such rows under refunds or skip", raw
            if part.fractions == "reject":
                yield place, f"_u_is_item AND {column} <> floor({column})", "is not a whole number: fractions: round_up takes it", raw
        elif measure == "amount":
            yield place, f"_u_is_item AND NOT _u_refund AND {column} < 0", "is negative: name such rows under refunds or skip", raw
