"""Copies of a lake's data files on this machine, for those who read paths.

A data file of a Delta table never changes, so a copy of its size is as good as the file. What the table does not need any more is
noted by an empty file beside it, so that all processes of the machine let go of it at the same time, whichever looks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

from features.state.disk import PRIVATE_FILE
from features.state.lake_store import AT_ONCE, LakeStore
from features.state.ports import KEPT_SECONDS

ERASED_SECONDS = 30.0
"""How long a copy is kept whose rows were erased by another machine, for readers of this one that have begun with it."""
PARTS_SECONDS = 3600.0
"""After so long what was to become a copy is no copy of anybody who lives."""
_NOTE, _ERASED = ".unneeded", ".erased"


class Why(Enum):
    """Why copies are not needed any more."""

    COMPACTED = "their rows are in other files"
    ERASED = "rows were taken out, or changed"
    UNKNOWN = "nobody has followed the table"


class LakeCache:
    """The folder of this machine that holds copies of one table's files."""

    def __init__(self, folder: Path, store: LakeStore) -> None:
        self._folder, self._store = folder, store

    def paths(self, sizes: Mapping[str, int]) -> list[str]:
        """The copies of objects, by their sizes; what is missing is fetched, several at once.

        Raises:
            FileNotFoundError: one is gone from the store.
            LakeError: the store cannot be reached.
        """
        missing = [name for name, size in sizes.items() if not _holds(self._folder / name, size)]
        if missing:
            with ThreadPoolExecutor(min(AT_ONCE, len(missing)), "ubiquo-lake") as pool:
                list(pool.map(lambda name: self._store.fetch(name, sizes[name], self._folder / name), missing))
        return [str(self._folder / name) for name in sizes]

    def tidy(self, needed: Collection[str], why: Why) -> None:
        """Note what is not *needed* any more, the names of the current version's files, and let go of what was noted long enough ago."""
        if not self._folder.is_dir():
            return
        now = time.time()
        for path in self._folder.iterdir():
            if path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    if now - path.stat().st_mtime > PARTS_SECONDS:
                        path.unlink()
            elif path.suffix == ".parquet" and path.name not in needed:
                _let_go(path, now, why)

    def purge(self, needed: Collection[str]) -> None:
        """Let go at once of all that is not *needed*."""
        if self._folder.is_dir():
            for path in self._folder.glob("*.parquet"):
                if path.name not in needed:
                    _drop(path)

    def copies(self) -> dict[str, str]:
        """Every copy, needed or not: object to its path."""
        return {path.name: str(path) for path in self._folder.glob("*.parquet")}

    def holds_more(self, needed: Collection[str]) -> bool:
        """Whether a copy lies here that is not *needed*."""
        return self._folder.is_dir() and any(path.name not in needed for path in self._folder.glob("*.parquet"))


def _holds(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _let_go(path: Path, now: float, why: Why) -> None:
    strict, lax = path.with_suffix(_ERASED), path.with_suffix(_NOTE)
    if why is Why.ERASED or (why is Why.UNKNOWN and not lax.exists()):
        if not strict.exists():
            strict.touch(PRIVATE_FILE)
    elif not strict.exists() and not lax.exists():
        lax.touch(PRIVATE_FILE)
    for note, seconds in ((strict, ERASED_SECONDS), (lax, KEPT_SECONDS)):
        with contextlib.suppress(FileNotFoundError):
            if now - note.stat().st_mtime >= seconds:
                _drop(path)


def _drop(path: Path) -> None:
    for each in (path, path.with_suffix(_ERASED), path.with_suffix(_NOTE)):
        each.unlink(missing_ok=True)
