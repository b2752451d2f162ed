"""A feature is one declaration: views, model inputs, gate ranges, reasons and the feature catalogue are derived from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Literal
from zoneinfo import ZoneInfo

import ibis.expr.types as ir

from features.definitions.compute import Literals, MomentTerms
from features.definitions.timeline import Timeline

Dtype = Literal["integer", "float", "text", "truth", "integers", "floats", "texts"]


@dataclass(frozen=True)
class Moment:
    """The moment that features are of: windows are half-open ``[as_of - days, as_of)``, days are the shop's own.

    In an expression stand ``at`` and ``within``, ``days_since``; ``as_of`` and ``today`` are for Python.
    """

    as_of: datetime
    timezone: str
    spelled: MomentTerms = field(default_factory=Literals, compare=False, repr=False)

    @property
    def at(self) -> ir.TimestampValue:
        """The moment in an expression."""
        return self.spelled.moment(self.as_of)

    @property
    def today(self) -> date:
        """The shop's own day."""
        return self.as_of.astimezone(ZoneInfo(self.timezone)).date()

    def within(self, table: ir.Table, days: int) -> ir.BooleanValue:
        """Which rows lie in the last *days*."""
        return table.occurred_at >= self.spelled.moment(self.as_of, days)

    def days_since(self, day: ir.DateValue) -> ir.IntegerValue:
        """Whole days from *day* until today."""
        return self.spelled.day(self.today).delta(day, unit="day").cast("int64")


Base = Callable[[Timeline, Moment], ir.Table]
"""What measures are taken of: rows that carry the key of their entity, from events before the moment alone."""


@dataclass(frozen=True)
class Measure:
    """One number an entity: an aggregate over its rows of a base."""

    base: Base
    value: Callable[[ir.Table, Moment], ir.Value]
    none: int | None = None
    """What an entity without any rows has: None is unknown, 0 is a count."""


@dataclass(frozen=True)
class Derived:
    """One number from the measures of the same entity."""

    value: Callable[[ir.Table], ir.Value]


@dataclass(frozen=True)
class Feature:
    """Everything that is said of one feature.

    Attributes:
        phrase: what it says to a marketer, with one place for the value: ``{:.0f}``, ``{:.0%}``, or ``{:m}`` for money.
        unknown: what is said where there is no value.
        low, high: between what its values must lie; None is open.
        direction: which way more of it may move the chance that the customer leaves: 1 raises, -1 lowers, 0 is open.
        inputs_of: the kinds of models that take it as an input.
        is_age: it grows with the calendar, so that a drift of it says nothing.
    """

    name: str
    dtype: Dtype
    definition: Measure | Derived
    phrase: str = ""
    unknown: str = ""
    low: float | None = 0.0
    high: float | None = None
    direction: Literal[-1, 0, 1] = 0
    inputs_of: tuple[str, ...] = ()
    is_age: bool = False


def counted(base: Base, value: Callable[[ir.Table, Moment], ir.Value]) -> Measure:
    """A measure that is 0 for whoever has no rows."""
    return Measure(base, value, none=0)


def ratio(numerator: ir.NumericValue, denominator: ir.NumericValue) -> ir.NumericValue:
    """Null where the denominator is zero: an unknown share is not a share of nothing."""
    return numerator.cast("float64") / denominator.cast("float64").nullif(0.0)


def compute_features(
    features: Sequence[Feature], entities: Callable[[Timeline], ir.Table], key: str, timeline: Timeline, as_of: datetime
) -> ir.Table:
    """One row an entity with all *features* as they stand at *as_of*: one aggregation a base, then what is derived.

    Args:
        features: what is wanted.
        entities: the entities known before the moment, one row each, under *key*.
        key: the column of the entity's id.
        timeline: the events, of which only those before *as_of* count.
        as_of: the moment.
    """
    past, moment = timeline.before(as_of), Moment(as_of, timeline.shop.timezone, timeline.compute)
    table = entities(past)
    measures = {feature.name: feature.definition for feature in features if isinstance(feature.definition, Measure)}
    for base in dict.fromkeys(each.base for each in measures.values()):
        rows = base(past, moment)
        taken = {name: each.value(rows, moment) for name, each in measures.items() if each.base is base}
        table = table.left_join(rows.group_by(key).aggregate(**taken), key).drop(f"{key}_right")
    table = table.mutate(**{name: table[name].fill_null(each.none) for name, each in measures.items() if each.none is not None})
    return table.mutate(**{f.name: f.definition.value(table) for f in features if isinstance(f.definition, Derived)})
