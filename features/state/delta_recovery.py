"""What is done with a Delta table after a power cut, or after damage."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from features.state.delta import HOOKS, DeltaError, DeltaTable
from features.state.delta_commits import actions, confirm, confirmed, mark
from features.state.disk import DamagedStateError, unlink_all

logger = logging.getLogger("ubiquo")


def recover(path: Path) -> None:
    """Take back what a power cut left half written, and see that all that was confirmed is there. Hold the table's lease.

    Raises:
        DamagedStateError: a confirmed commit or one of its files is missing, cut short or empty.
    """
    known, log = confirmed(path), path / "_delta_log"
    commits = sorted(log.glob("*.json")) if log.exists() else []
    if known is None and not commits:
        return
    _drop_torn_checkpoint(log)
    torn: list[Path] = []
    for commit in commits:
        number = int(commit.stem)
        if torn or not _is_whole(path, commit, check_files=known is not None and number > known):
            if known is None or number <= known:
                raise DamagedStateError(
                    f"{commit} is empty or cut short, though it was stored for good: put the table {path} back from a backup, or give up "
                    "what it held: python -m features repair"
                )
            torn.append(commit)
    for commit in torn:
        logger.warning("%s was never finished, as the power was cut: taken back; what it held is still where it came from", commit)
    unlink_all(torn)
    _check_active(path, known)
    if DeltaTable.is_deltatable(str(path)):
        confirm(path)


def repair(path: Path) -> list[str]:
    """Give up what cannot be read: cut-off commits and missing files; returns what was given up. Hold the table's lease."""
    given_up: list[str] = []
    log = path / "_delta_log"
    if not log.exists():
        if confirmed(path) is not None:
            given_up.append(f"{path}: the whole table is missing")
            mark(path).unlink()
        return given_up
    mark(path).unlink(missing_ok=True)
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
        given_up += [str(path / each) for each in DeltaTable(str(path)).repair(post_commithook_properties=HOOKS)["files_removed"]]
    confirm(path)
    return given_up


def _is_whole(path: Path, commit: Path, check_files: bool) -> bool:
    try:
        done = list(actions(commit))
    except ValueError:
        return False
    if not check_files:
        return bool(done)
    added = {path / unquote(each["add"]["path"]): each["add"]["size"] for each in done if "add" in each}
    removed = {path / unquote(each["remove"]["path"]) for each in done if "remove" in each}
    return bool(done) and all(file in removed or (file.exists() and file.stat().st_size == size) for file, size in added.items())


def _sizes(path: Path) -> dict[Path, int]:
    added = pa.table(DeltaTable(str(path)).get_add_actions(flatten=True))
    names, sizes = added["path"].to_pylist(), added["size_bytes"].to_pylist()
    return {path / unquote(name): size for name, size in zip(names, sizes, strict=True)}


def _check_active(path: Path, known: int | None) -> None:
    log = path / "_delta_log"
    if not DeltaTable.is_deltatable(str(path)):
        if known is None or known < 0:
            return
        raise DamagedStateError(
            f"the table {path} is missing, though version {known} of it was stored: put it back from a backup, or give it up: "
            "python -m features repair"
        )
    try:
        newest = DeltaTable(str(path)).version()
    except DeltaError as error:
        raise DamagedStateError(f"{log} cannot be read ({error}): put the table back from a backup") from None
    if known is not None and newest < known:
        raise DamagedStateError(
            f"{path / '_delta_log'} ends at version {newest}, though version {known} was stored: put the table back from a backup, or "
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
