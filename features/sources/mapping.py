"""The mapping of a retailer's own files to canonical events, as its YAML says it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from features.catalogue.tables import SHOWN
from features.definitions.domain import domain_named, domain_names
from features.events.event import EVENT_NAMES, explain
from features.events.spelling import nearest
from features.sources.mapping_mistakes import mistakes
from features.sources.mapping_parts import (
    AttributePart,
    Condition,
    ConsentPart,
    EventPart,
    Files,
    ItemPart,
    MappingError,
    MoneyPart,
    NumberPart,
    Refunds,
    ShopPart,
    Skip,
    Strict,
    TextPart,
    TimePart,
)

SHIPPED = Path(__file__).parent / "mappings"


class Mapping(Strict, frozen=True):
    """The whole of a ``mapping.yaml``."""

    source: Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9-]*$", max_length=64)]
    shop: ShopPart
    consent: ConsentPart
    event: EventPart
    files: Files = Files()
    item: ItemPart | None = None
    refunds: Refunds | None = None
    skip: tuple[Skip, ...] = ()
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
            field, reason = explain(error, cls)
            raise MappingError(f"{name}: {field}: {reason}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MappingError(f"{name}: not valid YAML: {error}") from None
        for field, reason in mistakes(mapping):
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
            for column in time.used:
                found.setdefault(column, place)
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
                near = nearest(column, tuple(present))
                hint = f"did you mean {near!r}? " if near else ""
                if len(present) == 1 and (between := next((d for d in ";\t|," if d in present[0]), None)):
                    hint = f"its columns seem to be divided by {between!r}: set files.delimiter. "
                raise MappingError(f"{name}: {place}: {file} has no column {column!r}; {hint}It has: {', '.join(present)}")
