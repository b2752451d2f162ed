"""The Delta tables of a home: how they are written for good, kept small, and how rows leave them.

Nothing old is let go before the new is synced. What a power cut leaves beyond the mark is checked at the next start, and taken back
where it is not whole; whatever made it was not let go either.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from features.state import delta_commits, delta_recovery
from features.state.delta import HOOKS, CommitProperties, DeltaError, DeltaTable, write_deltalake
from features.state.delta_commits import MARK, actions, confirm, mark
from features.state.delta_writes import CHECKPOINT_EVERY, COMPACT_ABOVE_FILES, SHORT_MEMORY, WRITER, DeltaWrites
from features.state.disk import sync_file, sync_folder, unlink_all, write_atomically
from features.state.ports import MovedOnError

__all__ = ["COMPACT_ABOVE_FILES", "DeltaFolder"]
_orphaned: dict[Path, float] = {}
"""Since when (monotonic) this process has known a file that no version needs."""


class DeltaFolder(DeltaWrites):
    """One Delta table in a folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether anything was ever stored in it, readable or not."""
        return self.path.exists()

    def version(self) -> int:
        """The current version; -1 if there is no table."""
        return delta_commits.version(self.path)

    def files(self) -> list[str]:
        """The Parquet files that make up the current version; none if there is no table."""
        return delta_commits.files(self.path)

    def drop(self) -> None:
        """Delete the table for good."""
        shutil.rmtree(self.path)
        mark(self.path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[list[str]]:
        """Every file of the folder, whichever version needs it."""
        yield [str(path) for path in self.path.rglob("*") if path.is_file()]

    def read(self, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The rows of the current version, or None if there is no table."""
        if self.version() < 0:
            return None
        wanted = None if columns is None else list(columns)
        table: pa.Table = DeltaTable(str(self.path)).to_pyarrow_table(columns=wanted)
        return table

    def commit_digest(self, number: int) -> str | None:
        """A digest of the commit of that number, as another may take its place after a repair; None where it is gone."""
        try:
            return hashlib.blake2b(self._commit_file(number).read_bytes(), digest_size=16).hexdigest()
        except FileNotFoundError:
            return None

    def appended_since(self, known: int) -> list[str] | None:
        """The data files that were appended after version *known*; None where rows were taken out since, or commits are gone."""
        added: list[str] = []
        for number in range(known + 1, self.version() + 1):
            commit = self._commit_file(number)
            if not commit.exists():
                return None
            for action in actions(commit):
                if "remove" in action and action["remove"]["dataChange"]:
                    return None
                # a compaction changes no data
                if "add" in action and action["add"]["dataChange"]:
                    added.append(str(self.path / unquote(action["add"]["path"])))
        return added if all(Path(file).exists() for file in added) else None

    def recover(self) -> None:
        """Take back what a power cut left half written, and see that all that was confirmed is there. Hold the table's lease.

        Raises:
            DamagedStateError: a confirmed commit or one of its files is missing, cut short or empty.
        """
        delta_recovery.recover(self.path)

    def repair(self) -> list[str]:
        """Give up what cannot be read: cut-off commits and missing files; returns what was given up. Hold the table's lease."""
        return delta_recovery.repair(self.path)

    def _sizes(self) -> list[int]:
        return [Path(each).stat().st_size for each in self.files()]

    def _at(self, version: int) -> DeltaTable:
        try:
            return DeltaTable(str(self.path), version=version)
        except DeltaError as error:
            raise MovedOnError(f"{self.path} does not stand at version {version}: {error}") from error

    def _first(self, rows: pa.Table, how: CommitProperties, **options: Any) -> None:
        # nothing is promised yet: should the power be cut in the first commit, it is taken back
        write_atomically(mark(self.path), MARK % -1)
        options |= {"writer_properties": WRITER, "post_commithook_properties": HOOKS, "commit_properties": how}
        write_deltalake(str(self.path), rows, **options)

    def _maker(self, version: int) -> Mapping[str, Any] | None:
        try:
            return next((each["commitInfo"] for each in actions(self._commit_file(version)) if "commitInfo" in each), {})
        except FileNotFoundError:
            return None

    def _settle(self) -> None:
        confirm(self.path)

    def _commit_file(self, version: int) -> Path:
        return self.path / "_delta_log" / f"{version:020}.json"

    def _checkpoint_if_due(self) -> None:
        log = self.path / "_delta_log"
        last = max((_number(each) for each in log.glob("*.checkpoint.parquet")), default=-1)
        if sum(_number(each) > last for each in log.glob("*.json")) <= CHECKPOINT_EVERY:
            return
        table = DeltaTable(str(self.path))
        if not SHORT_MEMORY.items() <= table.metadata().configuration.items():
            # made before this was set
            self._commit_settings()
            table = DeltaTable(str(self.path))
        table.create_checkpoint()
        sync_file(log / f"{table.version():020}.checkpoint.parquet")
        sync_file(log / "_last_checkpoint")
        sync_folder(log)

    def _purge(self, kept_seconds: float) -> int | None:
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
        return None


def _number(commit: Path) -> int:
    return int(commit.name.partition(".")[0])
