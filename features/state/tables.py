"""What all Delta tables of a home have in common: how they are written for good, kept small, and how rows leave them.

A version counts once its files, its commit and their folders are synced and the mark beside the table says so. Nothing old is
let go before. What a power cut leaves beyond the mark is checked at the next start, and taken back where it is not whole;
whatever made it was not let go either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from features.state.clock import microseconds
from features.state.delta import DeltaError, DeltaTable, PostCommitHookProperties, WriterProperties, write_deltalake
from features.state.disk import DamagedStateError, sync_all, sync_file, sync_folder, unlink_all, write_atomically

logger = logging.getLogger("ubiquo")
TIMES = ("known_at", "received_at", "as_of")
COMPACT_ABOVE_FILES = 16
LOOKS = 3
"""How often a look at a table is tried that others may tidy meanwhile."""
CHECKPOINT_EVERY = 16
"""After so many commits a checkpoint stands for all before it, which then go."""
KEPT_SECONDS = 600.0
"""How long a file that no version needs any more is kept, for readers that have begun with it."""
SMALLEST_FILE, LARGEST_FILE = 8_000_000, 256_000_000
_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
_WRITER = WriterProperties(compression="ZSTD", compression_level=3)
_SHORT_MEMORY = {"delta.deletedFileRetentionDuration": "interval 0 seconds"}
"""A checkpoint need not name the files that no version needs: ``_purge`` finds them itself. By default it does for a week, and so grows
with every small file that was ever written."""
_MARK = b"%020d"
_orphaned: dict[Path, float] = {}
"""Since when (monotonic) this process has known a file that no version needs."""


def append(path: Path, rows: pa.Table) -> None:
    """Append *rows* in one commit, which is on the disk when this returns; the first makes the table."""
    write_deltalake(str(path), rows, mode="append", writer_properties=_WRITER, post_commithook_properties=_HOOKS, **_if_new(path))
    confirm(path)


def overwrite(path: Path, rows: pa.Table) -> None:
    """Put *rows* in the place of the whole table, in one commit."""
    write_deltalake(str(path), rows, mode="overwrite", writer_properties=_WRITER, post_commithook_properties=_HOOKS, **_if_new(path))
    confirm(path)


def _if_new(path: Path) -> dict[str, Any]:
    if version(path) >= 0:
        return {}
    # nothing is promised yet: should the power be cut in the first commit, it is taken back
    write_atomically(_mark(path), _MARK % -1)
    # commits outlive the rows that they tell of: they keep no least and greatest identifier
    return {"configuration": {"delta.dataSkippingStatsColumns": TIMES[0], **_SHORT_MEMORY}}


def files(path: Path) -> list[str]:
    """The Parquet files that make up the current version of a table; none if there is no table."""
    return list(_state(path).files)


def version(path: Path) -> int:
    """The current version of a table; -1 if there is no table."""
    return _state(path).version


def commit_digest(path: Path, number: int) -> str | None:
    """A digest of the commit of that number, as another may take its place after a repair; None where it is gone."""
    try:
        return hashlib.blake2b((path / "_delta_log" / f"{number:020}.json").read_bytes(), digest_size=16).hexdigest()
    except FileNotFoundError:
        return None


def appended_since(path: Path, known: int) -> list[str] | None:
    """The data files that were appended after version *known*; None where rows were taken out since, or commits are gone."""
    added: list[str] = []
    for number in range(known + 1, version(path) + 1):
        commit = path / "_delta_log" / f"{number:020}.json"
        if not commit.exists():
            return None
        for action in _actions(commit):
            if "remove" in action and action["remove"]["dataChange"]:
                return None
            # a compaction changes no data
            if "add" in action and action["add"]["dataChange"]:
                added.append(str(path / unquote(action["add"]["path"])))
    return added if all(Path(file).exists() for file in added) else None


class _State(NamedTuple):
    """One version of a table."""

    version: int
    files: tuple[str, ...]


_ABSENT = _State(-1, ())
_states: dict[Path, tuple[tuple[str, int, int], _State]] = {}
"""What was read of each table, and by which newest commit: opening a table costs more than most of what is done with it."""


def _state(path: Path) -> _State:
    for _ in range(LOOKS):
        # commits that a checkpoint stands for may go between the list and the look
        with contextlib.suppress(DeltaError, FileNotFoundError):
            return _read_state(path)
    return _read_state(path)


def _read_state(path: Path) -> _State:
    log = path / "_delta_log"
    newest = max((name for name in os.listdir(log) if name.endswith(".json")), default=None) if log.is_dir() else None
    if newest is None:
        return _opened(path)
    stat = (log / newest).stat()
    commit = newest, stat.st_ino, stat.st_mtime_ns
    known = _states.get(path)
    if known is None or known[0] != commit:
        # what is read may be newer than that commit by now: then it is read once more than needed
        known = commit, _opened(path)
        _states[path] = known
    return known[1]


def _opened(path: Path) -> _State:
    if not DeltaTable.is_deltatable(str(path)):
        return _ABSENT
    table = DeltaTable(str(path))
    return _State(table.version(), tuple(uri.removeprefix("file://") for uri in table.file_uris()))


def maintain(path: Path, kept_seconds: float = KEPT_SECONDS) -> None:
    """Make many small files few, many commits one checkpoint, and delete what nobody has needed for *kept_seconds*.

    Nobody else may be writing to the table: hold its lock.
    """
    if not DeltaTable.is_deltatable(str(path)):
        return
    active = files(path)
    if len(active) > COMPACT_ABOVE_FILES:
        # files near the target stay as they are, so a byte is written anew only as often as the table doubles
        size = sum(Path(each).stat().st_size for each in active)
        target = min(max(SMALLEST_FILE, size // 8), LARGEST_FILE)
        optimizer = DeltaTable(str(path)).optimize
        optimizer.compact(target_size=target, writer_properties=_WRITER, post_commithook_properties=_HOOKS)
        confirm(path)
    _checkpoint_if_due(path)
    _purge(path, kept_seconds)


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
        merge = _merge(path, doomed, column).when_matched_delete()
        gone = int(merge.execute()["num_target_rows_deleted"])
    # without values too, as a crash may have come between a delete and this
    confirm(path)
    _purge(path, 0.0)
    return gone


def blank(path: Path, column: str, values: Sequence[str]) -> int:
    """Set *column* to null where it is one of *values*, and delete every older version of the table; returns how many rows."""
    if not values or not DeltaTable.is_deltatable(str(path)):
        return 0
    doomed = pa.table({column: pa.array(sorted(set(values)), pa.string())})
    merge = _merge(path, doomed, column).when_matched_update({column: "CAST(NULL AS STRING)"})
    blanked = int(merge.execute()["num_target_rows_updated"])
    confirm(path)
    _purge(path, 0.0)
    return blanked


def lower(path: Path, columns: Sequence[str], most: datetime) -> int:
    """Set each of the time *columns* to *most* where the first of them is later; returns how many rows."""
    moment = f"to_timestamp_micros({microseconds(most)})"
    updates = {column: f"CASE WHEN {column} > {moment} THEN {moment} ELSE {column} END" for column in columns}
    table = DeltaTable(str(path))
    done = table.update(updates, f"{columns[0]} > {moment}", writer_properties=_WRITER, post_commithook_properties=_HOOKS)
    confirm(path)
    return int(done["num_updated_rows"])


def keep_newest(path: Path, column: str, most_bytes: int) -> bool:
    """Delete the older half by the time *column* of a table that holds more than *most_bytes*; returns whether it did."""
    active = files(path)
    if sum(Path(each).stat().st_size for each in active) <= most_bytes:
        return False
    query = f"SELECT quantile_disc({column}, 0.5) FROM read_parquet(?)"
    with contextlib.closing(duckdb.connect()) as connection:
        connection.execute("SET TimeZone='UTC'")
        [(middle,)] = connection.execute(query, [active]).fetchall()
    DeltaTable(str(path)).delete(f"{column} < '{middle.isoformat()}'", writer_properties=_WRITER, post_commithook_properties=_HOOKS)
    confirm(path)
    logger.warning("%s held more than %d MB: what came before %s was let go", path, most_bytes // 1_000_000, middle.isoformat())
    return True


def confirm(path: Path) -> None:
    """Wait until everything that the current version needs is on the disk, and note the version beside the table.

    The note itself is synced only before something is deleted: should a power cut leave an older one, what lies beyond it is looked
    at and found whole.
    """
    current, marked = version(path), confirmed(path)
    if marked == current:
        return
    log = path / "_delta_log"
    commits = sorted(each for each in log.glob("*.json") if marked is None or int(each.stem) > marked)
    added = {path / unquote(action["add"]["path"]) for commit in commits for action in _actions(commit) if "add" in action}
    folders = [path, log]
    if marked is None or marked < 0:
        added |= set(map(Path, files(path)))
        folders.append(path.parent)
    # removed again by a later commit, perhaps
    sync_all([*(file for file in added if file.exists()), *commits])
    sync_all(folders)
    _note(path, current)


def _note(path: Path, current: int) -> None:
    mark, content = _mark(path), _MARK % current
    if mark.exists() and mark.stat().st_size == len(content):
        # in place: a disk writes so few bytes whole or not at all
        with open(mark, "r+b", buffering=0) as file:
            file.write(content)
    else:
        write_atomically(mark, content)


def confirmed(path: Path) -> int | None:
    """The last version that is on the disk for good; None if that was never noted.

    Raises:
        DamagedStateError: the note cannot be read.
    """
    mark = _mark(path)
    try:
        return int(mark.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise DamagedStateError(f"{mark} is damaged: delete it; the table is then taken as it stands") from None


def recover(path: Path) -> None:
    """Take back what a power cut left half written, and see that all that was confirmed is there. Hold the table's lock.

    Raises:
        DamagedStateError: a confirmed commit or one of its files is missing, cut short or empty.
    """
    mark, log = confirmed(path), path / "_delta_log"
    commits = sorted(log.glob("*.json")) if log.exists() else []
    if mark is None and not commits:
        return
    _drop_torn_checkpoint(log)
    torn: list[Path] = []
    for commit in commits:
        number = int(commit.stem)
        if torn or not _is_whole(path, commit, check_files=mark is not None and number > mark):
            if mark is None or number <= mark:
                raise DamagedStateError(
                    f"{commit} is empty or cut short, though it was stored for good: put the table {path} back from a backup, or give up "
                    "what it held: python -m features repair"
                )
            torn.append(commit)
    for commit in torn:
        logger.warning("%s was never finished, as the power was cut: taken back; what it held is still where it came from", commit)
    unlink_all(torn)
    _check_active(path, mark)
    if DeltaTable.is_deltatable(str(path)):
        confirm(path)


def repair(path: Path) -> list[str]:
    """Give up what cannot be read: cut-off commits and missing files; returns what was given up. Hold the table's lock."""
    given_up: list[str] = []
    log = path / "_delta_log"
    if not log.exists():
        if confirmed(path) is not None:
            given_up.append(f"{path}: the whole table is missing")
            _mark(path).unlink()
        return given_up
    _mark(path).unlink(missing_ok=True)
    _drop_torn_checkpoint(log)
    torn = False
    for commit in sorted(log.glob("*.json")):
        torn = torn or not _is_whole(path, commit, check_files=False)
        if torn:
            given_up.append(str(commit))
            commit.replace(commit.with_suffix(".damaged"))
    if not DeltaTable.is_deltatable(str(path)):
        return given_up
    for file, size in _sizes(path).items():
        if file.exists() and file.stat().st_size != size:
            file.replace(file.with_suffix(".damaged"))
    if any(not file.exists() for file in _sizes(path)):
        given_up += [str(path / each) for each in DeltaTable(str(path)).repair(post_commithook_properties=_HOOKS)["files_removed"]]
    confirm(path)
    return given_up


