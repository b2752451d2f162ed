"""What all Delta tables of a home have in common: how they are written, and how rows leave them for good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

TIMES = ("known_at", "received_at", "as_of")
COMPACT_ABOVE_FILES = 64


def without_statistics(path: Path) -> dict[str, Any]:
    """Options of ``write_deltalake`` for a table that may be new: its commits keep no least and greatest identifier.

    Commits outlive the rows that they tell of, so an erasure would not reach what they say.
    """
    return {} if DeltaTable.is_deltatable(str(path)) else {"configuration": {"delta.dataSkippingStatsColumns": TIMES[0]}}


def append(path: Path, rows: pa.Table) -> None:
    """Append *rows* in one commit; the first makes the table."""
    write_deltalake(str(path), rows, mode="append", **without_statistics(path))


def files(path: Path) -> list[str]:
    """The Parquet files that make up the current version of a table; none if there is no table."""
    if not DeltaTable.is_deltatable(str(path)):
        return []
    return [uri.removeprefix("file://") for uri in DeltaTable(str(path)).file_uris()]


def compact_if_fragmented(path: Path) -> None:
    """Make many small files few."""
    if DeltaTable.is_deltatable(str(path)) and len(files(path)) > COMPACT_ABOVE_FILES:
        DeltaTable(str(path)).optimize.compact()


def erase(path: Path, column: str, values: Sequence[str]) -> int:
    """Delete the rows whose *column* is one of *values* and every older version of the table; returns how many rows.

    Nobody may be writing to the table: hold its lock. By a merge, whose condition names no value, as the predicate of a delete
    stays in the commit.
    """
    if not DeltaTable.is_deltatable(str(path)):
        return 0
    gone = 0
    if values:
        doomed = pa.table({column: pa.array(sorted(set(values)), pa.string())})
        merge = DeltaTable(str(path)).merge(doomed, f"t.{column} = s.{column}", source_alias="s", target_alias="t")
        gone = int(merge.when_matched_delete().execute()["num_target_rows_deleted"])
    # without values too, as a crash may have come between a delete and this
    _forget_what_was(path)
    return gone


def blank(path: Path, column: str, values: Sequence[str]) -> int:
    """Set *column* to null where it is one of *values*, and delete every older version of the table; returns how many rows."""
    if not values or not DeltaTable.is_deltatable(str(path)):
        return 0
    doomed = pa.table({column: pa.array(sorted(set(values)), pa.string())})
    merge = DeltaTable(str(path)).merge(doomed, f"t.{column} = s.{column}", source_alias="s", target_alias="t")
    blanked = int(merge.when_matched_update({column: "CAST(NULL AS STRING)"}).execute()["num_target_rows_updated"])
    _forget_what_was(path)
    return blanked


def _forget_what_was(path: Path) -> None:
    """Delete older versions and what a crash left. *full*: a checkpoint forgets in time which files are no longer of the table."""
    DeltaTable(str(path)).vacuum(0, enforce_retention_duration=False, dry_run=False, full=True)
