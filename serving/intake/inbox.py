"""The durable inbox: an event is acknowledged only once it lies here, and leaves only once it lies in the log."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import datetime, timedelta
from typing import NamedTuple

import sqlalchemy as sa

from features.state.clock import microseconds
from features.state.ports import State
from features.state.sql import BIG, run_many
from serving.intake.event_queue import EPOCH, Accepted, Refused

READ_BYTES = 32_000_000


_META = sa.MetaData()
_WAITING = sa.Table(
    "waiting",
    _META,
    sa.Column("received_at", BIG, primary_key=True),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Column("content_hash", sa.Text, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("personal", sa.LargeBinary),
)
_REFUSED = sa.Table(
    "refused",
    _META,
    sa.Column("received_at", BIG, primary_key=True),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("token", sa.LargeBinary, nullable=False),
)
_STORE, _STORE_REFUSED = sa.insert(_WAITING), sa.insert(_REFUSED)
_LET_GO, _LET_GO_REFUSED = (sa.delete(each).where(each.c.received_at == sa.bindparam("at")) for each in (_WAITING, _REFUSED))


class _Job(NamedTuple):
    letters: Sequence[Accepted]
    refused: Sequence[Refused]
    done: Future[None]


class Inbox:
    """A database, synced at each commit; all that waits when a commit ends goes into the next one.

    One process writes; calls come from any thread. What leaves is overwritten.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        database = state.database("inbox", _WAITING, _REFUSED)
        self._reader, self._writer = database.connect(), database.connect()
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ubiquo-inbox", daemon=True)
        self._thread.start()

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
        self._state.check_room()
        with self._writer.writing() as connection:
            run_many(connection, _STORE, letters)
            run_many(connection, _STORE_REFUSED, refused)

    def waiting(self, limit: int = 10_000, after: datetime = EPOCH) -> list[Accepted]:
        """The events that were received after a moment and have not left yet, oldest first; a limit of -1 is none."""
        query = sa.select(_WAITING).where(_WAITING.c.received_at > microseconds(after)).order_by(_WAITING.c.received_at)
        found: list[Accepted] = []
        size = 0
        with self._reader.streaming(query if limit < 0 else query.limit(limit)) as rows:
            for at, i, h, payload, *rest in rows:
                found.append(Accepted(i, h, _moment(at), payload, *rest))
                size += len(payload)
                if size > READ_BYTES and limit >= 0:
                    # large ones come in more goes: memory holds no more than this
                    break
        return found

    def refused(self, limit: int = 10_000) -> list[Refused]:
        """The rows that could not be taken and have not left yet, oldest first."""
        query = sa.select(_REFUSED).order_by(_REFUSED.c.received_at)
        return [Refused(_moment(at), *rest) for at, *rest in self._reader.read(query if limit < 0 else query.limit(limit))]

    def drained(self, letters: Sequence[Accepted], refused: Sequence[Refused]) -> None:
        """Let go of what the log now holds."""
        with self._writer.writing() as connection:
            run_many(connection, _LET_GO, [(microseconds(x.received_at),) for x in letters])
            run_many(connection, _LET_GO_REFUSED, [(microseconds(x.received_at),) for x in refused])

    def scrub(self) -> None:
        """Bring the file and its write-ahead log to hold no more than what waits."""
        self._writer.scrub()

    def last_received(self) -> datetime | None:
        """The latest receipt of what waits, or None."""
        found = [self._reader.read(sa.select(sa.func.max(each.c.received_at))) for each in (_WAITING, _REFUSED)]
        latest = max((at for [(at,)] in found if at is not None), default=None)
        return None if latest is None else _moment(latest)

    def close(self) -> None:
        """Finish what was submitted and close the file."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()


def _moment(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)