def _merge(path: Path, doomed: pa.Table, column: str) -> Any:
    return DeltaTable(str(path)).merge(
        doomed, f"t.{column} = s.{column}", source_alias="s", target_alias="t", writer_properties=_WRITER, post_commithook_properties=_HOOKS
    )


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}.synced")


def _actions(commit: Path) -> Iterator[dict[str, Any]]:
    for line in commit.read_bytes().splitlines():
        yield json.loads(line)


def _is_whole(path: Path, commit: Path, check_files: bool) -> bool:
    try:
        actions = list(_actions(commit))
    except ValueError:
        return False
    if not check_files:
        return bool(actions)
    added = {path / unquote(each["add"]["path"]): each["add"]["size"] for each in actions if "add" in each}
    removed = {path / unquote(each["remove"]["path"]) for each in actions if "remove" in each}
    return bool(actions) and all(file in removed or (file.exists() and file.stat().st_size == size) for file, size in added.items())


def _sizes(path: Path) -> dict[Path, int]:
    actions = pa.table(DeltaTable(str(path)).get_add_actions(flatten=True))
    names, sizes = actions["path"].to_pylist(), actions["size_bytes"].to_pylist()
    return {path / unquote(name): size for name, size in zip(names, sizes, strict=True)}


def _check_active(path: Path, mark: int | None) -> None:
    log = path / "_delta_log"
    if not DeltaTable.is_deltatable(str(path)):
        if mark is None or mark < 0:
            return
        raise DamagedStateError(
            f"the table {path} is missing, though version {mark} of it was stored: put it back from a backup, or give it up: "
            "python -m features repair"
        )
    try:
        newest = DeltaTable(str(path)).version()
    except DeltaError as error:
        raise DamagedStateError(f"{log} cannot be read ({error}): put the table back from a backup") from None
    if mark is not None and newest < mark:
        raise DamagedStateError(
            f"{path / '_delta_log'} ends at version {newest}, though version {mark} was stored: put the table back from a backup, or "
            "give up what is missing: python -m features repair"
        )
    for file, size in _sizes(path).items():
        found = file.stat().st_size if file.exists() else None
        if found != size:
            state = "is missing" if found is None else f"holds {found} bytes instead of {size}"
            raise DamagedStateError(
                f"{file} {state}: put it back from a backup, or give up the rows that it held: python -m features repair"
            )


