"""The table of decisions: what was answered to whom, from which features, by which model and with which propensities."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from deltalake import DeltaTable

from features import tables
from features.event_log import connect
from features.home import Home

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
    ]
)


class DecisionLog:
    """An append-only spool that a decision reaches before its answer leaves, and the Delta table it is flushed to.

    The spool is handed to the operating system at once, so a crash of the process loses nothing; a line cut short by a
    crash of the machine is passed over with a warning.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._folder = home.decisions
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # what a crash left may end in half a line: it must not be written on
        self._seal()
        self._spool = self._open()

    @property
    def table(self) -> Path:
        """Where the Delta table lies."""
        return self._folder / "table"

    def append(self, decision: dict[str, Any]) -> None:
        """Hand one decision (the columns of ``SCHEMA``; request, choices and features as JSON-able values) to the system."""
        line = msgspec.json.encode(decision) + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._spool, line) :]

    def flush(self) -> int:
        """Move the spooled decisions into the Delta table, exactly once each; returns how many."""
        with self._home.locked("decisions"):
            return self._flush()

    def _flush(self) -> int:
        left_by_a_crash = set(self._folder.glob("sealed-*.jsonl"))
        with self._lock:
            os.close(self._spool)
            self._seal()
            self._spool = self._open()
        moved = 0
        for sealed in sorted(self._folder.glob("sealed-*.jsonl")):
            rows = [row for line in sealed.read_bytes().splitlines() if (row := _decode(line)) is not None]
            known = self._known([row["decision_id"] for row in rows]) if sealed in left_by_a_crash else set()
            fresh = [row for row in rows if row["decision_id"] not in known]
            if fresh:
                tables.append(self.table, pa.Table.from_pylist(fresh, SCHEMA))
            sealed.unlink()
            moved += len(fresh)
        if moved:
            tables.compact_if_fragmented(self.table)
        return moved

    def erase(self, customer_ids: Sequence[str]) -> int:
        """Delete every decision about these customers, and every older version of the table; returns how many."""
        with self._home.locked("decisions"):
            self._flush()
            return tables.erase(self.table, "customer_id", customer_ids)

    def read(self) -> list[dict[str, Any]]:
        """Every flushed decision, with request, choices and features decoded."""
        if not DeltaTable.is_deltatable(str(self.table)):
            return []
        rows: list[dict[str, Any]] = DeltaTable(str(self.table)).to_pyarrow_table().to_pylist()
        for row in rows:
            for name in ("request", "choices", "features"):
                row[name] = msgspec.json.decode(row[name])
        return rows

    def close(self) -> None:
        """Flush and let go of the spool."""
        self.flush()
        os.close(self._spool)

    def _seal(self) -> None:
        """Give a spool that holds something a name of its own: a crash from here on leaves it to the next flush."""
        current = self._folder / "spool.jsonl"
        if current.exists() and current.stat().st_size:
            current.rename(self._folder / f"sealed-{os.urandom(8).hex()}.jsonl")

    def _open(self) -> int:
        return os.open(self._folder / "spool.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _known(self, decision_ids: list[str]) -> set[str]:
        if not decision_ids or not DeltaTable.is_deltatable(str(self.table)):
            return set()
        files = tables.files(self.table)
        connection = connect()
        connection.register("batch", pa.table({"decision_id": pa.array(decision_ids, pa.string())}))
        rows = connection.execute("SELECT decision_id FROM read_parquet(?) SEMI JOIN batch USING (decision_id)", [files]).fetchall()
        return {row[0] for row in rows}


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = msgspec.json.decode(line)
    except msgspec.DecodeError:
        logger.warning("a decision was cut short by a crash and is lost: %d bytes", len(line))
        return None
    as_of = msgspec.convert(row["as_of"], type=datetime)
    texts = {name: msgspec.json.encode(row[name]).decode() for name in ("request", "choices", "features")}
    return {**row, **texts, "as_of": as_of}
