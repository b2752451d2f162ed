"""The mapping of a retailer's own files to canonical events: what its YAML may say, and every mistake in it told."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import duckdb
import msgspec
from iso4217 import Currency

from features.catalogue.tables import ITEM_ATTRIBUTES, MAX_ATTRIBUTES, SHOWN, AttributeKind, attribute_fault
from features.definitions.domain import UnknownDomainError, domain_named, domain_names
from features.events.event import EVENT_NAMES, Channel, explain
from features.events.identifiers import KINDS
from features.people.consent import PURPOSES

UNSAID = "TO BE FILLED IN"
"""What a proposed mapping says where only its owner can."""
EPOCHS = {"epoch_seconds": 1, "epoch_milliseconds": 1000}
"""Formats of times that are numbers since 1970, with how many of them make a second."""
SHIPPED = Path(__file__).parent / "mappings"
NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]


class MappingError(ValueError):
    """A mapping that cannot be used; the message names the file, the key and the mend."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class TextPart(_Strict, frozen=True):
    """A text from columns (joined by ``-``) or one fixed value; ``values`` translates, and what it lacks is rejected."""

    column: NonEmpty | None = None
    columns: list[NonEmpty] = []
    value: NonEmpty | None = None
    values: dict[str, NonEmpty] = {}
    is_integer: bool = False
    """The column holds whole numbers, perhaps written 17850.0: take 17850."""

    @property
    def used(self) -> list[str]:
        """The columns that it reads."""
        return [self.column] if self.column else list(self.columns)


class AttributePart(TextPart, frozen=True):
    """An attribute of items: a text, a number written as ``files`` says, or a list of texts divided by ``split``."""

    holds: AttributeKind = "text"
    split: Annotated[str, msgspec.Meta(min_length=1, max_length=1)] = "|"


class TimePart(_Strict, frozen=True):
    """A time from a column: ISO 8601 unless ``format`` (strptime, ``epoch_seconds`` or ``epoch_milliseconds``) says otherwise."""

    column: NonEmpty
    format: NonEmpty | None = None
    timezone: NonEmpty | None = None
    """The zone of times that do not carry their own."""


class KnownPart(_Strict, frozen=True):
    """From when on a row may be used: a time of its own, or so many hours after it occurred."""

    time: TimePart | None = None
    after_hours: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class NumberPart(_Strict, frozen=True):
    """A whole number from a column; ``fractions: round_up`` takes 0.53 (of a kilogram) as 1."""

    column: NonEmpty
    fractions: Literal["reject", "round_up"] = "reject"


class MoneyPart(_Strict, frozen=True):
    """An amount from a column, for the whole line or a single unit, in major (pounds) or minor (pence) units."""

    column: NonEmpty
    per: Literal["line", "unit"] = "line"
    unit: Literal["major", "minor"] = "major"


class Condition(_Strict, frozen=True):
    """What must hold of a column's value; with several tests all must hold, and ``negate`` turns the whole round."""

    column: NonEmpty
    matches: NonEmpty | None = None
    one_of: list[str] = []
    below: float | None = None
    above: float | None = None
    empty: bool | None = None
    negate: bool = False


class Skip(_Strict, frozen=True):
    """Rows that are no customer's doing: left out, and counted under their reason."""

    when: Annotated[list[Condition], msgspec.Meta(min_length=1)]
    because: NonEmpty


class Refunds(_Strict, frozen=True):
    """Rows that take a purchase back: they become ``refund`` events with positive quantities, tied to no purchase."""

    when: Annotated[list[Condition], msgspec.Meta(min_length=1)]


class ShopPart(_Strict, frozen=True):
    """The shop that the events belong to; several sources may share it, so what one does not name is not reset by it."""

    name: NonEmpty
    timezone: NonEmpty
    currency: NonEmpty
    margin_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] | msgspec.UnsetType = msgspec.UNSET
    phone_region: Annotated[str, msgspec.Meta(pattern="^[A-Z]{2}$")] | msgspec.UnsetType | None = msgspec.UNSET
    domain: NonEmpty | msgspec.UnsetType = msgspec.UNSET
    private_brands: tuple[NonEmpty, ...] | msgspec.UnsetType = msgspec.UNSET
    broad_campaign_types: tuple[NonEmpty, ...] | msgspec.UnsetType = msgspec.UNSET

    def named(self) -> dict[str, Any]:
        """What the mapping names, and nothing else."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not msgspec.UNSET}


class Files(_Strict, frozen=True):
    """How the files are written. The kind follows from the name's ending unless told: .csv .tsv .txt, .jsonl .ndjson, .parquet."""

    kind: Literal["csv", "jsonl", "parquet"] | None = None
    encoding: NonEmpty = "utf-8"
    delimiter: Annotated[str, msgspec.Meta(min_length=1, max_length=1)] | None = None
    decimal: Literal[".", ","] = "."
    thousands: Literal["", ",", ".", " ", "'"] = ""
    empty: tuple[str, ...] = ("", "NULL", "null", "NaN", "nan", "\\N")
    """What stands for no value."""


