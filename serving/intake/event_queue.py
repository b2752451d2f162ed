"""Where accepted events wait for the log: the port, and what goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

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


class EventQueue(Protocol):
    """An event is acknowledged only once it lies here for good, and leaves only once it lies in the log."""

    @property
    def is_open(self) -> bool:
        """Whether what is submitted will be stored."""

    def submit(self, letters: Sequence[Accepted], refused: Sequence[Refused], done: Future[None]) -> None:
        """Hand everything to the next commit, in the order of calls; *done* is, once it is stored for good.

        An empty submission is done once all earlier ones are.
        """

    def waiting(self, limit: int = 10_000, after: datetime = EPOCH) -> list[Accepted]:
        """The events that were received after a moment and have not left yet, oldest first; a limit of -1 is none."""

    def refused(self, limit: int = 10_000) -> list[Refused]:
        """The rows that could not be taken and have not left yet, oldest first."""

    def drained(self, letters: Sequence[Accepted], refused: Sequence[Refused]) -> None:
        """Let go of what the log now holds."""

    def scrub(self) -> None:
        """Hold no more than what waits."""

    def last_received(self) -> datetime | None:
        """The latest receipt of what waits, or None."""

    def close(self) -> None:
        """Finish what was submitted, and end."""
