"""What a Delta table on this machine's disk holds, as its commits tell it, and up to where it is stored for good.

A version counts once its files, its commit and their folders are synced and the mark beside the table says so.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from features.state.delta import DeltaError, DeltaTable
from features.state.disk import DamagedStateError, sync_all, write_atomically

LOOKS = 3
"""How often a look at a table is tried that others may tidy meanwhile."""
MARK = b"%020d"


def files(path: Path) -> list[str]:
    """The Parquet files that make up the current version of a table; none if there is no table."""
    return list(_state(path).files)


def version(path: Path) -> int:
    """The current version of a table; -1 if there is no table."""
    return _state(path).version


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
    added = {path / unquote(action["add"]["path"]) for commit in commits for action in actions(commit) if "add" in action}
    folders = [path, log]
    if marked is None or marked < 0:
        added |= set(map(Path, files(path)))
        folders.append(path.parent)
    # removed again by a later commit, perhaps
    sync_all([*(file for file in added if file.exists()), *commits])
    sync_all(folders)
    _note(path, current)


def _note(path: Path, current: int) -> None:
    note, content = mark(path), MARK % current
    if note.exists() and note.stat().st_size == len(content):
        # in place: a disk writes so few bytes whole or not at all
        with open(note, "r+b", buffering=0) as file:
            file.write(content)
    else:
        write_atomically(note, content)


def confirmed(path: Path) -> int | None:
    """The last version that is on the disk for good; None if that was never noted.

    Raises:
        DamagedStateError: the note cannot be read.
    """
    note = mark(path)
    try:
        return int(note.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise DamagedStateError(f"{note} is damaged: delete it; the table is then taken as it stands") from None


def mark(path: Path) -> Path:
    """The file that says up to which version a table is stored for good."""
    return path.with_name(f"{path.name}.synced")


def actions(commit: Path) -> Iterator[dict[str, Any]]:
    """What a commit says was done."""
    for line in commit.read_bytes().splitlines():
        yield json.loads(line)
