"""The durable inbox: an event is acknowledged only once it lies here, and leaves only once it lies in the log."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from features.state.clock import Clock, microseconds, moment_of
from features.state.ports import AnyRow, State, UnreachableError
from features.state.sql import put, run_many
from serving.intake.event_queue import TICK, Accepted, Entry, Follow, Moved, Progress, Refused, Turn
from serving.intake.queue_tables import BEGIN, REFUSED, STANDING, TO_COMPUTE, TURN, WAITING, letter_of, opened, received_last, standing_of

logger = logging.getLogger("ubiquo")
READ_BYTES = 32_000_000
LOOK_SECONDS, TURN_SECONDS = 0.25, 1.0
"""How long a question waits to be told whether other processes have stored anything, and for its turn to read it."""
MOMENT_SECONDS = 40.0
"""How long is waited for a moment of the queue: a commit may wait for the disk."""


_STORE, _STORE_REFUSED = sa.insert(WAITING), sa.insert(REFUSED)
_LET_GO, _LET_GO_REFUSED = (sa.delete(each).where(each.c.seq == sa.bindparam("at")) for each in (WAITING, REFUSED))
_DUE, _ARE_DUE = sa.select(TO_COMPUTE.c.customer_id), sa.select(TO_COMPUTE.c.customer_id).limit(1)
_TO_COMPUTE = put(TO_COMPUTE)
_LATER = sa.case((TO_COMPUTE.c.until > _TO_COMPUTE.excluded.until, TO_COMPUTE.c.until), else_=_TO_COMPUTE.excluded.until)
# whoever has lost the lease tells of earlier ones, late
_TO_COMPUTE = _TO_COMPUTE.on_conflict_do_update(index_elements=["customer_id"], set_={"until": _LATER})
_COMPUTED = sa.delete(TO_COMPUTE).where(TO_COMPUTE.c.customer_id == sa.bindparam("who"), TO_COMPUTE.c.until <= sa.bindparam("before"))
_FORGET = sa.delete(TO_COMPUTE).where(TO_COMPUTE.c.customer_id == sa.bindparam("who"))
_GIVEN = sa.update(TURN).values(seq=sa.bindparam("last"), received_at=sa.bindparam("at"))
_TELL = sa.update(TURN).where(TURN.c.moved_until < sa.bindparam("at")).values(moved_until=sa.bindparam("at"))
_MOVED = sa.update(TURN).where(TURN.c.moved < sa.bindparam("to")).values(moved=sa.bindparam("to"), moved_until=sa.bindparam("until"))


class _Job(NamedTuple):
    entry: Entry
    done: Future[None]


class _Moment:
    """Takes a place in the queue, and brings nothing."""

    at: datetime

    def enter(self, turn: Turn) -> tuple[Sequence[Accepted], Sequence[Refused]]:
        """Nothing, at the next moment."""
        _, self.at = turn.next()
        return (), ()

    def stored(self) -> None:
        """Nothing follows from it."""


class Inbox:
    """A database, synced at each commit; all that waits when a commit ends goes into the next one.

    The places are given out within the commit, by whoever has the turn among all processes. So the order of places is the order in
    which events were stored, and every process can follow it: what it follows is never taken back.
    """

    def __init__(self, state: State, clock: Clock) -> None:
        self._state, self._clock = state, clock
        self._is_shared = state.settings.shared or bool(state.settings.database)
        database = opened(state)
        self._reader, self._writer, self._looker = database.connect(), database.connect(), database.connect(LOOK_SECONDS)
        if not self._reader.read(STANDING):
            with self._writer.writing() as connection:
                run_many(connection, BEGIN, [(0, 0, None, 0, None)])
        self._closed = False
        self._following = threading.RLock()
        """Held while what was stored is followed, and while it is stored: each letter is followed once, in order."""
        self._noting = threading.Lock()
        self._follow: Follow = lambda letters: None
        self._moved: Moved = lambda standing, is_missing: None
        self._standing, self._followed = Progress(), 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ubiquo-inbox", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether what is submitted will be stored."""
        return not self._closed and self._thread.is_alive()

    def followed_by(self, follow: Follow, moved: Moved) -> None:
        """Hand on from now on what other processes have stored, and how far they have moved it on; begins with all that waits."""
        with self._following:
            self._follow, self._moved = follow, moved
            self._go_on(self._reader.read, self._read_standing())

    def submit(self, entry: Entry, done: Future[None]) -> None:
        """Have *entry* take part in the next commit, in the order of calls; *done* is, once it is on the disk and followed."""
        if self._closed:
            done.set_exception(RuntimeError("the inbox is closed"))
            return
        self._jobs.put(_Job(entry, done))

    def _work(self) -> None:
        closing = False
        while not closing:
            taken = [self._jobs.get()]
            while not self._jobs.empty():
                taken.append(self._jobs.get())
            jobs = [job for job in taken if job is not None]
            closing = len(jobs) < len(taken)
            try:
                with self._following:
                    refused = self._commit(jobs)
                    for job in jobs:
                        if job.done not in refused:
                            _tell(job.entry)
                    self._followed = self._standing.last
            except BaseException as error:
                for each in jobs:
                    each.done.set_exception(error)
                continue
            for each in jobs:
                if (failure := refused.get(each.done)) is not None:
                    each.done.set_exception(failure)
                else:
                    each.done.set_result(None)

    def _commit(self, jobs: Sequence[_Job]) -> Mapping[Future[None], Exception]:
        """Store what the jobs bring, in one transaction; returns those that brought nothing, as their entry failed."""
        if not jobs:
            return {}
        failed: dict[Future[None], Exception] = {}
        with self._in_turn(), self._writer.writing() as connection:
            standing = standing_of(connection.execute(STANDING).fetchall())
            # first what others have stored since: the order of places is the order in which all of them are followed
            self._go_on(lambda query: connection.execute(query).fetchall(), standing)
            turn = Turn(standing, self._clock, self._is_shared)
            letters: list[tuple[Any, ...]] = []
            refused: list[tuple[Any, ...]] = []
            for job in jobs:
                try:
                    accepted, rejected = job.entry.enter(turn)
                except Exception as error:
                    failed[job.done] = error
                    continue
                letters += [_row(each) for each in accepted]
                refused += [(each.seq, microseconds(each.received_at), each.source, each.token) for each in rejected]
            if turn.seq == standing.last or turn.received_at is None:
                return failed
            run_many(connection, _STORE, letters)
            run_many(connection, _STORE_REFUSED, refused)
            connection.execute(_GIVEN, {"last": turn.seq, "at": microseconds(turn.received_at)})
        with self._noting:
            self._standing = self._standing._replace(last=turn.seq, received_at=turn.received_at)
        return failed

    def _in_turn(self) -> AbstractContextManager[object]:
        """Where several processes write to one file each waits in line: SQLite lets whoever asks at the right moment go first."""
        return self._state.lease.hold("turn") if self._is_shared and not self._state.settings.database else nullcontext()

    # --- following

    def catch_up(self) -> None:
        """Follow all that was stored before this was called; costs one look where nothing is new."""
        # every question waits for this
        current = standing_of(self._looker.read(STANDING))
        # what this process has stored itself may not be followed yet
        if (current.last, *current[2:]) == (self._followed, *self._standing[2:]):
            return
        if not self._following.acquire(timeout=TURN_SECONDS):
            raise UnreachableError("what was stored last cannot be read yet: the queue waits for its database")
        try:
            self._go_on(self._reader.read, self._read_standing())
        finally:
            self._following.release()

    def standing(self) -> Progress:
        """How far it is, as far as this process has followed."""
        return self._standing

    def followed(self) -> int:
        """The place up to which all that was stored has been followed here."""
        return self._followed

    def moment(self) -> datetime:
        """A moment before which everything received is on the disk, and followed here; whatever comes is received later."""
        moment, done = _Moment(), Future[None]()
        self.submit(moment, done)
        try:
            done.result(MOMENT_SECONDS)
        except TimeoutError:
            why = f"the queue has stored nothing for {MOMENT_SECONDS:.0f} s: see that the disk, or the database server, answers"
            raise UnreachableError(why) from None
        return moment.at

    def _go_on(self, read: Callable[[sa.Select[Any]], Sequence[AnyRow]], seen: Progress) -> None:
        """Follow what others have stored up to *seen*, which was read before; hold ``_following``."""
        known = self._standing
        if (seen.last, *seen[2:]) == (known.last, *known[2:]):
            return
        letters = []
        if seen.last > known.last:
            query = sa.select(WAITING).where(WAITING.c.seq > known.last).order_by(WAITING.c.seq)
            letters = [letter_of(row) for row in read(query)]
        # looked at again: letters may have been moved on before they could be read
        now = standing_of(read(STANDING))
        is_missing = now.moved > known.last
        reached = max(seen.last, letters[-1].seq if letters else 0, now.moved)
        with self._noting:
            # whoever dates what follows from these letters must not date it before them
            self._standing = self._standing._replace(received_at=now.received_at)
        if now.moved > known.moved:
            # before: whoever has no past here may have one in what is missing
            self._moved(now, is_missing)
        self._follow(letters)
        with self._noting:
            mine = self._standing
            if mine.moved > now.moved:
                # this process has moved some on meanwhile
                now = now._replace(moved=mine.moved, moved_until=mine.moved_until)
            self._standing, self._followed = now._replace(last=reached), reached

    def _read_standing(self) -> Progress:
        return standing_of(self._reader.read(STANDING))

    # --- what waits

    def waiting(self, limit: int = 10_000, after: int = 0) -> list[Accepted]:
        """The events after a place that have not left yet, in order; a limit of -1 is none."""
        query = sa.select(WAITING).where(WAITING.c.seq > after).order_by(WAITING.c.seq)
        found: list[Accepted] = []
        size = 0
        with self._reader.streaming(query if limit < 0 else query.limit(limit)) as rows:
            for row in rows:
                found.append(letter_of(row))
                size += len(found[-1].payload)
                if size > READ_BYTES and limit >= 0:
                    # large ones come in more goes: memory holds no more than this
                    break
        return found

    def refused(self, limit: int = 10_000) -> list[Refused]:
        """The rows that could not be taken and have not left yet, in order."""
        query = sa.select(REFUSED).order_by(REFUSED.c.seq)
        rows = self._reader.read(query if limit < 0 else query.limit(limit))
        return [Refused(moment_of(at), source, token, seq) for seq, at, source, token in rows]

    def count_refused(self) -> int:
        """How many rows that could not be taken have not left yet."""
        [(count,)] = self._reader.read(sa.select(sa.func.count()).select_from(REFUSED))
        return int(count)

    def drained(self, letters: Sequence[Accepted], refused: Sequence[Refused], touched: Collection[str] = ()) -> None:
        """Let go of what the log now holds, and note in the same commit of whom it knows more than their windowed features do."""
        if not (letters or refused or touched):
            return
        to, until = (letters[-1].seq, letters[-1].received_at + TICK) if letters else (0, self._standing.moved_until or moment_of(0))
        with self._in_turn(), self._writer.writing() as connection:
            run_many(connection, _LET_GO, [(x.seq,) for x in letters])
            run_many(connection, _LET_GO_REFUSED, [(x.seq,) for x in refused])
            if letters:
                connection.execute(_MOVED, {"to": to, "until": microseconds(until)})
            run_many(connection, _TO_COMPUTE, [(customer, microseconds(until)) for customer in sorted(touched)])
        # a commit that waits for the disk keeps nobody waiting here
        with self._noting:
            if to > self._standing.moved:
                self._standing = self._standing._replace(moved=to, moved_until=until)

    def to_compute(self) -> list[str]:
        """The customers whose windowed features do not know what was moved on, in order."""
        return sorted(customer for (customer,) in self._reader.read(_DUE))

    def has_to_compute(self) -> bool:
        """Whether there are any."""
        return bool(self._reader.read(_ARE_DUE))

    def computed(self, customers: Iterable[str], at: datetime) -> None:
        """Their windowed features know all that was received before a moment, and so does everybody's."""
        with self._in_turn(), self._writer.writing() as connection:
            run_many(connection, _COMPUTED, [(customer, microseconds(at)) for customer in customers])
            # should the rows of that moment be lost, it is seen that they told less
            connection.execute(_TELL, {"at": microseconds(at)})

    def forget(self, customers: Iterable[str]) -> None:
        """They are gone, and nothing is to be computed of them."""
        with self._in_turn(), self._writer.writing() as connection:
            run_many(connection, _FORGET, [(customer,) for customer in customers])

    def scrub(self) -> None:
        """Bring the file and its write-ahead log to hold no more than what waits."""
        self._writer.scrub()

    def last_received(self) -> datetime | None:
        """The latest receipt of what waits, or None."""
        return received_last(self._reader)

    def close(self) -> None:
        """Finish what was submitted and close the file."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        for session in (self._reader, self._writer, self._looker):
            session.close()


def _tell(entry: Entry) -> None:
    try:
        entry.stored()
    except Exception:
        # it is stored, and must not be told otherwise; the log will know it
        logger.exception("what was stored could not be followed at once")


def _row(letter: Accepted) -> tuple[Any, ...]:
    event_id, content_hash, received_at, payload, source, personal, seq = letter
    return seq, microseconds(received_at), event_id, content_hash, payload, source, personal