def _drop_torn_checkpoint(log: Path) -> None:
    """A checkpoint that was cut short, or a pointer to one, is worth nothing, and is not needed."""
    # the commits that a checkpoint stands for go only once it is synced
    for checkpoint in log.glob("*.checkpoint.parquet"):
        try:
            pq.read_metadata(checkpoint)
        except (pa.ArrowInvalid, OSError):
            logger.warning("%s was never finished: taken back", checkpoint)
            checkpoint.unlink()
    pointer = log / "_last_checkpoint"
    if not pointer.exists():
        return
    try:
        stands_for = int(json.loads(pointer.read_bytes())["version"])
        whole = (log / f"{stands_for:020}.checkpoint.parquet").exists()
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        pointer.unlink()


def _checkpoint_if_due(path: Path) -> None:
    log = path / "_delta_log"
    last = max((_number(each) for each in log.glob("*.checkpoint.parquet")), default=-1)
    if sum(_number(each) > last for each in log.glob("*.json")) <= CHECKPOINT_EVERY:
        return
    table = DeltaTable(str(path))
    if not _SHORT_MEMORY.items() <= table.metadata().configuration.items():
        # made before this was set
        table.alter.set_table_properties(_SHORT_MEMORY, post_commithook_properties=_HOOKS)
        confirm(path)
    table.create_checkpoint()
    sync_file(log / f"{table.version():020}.checkpoint.parquet")
    sync_file(log / "_last_checkpoint")
    sync_folder(log)


def _purge(path: Path, kept_seconds: float) -> None:
    """Delete what no version needs and this process has known as such for *kept_seconds*: data files, and commits before a checkpoint.

    Not at once: somebody may just have listed them.
    """
    needed, now, log = set(map(Path, files(path))), time.monotonic(), path / "_delta_log"
    checkpoints = list(log.glob("*.checkpoint.parquet"))
    last = max(map(_number, checkpoints), default=-1)
    lying = [each for each in path.glob("*.parquet") if each not in needed]
    lying += [each for each in (*log.glob("*.json"), *checkpoints) if _number(each) < last]
    for each in lying:
        _orphaned.setdefault(each, now)
    due = [each for each in lying if now - _orphaned[each] >= kept_seconds]
    if due and _mark(path).exists():
        # an older note would have these looked for
        sync_file(_mark(path))
    unlink_all(due)
    for each in due:
        del _orphaned[each]


def _number(commit: Path) -> int:
    return int(commit.name.partition(".")[0])
