"""Who has been erased and is still being taken out of the files: from the moment they ask, nobody sees anything of theirs."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

from features.state.disk import transaction
from features.state.home import Home

_KINDS = ("key", "customer", "event")
LOOK_SECONDS = 1.0
"""How often it is looked whether another process has hidden anybody; what this one hides it knows at once."""


class _Seen(NamedTuple):
    """What was read, and from which state of the file."""

    stamp: tuple[int, int] | None
    values: dict[str, frozenset[str]]


_NOTHING = _Seen(None, dict.fromkeys(_KINDS, frozenset()))


class Hidden:
    """Identity keys, customer ids and event ids that no reader may use; a small SQLite file, empty once they are purged.

    It is read again where it has changed, so other processes know too. Safe to call from several threads.
    """

    def __init__(self, home: Home) -> None:
        self._path = home.root / "hidden.db"
        self._lock = threading.Lock()
        self._seen = _NOTHING
        self._look_at = 0.0

    @property
    def keys(self) -> frozenset[str]:
        """The identity keys."""
        return self._read()["key"]

    @property
    def customers(self) -> frozenset[str]:
        """The customers' ids, former ones too."""
        return self._read()["customer"]

    @property
    def events(self) -> frozenset[str]:
        """The events' ids."""
        return self._read()["event"]

    def add(self, keys: Iterable[str], customers: Iterable[str], events: Iterable[str]) -> None:
        """Hide these; what is hidden already stays so."""
        rows = [(kind, value) for kind, values in zip(_KINDS, (keys, customers, events), strict=True) for value in values]
        with self._open() as db:
            db.executemany("INSERT OR IGNORE INTO hidden VALUES (?, ?)", rows)
        self._look_at = 0.0

    def remove(self, keys: Iterable[str], customers: Iterable[str], events: Iterable[str]) -> None:
        """Let go of what is nowhere any more, leaving no trace in the file."""
        rows = [(kind, value) for kind, values in zip(_KINDS, (keys, customers, events), strict=True) for value in values]
        with self._open() as db:
            db.executemany("DELETE FROM hidden WHERE kind = ? AND value = ?", rows)
        self._look_at = 0.0

    def _read(self) -> dict[str, frozenset[str]]:
        # it is asked for with every identifier that is looked up
        now = time.monotonic()
        if now < self._look_at:
            return self._seen.values
        self._look_at = now + LOOK_SECONDS
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return _NOTHING.values
        stamp = (status.st_mtime_ns, status.st_size)
        seen = self._seen
        if seen.stamp != stamp:
            with self._lock, self._open() as db:
                found: dict[str, Collection[str]] = {kind: set() for kind in _KINDS}
                for kind, value in db.execute("SELECT kind, value FROM hidden"):
                    found[kind].add(value)  # type: ignore[attr-defined]
            seen = self._seen = _Seen(stamp, {kind: frozenset(values) for kind, values in found.items()})
        return seen.values

    def _open(self) -> AbstractContextManager[sqlite3.Connection]:
        # no write-ahead log, and what is deleted is overwritten: a key must not stay in a free page
        return transaction(
            self._path,
            "PRAGMA secure_delete=ON",
            "CREATE TABLE IF NOT EXISTS hidden (kind TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, value)) WITHOUT ROWID",
        )
