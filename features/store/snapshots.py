"""Snapshots: the rows of a feature view as they stood at a moment, computed from the log and kept as Parquet files."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.catalogue.tables import Catalogue
from features.definitions.folds.fold import Line
from features.definitions.folds.registered import CustomerState, Touch
from features.definitions.timeline import Timeline
from features.definitions.view import View
from features.state.clock import microseconds
from features.state.disk import make_folder, move_into_place
from features.state.home import Home
from features.store import timeline
from features.store.timeline import open_timeline

Wanted = Mapping[datetime, Sequence[str] | None]
"""For which moments a view is wanted, and for which entities (None: all)."""


EVENTS_AT_ONCE = 300_000
"""How many events are sorted at once: DuckDB cannot spill all that a sort of nested rows holds."""
ROWS_AT_ONCE = 500
"""How many rows of states of one moment are held before they are written."""
_STAMP = "%Y%m%dT%H%M%S%fZ"
_READ = [
    "customer_id", "known_at", "event_id", "name", "occurred_at", "local_date", "channel", "store_id", "session_id", "query", "offer_id",
    "decision_id", "items",
]  # fmt: skip


def snapshot_folder(home: Home, view: View) -> Path:
    """Where the snapshots of *view* lie: those of other columns lie elsewhere, as a reader could not put them side by side."""
    return home.snapshots / view.name / view.layout


def snapshot_path(home: Home, view: View, as_of: datetime) -> Path:
    """Where the snapshot of *view* at *as_of* lies."""
    return snapshot_folder(home, view) / f"{as_of:{_STAMP}}.parquet"


class WholeSnapshot(NamedTuple):
    """A snapshot of every entity: of which moment, with how many rows, and when it was written."""

    as_of: datetime
    rows: int
    written_at: datetime


def newest_whole(home: Home, view: View) -> WholeSnapshot | None:
    """The newest snapshot of *view* that holds every entity; None where there is none."""
    for path in sorted(snapshot_folder(home, view).glob("*.parquet"), reverse=True):
        with contextlib.suppress(OSError, pa.ArrowException, ValueError):
            told = pq.read_metadata(path)
            if (told.metadata or {}).get(b"all") == b"1":
                as_of = datetime.strptime(path.stem, _STAMP).replace(tzinfo=UTC)
                return WholeSnapshot(as_of, told.num_rows, datetime.fromtimestamp(path.stat().st_mtime, UTC))
    return None


def backfill(home: Home, view: View, wanted: Wanted, advance: Callable[[int], None] = lambda n: None) -> int:
    """Make the snapshots that are missing or out of date; returns how many were computed.

    A snapshot stands as long as its definition's source is unchanged and the log holds as many events known by then:
    the log only ever grows, so an equal count is an equal set. Each file is written whole or not at all.
    """
    if not wanted:
        return 0
    with contextlib.closing(open_timeline(home, identified_by=max(wanted), purposes=view.purposes)) as opened:
        stamps, stale = _stamps(home, opened, view, wanted), dict[datetime, Sequence[str] | None]()
        for as_of, entities in sorted(wanted.items()):
            if _stands(snapshot_path(home, view, as_of), view, stamps[as_of], entities):
                advance(1)
            else:
                stale[as_of] = entities
        with contextlib.ExitStack() as files:
            parts: dict[datetime, _Part] = {}
            for as_of, table in parts_of(opened, view, stale):
                if as_of not in parts:
                    metadata = {b"stamp": stamps[as_of], b"all": b"1" if wanted[as_of] is None else b"0"}
                    parts[as_of] = files.enter_context(_Part(snapshot_path(home, view, as_of), view, metadata))
                parts[as_of].write(table)
            for part in parts.values():
                part.finish()
                advance(1)
    return len(stale)


def drop_unread(home: Home, views: Mapping[str, View]) -> None:
    """Let go of snapshots of views, or with columns, that there are no more: nothing reads them."""
    read = {view.name: view.layout for view in views.values()}
    for folder in home.snapshots.glob("*"):
        for path in [folder] if folder.name not in read else folder.glob("*"):
            if path.name != read.get(folder.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def compute(opened: Timeline, view: View, wanted: Wanted) -> Iterator[tuple[datetime, pa.Table]]:
    """The rows of *view* at each wanted moment, in time order, straight from the log: for a few customers, as all are held at once."""
    found: dict[datetime, list[pa.Table]] = {as_of: [] for as_of in sorted(wanted)}
    for as_of, table in parts_of(opened, view, wanted):
        found[as_of].append(table)
    for as_of, tables in found.items():
        yield as_of, pa.concat_tables(tables)


def parts_of(opened: Timeline, view: View, wanted: Wanted) -> Iterator[tuple[datetime, pa.Table]]:
    """The rows of *view* at each wanted moment, part by part: those of one moment in the order of their keys, the moments' in turn."""
    if view.compute is not None:
        for as_of in sorted(wanted):
            yield as_of, _shape(view, as_of, view.compute(opened, as_of).to_pyarrow(), wanted[as_of])
        return
    chosen = {as_of: None if entities is None else frozenset(entities) for as_of, entities in wanted.items()}
    waiting: dict[datetime, list[dict[str, Any]]] = {as_of: [] for as_of in wanted}
    for as_of, customer_id, state in states(opened, sorted(wanted)):
        only, rows = chosen[as_of], waiting[as_of]
        if only is None or customer_id in only:
            rows.append({"customer_id": customer_id, **state.to_row()})
        if len(rows) >= ROWS_AT_ONCE:
            yield as_of, _of_rows(view, as_of, rows)
            rows.clear()
    for as_of, rows in sorted(waiting.items()):
        yield as_of, _of_rows(view, as_of, rows)


