"""Snapshots: the rows of a feature view as they stood at a moment, computed from the log and kept as Parquet files."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import definitions, folds, timeline, views
from features.catalogue import Catalogue
from features.clock import microseconds
from features.definitions import DEFINITIONS
from features.disk import make_folder, move_into_place
from features.folds import History, Touch, fold_history
from features.home import Home
from features.timeline import Timeline, open_timeline
from features.views import VIEWS, View

Wanted = Mapping[datetime, Sequence[str] | None]
"""For which moments a view is wanted, and for which entities (None: all)."""


def snapshot_path(home: Home, view: str, as_of: datetime) -> Path:
    """Where the snapshot of *view* at *as_of* lies."""
    return home.snapshots / view / f"{as_of:%Y%m%dT%H%M%S%fZ}.parquet"


def backfill(home: Home, view: str, wanted: Wanted, advance: Callable[[int], None] = lambda n: None) -> int:
    """Make the snapshots that are missing or out of date; returns how many were computed.

    A snapshot stands as long as its definition's source is unchanged and the log holds as many events known by then:
    the log only ever grows, so an equal count is an equal set. Each file is written whole or not at all.
    """
    if not wanted:
        return 0
    opened = open_timeline(home, identified_by=max(wanted), purposes=VIEWS[view].purposes)
    stamps, stale = _stamps(home, opened, wanted), {}
    for as_of, entities in sorted(wanted.items()):
        if _stands(snapshot_path(home, view, as_of), VIEWS[view], stamps[as_of], entities):
            advance(1)
        else:
            stale[as_of] = stamps[as_of]
    for as_of, table in compute(opened, view, {as_of: wanted[as_of] for as_of in stale}):
        _write(snapshot_path(home, view, as_of), table, stale[as_of], complete=wanted[as_of] is None)
        advance(1)
    return len(stale)


def compute(opened: Timeline, view: str, wanted: Wanted) -> Iterator[tuple[datetime, pa.Table]]:
    """The rows of *view* at each wanted moment, in time order, straight from the log."""
    if view in DEFINITIONS:
        for as_of in sorted(wanted):
            yield as_of, _shape(VIEWS[view], as_of, DEFINITIONS[view](opened, as_of).to_pyarrow(), wanted[as_of])
        return
    for as_of, histories in replay(opened, sorted(wanted)):
        entities = wanted[as_of]
        chosen = histories if entities is None else {c: histories[c] for c in entities if c in histories}
        rows = [{"customer_id": c, **h.to_row()} for c, h in chosen.items()]
        columns = [f.name for f in VIEWS[view].arrow_schema() if f.name not in ("event_timestamp", VIEWS[view].at_column)]
        table = pa.table({name: pa.array([r[name] for r in rows], VIEWS[view].arrow_schema().field(name).type) for name in columns})
        yield as_of, _shape(VIEWS[view], as_of, table, None)


def replay(opened: Timeline, moments: Sequence[datetime]) -> Iterator[tuple[datetime, dict[str, History]]]:
    """Fold every customer's events in the order in which they became known; gives all histories at each moment.

    The histories go on changing after each step: use them before asking for the next.
    """
    histories: dict[str, History] = {}
    waiting = iter(moments)
    moment = next(waiting, None)
    for customer_id, known_at, touch in _touches(opened):
        while moment is not None and known_at >= moment:
            yield moment, histories
            moment = next(waiting, None)
        if moment is None:
            return
        fold_history(histories.setdefault(customer_id, History()), touch)
    while moment is not None:
        yield moment, histories
        moment = next(waiting, None)


def _touches(opened: Timeline) -> Iterator[tuple[str, datetime, Touch]]:
    events = opened.events.filter(opened.events.customer_id.notnull())
    columns = ["customer_id", "known_at", "name", "occurred_at", "channel", "items"]
    for batch in events.order_by("known_at", "event_id").select(*columns).to_pyarrow().to_batches(50_000):
        rows = zip(*(batch.column(name).to_pylist() for name in columns[:-1]), _item_ids(batch.column("items")), strict=True)
        for customer_id, known_at, name, occurred_at, channel, item_ids in rows:
            yield customer_id, known_at, Touch(name, occurred_at, channel, item_ids)


def _item_ids(items: pa.ListArray) -> list[list[str]]:
    """Each event's item ids, lines of no quantity left out; by columns, as a dict a line would cost ten times more."""
    lines = items.flatten()
    ids, quantities = lines.field("item_id").to_pylist(), lines.field("quantity").to_pylist()
    ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(items), 0)).to_pylist()
    starts = [0, *ends[:-1]]
    return [[ids[k] for k in range(start, end) if quantities[k] > 0] for start, end in zip(starts, ends, strict=True)]


def _shape(view: View, as_of: datetime, table: pa.Table, entities: Iterable[str] | None) -> pa.Table:
    if entities is not None:
        table = table.filter(pc.is_in(table[view.key], pa.array(list(entities), pa.string())))
    table = table.append_column("event_timestamp", pa.array([as_of] * len(table), pa.timestamp("us", tz="UTC")))
    table = table.append_column(view.at_column, pa.array([microseconds(as_of)] * len(table), pa.int64()))
    schema = view.arrow_schema()
    return table.select(schema.names).cast(schema).sort_by(view.key)


def _stamps(home: Home, opened: Timeline, moments: Iterable[datetime]) -> dict[datetime, bytes]:
    """What each snapshot depends on: the definitions' source, the catalogue, how many events count at its moment, the plan."""
    source = "".join(inspect.getsource(module) for module in (definitions, folds, timeline, views))
    source += Catalogue(home).digest("items", "offers") + opened.consents
    known = opened.events.select(at=ibis.greatest(opened.events.occurred_at, opened.events.known_at)).to_pandas()["at"]
    planned = opened.item_context.select("valid_from").to_pandas()["valid_from"]
    since_epoch = [np.sort(column.astype("datetime64[us, UTC]").astype("int64").to_numpy()) for column in (known, planned)]

    def stamp(as_of: datetime) -> bytes:
        counts = [int(np.searchsorted(column, microseconds(as_of))) for column in since_epoch]
        return hashlib.sha256(f"{source}{counts}".encode()).hexdigest().encode()

    return {as_of: stamp(as_of) for as_of in moments}


def _stands(path: Path, view: View, stamp: bytes, entities: Sequence[str] | None) -> bool:
    if not path.exists():
        return False
    metadata = pq.read_schema(path).metadata or {}
    if metadata.get(b"stamp") != stamp:
        return False
    if entities is None:
        return metadata.get(b"all") == b"1"
    held = set(pq.read_table(path, columns=[view.key])[view.key].to_pylist())
    return metadata.get(b"all") == b"1" or set(entities) <= held


def _write(path: Path, table: pa.Table, stamp: bytes, complete: bool) -> None:
    make_folder(path.parent)
    part = path.with_suffix(f".{os.getpid()}.part")
    pq.write_table(table.replace_schema_metadata({b"stamp": stamp, b"all": b"1" if complete else b"0"}), part)
    move_into_place(part, path)
