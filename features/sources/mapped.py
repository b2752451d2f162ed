"""A retailer's own files as a source: checked and sorted into events on disk first, so that memory stays bounded."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import duckdb
import msgspec
import pyarrow as pa

from features.catalogue.shop import Shop
from features.catalogue.tables import ATTRIBUTE_TYPES, Catalogue, items_schema
from features.events.event import Purpose
from features.people.consent import PURPOSES
from features.sources import staging
from features.sources.importing import Arrival
from features.sources.mapping import Mapping
from features.sources.row_problems import quoted
from features.sources.tabular import LINE, TabularFile, UnreadableFileError, expand
from features.state.clock import local_midnight, system_clock
from features.state.home import Home
from features.store.dead_letters import DeadLetter

BATCH = 20_000
MEMORY = "1GB"
STAGE_VERSION = 1
"""Changes when the same files and mapping would give other events."""


class RejectedFilesError(ValueError):
    """More rows than the mapping allows could not be taken, so nothing was stored; the message says which and why."""


@dataclass(frozen=True)
class Rejection:
    """Rows rejected for the same reason."""

    field: str
    reason: str
    rows: int
    example: str
    """The first such row: its file, number and value."""


@dataclass(frozen=True)
class Staged:
    """What became of every row of the files; ``rows`` is the sum of the others that count rows."""

    rows: int
    events: int
    taken: int
    left_out: int
    """Lines that are no items, of events that were taken."""
    repeated: int
    """Rows found twice, in two files or as equal rows of one event that has no lines."""
    rejected: int
    held_back: int
    """Good rows of events that another row spoils."""
    skipped: dict[str, int]
    anonymous: int
    """Events without an identifier."""


class MappedFiles:
    """Files that a mapping describes, staged in a DuckDB file of the home and given out as events in order of time.

    A stage that was finished before a crash is used again as long as neither files nor mapping nor this code changed.
    """

    def __init__(self, home: Home, patterns: list[str], mapping: Mapping, trial: bool = False) -> None:
        self.mapping, self.home = mapping, home
        self.name = mapping.source
        self.consent_basis = mapping.consent.basis
        self.purposes: tuple[Purpose, ...] = tuple(p for p in PURPOSES if p in mapping.consent.purposes)
        self.files = [TabularFile(path, mapping.files) for path in expand(patterns)]
        for file in self.files:
            columns = file.columns()
            folded = [column.lower() for column in columns]
            if twice := [c for c in columns if folded.count(c.lower()) > 1]:
                raise UnreadableFileError(f"{file.path}: its columns {' and '.join(twice)} differ only by case: rename one")
            mapping.check_columns(columns, str(file.path))
        self._fingerprint = self._digest()
        # a trial must not touch the stage of an import under way
        self._stage_path = home.root / "imports" / f"{self.name}.{'trial' if trial else 'stage'}.duckdb"
        self._db: duckdb.DuckDBPyConnection | None = None

    def fingerprint(self) -> str:
        """Names what would be imported: the content of the files and the mapping."""
        return self._fingerprint

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.path.stat().st_size for file in self.files)

    def stage(self, advance: Callable[[int], None] = lambda done: None) -> Staged:
        """Read, check and sort everything; *advance* is told the bytes read so far.

        Raises:
            UnreadableFileError: a file is broken or of another encoding; nothing is kept.
        """
        self.close()
        self._stage_path.parent.mkdir(parents=True, exist_ok=True)
        if not self._standing():
            self.close()
            self._forget()
            db = self._connect()
            staging.create(db, self.mapping)
            done = 0
            for number, file in enumerate(self.files):
                for table, rows in file.batches(list(self.mapping.columns())):
                    staging.add(db, self.mapping, number, str(file.path), table, rows, LINE)
                    advance(done + file.position())
                bad = [(each.row, each.reason, each.raw, self._event_id(file, each.raw)) for each in file.bad]
                staging.add_bad(db, number, str(file.path), bad)
                done += file.path.stat().st_size
                advance(done)
            staging.arrange(db, self.mapping, [str(file.path) for file in self.files])
            db.execute("CREATE TABLE finished AS SELECT ? AS fingerprint", [self._fingerprint]).fetchall()
            db.execute("CHECKPOINT").fetchall()
        return self.staged()

    def staged(self) -> Staged:
        """What the stage holds."""
        counts = staging.counts(self._connect())
        skipped = dict(self._connect().execute("SELECT because, sum(rows)::BIGINT FROM skipped GROUP BY ALL ORDER BY 2 DESC").fetchall())
        return Staged(**counts, skipped=skipped)

    def rejections(self) -> list[Rejection]:
        """Why rows were rejected, the most frequent reason first."""
        rows = self._connect().execute(
            """SELECT field, reason, sum(rows)::BIGINT, min_by(file || ', row ' || row || coalesce(': ' || value, ''), (file_no, row))
               FROM rejected GROUP BY field, reason ORDER BY 3 DESC, 1, 2"""
        )
        return [Rejection(*row) for row in rows.fetchall()]

    def check(self) -> None:
        """See that not so many rows were rejected that the mapping must be wrong.

        Raises:
            RejectedFilesError: more than ``max_rejected`` were.
        """
        staged = self.staged()
        lost = staged.rejected + staged.held_back
        if staged.rows == 0:
            raise RejectedFilesError(f"{', '.join(str(f.path) for f in self.files)}: no row to import")
        if lost > self.mapping.max_rejected * staged.rows or staged.events == 0:
            reasons = "\n".join(f"  {r.rows} x {r.field}: {r.reason} ({r.example})" for r in self.rejections()[:10])
            raise RejectedFilesError(
                f"{lost} of {staged.rows} rows cannot be taken and {staged.events} events would remain, more loss than max_rejected "
                f"({self.mapping.max_rejected:.0%}) allows, so nothing was stored:\n{reasons}\n"
                "Correct the mapping, or set max_rejected in it if these rows are to be dropped."
            )

    def letters(self) -> Iterator[DeadLetter]:
        """Every row that cannot be taken, as a dead letter."""
        at = system_clock()
        query = "SELECT field, reason, file, row, value, raw FROM rejected ORDER BY file_no, row"
        cursor = self._connect().cursor()
        cursor.execute(query)
        while rows := cursor.fetchmany(BATCH):
            for field, reason, file, row, value, raw in rows:
                said = f"{file}, row {row}: {reason}" + (f": {value!r}" if value is not None else "")
                yield DeadLetter(at, self.name, field, said, raw)

    def shop(self, standing: Shop | None) -> Shop:
        """The shop as the mapping describes it, its data ending with the last day that has an event, or as it already stands.

        Raises:
            ValueError: the home holds another shop.
        """
        zone = self.mapping.shop.timezone
        [(last,)] = self._connect().execute("SELECT epoch_us(max(occurred_at)) FROM heads").fetchall()
        moment = datetime.fromtimestamp(last / 1e6, UTC) if last is not None else system_clock()
        ends = local_midnight(moment.astimezone(ZoneInfo(zone)).date() + timedelta(days=1), zone)
        return Shop.described(standing, data_end=ends, **self.mapping.shop.named())

    def count(self) -> int:
        """How many events ``events`` gives."""
        [(count,)] = self._connect().execute("SELECT count(*) FROM heads").fetchall()
        return int(count)

    def events(self, start: int = 0) -> Iterator[list[Arrival]]:
        """Batches of canonical events as JSON with the time each became known, in the order in which they occurred."""
        for first in range(start, self.count(), BATCH):
            rows = self._connect().execute(staging.payloads(self.mapping, first, first + BATCH)).fetchall()
            yield [Arrival(raw.encode(), datetime.fromtimestamp(0, UTC) + timedelta(microseconds=known)) for raw, known in rows]

    def examples(self) -> list[bytes]:
        """The first two events, and the first of each further name and of those without a customer."""
        kinds = " || ".join(f"(max(id_{kind}) IS NULL)::VARCHAR" for kind in self.mapping.event.identifiers) or "''"
        query = f"SELECT min(nth) FROM (SELECT nth, any_value(name) || {kinds} AS kind FROM sorted GROUP BY nth) GROUP BY kind"
        firsts = {nth for (nth,) in self._connect().execute(query).fetchall()}
        wanted = sorted({n for n in (0, 1) if n < self.count()} | firsts)
        queries = [staging.payloads(self.mapping, n, n + 1) for n in wanted[:8]]
        return [raw.encode() for q in queries for raw, _ in self._connect().execute(q).fetchall()]

    def write_catalogue(self, catalogue: Catalogue) -> None:
        """Add the items that the catalogue does not know yet; the other tables come to be, if need be, empty."""
        catalogue.ensure()
        if self.mapping.item is None:
            return
        found = self._connect().sql(staging.items(self.mapping)).to_arrow_table()
        attributes = {name: part.holds for name, part in self.mapping.attributes().items()}
        known = catalogue.read("items")
        held = set(known["item_id"].to_pylist())
        fresh = found.filter(pa.array([item not in held for item in found["item_id"].to_pylist()], pa.bool_()))
        if not len(fresh):
            return
        fresh = fresh.append_column("recommendable", pa.array([True] * len(fresh), pa.bool_()))
        for name in attributes:
            if name in known.column_names and known.schema.field(name).type != ATTRIBUTE_TYPES[attributes[name]]:
                raise ValueError(
                    f"item.attributes.{name}: the catalogue holds it as {known.schema.field(name).type}, not as a {attributes[name]}: "
                    "say the same, or give it another name"
                )
        catalogue.add_items(fresh.cast(items_schema(attributes)))

    def finish(self) -> None:
        """Throw the stage away: its events are stored."""
        self.close()
        self._forget()

    def close(self) -> None:
        """Let go of the stage's file."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _event_id(self, file: TabularFile, raw: str) -> str | None:
        """The event that a row with too few or too many fields belongs to, if it still stands where the header says."""
        if file.kind != "csv" or self.mapping.event.id is None:
            return None
        text, header = self.mapping.text(self.mapping.event.id), file.columns()
        fields = next(csv.reader([raw], delimiter=file.delimiter), [])
        places = [header.index(column) for column in text.used]
        if not places or max(places) >= len(fields):
            return None
        told = "-".join(fields[place].strip() for place in places)
        return re.sub(r"\.0*$", "", told) if text.is_integer else told

    def _connect(self) -> duckdb.DuckDBPyConnection:
        if self._db is None:
            self._db = duckdb.connect(str(self._stage_path))
            self._db.execute(f"SET TimeZone='UTC'; SET memory_limit='{MEMORY}'; SET threads=2").fetchall()
            self._db.execute(f"SET temp_directory={quoted(str(self._stage_path) + '.tmp')}").fetchall()
        return self._db

    def _standing(self) -> bool:
        if not self._stage_path.exists():
            return False
        try:
            [(finished,)] = self._connect().execute("SELECT fingerprint FROM finished").fetchall()
        except duckdb.Error:
            # killed before it was finished
            return False
        return bool(finished == self._fingerprint)

    def _forget(self) -> None:
        for path in (self._stage_path, self._stage_path.with_suffix(".duckdb.wal")):
            path.unlink(missing_ok=True)

    def _digest(self) -> str:
        digest = hashlib.sha256(f"{STAGE_VERSION} {msgspec.json.encode(self.mapping, order='sorted').decode()}".encode())
        for file in self.files:
            digest.update(file.path.name.encode())
            with open(file.path, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()
