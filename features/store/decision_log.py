"""The table of decisions: what was answered to whom, from which features, by which model and with which propensities."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from features.state.disk import RESERVED_BYTES, AppendOnlyFile, check_room, free_bytes, make_folder, unlink_all, write_atomically
from features.state.file_lease import is_in_use, use
from features.state.home import Home
from features.state.ports import DECISIONS, Table
from features.store.event_log import connect

logger = logging.getLogger("ubiquo")
_TIME = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema(
    [
        ("decision_id", pa.string()),
        ("kind", pa.string()),
        ("customer_id", pa.string()),
        ("as_of", _TIME),
        ("model", pa.string()),
        ("feature_at", pa.int64()),
        ("fallback", pa.string()),
        ("request", pa.string()),
        ("choices", pa.string()),
        ("features", pa.string()),
        ("assignment", pa.string()),
    ]
)
_SPOOLS = "*.jsonl"
FLUSH_SECONDS = 10.0
"""How long decisions stay in their spool, where they are safe: each flush makes a file, which is tidied later."""
PORTION_BYTES = 8_000_000
"""How much is moved at once, so that nobody waits long for the interpreter; and from what size of a spool nobody waits for the time."""
OTHERS_SECONDS, ASKED_AGAIN_SECONDS = 30.0, 0.05
"""How long an erasure waits for other services to flush, and how often it looks."""
_ASKED = "flush-asked"
"""The file that is made anew where every service is to flush at once."""
LOOK_SECONDS = 0.25
"""How often the room on the disk is looked at, at most."""


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line of the spool."""

    decision_id: str
    kind: str
    customer_id: str | None
    as_of: datetime
    model: str
    feature_at: int | None
    fallback: str | None
    request: msgspec.Raw
    choices: msgspec.Raw
    features: msgspec.Raw
    assignment: msgspec.Raw = msgspec.Raw(b"{}")
    """What the customer is in; a spool of an earlier version says nothing of it."""


