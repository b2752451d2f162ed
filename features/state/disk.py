"""How bytes reach the disk for good: nothing old is let go before the new is synced, file and folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
RESERVED_BYTES = 64 * 1024 * 1024
"""What must stay free of the disk: the log, its compaction and a recovery need room to end what was begun."""


class DamagedStateError(RuntimeError):
    """A stored file cannot be read as what it is; the message names the file and the way back."""


class NoSpaceError(OSError):
    """The disk is full, or nearly so: what would add to it is refused, what only reads goes on."""


def free_bytes(folder: Path) -> int:
    """How much of the disk that holds *folder* is free for us."""
    return shutil.disk_usage(folder).free


def check_room(folder: Path) -> None:
    """See that the disk has room for more.

    Raises:
        NoSpaceError: less than ``RESERVED_BYTES`` are free.
    """
    free = free_bytes(folder)
    if free < RESERVED_BYTES:
        raise NoSpaceError(f"the disk of {folder} has {free // 1_000_000} MB left, and {RESERVED_BYTES // 1_000_000} MB are kept free")


def sync_file(path: Path) -> None:
    """Wait until the content of *path* is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in the folder *path* are on the disk: a new file is not there for good before."""
    sync_file(path)


def sync_all(paths: Collection[Path]) -> None:
    """Wait until files and folders are on the disk, all at once: they share the commits of the file system's journal."""
    if len(paths) < 2:
        for path in paths:
            sync_file(path)
        return
    with ThreadPoolExecutor(min(8, len(paths)), "ubiquo-sync") as pool:
        list(pool.map(sync_file, paths))


def sync_tree(folder: Path) -> None:
    """Wait until every file below *folder*, and every folder, is on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            # a temporary file may be gone by now
            with contextlib.suppress(FileNotFoundError):
                sync_file(Path(place) / name)
        sync_folder(Path(place))
    sync_folder(folder.parent)


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter, and those above it, so that they are there for good."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=PRIVATE_FOLDER)
    sync_folder(folder.parent)


def move_into_place(part: Path, path: Path) -> None:
    """Put the finished file *part* in the place of *path*, for good: a power cut leaves the old content or the new."""
    sync_file(part)
    os.replace(part, path)
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace *path* with *content* so that a reader, and a power cut, finds the old file or the new one, never a part."""
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as handle:
            handle.write(content)
        move_into_place(part, path)
    finally:
        part.unlink(missing_ok=True)


class AppendOnlyFile:
    """A new file that lines are appended to, each handed to the system at once.

    It owns its descriptor: once closed a write raises, whatever file the system gives the same number to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, PRIVATE_FILE), "ab", buffering=0)  # noqa: SIM115
        self.size = 0

    def write(self, line: bytes) -> None:
        """Append *line* whole, or raise and leave the file as it was.

        Raises:
            OSError: the system does not take it, e.g. as the disk is full.
            ValueError: the file is closed.
        """
        before, left = self.size, line
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
            self.size += len(line)
        except OSError:
            # half a line would spoil the next one
            self._file.truncate(before)
            raise

    def fileno(self) -> int:
        """The descriptor."""
        return self._file.fileno()

    def rename(self, path: Path) -> None:
        """Call the file *path* from here on."""
        self.path.rename(path)
        self.path = path

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def unlink_all(paths: Iterable[Path]) -> int:
    """Delete files and wait until they are gone for good; returns how many there were."""
    folders, gone = set(), 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            gone += 1
            folders.add(path.parent)
    for folder in folders:
        sync_folder(folder)
    return gone
