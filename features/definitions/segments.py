"""Segments: conditions on a customer that have a name, for offers, journeys and reports alike; and what else a question may tell."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

import msgspec

from features.catalogue.yaml_file import WrittenError, read_yaml, wrong
from features.definitions.conditions import CelCondition, ConditionError, Names, ValueKind, names_of
from features.definitions.domain import domain_named
from features.definitions.standing import BUILT_IN, STANDING, Borders, CustomerStanding, Risk
from features.events.spelling import meant
from features.state.home import Home

SEGMENTS = "segments.yaml"
"""The file of a home that names segments and declares what questions may tell beside."""
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
ContextValue = bool | float | str


class SegmentsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of a segments file."""

    context: dict[Name, Literal["number", "text", "truth"]] = {}
    """What a question may tell beside, under ``context``."""
    segments: dict[Name, str] = {}
    """By name a condition in CEL."""


class Vocabulary:
    """Everything that a condition of one shop may name.

    Attributes:
        names: what each name holds.
        context: what a question may tell, by name.
        segments: the conditions that have a name: the shop's own, and those that every shop has.
        standing: what tells where a customer stands.
    """

    def __init__(
        self,
        names: Names,
        context: Mapping[str, ValueKind],
        segments: Mapping[str, CelCondition],
        standing: CustomerStanding,
    ) -> None:
        self.context, self.segments, self.standing = dict(context), dict(segments), standing
        self.names: Names = {**names, **dict.fromkeys(segments, "truth")}

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Vocabulary) and (other.names, other.segments) == (self.names, self.segments)
        return same and isinstance(other, Vocabulary) and other.standing.borders == self.standing.borders

    def __hash__(self) -> int:
        return hash(tuple(self.names))

    @classmethod
    def load(cls, home: Home, domain: str, risk: Risk | None = None) -> Vocabulary:
        """That of an installation; without a file it has the segments that every shop has.

        Raises:
            WrittenError: the file has a mistake.
            DamagedStateError: the borders between fifths are damaged.
        """
        path: Path = home.root / SEGMENTS
        standing = CustomerStanding(domain_named(domain).leaving, Borders.load(home), risk)
        return cls.parse(path.read_bytes() if path.exists() else b"", path.name, domain, standing)

    @classmethod
    def parse(cls, text: bytes, name: str, domain: str, standing: CustomerStanding | None = None) -> Vocabulary:
        """Read and check a segments file. Its conditions may name the segments that every shop has, and not each other.

        Raises:
            WrittenError: it has a mistake; the message names line, field and fix.
        """
        said = read_yaml(text, name, SegmentsFile)
        features = names_of(domain_named(domain), STANDING)
        for where, given in (("context", said.context), ("segments", said.segments)):
            if taken := [each for each in given if each in features or (where == "segments" and each in said.context)]:
                raise wrong(text, name, f"{where}.{taken[0]}", "is the name of something else: give it another")
        known: Names = {**features, **said.context}
        # a name that the shop gives to something of its own is its own
        given_to_all = {each: condition for each, condition in BUILT_IN.items() if each not in known and each not in said.segments}
        segments = {each: CelCondition.parse(condition, known) for each, condition in given_to_all.items()}
        names: Names = {**known, **dict.fromkeys(given_to_all, "truth")}
        for each, condition in said.segments.items():
            try:
                segments[each] = CelCondition.parse(condition, names)
            except ConditionError as error:
                raise wrong(text, name, f"segments.{each}", str(error)) from None
        return cls(names, said.context, segments, standing or CustomerStanding(domain_named(domain).leaving))

    def parse_condition(self, text: str) -> CelCondition:
        """A condition in these words.

        Raises:
            ConditionError: it cannot be.
        """
        return CelCondition.parse(text, self.names)

    def check_context(self, context: Mapping[str, ContextValue]) -> None:
        """See that a question tells what was declared, as what it was declared.

        Raises:
            WrongContextError: it does not.
        """
        fits: dict[str, type | tuple[type, ...]] = {"number": (int, float), "text": str, "truth": bool}
        for name, value in context.items():
            if (kind := self.context.get(name)) is None:
                known = f"one of {', '.join(self.context)}" if self.context else f"what {SEGMENTS} declares under context"
                raise WrongContextError(name, f"is not declared: use {known}{meant(name, tuple(self.context))}")
            if not isinstance(value, fits[kind]) or (kind == "number" and isinstance(value, bool)):
                raise WrongContextError(name, f"is to be a {kind}")

    def told(self, row: Mapping[str, Any], question: Mapping[str, Any]) -> Told:
        """What is known of one customer and one question."""
        return Told(self, {**row, **question})

    def needs(self, condition: CelCondition) -> frozenset[str]:
        """The names that a condition reads, those that its segments read, and the features that tell where a customer stands."""
        found, waiting = set[str](), set(condition.names)
        while waiting:
            found |= waiting
            waiting = {name for each in waiting if each in self.segments for name in self.segments[each].names} - found
        return frozenset(found | self.standing.reads) if found & STANDING.keys() else frozenset(found)


class Told(Mapping[str, Any]):
    """What is known of one customer and one question, by name; a segment, and where they stand, is found out once it is asked for."""

    def __init__(self, vocabulary: Vocabulary, values: Mapping[str, Any]) -> None:
        self._segments, self._standing, self._values = vocabulary.segments, vocabulary.standing, dict(values)

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            if name in self._segments:
                self._values[name] = self._segments[name].holds(self)
            elif name in STANDING:
                self._values[name] = self._standing.of(name, self)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        # what is not asked for is not found out
        return name in self._values or name in self._segments or name in STANDING

    def __iter__(self) -> Any:
        return iter({**self._segments, **self._values})

    def __len__(self) -> int:
        return len({**self._segments, **self._values})


class WrongContextError(ValueError):
    """A question tells something that is not declared; ``field`` names it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"context.{name}: {reason}")
        self.field, self.reason = f"context.{name}", reason


def of_the_question(at: datetime, zone: ZoneInfo, channel: str | None, store_id: str | None) -> dict[str, Any]:
    """What every question tells."""
    local = at.astimezone(zone)
    told = {"hour": local.hour, "weekday": local.isoweekday(), "month": local.month, "day": local.day}
    return {"channel": channel, "store_id": store_id, **told}


__all__ = ["SEGMENTS", "ContextValue", "SegmentsFile", "Told", "Vocabulary", "WrittenError", "WrongContextError", "of_the_question"]
