"""Snapshots: the rows of a feature view as they stood at a moment, computed from the log and kept as Parquet files."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.catalogue.tables import Catalogue
from features.definitions.folds.registered import CustomerState
from features.definitions.timeline import Timeline
from features.definitions.view import View
from features.state.clock import microseconds
from features.state.disk import make_folder, move_into_place
from features.state.home import Home
from features.store import timeline
from features.store.compute import compute_of
from features.store.folding import ORDER, READ, folded, states_of, touches_of
from features.store.timeline import open_timeline

Wanted = Mapping[datetime, Sequence[str] | None]
"""For which moments a view is wanted, and for which entities (None: all)."""


_STAMP = "%Y%m%dT%H%M%S%fZ"


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
    with contextlib.closing(open_timeline(home, identified_by=max(wanted), purposes=view.purposes, compute=compute_of(home))) as opened:
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
    for as_of in sorted(wanted):
        # one of nobody is written too
        yield as_of, view.arrow_schema().empty_table()
    if view.compute is not None:
        for as_of in sorted(wanted):
            for table in opened.compute.ordered(partial(view.compute, opened), as_of, view.key, view.compute):
                yield as_of, _shape(view, as_of, table, wanted[as_of])
        return
    chosen = {as_of: None if entities is None else frozenset(entities) for as_of, entities in wanted.items()}
    for batch in opened.compute.stepped(partial(_read_by_folds, opened), ORDER[0], ORDER, partial(folded, chosen=chosen)):
        as_of = batch["as_of"][0].as_py()
        yield as_of, _shape(view, as_of, pa.Table.from_batches([batch]), None)


def states(opened: Timeline, moments: Sequence[datetime]) -> Iterator[tuple[datetime, str, CustomerState]]:
    """Each customer's state under all folds as it stood at each of *moments* (ascending), customer by customer in the order of their ids.

    Use each before asking for the next, as it goes on changing; see ``states_of``. All their events come here: ``parts_of`` folds them
    where they lie.
    """
    return states_of(touches_of(opened.compute.stepped(partial(_read_by_folds, opened), ORDER[0], ORDER, iter)), moments)


def _read_by_folds(opened: Timeline) -> ir.Table:
    return opened.events.filter(opened.events.customer_id.notnull()).select(*READ)


def _shape(view: View, as_of: datetime, table: pa.Table, entities: Iterable[str] | None) -> pa.Table:
    if entities is not None:
        table = table.filter(pc.is_in(table[view.key], pa.array(list(entities), pa.string())))
    table = table.append_column("event_timestamp", pa.array([as_of] * len(table), pa.timestamp("us", tz="UTC")))
    table = table.append_column(view.at_column, pa.array([microseconds(as_of)] * len(table), pa.int64()))
    schema = view.arrow_schema()
    return table.select(schema.names).cast(schema)


def _stamps(home: Home, opened: Timeline, view: View, moments: Collection[datetime]) -> dict[datetime, bytes]:
    """What each snapshot depends on: its definitions' source, the catalogue, how many events count at its moment, the plan."""
    source = view.source + inspect.getsource(timeline) + Catalogue(home).digest("items", "offers") + opened.consents
    known = ibis.greatest(opened.events.occurred_at, opened.events.known_at)
    events, planned = _before(known, moments), _before(opened.item_context.valid_from, moments)

    def stamp(as_of: datetime) -> bytes:
        return hashlib.sha256(f"{source}{[events[as_of], planned[as_of]]}".encode()).hexdigest().encode()

    return {as_of: stamp(as_of) for as_of in moments}


def _before(times: ir.TimestampValue, moments: Collection[datetime]) -> dict[datetime, int]:
    """How many of *times* lie before each moment, counted where they lie."""
    named = {f"n{number}": moment for number, moment in enumerate(moments)}
    rows = times.as_table()
    at = rows[rows.columns[0]]
    [counts] = rows.aggregate(**{name: (at < ibis.timestamp(moment)).sum() for name, moment in named.items()}).to_pyarrow().to_pylist()
    return {moment: int(counts[name] or 0) for name, moment in named.items()}


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
        if len(table):
            self._file.write_table(table.replace_schema_metadata(self._schema.metadata))

    def finish(self) -> None:
        self._file.close()
        move_into_place(self._part, self._path)
