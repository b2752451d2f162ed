"""A copy of one home as it was at a moment, made while a service runs on it, and a home made of such a copy.

No lease stops the service for longer than it takes to link the files of a table. What is copied first may lack what is copied later,
and is brought up to it at the next start, as after a crash: online rows, then the inbox, then the log that the inbox is emptied into.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import msgspec
import pyarrow.parquet as pq

from features.state.disk import PRIVATE_FILE, DamagedStateError, make_folder, sync_folder, sync_tree, write_atomically
from features.state.home import Home
from features.state.lake_tables import kept_in
from features.state.moving import check_not_moved
from features.state.ports import DECISIONS, LOG, MissingStateError, deriving
from features.state.sqlite_file import copy_database, is_database
from features.state.tables import DeltaFolder

MANIFEST = "backup.json"
FORMAT = 1
NEW_VOLUME = "lost+found"
"""What a file system may put into a volume of its own."""
FIRST = ("feast/online.db", "log/events.index", "log/identifiers.index", "log/dead_letters.index", "inbox.db")
"""What is brought up to the log at the next start, and so must not know more than it."""
LEFT_OUT = ("*.lock", "spill-*", "new-*", "backup-*", "cache", "bentoml", "service-*.log")
"""What of a home itself belongs to processes that run, or is made anew: a user's file of such a name, further down, is not meant."""
UNFINISHED, BESIDE = "*.part", ("-wal", "-shm", "-journal")
"""What is being written, anywhere, and what lies beside a database, which is copied as a whole."""
SPOOLS, NEW_SPOOLS = "spool-*.jsonl", "new-*"


class CopiedFile(msgspec.Struct):
    """One file of a backup."""

    size: int
    digest: str


class Manifest(msgspec.Struct):
    """What a backup holds: it is written last, so that one that broke off has none."""

    format: int
    versions: dict[str, int]
    """Table to its version."""
    rows: dict[str, int]
    """Table to how many rows it holds."""
    files: dict[str, CopiedFile]


def back_up(home: Home, to: Path, told: Callable[[int], None] = lambda size: None) -> Manifest:
    """Copy *home* into the folder *to*, which is made.

    Raises:
        ValueError: there is something at *to*, or the state of the home lies on servers, or was moved there.
        MissingStateError: there is no home.
        DamagedStateError: a database is damaged.
    """
    if home.settings.database or home.settings.lake:
        raise ValueError("the state lies on servers, whose own tools make the backups: see 'Backup' in docs/operations.md")
    # a setting that was forgotten must not make a backup of what was left behind
    check_not_moved(home.root)
    if lake := kept_in(home.root):
        raise ValueError(f"the tables of {home.root} lie in {lake}, whose own tools make the backups: see 'Backup' in docs/operations.md")
    if not home.root.is_dir():
        raise MissingStateError(f"there is no home at {home.root}: set UBIQUO_HOME")
    _check_empty(to)
    to = to.resolve()
    make_folder(to)
    staged = home.root / f"backup-{uuid.uuid4().hex}"
    try:
        with deriving(home):
            for name in FIRST:
                if (home.root / name).exists():
                    _copy(home.root / name, to / name)
            versions = _stage(home, staged)
            for path in _files(staged):
                _copy(path, to / path.relative_to(staged))
            # a database before the files that it names
            others = sorted(_others(home, to), key=lambda path: path.suffix != ".db")
            for path in others:
                # somebody may have replaced or finished it
                with contextlib.suppress(FileNotFoundError):
                    _copy(path, to / path.relative_to(home.root))
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    files = {}
    for path in _files(to):
        files[str(path.relative_to(to))] = _kept(path)
        told(path.stat().st_size)
    manifest = Manifest(FORMAT, versions, rows_of(Home(to, home.settings)), files)
    sync_tree(to)
    write_atomically(to / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)), PRIVATE_FILE)
    return manifest