class ConsentPart(_Strict, frozen=True):
    """On what basis the rows were collected, and for which purposes they may be used."""

    basis: NonEmpty
    purposes: list[NonEmpty]


class EventPart(_Strict, frozen=True):
    """The fields of the event itself; rows with the same ``id`` are the lines of one event."""

    name: str | TextPart
    occurred_at: TimePart
    id: str | TextPart | None = None
    """Absent: a digest of the row, so that equal rows are one event."""
    known_at: KnownPart = KnownPart()
    currency: str | TextPart | None = None
    channel: str | TextPart | None = None
    identifiers: dict[str, str | TextPart] = {}
    store_id: str | TextPart | None = None
    session_id: str | TextPart | None = None
    offer_id: str | TextPart | None = None
    campaign_id: str | TextPart | None = None
    query: str | TextPart | None = None
    traits: dict[NonEmpty, str | TextPart] = {}
    across_files: Literal["same", "join"] = "same"
    """An event found in two files must be the same in both (overlapping exports), or is to be joined (an export cut into parts)."""


class ItemPart(_Strict, frozen=True):
    """The item of each row."""

    id: str | TextPart
    quantity: NumberPart | None = None
    amount: MoneyPart | None = None
    discount: MoneyPart | None = None
    coupon: MoneyPart | None = None
    leave_out: list[Condition] = []
    """Lines that are no items (postage, fees): any of these conditions leaves the line out of its event."""
    attributes: dict[str, str | AttributePart] = {}
    """Attributes for the catalogue, where it does not know the item yet; of several the most frequent. One that the domain does not
    know is the shop's own, and says what it ``holds``. ``name``, ``price_minor``, ``image_url`` and ``url`` are shown in answers."""


