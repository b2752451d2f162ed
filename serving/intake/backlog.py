"""What was accepted and is not in the log yet."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from features.events.event import SealedEvent
from serving.intake.event_queue import Accepted, Refused


class Taken(NamedTuple):
    """An event that was taken, its customer, and when it was received."""

    event: SealedEvent
    customer_id: str | None
    received_at: datetime


class _Held(NamedTuple):
    content_hash: str
    seq: int
    size: int


class Backlog:
    """Which events wait for the log, by id, and how many bytes they hold. Safe to call from several threads."""

    def __init__(self, refused: int) -> None:
        self._events: dict[str, _Held] = {}
        self._refused = refused
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        """How many events wait."""
        return len(self._events)

    @property
    def rows(self) -> int:
        """How many events and refused rows wait to be moved on."""
        return len(self._events) + self._refused

    def get(self, event_id: str) -> str | None:
        """The content hash of an event that waits."""
        held = self._events.get(event_id)
        return None if held is None else held.content_hash

    def enter(self, letters: Iterable[Accepted], refused: int = 0) -> None:
        """Events, and so many refused rows, wait from here on."""
        with self._lock:
            self._refused += refused
            for letter in letters:
                self._let_go([letter.event_id])
                self._events[letter.event_id] = _Held(letter.content_hash, letter.seq, len(letter.payload))
                self.bytes += len(letter.payload)

    def moved(self, letters: Sequence[Accepted], refused: Sequence[Refused]) -> None:
        """These are in the log."""
        with self._lock:
            self._let_go(letter.event_id for letter in letters)
            self._refused = max(0, self._refused - len(refused))

    def moved_elsewhere(self, to: int) -> None:
        """Another process has moved what waited up to a place."""
        with self._lock:
            self._let_go([event_id for event_id, held in self._events.items() if held.seq <= to])

    def left_elsewhere(self, refused: int) -> None:
        """Other processes have left so many refused rows."""
        with self._lock:
            self._refused = refused

    def _let_go(self, event_ids: Iterable[str]) -> None:
        for event_id in event_ids:
            held = self._events.pop(event_id, None)
            self.bytes = max(0, self.bytes - (0 if held is None else held.size))
