"""What of a mapping is well-formed and still cannot be meant, each with its place and its fix."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import duckdb
import msgspec
from iso4217 import Currency

from features.catalogue.tables import ITEM_ATTRIBUTES, MAX_ATTRIBUTES, SHOWN, attribute_fault
from features.definitions.domain import UnknownDomainError, domain_named
from features.events.event import Channel
from features.events.identifiers import KINDS
from features.events.spelling import meant, nearest
from features.people.consent import PURPOSES
from features.sources.mapping_parts import EPOCHS, UNSAID, AttributePart

if TYPE_CHECKING:
    from features.sources.mapping import Mapping


def _attribute_mistakes(mapping: Mapping, attribute: str) -> Iterator[tuple[str, str]]:
    place = f"item.attributes.{attribute}"
    if (fault := attribute_fault(attribute)) is not None:
        yield place, fault
    said = mapping.item.attributes[attribute] if mapping.item else ""
    if attribute not in ITEM_ATTRIBUTES and attribute not in SHOWN and isinstance(said, str):
        near = nearest(attribute, (*ITEM_ATTRIBUTES, *SHOWN))
        hint = f" (did you mean {near!r}?)" if near else ""
        own = f"one of your own says what it holds, e.g. {{column: {said}, holds: text}}"
        yield place, f"the catalogue knows {', '.join((*ITEM_ATTRIBUTES, *SHOWN))}{hint}; {own}"
    if attribute in ITEM_ATTRIBUTES and isinstance(said, AttributePart) and said.holds != "text":
        yield f"{place}.holds", f"{attribute} is a text in every catalogue: give an attribute of your own another name"
    if attribute in SHOWN and isinstance(said, AttributePart) and said.holds != SHOWN[attribute]:
        yield f"{place}.holds", f"answers show {attribute}, and it holds {SHOWN[attribute]}: say so, or give yours another name"
    if mapping.item and len(mapping.item.attributes) > MAX_ATTRIBUTES:
        yield "item.attributes", f"more than {MAX_ATTRIBUTES} attributes"


def mistakes(mapping: Mapping) -> Iterator[tuple[str, str]]:
    """What is well-formed and still cannot be meant."""
    for place, zone in (("shop.timezone", mapping.shop.timezone), *((f"{p}.timezone", t.timezone) for p, t in mapping.times())):
        if zone is not None and not _is_zone(zone):
            yield place, f"there is no time zone {zone!r}: use an IANA name such as 'Europe/London'"
    for place, time in mapping.times():
        if bool(time.column) == bool(time.columns):
            yield place, "give either column, or columns: [date, time of day]"
        if time.format is None or time.format in EPOCHS:
            continue
        if "%z" not in time.format and time.timezone is None:
            yield f"{place}.timezone", f"times written as {time.format} do not carry a zone: say which, e.g. {mapping.shop.timezone}"
        if (fault := _format_fault(time.format)) is not None:
            yield f"{place}.format", f"{time.format!r}: {fault}: see strptime, e.g. %d/%m/%Y %H:%M"
    if mapping.shop.domain is not msgspec.UNSET:
        try:
            domain_named(mapping.shop.domain)
        except UnknownDomainError as error:
            yield "shop.domain", str(error)
    try:
        Currency(mapping.shop.currency)
    except ValueError:
        yield "shop.currency", f"{mapping.shop.currency!r} is no ISO 4217 currency such as 'GBP'"
    if mapping.consent.basis == UNSAID:
        yield "consent.basis", "say on what basis the rows were collected, e.g. 'loyalty card terms of 2024'"
    for purpose in mapping.consent.purposes:
        if purpose not in PURPOSES:
            yield "consent.purposes", f"{purpose!r} is not one of {', '.join(PURPOSES)}"
    if not mapping.consent.purposes:
        yield "consent.purposes", f"say for which of {', '.join(PURPOSES)} the rows may be used; rows for none of them must stay out"
    for place, text in mapping.texts():
        if [bool(text.column), bool(text.columns), bool(text.value)].count(True) != 1:
            yield place, "give exactly one of column, columns and value"
        allowed = _allowed(mapping, place)
        for said in (*text.values.values(), *([text.value] if text.value else [])):
            if allowed and said not in allowed:
                yield place, f"{said!r} is not one of {', '.join(allowed)}{meant(said, allowed)}"
    for kind in mapping.event.identifiers:
        if kind not in KINDS:
            yield f"event.identifiers.{kind}", f"the kinds of identifiers are {', '.join(KINDS)}{meant(kind, KINDS)}"
    for attribute in mapping.item.attributes if mapping.item else ():
        yield from _attribute_mistakes(mapping, attribute)
    for place, condition in mapping.conditions():
        if condition.matches is None and not condition.one_of and {condition.below, condition.above, condition.empty} == {None}:
            yield place, "give at least one of matches, one_of, below, above and empty"
        if (fault := _regex_fault(condition.matches)) is not None:
            yield f"{place}.matches", f"{condition.matches!r} is no regular expression: {fault}"
    try:
        codecs.lookup(mapping.files.encoding)
    except LookupError:
        yield "files.encoding", f"there is no encoding {mapping.files.encoding!r}: use e.g. utf-8, windows-1252, iso-8859-1, utf-16"
    if mapping.files.decimal == mapping.files.thousands:
        yield "files.thousands", f"{mapping.files.thousands!r} is the decimal sign too"


def _allowed(mapping: Mapping, place: str) -> tuple[str, ...]:
    return {"event.name": mapping.event_names(), "event.channel": get_args(Channel)}.get(place, ())


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def _regex_fault(pattern: str | None) -> str | None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        return str(error)
    return None


def _format_fault(text: str) -> str | None:
    if "%" not in text:
        return "it holds no %"
    try:
        duckdb.connect().execute("SELECT try_strptime('x', '" + text.replace("'", "''") + "')").fetchall()
    except duckdb.Error as error:
        return str(error).splitlines()[0]
    return None