class DecisionLog:
    """An append-only spool that a decision reaches before its answer leaves, and the Delta table it is flushed to.

    The spool is handed to the operating system at once, so a crash of the process loses nothing; a line cut short by a
    crash of the machine is passed over with a warning. A spool is deleted once what it holds is in the table, and synced. Each process
    has spools of its own; those of one that ended are moved on by any other.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._folder, self.table = home.decisions, home.tables[DECISIONS]
        make_folder(self._folder)
        self._lock = threading.Lock()
        self._most_bytes = home.settings.max_decision_bytes
        self._looked_at = self._flushed_at = float("-inf")
        self.unlogged = 0
        """How many decisions could not be kept since the start."""
        self._answered = self._asked()
        # what a crash left may end in half a line: it must not be written on
        self._spool = self._new_spool()

    def append(self, decision: dict[str, Any]) -> bool:
        """Hand one decision (the columns of ``SCHEMA``; request, choices and features as JSON-able values) to the system.

        Returns whether it was taken: a full disk costs the record, not the answer.
        """
        line = msgspec.json.encode(decision) + b"\n"
        with self._lock:
            try:
                # what is left of a full disk is for what was promised; a look at it costs as much as writing a line
                if time.monotonic() - self._looked_at > LOOK_SECONDS:
                    check_room(self._folder)
                    self._looked_at = time.monotonic()
                self._spool.write(line)
            except (OSError, ValueError) as error:
                self.unlogged += 1
                logger.warning("a decision could not be logged: %s", error)
                return False
        return True

    def flush(self) -> int:
        """Move the spooled decisions into the Delta table, exactly once each; returns how many."""
        with self._home.lease.hold(DECISIONS):
            return self._flush()

    def flush_if_due(self) -> int:
        """Flush where the spool has grown, or some time has passed; returns how many were moved."""
        due = self._spool.size >= PORTION_BYTES or time.monotonic() - self._flushed_at >= FLUSH_SECONDS
        return self.flush() if due or self._asked() != self._answered else 0

    def maintain(self) -> None:
        """Keep the table in few files, and within its bound."""
        with self._home.lease.hold(DECISIONS):
            self.table.keep_newest("as_of", self._most_bytes)
            self.table.maintain()

    def _flush(self) -> int:
        if free_bytes(self._folder) < RESERVED_BYTES:
            logger.warning("decisions wait in %s: the disk is nearly full", self._folder)
            return 0
        asked, version = self._asked(), self.table.version()
        rotated = self._rotate()
        moved = 0
        for sealed in sorted(set(self._folder.glob(_SPOOLS)) - {self._spool.path}):
            if sealed != rotated and is_in_use(sealed):
                # another process is writing to it
                continue
            for lines in _decoded(sealed):
                # only what was just written is certainly new: any other spool may be of a flush that broke off
                known = self._known([line.decision_id for line in lines]) if sealed != rotated else set()
                fresh = [line for line in lines if line.decision_id not in known]
                if fresh:
                    # on what was looked at alone, as the lease may have been lost: whoever had it meanwhile has moved the same
                    version = self.table.append(_columns(fresh), expected_version=version)
                moved += len(fresh)
            unlink_all([sealed])
        self._flushed_at, self._answered = time.monotonic(), asked
        return moved

    def erase(self, customer_ids: Sequence[str]) -> int:
        """Delete every decision about these customers, and every older version of the table; returns how many."""
        with self._home.lease.hold(DECISIONS):
            self._flush()
            return self.table.erase("customer_id", customer_ids).rows

    def erase_everywhere(self, customer_ids: Sequence[str]) -> int:
        """As ``erase``, and of what other services have in their spools: they are asked to flush, and waited for. Hold no lease that
        their background work waits for.

        Raises:
            TimeoutError: one goes on writing to its spool; nothing was erased.
        """
        write_atomically(self._folder / _ASKED, os.urandom(8))
        held = [each for each in self._folder.glob(_SPOOLS) if each != self._spool.path and _is_kept(each)]
        until = time.monotonic() + OTHERS_SECONDS
        while held := [each for each in held if _is_kept(each)]:
            if time.monotonic() >= until:
                raise TimeoutError(f"another service does not flush its spool of decisions, {held[0]}: end it, or see why (/readyz)")
            time.sleep(ASKED_AGAIN_SECONDS)
        return self.erase(customer_ids)

    def _asked(self) -> tuple[int, int] | None:
        """What differs once everybody was asked to flush."""
        try:
            status = (self._folder / _ASKED).stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def read(self) -> list[dict[str, Any]]:
        """Every flushed decision, with request, choices and features decoded."""
        return flushed(self.table)

    def close(self) -> None:
        """Flush and let go of the spool."""
        try:
            self.flush()
        finally:
            with self._lock:
                self._spool.close()

    def _rotate(self) -> Path | None:
        """Begin a new spool and return the path of the one before; where no new one can be made the old goes on."""
        with self._lock:
            if not self._spool.size:
                return None
            old, self._spool = self._spool, self._new_spool()
            old.close()
            return old.path

    def _new_spool(self) -> AppendOnlyFile:
        spool = AppendOnlyFile(self._folder / f"new-{os.getpid()}-{os.urandom(8).hex()}")
        # it gets its name once it is in use, so that nobody takes it for one that a crash left
        use(spool.path, spool)
        spool.rename(self._folder / f"spool-{spool.path.name.removeprefix('new-')}.jsonl")
        return spool

    def _known(self, decision_ids: list[str]) -> set[str]:
        files = self.table.files()
        if not decision_ids or not files:
            return set()
        connection = connect()
        connection.register("batch", pa.table({"decision_id": pa.array(decision_ids, pa.string())}))
        rows = connection.execute("SELECT decision_id FROM read_parquet(?) SEMI JOIN batch USING (decision_id)", [files]).fetchall()
        return {row[0] for row in rows}


class BatchDecisions:
    """The decisions of a batch, which go straight into the table in portions: each once, whatever is run again, beside a running service.

    They have no spool: a batch that was killed is run again, and makes the same ones.
    """

    def __init__(self, home: Home) -> None:
        self._home, self._table = home, home.tables[DECISIONS]
        make_folder(home.decisions)
        self._decoder = msgspec.json.Decoder(_Line)
        self._waiting: list[_Line] = []
        self._bytes = 0
        self.logged = self.known = 0
        """How many are in the table since the start, and how many were before."""

    def add(self, decision: dict[str, Any]) -> None:
        """Take one decision (as ``DecisionLog.append`` does); the table has it once ``flush`` has returned."""
        self.add_line(msgspec.json.encode(decision))

    def add_line(self, line: bytes) -> None:
        """Take one decision as JSON, which another process has made of it."""
        self._waiting.append(self._decoder.decode(line))
        self._bytes += len(line)
        if self._bytes >= PORTION_BYTES:
            self.flush()

    def flush(self) -> None:
        """Move what waits into the table. What stands there already stays; another answer given under the same id takes its place.

        Raises:
            NoSpaceError: the disk is nearly full.
        """
        lines, self._waiting, self._bytes = self._waiting, [], 0
        if not lines:
            return
        with self._home.lease.hold(DECISIONS):
            check_room(self._home.decisions)
            seen = self._table.version()
            told = self._told([line.decision_id for line in lines])
            others = [each.decision_id for each in lines if told.get(each.decision_id) not in (None, bytes(each.choices).decode())]
            if others:
                seen = self._table.erase("decision_id", others, expected_version=seen).version
            stay = told.keys() - set(others)
            fresh = [line for line in lines if line.decision_id not in stay]
            if fresh:
                self._table.append(_columns(fresh), expected_version=seen)
        self.logged += len(fresh)
        self.known += len(lines) - len(fresh)

    def _told(self, decision_ids: list[str]) -> dict[str, str]:
        """The choices of those decisions that are in the table."""
        if not (files := self._table.files()):
            return {}
        connection = connect()
        connection.register("batch", pa.table({"decision_id": pa.array(decision_ids, pa.string())}))
        query = "SELECT decision_id, choices FROM read_parquet(?) SEMI JOIN batch USING (decision_id)"
        return dict(connection.execute(query, [files]).fetchall())


def flushed(table: Table) -> list[dict[str, Any]]:
    """Every decision in the table, with request, choices and features decoded."""
    found = table.read()
    rows: list[dict[str, Any]] = [] if found is None else found.to_pylist()
    for row in rows:
        for name in ("request", "choices", "features", "assignment"):
            # rows of an earlier version have no assignment
            row[name] = msgspec.json.decode(row[name] or "{}")
    return rows


def _is_kept(spool: Path) -> bool:
    """Whether a process goes on writing to a spool that holds anything."""
    try:
        return spool.stat().st_size > 0 and is_in_use(spool)
    except FileNotFoundError:
        return False


def _decoded(path: Path) -> Iterator[list[_Line]]:
    """The decisions of a spool in portions; a line that is none is named and passed over."""
    decoder = msgspec.json.Decoder(_Line)
    lines, size = [], 0
    with path.open("rb") as spool:
        for number, line in enumerate(spool, 1):
            try:
                # what is only copied is not looked at by the decoder
                line.decode()
                lines.append(decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                logger.warning("%s: line %d (%d bytes) is no decision, cut short by a crash perhaps: it is lost", path, number, len(line))
                continue
            size += len(line)
            if size >= PORTION_BYTES:
                yield lines
                lines, size = [], 0
    if lines:
        yield lines


def _columns(lines: Sequence[_Line]) -> pa.Table:
    """The rows of ``SCHEMA``: column by column, as a row holds some thousand numbers that need not be looked at."""
    columns = []
    for column in SCHEMA:
        values = [getattr(line, column.name) for line in lines]
        if isinstance(values[0], msgspec.Raw):
            columns.append(pa.array([bytes(value) for value in values], pa.binary()).cast(pa.string()))
        else:
            columns.append(pa.array(values, column.type))
    return pa.Table.from_arrays(columns, schema=SCHEMA)
