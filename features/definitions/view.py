"""Feature views: which declarations make one, of which entity, for which purposes; and how its rows are laid out."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from types import ModuleType

import ibis.expr.types as ir
import pyarrow as pa

from features.definitions import domain, domains, feature, shopping, timeline
from features.definitions.domain import domain_named
from features.definitions.feature import Dtype, Feature, compute_features
from features.definitions.folds import fold
from features.definitions.folds.registered import FOLDS
from features.definitions.timeline import Timeline
from features.events.event import Purpose
from features.people.consent import FEATURES, STATISTICS

ARROW: dict[Dtype, pa.DataType] = {
    "integer": pa.int64(), "float": pa.float64(), "text": pa.string(), "truth": pa.bool_(), "texts": pa.list_(pa.string()),
    "integers": pa.list_(pa.int64()), "floats": pa.list_(pa.float64()),
}  # fmt: skip
TIME = pa.timestamp("us", tz="UTC")
ONLINE = "_online"
"""Ends the name of the view, and of the service, that holds a row as one value: read and written at once, whatever its columns."""


@dataclass(frozen=True)
class View:
    """One feature view: its entity's key, its columns, and the column that tells which snapshot a row is of.

    Feast joins the last row at or before the spine's time, however old; ``at_column`` (Unix microseconds, a feature like
    any other) lets the door notice when that is not the row that was asked for.

    Attributes:
        purposes: what an event must be allowed for to count in it.
        compute: the rows at a moment; None for a view that a fold makes.
        modules: whose source says what its rows are.
    """

    name: str
    key: str
    columns: dict[str, Dtype]
    compute: Callable[[Timeline, datetime], ir.Table] | None
    modules: tuple[ModuleType, ...]
    purposes: tuple[Purpose, ...] = FEATURES

    @property
    def at_column(self) -> str:
        """The name of the snapshot's time among the features."""
        return f"{self.name}_at"

    @property
    def packed_column(self) -> str:
        """The column of the online view that holds the whole row."""
        return f"{self.name}_packed"

    def arrow_schema(self) -> pa.Schema:
        """The Parquet schema of a snapshot; times in microseconds, for DuckDB's sake."""
        named = ((name, ARROW[kind]) for name, kind in self.columns.items())
        return pa.schema([(self.key, pa.string()), ("event_timestamp", TIME), (self.at_column, pa.int64()), *named])

    @property
    def layout(self) -> str:
        """Names the columns and their types: rows of another layout cannot be read beside these."""
        return hashlib.sha256(str(self.arrow_schema()).encode()).hexdigest()[:12]

    @property
    def source(self) -> str:
        """The source of all that says what its rows are: with another source they are other rows."""
        return "".join(inspect.getsource(module) for module in self.modules)


@cache
def views_of(domain_name: str) -> dict[str, View]:
    """The feature views of a domain, by name.

    Raises:
        UnknownDomainError: there is no such domain.
    """
    of = domain_named(domain_name)
    here = (feature, shopping, timeline, domain, sys.modules[f"{domains.__name__}.{of.name}"])
    folded = (fold, *(sys.modules[type(each).__module__] for each in FOLDS))
    views = (
        View("customer_activity", "customer_id", _columns(of.customer), _computed(of.customer, shopping.customers, "customer_id"), here),
        View("customer_state", "customer_id", {each.name: "text" for each in FOLDS}, None, folded),
        View("item_stats", "item_id", _columns(of.item), _computed(of.item, shopping.sold_items, "item_id"), here, STATISTICS),
    )
    return {view.name: view for view in views}


def _columns(features: Sequence[Feature]) -> dict[str, Dtype]:
    return {each.name: each.dtype for each in features}


def _computed(features: Sequence[Feature], entities: Callable[[Timeline], ir.Table], key: str) -> Callable[[Timeline, datetime], ir.Table]:
    return lambda timeline, as_of: compute_features(features, entities, key, timeline, as_of)