def states(opened: Timeline, moments: Sequence[datetime]) -> Iterator[tuple[datetime, str, CustomerState]]:
    """Each customer's state under all folds as it stood at each of *moments* (ascending), customer by customer in the order of their ids.

    Their events are folded in the order in which they became known. One customer's state is held at a time, and goes on changing
    after each step: use it before asking for the next.
    """
    for customer_id, touches in itertools.groupby(_touches(opened), key=lambda each: each[0]):
        state, passed = None, 0
        for _, known_at, touch in touches:
            while passed < len(moments) and known_at >= moments[passed]:
                if state is not None:
                    yield moments[passed], customer_id, state
                passed += 1
            if passed < len(moments):
                state = (state or CustomerState()).step(touch)
        if state is not None:
            for moment in moments[passed:]:
                yield moment, customer_id, state


def _touches(opened: Timeline) -> Iterator[tuple[str, datetime, Touch]]:
    """What a fold reads of every customer's events, customer by customer, each one's in the order in which they became known."""
    events = opened.events.filter(opened.events.customer_id.notnull())
    connection = opened.events.get_backend().con
    for first, last in _ranges(events):
        ordered = events.filter(events.customer_id.between(first, last)).order_by("customer_id", "known_at", "event_id").select(*_READ)
        # streamed by DuckDB itself: ibis 12 asks DuckDB 2 for a method that it no longer has
        for batch in connection.sql(str(ibis.to_sql(ordered, "duckdb"))).to_arrow_reader(20_000):
            rows = zip(*(batch.column(name).to_pylist() for name in _READ[:-1]), _lines(batch.column("items")), strict=True)
            for customer_id, known_at, *told in rows:
                yield customer_id, known_at, Touch(*told)


def _ranges(events: ir.Table) -> Iterator[tuple[str, str]]:
    """The first and the last of so many customers, in the order of their ids, as have few enough events to be sorted in memory."""
    counted = events.group_by("customer_id").aggregate(events=events.count()).order_by("customer_id").to_pyarrow()
    first, last, held = None, "", 0
    for customer_id, count in zip(counted["customer_id"].to_pylist(), counted["events"].to_pylist(), strict=True):
        if first is not None and held + count > EVENTS_AT_ONCE:
            yield first, last
            first, held = None, 0
        first, last, held = first or customer_id, customer_id, held + count
    if first is not None:
        yield first, last


def _lines(items: pa.ListArray) -> list[tuple[Line, ...]]:
    """Each event's items; by columns, as a dict a line would cost ten times more."""
    lines = items.flatten()
    told = [Line(*each) for each in zip(*(lines.field(name).to_pylist() for name in Line._fields), strict=True)]
    ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(items), 0)).to_pylist()
    return [tuple(told[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _of_rows(view: View, as_of: datetime, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = [f for f in view.arrow_schema() if f.name not in ("event_timestamp", view.at_column)]
    table = pa.table({f.name: pa.array([row[f.name] for row in rows], f.type) for f in columns})
    return _shape(view, as_of, table, None)


def _shape(view: View, as_of: datetime, table: pa.Table, entities: Iterable[str] | None) -> pa.Table:
    if entities is not None:
        table = table.filter(pc.is_in(table[view.key], pa.array(list(entities), pa.string())))
    table = table.append_column("event_timestamp", pa.array([as_of] * len(table), pa.timestamp("us", tz="UTC")))
    table = table.append_column(view.at_column, pa.array([microseconds(as_of)] * len(table), pa.int64()))
    schema = view.arrow_schema()
    return table.select(schema.names).cast(schema).sort_by(view.key)


def _stamps(home: Home, opened: Timeline, view: View, moments: Iterable[datetime]) -> dict[datetime, bytes]:
    """What each snapshot depends on: its definitions' source, the catalogue, how many events count at its moment, the plan."""
    source = view.source + inspect.getsource(timeline) + Catalogue(home).digest("items", "offers") + opened.consents
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


class _Part:
    """A snapshot that is being written; what is not finished is taken back."""

    def __init__(self, path: Path, view: View, metadata: Mapping[bytes, bytes]) -> None:
        make_folder(path.parent)
        self._path, self._part = path, path.with_suffix(f".{os.getpid()}.part")
        self._schema = view.arrow_schema().with_metadata(dict(metadata))
        self._file = pq.ParquetWriter(self._part, self._schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)

    def write(self, table: pa.Table) -> None:
        self._file.write_table(table.replace_schema_metadata(self._schema.metadata))

    def finish(self) -> None:
        self._file.close()
        move_into_place(self._part, self._path)
