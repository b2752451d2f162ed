"""The durable inbox: an event is acknowledged only once it lies here, and leaves only once it lies in the log."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from features.clock import microseconds
from features.event_log import DeadLetter
from features.home import Home

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Letter(NamedTuple):
    """An accepted event waiting for the log."""

    event_id: str
    content_hash: str
    received_at: datetime
    payload: bytes


class Inbox:
    """A SQLite file, written ahead and synced at each commit. One process writes; calls from several threads take turns."""

    def __init__(self, home: Home) -> None:
        home.root.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(home.inbox, check_same_thread=False, isolation_level=None)
        self._db.executescript(
            """
            PRAGMA journal_mode=WAL;
            PRAGMA synchronous=FULL;
            CREATE TABLE IF NOT EXISTS events (
                event_id TEXT PRIMARY KEY, content_hash TEXT NOT NULL, received_at INTEGER NOT NULL, payload BLOB);
            CREATE INDEX IF NOT EXISTS waiting ON events (received_at) WHERE payload IS NOT NULL;
            CREATE TABLE IF NOT EXISTS rejected (
                received_at INTEGER NOT NULL, source TEXT NOT NULL, field TEXT NOT NULL, reason TEXT NOT NULL, raw TEXT NOT NULL);
            """
        )

    def hashes(self, event_ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each of *event_ids* that was ever accepted here."""
        with self._lock:
            marks = ",".join("?" * len(event_ids))
            return dict(self._db.execute(f"SELECT event_id, content_hash FROM events WHERE event_id IN ({marks})", list(event_ids)))

    def store(self, letters: Sequence[Letter], rejected: Sequence[DeadLetter]) -> None:
        """Write everything in one transaction; when this returns it is on the disk."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(
                    "INSERT INTO events VALUES (?, ?, ?, ?)",
                    [(x.event_id, x.content_hash, microseconds(x.received_at), x.payload) for x in letters],
                )
                self._db.executemany(
                    "INSERT INTO rejected VALUES (?, ?, ?, ?, ?)", [(microseconds(x.received_at), *x[1:]) for x in rejected]
                )
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def waiting(self, limit: int = 10_000) -> tuple[list[Letter], list[DeadLetter]]:
        """What has not reached the log yet, oldest first."""
        with self._lock:
            events = self._db.execute(
                "SELECT event_id, content_hash, received_at, payload FROM events WHERE payload IS NOT NULL ORDER BY received_at LIMIT ?",
                (limit,),
            ).fetchall()
            rejected = self._db.execute("SELECT * FROM rejected ORDER BY rowid LIMIT ?", (limit,)).fetchall()
        letters = [Letter(i, h, _moment(at), payload) for i, h, at, payload in events]
        return letters, [DeadLetter(_moment(at), *rest) for at, *rest in rejected]

    def drained(self, letters: Sequence[Letter], rejected: int) -> None:
        """Forget the content of what the log now holds; ids and hashes stay, to know a repeat by."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("UPDATE events SET payload = NULL WHERE event_id = ?", [(x.event_id,) for x in letters])
            self._db.execute("DELETE FROM rejected WHERE rowid IN (SELECT rowid FROM rejected ORDER BY rowid LIMIT ?)", (rejected,))
            self._db.execute("COMMIT")

    def last_received(self) -> datetime | None:
        """The latest receipt, or None."""
        with self._lock:
            [(latest,)] = self._db.execute("SELECT max(received_at) FROM events").fetchall()
        return None if latest is None else _moment(latest)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def _moment(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)
