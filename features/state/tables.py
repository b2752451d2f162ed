"""The Delta tables of a home: how they are written for good, kept small, and how rows leave them.

Nothing old is let go before the new is synced. What a power cut leaves beyond the mark is checked at the next start, and taken back
where it is not whole; whatever made it was not let go either.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import duckdb
import pyarrow as pa

from features.state import delta_commits, delta_recovery
from features.state.clock import microseconds
from features.state.delta import HOOKS, DeltaTable, WriterProperties, write_deltalake
from features.state.delta_commits import MARK, actions, confirm, mark
from features.state.disk import sync_file, sync_folder, unlink_all, write_atomically
from features.state.ports import KEPT_SECONDS

logger = logging.getLogger("ubiquo")
TIMES = ("known_at", "received_at", "as_of")
COMPACT_ABOVE_FILES = 16
CHECKPOINT_EVERY = 16
"""After so many commits a checkpoint stands for all before it, which then go."""
SMALLEST_FILE, LARGEST_FILE = 8_000_000, 256_000_000
_WRITER = WriterProperties(compression="ZSTD", compression_level=3)
_SHORT_MEMORY = {"delta.deletedFileRetentionDuration": "interval 0 seconds"}
"""A checkpoint need not name the files that no version needs: ``_purge`` finds them itself. By default it does for a week, and so grows
with every small file that was ever written."""
_orphaned: dict[Path, float] = {}
"""Since when (monotonic) this process has known a file that no version needs."""


class DeltaFolder:
    """One Delta table in a folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Whether anything was ever stored in it, readable or not."""
        return self.path.exists()

    @property
    def _is_table(self) -> bool:
        return bool(DeltaTable.is_deltatable(str(self.path)))

    def append(self, rows: pa.Table) -> None:
        """Append *rows* in one commit, which is on the disk when this returns; the first makes the table."""
        self._write(rows, "append")

    def overwrite(self, rows: pa.Table) -> None:
        """Put *rows* in the place of the whole table, in one commit."""
        self._write(rows, "overwrite")

    def _if_new(self) -> dict[str, Any]:
        if self.version() >= 0:
            return {}
        # nothing is promised yet: should the power be cut in the first commit, it is taken back
        write_atomically(mark(self.path), MARK % -1)
        # commits outlive the rows that they tell of: they keep no least and greatest identifier
        return {"configuration": {"delta.dataSkippingStatsColumns": TIMES[0], **_SHORT_MEMORY}}

    def _write(self, rows: pa.Table, mode: Literal["append", "overwrite"]) -> None:
        properties = self._if_new()
        if mode == "append":
            # a later version may tell more of a row
            properties["schema_mode"] = "merge"
        write_deltalake(str(self.path), rows, mode=mode, writer_properties=_WRITER, post_commithook_properties=HOOKS, **properties)
        confirm(self.path)

    def version(self) -> int:
        """The current version; -1 if there is no table."""
        return delta_commits.version(self.path)

    def files(self) -> list[str]:
        """The Parquet files that make up the current version; none if there is no table."""
        return delta_commits.files(self.path)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The rows of the current version, or None if there is no table."""
        if not self._is_table:
            return None
        wanted = None if columns is None else list(columns)
        table: pa.Table = DeltaTable(str(self.path)).to_pyarrow_table(columns=wanted)
        return table

    def commit_digest(self, number: int) -> str | None:
        """A digest of the commit of that number, as another may take its place after a repair; None where it is gone."""
        try:
            return hashlib.blake2b((self.path / "_delta_log" / f"{number:020}.json").read_bytes(), digest_size=16).hexdigest()
        except FileNotFoundError:
            return None

    def appended_since(self, known: int) -> list[str] | None:
        """The data files that were appended after version *known*; None where rows were taken out since, or commits are gone."""
        added: list[str] = []
        for number in range(known + 1, self.version() + 1):
            commit = self.path / "_delta_log" / f"{number:020}.json"
            if not commit.exists():
                return None
            for action in actions(commit):
                if "remove" in action and action["remove"]["dataChange"]:
                    return None
                # a compaction changes no data
                if "add" in action and action["add"]["dataChange"]:
                    added.append(str(self.path / unquote(action["add"]["path"])))
        return added if all(Path(file).exists() for file in added) else None

    def maintain(self, kept_seconds: float = KEPT_SECONDS) -> None:
        """Make many small files few, many commits one checkpoint, and delete what nobody has needed for *kept_seconds*.

        Nobody else may be writing to the table: hold its lease.
        """
        if not self._is_table:
            return
        active = self.files()
        if len(active) > COMPACT_ABOVE_FILES:
            # files near the target stay as they are, so a byte is written anew only as often as the table doubles
            size = sum(Path(each).stat().st_size for each in active)
            target = min(max(SMALLEST_FILE, size // 8), LARGEST_FILE)
            optimizer = DeltaTable(str(self.path)).optimize
            optimizer.compact(target_size=target, writer_properties=_WRITER, post_commithook_properties=HOOKS)
            confirm(self.path)
        self._checkpoint_if_due()
        self._purge(kept_seconds)

    def erase(self, column: str, values: Sequence[str]) -> int:
        """Delete the rows whose *column* is one of *values* and every older version of the table; returns how many rows.

        Nobody may be writing to the table: hold its lease. By a merge, whose condition names no value, as the predicate of a delete
        stays in the commit.
        """
        if not self._is_table:
            return 0
        gone = 0
        if values:
            doomed = pa.table({column: pa.array(sorted(set(values)), pa.string())})
            merge = self._merge(doomed, column).when_matched_delete()
            gone = int(merge.execute()["num_target_rows_deleted"])
        # without values too, as a crash may have come between a delete and this
        confirm(self.path)
        self._purge(0.0)
        return gone

    def blank(self, column: str, values: Sequence[str]) -> int:
        """Set *column* to null where it is one of *values*, and delete every older version of the table; returns how many rows."""
        if not values or not self._is_table:
            return 0
        doomed = pa.table({column: pa.array(sorted(set(values)), pa.string())})
        merge = self._merge(doomed, column).when_matched_update({column: "CAST(NULL AS STRING)"})
        blanked = int(merge.execute()["num_target_rows_updated"])
        confirm(self.path)
        self._purge(0.0)
        return blanked

    def lower(self, columns: Sequence[str], most: datetime) -> int:
        """Set each of the time *columns* to *most* where the first of them is later; returns how many rows."""
        moment = f"arrow_cast(to_timestamp_micros({microseconds(most)}), 'Timestamp(Microsecond, Some(\"UTC\"))')"
        updates = {column: f"CASE WHEN {column} > {moment} THEN {moment} ELSE {column} END" for column in columns}
        table = DeltaTable(str(self.path))
        done = table.update(updates, predicate=f"{columns[0]} > {moment}", writer_properties=_WRITER, post_commithook_properties=HOOKS)
        confirm(self.path)
        return int(done["num_updated_rows"])

    def keep_newest(self, column: str, most_bytes: int) -> bool:
        """Delete the older half by the time *column* of a table that holds more than *most_bytes*; returns whether it did."""
        active = self.files()
        if sum(Path(each).stat().st_size for each in active) <= most_bytes:
            return False
        query = f"SELECT quantile_disc({column}, 0.5) FROM read_parquet(?)"
        with contextlib.closing(duckdb.connect()) as connection:
            connection.execute("SET TimeZone='UTC'")
            [(middle,)] = connection.execute(query, [active]).fetchall()
        DeltaTable(str(self.path)).delete(f"{column} < '{middle.isoformat()}'", writer_properties=_WRITER, post_commithook_properties=HOOKS)
        confirm(self.path)
        logger.warning("%s held more than %d MB: what came before %s was let go", self.path, most_bytes // 1_000_000, middle.isoformat())
        return True

    def recover(self) -> None:
        """Take back what a power cut left half written, and see that all that was confirmed is there. Hold the table's lease.

        Raises:
            DamagedStateError: a confirmed commit or one of its files is missing, cut short or empty.
        """
        delta_recovery.recover(self.path)

    def repair(self) -> list[str]:
        """Give up what cannot be read: cut-off commits and missing files; returns what was given up. Hold the table's lease."""
        return delta_recovery.repair(self.path)

    def _merge(self, doomed: pa.Table, column: str) -> Any:
        how: dict[str, Any] = {"source_alias": "s", "target_alias": "t", "writer_properties": _WRITER, "post_commithook_properties": HOOKS}
        return DeltaTable(str(self.path)).merge(doomed, f"t.{column} = s.{column}", **how)

    def _checkpoint_if_due(self) -> None:
        log = self.path / "_delta_log"
        last = max((_number(each) for each in log.glob("*.checkpoint.parquet")), default=-1)
        if sum(_number(each) > last for each in log.glob("*.json")) <= CHECKPOINT_EVERY:
            return
        table = DeltaTable(str(self.path))
        if not _SHORT_MEMORY.items() <= table.metadata().configuration.items():
            # made before this was set
            table.alter.set_table_properties(_SHORT_MEMORY, post_commithook_properties=HOOKS)
            confirm(self.path)
        table.create_checkpoint()
        sync_file(log / f"{table.version():020}.checkpoint.parquet")
        sync_file(log / "_last_checkpoint")
        sync_folder(log)

    def _purge(self, kept_seconds: float) -> None:
        """Delete what no version needs and this process has known as such for *kept_seconds*: data files, and commits before a checkpoint.

        Not at once: somebody may just have listed them.
        """
        needed, now, log = set(map(Path, self.files())), time.monotonic(), self.path / "_delta_log"
        checkpoints = list(log.glob("*.checkpoint.parquet"))
        last = max(map(_number, checkpoints), default=-1)
        lying = [each for each in self.path.glob("*.parquet") if each not in needed]
        lying += [each for each in (*log.glob("*.json"), *checkpoints) if _number(each) < last]
        for each in lying:
            _orphaned.setdefault(each, now)
        due = [each for each in lying if now - _orphaned[each] >= kept_seconds]
        if due and mark(self.path).exists():
            # an older note would have these looked for
            sync_file(mark(self.path))
        unlink_all(due)
        for each in due:
            del _orphaned[each]


def _number(commit: Path) -> int:
    return int(commit.name.partition(".")[0])