class Mapping(_Strict, frozen=True):
    """The whole of a ``mapping.yaml``."""

    source: Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9-]*$", max_length=64)]
    shop: ShopPart
    consent: ConsentPart
    event: EventPart
    files: Files = Files()
    item: ItemPart | None = None
    refunds: Refunds | None = None
    skip: list[Skip] = []
    max_rejected: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    """The import stores nothing if more than this share of the rows cannot be taken: then the mapping is wrong, not the rows."""

    @classmethod
    def read(cls, path: Path) -> Mapping:
        """Read and check a mapping file, or a shipped one by its bare name.

        Raises:
            MappingError: it cannot be read, or says something that it may not.
        """
        found = path if path.exists() else SHIPPED / f"{path}.yaml"
        if not found.exists():
            known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
            raise MappingError(f"there is no mapping {path}: give a file, or the name of one that ubiquo ships ({known})")
        return cls.parse(found.read_bytes(), str(path))

    @classmethod
    def parse(cls, text: bytes, name: str) -> Mapping:
        """Read and check a mapping's text; *name* is what messages call it.

        Raises:
            MappingError: see ``read``.
        """
        try:
            mapping = msgspec.yaml.decode(text, type=cls)
        except msgspec.ValidationError as error:
            field, reason = explain(error)
            raise MappingError(f"{name}: {field}: {reason}{_nearest(field, reason)}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MappingError(f"{name}: not valid YAML: {error}") from None
        for field, reason in _mistakes(mapping):
            raise MappingError(f"{name}: {field}: {reason}")
        return mapping

    def text(self, value: str | TextPart) -> TextPart:
        """The long form of a text: a bare string is a column."""
        return TextPart(column=value) if isinstance(value, str) else value

    def texts(self) -> Iterator[tuple[str, TextPart]]:
        """Every text of the mapping with its place in the file."""
        event, item = self.event, self.item
        for name in ("name", "id", "currency", "channel", "store_id", "session_id", "offer_id", "campaign_id", "query"):
            if (value := getattr(event, name)) is not None:
                yield f"event.{name}", self.text(value)
        for group in ("identifiers", "traits"):
            for name, value in getattr(event, group).items():
                yield f"event.{group}.{name}", self.text(value)
        if item is not None:
            yield "item.id", self.text(item.id)
            for name, value in item.attributes.items():
                yield f"item.attributes.{name}", self.text(value)

    def attributes(self) -> dict[str, AttributePart]:
        """The attributes of items in their long form."""
        named = self.item.attributes if self.item is not None else {}

        def whole(name: str, said: str | AttributePart) -> AttributePart:
            return AttributePart(column=said, holds=SHOWN.get(name, "text")) if isinstance(said, str) else said

        return {name: whole(name, said) for name, said in named.items()}

    def conditions(self) -> Iterator[tuple[str, Condition]]:
        """Every condition with its place in the file."""
        groups: list[tuple[str, Sequence[Condition]]] = [(f"skip[{k}].when", skip.when) for k, skip in enumerate(self.skip)]
        groups.append(("refunds.when", self.refunds.when if self.refunds else []))
        groups.append(("item.leave_out", self.item.leave_out if self.item else []))
        for place, conditions in groups:
            yield from ((f"{place}[{k}]", condition) for k, condition in enumerate(conditions))

    def event_names(self) -> tuple[str, ...]:
        """The events that there are: those of every shop, and of the mapping's domain; of all domains where it names none."""
        said = self.shop.domain
        domains = [said] if said in domain_names() else domain_names()
        return (*EVENT_NAMES, *(name for each in domains for name in domain_named(each).events))

    def times(self) -> Iterator[tuple[str, TimePart]]:
        """Every time with its place in the file."""
        yield "event.occurred_at", self.event.occurred_at
        if self.event.known_at.time is not None:
            yield "event.known_at.time", self.event.known_at.time

    def columns(self) -> dict[str, str]:
        """Every column that is read, with the first place that reads it."""
        found: dict[str, str] = {}
        for place, text in self.texts():
            for column in text.used:
                found.setdefault(column, place)
        for place, condition in self.conditions():
            found.setdefault(condition.column, place)
        for place, time in self.times():
            found.setdefault(time.column, place)
        for place, measure in self._measures():
            found.setdefault(measure.column, place)
        return found

    def _measures(self) -> Iterator[tuple[str, NumberPart | MoneyPart]]:
        for name in ("quantity", "amount", "discount", "coupon"):
            if self.item is not None and (part := getattr(self.item, name)) is not None:
                yield f"item.{name}", part

    def check_columns(self, present: Sequence[str], file: str, name: str = "mapping") -> None:
        """See that *file* has every column that the mapping reads.

        Raises:
            MappingError: it lacks one; the message shows the nearest that it has.
        """
        for column, place in self.columns().items():
            if column not in present:
                near = difflib.get_close_matches(column, present, 1, 0.6)
                hint = f"did you mean {near[0]!r}? " if near else ""
                if len(present) == 1 and (between := next((d for d in ";\t|," if d in present[0]), None)):
                    hint = f"its columns seem to be divided by {between!r}: set files.delimiter. "
                raise MappingError(f"{name}: {place}: {file} has no column {column!r}; {hint}It has: {', '.join(present)}")


def _attribute_mistakes(mapping: Mapping, attribute: str) -> Iterator[tuple[str, str]]:
    place = f"item.attributes.{attribute}"
    if (fault := attribute_fault(attribute)) is not None:
        yield place, fault
    said = mapping.item.attributes[attribute] if mapping.item else ""
    if attribute not in ITEM_ATTRIBUTES and attribute not in SHOWN and isinstance(said, str):
        near = difflib.get_close_matches(attribute, ITEM_ATTRIBUTES, 1, 0.6)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        own = f"one of your own says what it holds, e.g. {{column: {said}, holds: text}}"
        yield place, f"the catalogue knows {', '.join((*ITEM_ATTRIBUTES, *SHOWN))}{hint}; {own}"
    if attribute in ITEM_ATTRIBUTES and isinstance(said, AttributePart) and said.holds != "text":
        yield f"{place}.holds", f"{attribute} is a text in every catalogue: give an attribute of your own another name"
    if attribute in SHOWN and isinstance(said, AttributePart) and said.holds != SHOWN[attribute]:
        yield f"{place}.holds", f"answers show {attribute}, and it holds {SHOWN[attribute]}: say so, or give yours another name"
    if mapping.item and len(mapping.item.attributes) > MAX_ATTRIBUTES:
        yield "item.attributes", f"more than {MAX_ATTRIBUTES} attributes"


def _mistakes(mapping: Mapping) -> Iterator[tuple[str, str]]:
    """What is well-formed and still cannot be meant."""
    for place, zone in (("shop.timezone", mapping.shop.timezone), *((f"{p}.timezone", t.timezone) for p, t in mapping.times())):
        if zone is not None and not _is_zone(zone):
            yield place, f"there is no time zone {zone!r}: use an IANA name such as 'Europe/London'"
    for place, time in mapping.times():
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
                near = difflib.get_close_matches(said, allowed, 1, 0.5)
                yield place, f"{said!r} is not one of {', '.join(allowed)}" + (f": did you mean {near[0]!r}?" if near else "")
    for kind in mapping.event.identifiers:
        if kind not in KINDS:
            yield f"event.identifiers.{kind}", f"the kinds of identifiers are {', '.join(KINDS)}"
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


def _nearest(field: str, reason: str) -> str:
    """For an unknown key: the known one that it resembles."""
    if "unknown field" not in reason:
        return ""
    names = {f for kind in _Strict.__subclasses__() for f in kind.__struct_fields__}
    near = difflib.get_close_matches(field.rsplit(".", 1)[-1], sorted(names), 1, 0.6)
    return f": did you mean {near[0]!r}?" if near else ""
