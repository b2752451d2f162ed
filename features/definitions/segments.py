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
        segments: the conditions that have a name.
    """

    def __init__(self, names: Names, context: Mapping[str, ValueKind], segments: Mapping[str, CelCondition]) -> None:
        self.context, self.segments = dict(context), dict(segments)
        self.names: Names = {**names, **dict.fromkeys(segments, "truth")}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (other.names, other.segments) == (self.names, self.segments)

    def __hash__(self) -> int:
        return hash(tuple(self.names))

    @classmethod
    def load(cls, home: Home, domain: str) -> Vocabulary:
        """That of an installation; without a file there are no segments.

        Raises:
            WrittenError: the file has a mistake.
        """
        path: Path = home.root / SEGMENTS
        return cls.parse(path.read_bytes() if path.exists() else b"", path.name, domain)

    @classmethod
    def parse(cls, text: bytes, name: str, domain: str) -> Vocabulary:
        """Read and check a segments file.

        Raises:
            WrittenError: it has a mistake; the message names line, field and fix.
        """
        said = read_yaml(text, name, SegmentsFile)
        features = names_of(domain_named(domain), {})
        for where, given in (("context", said.context), ("segments", said.segments)):
            if taken := [each for each in given if each in features or (where == "segments" and each in said.context)]:
                raise wrong(text, name, f"{where}.{taken[0]}", "is the name of something else: give it another")
        names, segments = {**features, **said.context}, {}
        for each, condition in said.segments.items():
            try:
                segments[each] = CelCondition.parse(condition, names)
            except ConditionError as error:
                raise wrong(text, name, f"segments.{each}", str(error)) from None
        return cls(names, said.context, segments)

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
        """The names that a condition reads, and those that its segments read."""
        return condition.names.union(*(self.segments[name].names for name in condition.names if name in self.segments))


class Told(Mapping[str, Any]):
    """What is known of one customer and one question, by name; a segment is found out once it is asked for."""

    def __init__(self, vocabulary: Vocabulary, values: Mapping[str, Any]) -> None:
        self._segments, self._values = vocabulary.segments, dict(values)

    def __getitem__(self, name: str) -> Any:
        if name not in self._values and name in self._segments:
            self._values[name] = self._segments[name].holds(self._values)
        return self._values[name]

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
