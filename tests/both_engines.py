"""The same features by DuckDB and by Spark, beside each other."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from features.catalogue.shop import Shop
from features.definitions.folds.registered import NAMES
from features.definitions.view import View, views_of
from features.state.home import Home
from features.store.compute import EngineName, compute_of, with_engine
from features.store.snapshots import parts_of
from features.store.timeline import open_timeline

TOLERANCE = 1e-9
"""How far a number that is no whole one may lie from the other engine's, relative to it."""


@dataclass(frozen=True)
class Compared:
    """One view at one moment, or one fold of it, by both engines."""

    view: str
    at: datetime
    rows: int
    columns: int
    exact: int
    """How many columns are equal to the last bit."""
    largest: float
    """The largest relative difference of a number that is no whole one; infinite where anything else differs."""
    empty: tuple[str, ...]
    """The columns in which nothing stands, so that they compare nothing."""

    @property
    def agrees(self) -> bool:
        return self.largest <= TOLERANCE


def rows_of(home: Home, engine: EngineName, view: View, moments: Sequence[datetime]) -> dict[datetime, pa.Table]:
    """The rows of a view at some moments."""
    home = with_engine(home, engine)
    with contextlib.closing(open_timeline(home, max(moments), purposes=view.purposes, compute=compute_of(home))) as opened:
        found: dict[datetime, list[pa.Table]] = {moment: [] for moment in moments}
        for at, table in parts_of(opened, view, dict.fromkeys(moments)):
            found[at].append(table)
    return {at: pa.concat_tables(tables) for at, tables in found.items()}


def compared(
    home: Home,
    moments: Sequence[datetime],
    took: Callable[[str, str, float], None] = lambda view, engine, seconds: None,
    only: Sequence[str] = (),
) -> list[Compared]:
    """Every view of the shop's domain, or *only* some, at each moment, the states fold by fold."""
    found = []
    for view in views_of(Shop.load(home).domain).values():
        if only and view.name not in only:
            continue
        by_engine: dict[str, dict[datetime, pa.Table]] = {}
        for engine in ("duckdb", "spark"):
            began = time.perf_counter()
            by_engine[engine] = rows_of(home, engine, view, moments)
            took(view.name, engine, time.perf_counter() - began)
        for at in moments:
            one, other = by_engine["duckdb"][at], by_engine["spark"][at]
            parts = {view.name: list(view.columns)} if view.compute is not None else {f"{view.name}: {name}": [name] for name in NAMES}
            found += [beside(name, at, one.select([view.key, *names]), other.select([view.key, *names])) for name, names in parts.items()]
    return found


def beside(name: str, at: datetime, one: pa.Table, other: pa.Table) -> Compared:
    """Two tables, row by row in the order in which they came."""
    if one.schema != other.schema or len(one) != len(other):
        return Compared(name, at, len(one), len(one.column_names), 0, math.inf, ())
    exact, largest = 0, 0.0
    for column in one.column_names:
        left, right = one[column].to_pylist(), other[column].to_pylist()
        if left == right:
            exact += 1
        else:
            largest = max(largest, *(apart(a, b) for a, b in zip(left, right, strict=True)))
    empty = tuple(column for column in one.column_names if one[column].null_count == len(one))
    return Compared(name, at, len(one), len(one.column_names), exact, largest, empty)


def apart(one: Any, other: Any) -> float:
    """How far two values lie apart, relative to them; infinite where they are not both fractions."""
    if one == other:
        return 0.0
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(abs(one), abs(other))
    return math.inf
