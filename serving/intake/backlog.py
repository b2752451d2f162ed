"""What was accepted and is not in the log yet, and the order in which receipts are given."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import datetime, timedelta
from typing import NamedTuple

from features.events.event import SealedEvent
from features.state.clock import Clock
from serving.intake.event_queue import Accepted, Refused

TICK = timedelta(microseconds=1)


class Taken(NamedTuple):
    """An event that was taken, its customer, and when it was received."""

    event: SealedEvent
    customer_id: str | None
    received_at: datetime


class Turn:
    """Receipts are given one after the other: hold the lock for as many as belong together."""

    def __init__(self, clock: Clock) -> None:
        self.lock = threading.Lock()
        self.last: datetime | None = None
        self._clock = clock

    def next_moment(self) -> datetime:
        """The time of receipt: the clock's, but always later than the last, so that the order of events is their order."""
        now = self._clock()
        self.last = now if self.last is None or now > self.last + TICK else self.last + 2 * TICK
        return self.last


class Backlog:
    """Which events wait for the log, by id, and how many bytes they and the refused rows hold. Safe to call from several threads."""

    def __init__(self, refused: int) -> None:
        self._events: dict[str, tuple[str, Future[None]]] = {}
        """The content hash of each, and what is done once it is on the disk."""
        self._refused = refused
        self._counting = threading.Lock()
        self.bytes = 0
        self.generation = 0
        """How often something was moved into the log."""

    def __len__(self) -> int:
        """How many events wait."""
        return len(self._events)

    @property
    def rows(self) -> int:
        """How many events and refused rows wait to be moved on."""
        return len(self._events) + self._refused

    def get(self, event_id: str) -> tuple[str, Future[None]] | None:
        """The content hash of an event that waits, and what is done once it is on the disk."""
        return self._events.get(event_id)

    def enter(self, letter: Accepted, stored: Future[None]) -> None:
        """An event waits from here on."""
        self._events[letter.event_id] = letter.content_hash, stored
        with self._counting:
            self.bytes += len(letter.payload)

    def refuse(self, rows: Sequence[Refused]) -> None:
        """Rows wait for the dead letters from here on."""
        with self._counting:
            self._refused += len(rows)
            self.bytes += sum(len(row.token) for row in rows)

    def let_go(self, letters: Sequence[Accepted], refused: Sequence[Refused], moved: bool = False) -> None:
        """These do not wait any more: they were *moved* into the log, or could not be stored."""
        for letter in letters:
            self._events.pop(letter.event_id, None)
        with self._counting:
            self.generation += moved
            self._refused = max(0, self._refused - len(refused))
            self.bytes = max(0, self.bytes - sum(len(x.payload) for x in letters) - sum(len(x.token) for x in refused))
