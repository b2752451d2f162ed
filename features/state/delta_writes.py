"""What every Delta table does alike, wherever it lies: how rows come in, leave and are brought together, each time in one commit.

A commit is made on the version that was seen, or not at all: deltalake by itself lays an append on top of whatever others have
committed meanwhile, and so would append what they have appended already. Each commit carries a mark of whoever made it. So an answer
that was lost on its way is not taken for somebody else's commit.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import duckdb
import pyarrow as pa

from features.state.clock import microseconds
from features.state.delta import HOOKS, CommitProperties, DeltaError, DeltaTable, WriterProperties, write_deltalake
from features.state.ports import KEPT_SECONDS, Changed, MovedOnError

logger = logging.getLogger("ubiquo")
TIMES = ("known_at", "received_at", "as_of")
COMPACT_ABOVE_FILES = 16
CHECKPOINT_EVERY = 16
"""After so many commits a checkpoint stands for all before it, which then go."""
SMALLEST_FILE, LARGEST_FILE = 8_000_000, 256_000_000
TRIES = 8
"""How often a commit that may come after any other is tried again as others come before it."""
SHORT_MEMORY = {"delta.deletedFileRetentionDuration": "interval 0 seconds"}
"""A checkpoint need not name the files that no version needs: whoever purges finds them. By default it does for a week, and so grows
with every small file that was ever written."""
MADE_BY = "ubiquo"
"""The field of a commit that holds the mark of who made it."""
WRITER = WriterProperties(compression="ZSTD", compression_level=3)
_Work = Callable[[Any, CommitProperties], Mapping[str, Any] | None]


class DeltaWrites(ABC):
    """A Delta table that is written to. Nobody else may be writing to it where a method says so: hold its lease."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it lies."""

    @abstractmethod
    def version(self) -> int:
        """The current version; -1 if there is no table."""

    @abstractmethod
    def files(self) -> list[str]:
        """The Parquet files that make up the current version, on this machine."""

    @abstractmethod
    def _sizes(self) -> list[int]:
        """How many bytes each data file of the current version holds."""

    @abstractmethod
    def _at(self, version: int) -> DeltaTable:
        """The table as it stands at *version*; it may have moved on.

        Raises:
            MovedOnError: it never reached that version, or its commits are gone.
        """

    @abstractmethod
    def _first(self, rows: pa.Table, how: CommitProperties, **options: Any) -> None:
        """Make the table of *rows*, in its first commit."""

    @abstractmethod
    def _maker(self, version: int) -> Mapping[str, Any] | None:
        """What the commit of that number says of itself; None where there is none."""

    @abstractmethod
    def _settle(self) -> None:
        """What a commit needs to be stored for good."""

    @abstractmethod
    def _checkpoint_if_due(self) -> None:
        """Let a checkpoint stand for many commits."""

    @abstractmethod
    def _purge(self, kept_seconds: float) -> int | None:
        """Delete what nobody has needed for *kept_seconds*; returns the version that it made for that, if it did."""

    def append(self, rows: pa.Table, expected_version: int | None = None) -> int:
        """Append *rows* in one commit, which is stored for good when this returns; the first makes the table. Returns its version.

        Raises:
            MovedOnError: the table does not stand at *expected_version*; nothing was appended.
        """
        return self._write(rows, "append", expected_version)

    def overwrite(self, rows: pa.Table, expected_version: int | None = None) -> int:
        """Put *rows* in the place of the whole table, in one commit; returns its version.

        Raises:
            MovedOnError: as ``append``.
        """
        return self._write(rows, "overwrite", expected_version)

    def _write(self, rows: pa.Table, mode: Literal["append", "overwrite"], expected: int | None) -> int:
        # a later version may tell more of a row
        more: dict[str, Any] = {"schema_mode": "merge"} if mode == "append" else {}

        def work(table: DeltaTable | None, how: CommitProperties) -> None:
            if table is None:
                # commits outlive the rows that they tell of: they keep no least and greatest identifier
                settings = {"delta.dataSkippingStatsColumns": TIMES[0], **SHORT_MEMORY}
                # by any other mode it would append to what somebody else has made in this moment
                self._first(rows, how, configuration=settings, mode="error")
                return
            options: dict[str, Any] = {"writer_properties": WRITER, "post_commithook_properties": HOOKS, "commit_properties": how}
            write_deltalake(table, rows, mode=mode, **options, **more)

        return self._commit(work, expected)[1]

    def maintain(self, kept_seconds: float = KEPT_SECONDS) -> None:
        """Make many small files few, many commits one checkpoint, and delete what nobody has needed for *kept_seconds*.

        Nobody else may be writing to the table: hold its lease.
        """
        if self.version() < 0:
            return
        sizes = self._sizes()
        if len(sizes) > COMPACT_ABOVE_FILES:
            # files near the target stay as they are, so a byte is written anew only as often as the table doubles
            self._compact(min(max(SMALLEST_FILE, sum(sizes) // 8), LARGEST_FILE))
        self._checkpoint_if_due()
        self._purge(kept_seconds)

    def _compact(self, target: int) -> None:
        options: dict[str, Any] = {"target_size": target, "writer_properties": WRITER, "post_commithook_properties": HOOKS}
        self._commit(lambda table, how: table.optimize.compact(commit_properties=how, **options))

    def _commit_settings(self) -> None:
        """Commit the table's settings again: nothing that was begun on an earlier version can be committed any more."""
        self._commit(
            lambda table, how: table.alter.set_table_properties(SHORT_MEMORY, commit_properties=how, post_commithook_properties=HOOKS)
        )

    def erase(self, column: str, values: Sequence[str], expected_version: int | None = None) -> Changed:
        """Delete the rows whose *column* is one of *values* and every older version of the table.

        Nobody may be writing to the table: hold its lease. By a merge, whose condition names no value, as the predicate of a delete
        stays in the commit.

        Raises:
            MovedOnError: as ``append``; nothing was deleted.
        """
        if (seen := self.version()) < 0:
            return Changed(0, -1)
        gone = Changed(0, seen if expected_version is None else expected_version)
        if values:
            gone = self._merge(column, values, expected_version, lambda merge: merge.when_matched_delete(), "num_target_rows_deleted")
        # without values too, as a crash may have come between a delete and this
        self._settle()
        return self._purged(gone)

    def blank(self, column: str, values: Sequence[str], expected_version: int | None = None) -> Changed:
        """Set *column* to null where it is one of *values*, and delete every older version of the table.

        Raises:
            MovedOnError: as ``append``; nothing was changed.
        """
        seen = self.version()
        if not values or seen < 0:
            return Changed(0, seen if expected_version is None else expected_version)
        nothing = {column: "CAST(NULL AS STRING)"}
        blanked = self._merge(column, values, expected_version, lambda merge: merge.when_matched_update(nothing), "num_target_rows_updated")
        return self._purged(blanked)

    def _purged(self, changed: Changed) -> Changed:
        made = self._purge(0.0)
        return changed._replace(version=made) if made == changed.version + 1 else changed

    def _merge(self, column: str, values: Sequence[str], expected: int | None, what: Callable[[Any], Any], counted: str) -> Changed:
        doomed = pa.table({column: pa.array(sorted(set(values)), pa.string())})

        def work(table: DeltaTable, how: CommitProperties) -> Mapping[str, Any]:
            options: dict[str, Any] = {"writer_properties": WRITER, "post_commithook_properties": HOOKS, "commit_properties": how}
            merge = table.merge(doomed, f"t.{column} = s.{column}", source_alias="s", target_alias="t", **options)
            done: Mapping[str, Any] = what(merge).execute()
            return done

        done, made = self._commit(work, expected)
        return Changed(int(done.get(counted, 0)), made)

    def lower(self, columns: Sequence[str], most: datetime) -> int:
        """Set each of the time *columns* to *most* where the first of them is later; returns how many rows."""
        moment = f"arrow_cast(to_timestamp_micros({microseconds(most)}), 'Timestamp(Microsecond, Some(\"UTC\"))')"
        updates = {column: f"CASE WHEN {column} > {moment} THEN {moment} ELSE {column} END" for column in columns}
        options: dict[str, Any] = {"writer_properties": WRITER, "post_commithook_properties": HOOKS}
        later = f"{columns[0]} > {moment}"
        done, _ = self._commit(lambda table, how: table.update(updates, predicate=later, commit_properties=how, **options))
        return int(done.get("num_updated_rows", 0))

    def keep_newest(self, column: str, most_bytes: int) -> bool:
        """Delete the older half by the time *column* of a table that holds more than *most_bytes*; returns whether it did."""
        if sum(self._sizes()) <= most_bytes:
            return False
        query = f"SELECT quantile_disc({column}, 0.5) FROM read_parquet(?)"
        with contextlib.closing(duckdb.connect()) as connection:
            connection.execute("SET TimeZone='UTC'")
            [(middle,)] = connection.execute(query, [self.files()]).fetchall()
        options: dict[str, Any] = {"writer_properties": WRITER, "post_commithook_properties": HOOKS}
        older = f"{column} < '{middle.isoformat()}'"
        self._commit(lambda table, how: table.delete(older, commit_properties=how, **options))
        logger.warning("%s held more than %d MB: what came before %s was let go", self.place, most_bytes // 1_000_000, middle.isoformat())
        return True

    def _commit(self, work: _Work, expected: int | None = None) -> tuple[Mapping[str, Any], int]:
        """Do *work* on the table as it stands at *expected*, or wherever it stands; returns what it did and the version that it made.

        Work that changes nothing makes no version.
        """
        mark, tries = uuid.uuid4().hex, TRIES
        while True:
            tries -= 1
            seen = self.version() if expected is None else expected
            try:
                done, made = self._tried(work, seen, mark)
            except MovedOnError:
                if expected is not None or not tries:
                    raise
                logger.info("%s has moved on from version %d: tried again", self.place, seen)
                continue
            self._settle()
            return done, made

    def _tried(self, work: _Work, seen: int, mark: str) -> tuple[Mapping[str, Any], int]:
        if seen < 0 and (now := self.version()) >= 0:
            raise MovedOnError(f"{self.place} stands at version {now}: somebody has made it meanwhile")
        table = self._at(seen) if seen >= 0 else None
        try:
            done = work(table, CommitProperties(max_commit_retries=0, custom_metadata={MADE_BY: mark}))
        except (DeltaError, OSError) as error:
            commit = self._maker(seen + 1)
            if commit is not None and commit.get(MADE_BY) == mark:
                return commit.get("operationMetrics") or {}, seen + 1
            if commit is not None or self.version() > seen:
                raise MovedOnError(f"{self.place} has moved on from version {seen}: another process has written to it") from error
            raise
        return done or {}, 0 if table is None else min(table.version(), seen + 1)
