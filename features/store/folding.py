"""From events in order to states: one customer's at a time, wherever the events are read."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from features.definitions.folds.fold import Line
from features.definitions.folds.registered import NAMES, CustomerState, Touch

ROWS_AT_ONCE = 500
"""How many rows of states of one moment are held before they are handed on."""
READ = (
    "customer_id", "known_at", "event_id", "name", "occurred_at", "local_date", "channel", "store_id", "session_id", "query", "offer_id",
    "decision_id", "items",
)  # fmt: skip
"""The columns of an event that folds read, those of its customer and of when it became known first."""
ORDER = ("customer_id", "known_at", "event_id")
"""In which order events are folded."""
STATES = pa.schema(
    [("as_of", pa.timestamp("us", tz="UTC")), ("customer_id", pa.string()), *((name, pa.string()) for name in NAMES)]
)  # fmt: skip
"""Rows of states, each with the moment that it is of."""
Chosen = Mapping[datetime, Collection[str] | None]
"""For which moments states are wanted, and of which customers (None: all)."""


def states_of(touches: Iterable[tuple[str, datetime, Touch]], moments: Sequence[datetime]) -> Iterator[tuple[datetime, str, CustomerState]]:
    """Each customer's state under all folds as it stood at each of *moments* (ascending), customer by customer as they come.

    Their events are folded in the order in which they became known. One customer's state is held at a time, and goes on changing
    after each step: use it before asking for the next.

    Raises:
        RuntimeError: the customers do not come in the order of their ids, so that one might come twice, each time with some of their
            events.
    """
    before = ""
    for customer_id, theirs in itertools.groupby(touches, key=lambda each: each[0]):
        if customer_id <= before:
            raise RuntimeError("events to be folded did not come in order: nothing is made of them")
        before = customer_id
        state, passed = None, 0
        for _, known_at, touch in theirs:
            while passed < len(moments) and known_at >= moments[passed]:
                if state is not None:
                    yield moments[passed], customer_id, state
                passed += 1
            if passed < len(moments):
                state = (state or CustomerState()).step(touch)
        if state is not None:
            for moment in moments[passed:]:
                yield moment, customer_id, state


def touches_of(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, datetime, Touch]]:
    """What folds read of events (``READ``), row by row."""
    for batch in batches:
        rows = zip(*(batch.column(name).to_pylist() for name in READ[:-1]), _lines(batch.column("items")), strict=True)
        for customer_id, known_at, *told in rows:
            yield customer_id, known_at, Touch(*told)


def folded(batches: Iterable[pa.RecordBatch], chosen: Chosen) -> Iterator[pa.RecordBatch]:
    """The rows of ``STATES`` that events in ``ORDER`` make; each batch is of one moment, and those of one moment follow the customers."""
    waiting: dict[datetime, list[tuple[str, CustomerRow]]] = {moment: [] for moment in sorted(chosen)}
    for moment, customer_id, state in states_of(touches_of(batches), list(waiting)):
        only, rows = chosen[moment], waiting[moment]
        if only is None or customer_id in only:
            rows.append((customer_id, state.to_row()))
        if len(rows) >= ROWS_AT_ONCE:
            yield _batch(moment, rows)
            rows.clear()
    for moment, rows in waiting.items():
        if rows:
            yield _batch(moment, rows)


CustomerRow = Mapping[str, str]
"""One customer's states, by fold."""


def _batch(moment: datetime, rows: Sequence[tuple[str, CustomerRow]]) -> pa.RecordBatch:
    columns = [[moment] * len(rows), [customer_id for customer_id, _ in rows], *([row[name] for _, row in rows] for name in NAMES)]
    return pa.record_batch([pa.array(column, f.type) for column, f in zip(columns, STATES, strict=True)], schema=STATES)


def _lines(items: pa.ListArray) -> list[tuple[Line, ...]]:
    """Each event's items; by columns, as a dict a line would cost ten times more."""
    lines = items.flatten()
    told = [Line(*each) for each in zip(*(lines.field(name).to_pylist() for name in Line._fields), strict=True)]
    ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(items), 0)).to_pylist()
    return [tuple(told[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