def restore(source: Path, home: Path, told: Callable[[int], None] = lambda size: None) -> Manifest:
    """Make the home *home* of a backup, having compared every file with what was written.

    Raises:
        ValueError: there is something at *home*.
        MissingStateError: there is no whole backup.
        DamagedStateError: a file of it is not as it was written.
    """
    if not (source / MANIFEST).is_file():
        raise MissingStateError(f"{source} holds no backup that was finished: {MANIFEST} is missing")
    try:
        manifest = msgspec.json.decode((source / MANIFEST).read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise DamagedStateError(f"{source / MANIFEST} cannot be read ({error}): take another backup") from None
    if manifest.format != FORMAT:
        raise ValueError(f"{source} was made by another version (format {manifest.format}, not {FORMAT}): restore it with that version")
    _check_empty(home)
    # what is there, such as a volume, stays: nobody but its owner may replace it, and nobody at all while it is mounted
    is_there = home.exists()
    name = f".restoring-{uuid.uuid4().hex}"
    part = home / name if is_there else home.with_name(f"{home.name}{name}")
    make_folder(part)
    try:
        for name, kept in manifest.files.items():
            if not (source / name).is_file():
                raise DamagedStateError(f"{source / name} is missing: take another backup")
            _copy_file(source / name, part / name)
            if _kept(part / name) != kept:
                raise DamagedStateError(f"{source / name} is not as it was written: take another backup")
            told(kept.size)
        if (rows := rows_of(Home(part))) != manifest.rows:
            raise DamagedStateError(f"{source} reads as {rows} rows instead of {manifest.rows}: take another backup")
        sync_tree(part)
        if is_there:
            # without its shop no command takes it for a home
            shop = Home(part).shop.name
            for path in sorted(part.iterdir(), key=lambda path: path.name == shop):
                path.rename(home / path.name)
            sync_folder(home)
        else:
            part.rename(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def rows_of(home: Home) -> dict[str, int]:
    """How many rows each table in the home's own folder holds."""
    tables = home.table_folders.items()
    return {name: sum(pq.read_metadata(path).num_rows for path in table.files()) for name, table in tables if table.exists}


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(path.name != NEW_VOLUME for path in folder.iterdir())):
        raise ValueError(f"{folder} is not empty: name a folder that is, or none yet")


def _stage(home: Home, staged: Path) -> dict[str, int]:
    """Link what the tables consist of right now into a folder, where nobody clears it away; returns the version of each."""
    make_folder(staged)
    versions = {}
    for lease in (LOG, DECISIONS):
        with home.lease.hold(lease):
            for name, table in home.table_folders.items():
                if (name == DECISIONS) == (lease == DECISIONS) and table.exists:
                    versions[name] = table.version()
                    _link(home, table, staged)
            if lease == DECISIONS:
                for spool in home.decisions.glob(SPOOLS):
                    _copy_lines(spool, staged / spool.relative_to(home.root))
    return versions


def _link(home: Home, table: DeltaFolder, staged: Path) -> None:
    commits = (path for path in (table.path / "_delta_log").iterdir() if path.is_file())
    for path in (*map(Path, table.files()), *commits):
        linked = staged / path.relative_to(home.root)
        make_folder(linked.parent)
        os.link(path, linked)
    mark = table.path.with_name(f"{table.path.name}.synced")
    if mark.exists():
        # it is written in place
        _copy_file(mark, staged / mark.relative_to(home.root))


def _others(home: Home, to: Path) -> Iterator[Path]:
    tables = [table.path for table in home.table_folders.values()]
    marks = {path.with_name(f"{path.name}.synced") for path in tables}
    for path in _files(home.root):
        inner = path.relative_to(home.root)
        is_first = str(inner) in FIRST or path in marks or path.is_relative_to(to)
        is_spool = path.parent == home.decisions and any(fnmatch(path.name, pattern) for pattern in (SPOOLS, NEW_SPOOLS))
        is_table = any(path.is_relative_to(each) for each in tables) or is_spool
        is_scratch = any(fnmatch(inner.parts[0], pattern) for pattern in LEFT_OUT) or fnmatch(path.name, UNFINISHED)
        if not (is_first or is_table or is_scratch or _is_beside_database(path)):
            yield path


def _is_beside_database(path: Path) -> bool:
    databases = [path.with_name(path.name.removesuffix(each)) for each in BESIDE if path.name.endswith(each)]
    return any(each.is_file() and is_database(each) for each in databases)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _copy(path: Path, to: Path) -> None:
    if is_database(path):
        make_folder(to.parent)
        copy_database(path, to)
    else:
        _copy_file(path, to)


def _copy_file(path: Path, to: Path) -> None:
    make_folder(to.parent)
    shutil.copyfile(path, to)
    shutil.copymode(path, to)


def _copy_lines(path: Path, to: Path) -> None:
    """Copy a file that is being appended to, up to its last whole line."""
    content = path.read_bytes()
    make_folder(to.parent)
    write_atomically(to, content[: content.rfind(b"\n") + 1], PRIVATE_FILE)


def _kept(path: Path) -> CopiedFile:
    with path.open("rb") as file:
        return CopiedFile(path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()[:64])
