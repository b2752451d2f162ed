"""The durable inbox: an event is acknowledged only once it lies here, and leaves only once it lies in the log."""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from features.state.clock import microseconds
from features.state.disk import check_room, explained, open_database, roll_back
from features.state.home import Home

READ_BYTES = 32_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Accepted(NamedTuple):
    """An accepted event waiting for the log."""

    event_id: str
    content_hash: str
    received_at: datetime
    payload: bytes
    """The sealed event."""
    source: str
    personal: bytes | None = None
    """What the contact table is to keep of it, encrypted."""


class Refused(NamedTuple):
    """A row that could not be taken, waiting for the dead letters; what it says is encrypted."""

    received_at: datetime
    source: str
    token: bytes


class _Job(NamedTuple):
    letters: Sequence[Accepted]
    refused: Sequence[Refused]
    done: Future[None]


class Inbox:
    """A SQLite file, written ahead and synced at each commit; all that waits when a commit ends goes into the next one.

    One process writes; calls come from any thread. What leaves is overwritten.
    """

    def __init__(self, home: Home) -> None:
        self._path = home.inbox
        self._reader = self._connect(home)
        self._reading = threading.Lock()
        self._writer = self._connect(home)
        self._writing = threading.Lock()
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ubiquo-inbox", daemon=True)
        self._thread.start()

    @staticmethod
    def _connect(home: Home) -> sqlite3.Connection:
        return open_database(
            home.inbox,
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "PRAGMA secure_delete=ON",
            "CREATE TABLE IF NOT EXISTS waiting (received_at INTEGER PRIMARY KEY, event_id TEXT NOT NULL, content_hash TEXT NOT NULL, "
            "payload BLOB NOT NULL, source TEXT NOT NULL, personal BLOB)",
            "CREATE TABLE IF NOT EXISTS refused (received_at INTEGER PRIMARY KEY, source TEXT NOT NULL, token BLOB NOT NULL)",
        )

    @property
    def is_open(self) -> bool:
        """Whether what is submitted will be stored."""
        return not self._closed and self._thread.is_alive()

    def submit(self, letters: Sequence[Accepted], refused: Sequence[Refused], done: Future[None]) -> None:
        """Hand everything to the next commit, in the order of calls; *done* is, once it is on the disk.

        An empty submission is done once all earlier ones are.
        """
        if self._closed:
            done.set_exception(RuntimeError("the inbox is closed"))
            return
        self._jobs.put(_Job(letters, refused, done))

    def _work(self) -> None:
        closing = False
        while not closing:
            taken = [self._jobs.get()]
            while not self._jobs.empty():
                taken.append(self._jobs.get())
            jobs = [job for job in taken if job is not None]
            closing = len(jobs) < len(taken)
            try:
                self._commit(jobs)
            except BaseException as error:
                for each in jobs:
                    each.done.set_exception(error)
            else:
                for each in jobs:
                    each.done.set_result(None)

    def _commit(self, jobs: Sequence[_Job]) -> None:
        waiting = (x for job in jobs for x in job.letters)
        letters = [(microseconds(x.received_at), x.event_id, x.content_hash, x.payload, x.source, x.personal) for x in waiting]
        refused = [(microseconds(x.received_at), x.source, x.token) for job in jobs for x in job.refused]
        if not letters and not refused:
            return
        check_room(self._path.parent)
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                self._writer.executemany("INSERT INTO waiting VALUES (?, ?, ?, ?, ?, ?)", letters)
                self._writer.executemany("INSERT INTO refused VALUES (?, ?, ?)", refused)
                self._writer.execute("COMMIT")
            except BaseException as error:
                roll_back(self._writer)
                raise (explained(error, self._path) if isinstance(error, sqlite3.Error) else error) from error

    def waiting(self, limit: int = 10_000, after: datetime = EPOCH) -> list[Accepted]:
        """The events that were received after a moment and have not left yet, oldest first; a limit of -1 is none."""
        query = """SELECT event_id, content_hash, received_at, payload, source, personal FROM waiting
                   WHERE received_at > ? ORDER BY received_at LIMIT ?"""
        found: list[Accepted] = []
        size = 0
        with self._reading, contextlib.closing(self._reader.execute(query, (microseconds(after), limit))) as rows:
            for i, h, at, payload, *rest in rows:
                found.append(Accepted(i, h, _moment(at), payload, *rest))
                size += len(payload)
                if size > READ_BYTES and limit >= 0:
                    # large ones come in more goes: memory holds no more than this
                    break
        return found

    def refused(self, limit: int = 10_000) -> list[Refused]:
        """The rows that could not be taken and have not left yet, oldest first."""
        with self._reading:
            rows = self._reader.execute("SELECT * FROM refused ORDER BY received_at LIMIT ?", (limit,)).fetchall()
        return [Refused(_moment(at), *rest) for at, *rest in rows]

    def drained(self, letters: Sequence[Accepted], refused: Sequence[Refused]) -> None:
        """Let go of what the log now holds."""
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                self._writer.executemany("DELETE FROM waiting WHERE received_at = ?", [(microseconds(x.received_at),) for x in letters])
                self._writer.executemany("DELETE FROM refused WHERE received_at = ?", [(microseconds(x.received_at),) for x in refused])
                self._writer.execute("COMMIT")
            except BaseException:
                roll_back(self._writer)
                raise

    def scrub(self) -> None:
        """Bring the file and its write-ahead log to hold no more than what waits."""
        with self._writing:
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def last_received(self) -> datetime | None:
        """The latest receipt of what waits, or None."""
        with self._reading:
            query = "SELECT max(at) FROM (SELECT max(received_at) AS at FROM waiting UNION ALL SELECT max(received_at) FROM refused)"
            [(latest,)] = self._reader.execute(query).fetchall()
        return None if latest is None else _moment(latest)

    def close(self) -> None:
        """Finish what was submitted and close the file."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()


def _moment(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)
