"""Where accepted events wait for the log: the port, and what goes through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

from features.state.clock import AHEAD, Clock
from features.state.ports import MissingStateError

TICK = timedelta(microseconds=1)


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
    seq: int = 0
    """Its place in the queue; places only grow."""


class Refused(NamedTuple):
    """A row that could not be taken, waiting for the dead letters; what it says is encrypted."""

    received_at: datetime
    source: str
    token: bytes
    seq: int = 0


class Progress(NamedTuple):
    """How far the queue is.

    Attributes:
        last, received_at: the last place that was given, and its receipt.
        moved, moved_until: every event up to this place is in the log and the online rows, which tell of all received before that moment.
    """

    last: int = 0
    received_at: datetime | None = None
    moved: int = 0
    moved_until: datetime | None = None


class ClocksApartError(MissingStateError):
    """The clocks of machines that share a queue differ by so much that receipts would go back and forth."""


SET_RIGHT = "set the clocks of all machines right, then end all services and start them again: the first follows its own clock"


class Turn:
    """One turn at the queue, of which there is one at a time among all processes: who enters in it gives out places and receipts.

    Receipts only grow. Where the queue *is_shared*, a machine whose clock lies far behind the last of them takes no turn; a machine of its
    own does not follow what its clock said when it was far ahead.

    Raises:
        ClocksApartError: as said.
    """

    def __init__(self, standing: Progress, clock: Clock, is_shared: bool = False) -> None:
        last, now = standing.received_at, clock()
        if is_shared and last is not None and last > now + AHEAD:
            raise ClocksApartError(
                f"the queue's last receipt is of {last.isoformat()}, and this machine's clock says {now.isoformat()}: {SET_RIGHT}"
            )
        self.moved = standing.moved
        """Up to which place events are in the log."""
        self.entered: dict[str, str] = {}
        """The content hash of each event that was entered in this turn, by id."""
        self.seq, self._clock = standing.last, clock
        self.received_at: datetime | None = standing.received_at

    def next(self) -> tuple[int, datetime]:
        """The next place, and its receipt: the clock's time, but always later than the last, so that places and receipts agree."""
        now, last = self._clock(), self.received_at
        if last is not None and last <= now + AHEAD and now <= last + TICK:
            # room for the moment just after an event
            now = last + 2 * TICK
        self.seq, self.received_at = self.seq + 1, now
        return self.seq, now


class Entry(Protocol):
    """What a request brings to the queue."""

    def enter(self, turn: Turn) -> tuple[Sequence[Accepted], Sequence[Refused]]:
        """What is to be stored, in the order in which it then lies; whatever this raises is told to who submitted it, and to no other."""

    def stored(self) -> None:
        """It is stored for good: all that was stored before it has been followed, and nothing later."""


Follow = Callable[[Sequence[Accepted]], object]
Moved = Callable[[Progress, bool], object]
"""Only notes it: it is called while the queue waits."""


class EventQueue(Protocol):
    """An event is acknowledged only once it lies here for good, and leaves only once it lies in the log.

    Several processes may share it. What one of them stores the others follow, in the same order.
    """

    @property
    def is_open(self) -> bool:
        """Whether what is submitted will be stored."""

    def followed_by(self, follow: Follow, moved: Moved) -> None:
        """Hand on from now on what other processes have stored, each letter once and in order, and how far they have moved letters on.

        *moved* is also told whether some letters were moved on before they could be handed on.
        """

    def submit(self, entry: Entry, done: Future[None]) -> None:
        """Have *entry* take part in the next commit, in the order of calls; *done* is, once it is stored for good and followed."""

    def catch_up(self) -> None:
        """Follow all that was stored before this was called."""

    def standing(self) -> Progress:
        """How far it is, as far as this process has followed."""

    def followed(self) -> int:
        """The place up to which all that was stored has been followed here; a moment after a commit it may lie before ``standing``."""

    def moment(self) -> datetime:
        """A moment before which everything received is stored, and followed here; whatever comes is received later."""

    def waiting(self, limit: int = 10_000, after: int = 0) -> list[Accepted]:
        """The events after a place that have not left yet, in order; a limit of -1 is none."""

    def refused(self, limit: int = 10_000) -> list[Refused]:
        """The rows that could not be taken and have not left yet, in order."""

    def count_refused(self) -> int:
        """How many rows that could not be taken have not left yet."""

    def drained(self, letters: Sequence[Accepted], refused: Sequence[Refused], touched: Collection[str] = ()) -> None:
        """Let go of what the log now holds; *letters* are those that waited longest. Customers that they *touched* are to be computed."""

    def to_compute(self) -> list[str]:
        """The customers whose windowed features do not know what was moved on, in order, whoever moved it."""

    def has_to_compute(self) -> bool:
        """Whether there are any."""

    def computed(self, customers: Iterable[str], at: datetime) -> None:
        """Their windowed features know all that was received before a moment."""

    def forget(self, customers: Iterable[str]) -> None:
        """They are gone, and nothing is to be computed of them."""

    def scrub(self) -> None:
        """Hold no more than what waits."""

    def last_received(self) -> datetime | None:
        """The latest receipt of what waits, or None."""

    def close(self) -> None:
        """Finish what was submitted, and end."""
