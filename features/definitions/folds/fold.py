"""What a fold is: one customer's events, taken in one by one, into a small state from which features are read at any moment."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from datetime import date, datetime
from functools import cached_property
from typing import Any, Generic, Literal, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import msgspec

from features.definitions.feature import Dtype, Moment
from features.events.event import SealedEvent

S = TypeVar("S")
T = TypeVar("T", bound=tuple[Any, ...])
DONE_TO_THEM = ("message_sent", "ad_impression", "erasure")
"""What the shop did, and not the customer."""
TIMEZONE = "timezone"
"""The trait of an event in which a device tells its time zone (an IANA name such as ``Europe/Paris``)."""
Scope = Literal["customer", "session", "item"]


class OutdatedStateError(ValueError):
    """A state was made by another definition of its fold: it has to be made anew from the log."""


class Line(NamedTuple):
    """One item of an event."""

    item_id: str
    quantity: int
    amount_minor: int
    coupon_minor: int = 0


class Touch(NamedTuple):
    """The part of an event that folds read."""

    event_id: str
    name: str
    occurred_at: datetime
    local_date: date
    """The shop's own day."""
    channel: str | None = None
    store_id: str | None = None
    session_id: str | None = None
    query: str | None = None
    offer_id: str | None = None
    decision_id: str | None = None
    lines: tuple[Line, ...] = ()
    timezone: str | None = None
    """The time zone that the customer's device told."""

    @property
    def at(self) -> int:
        """When it occurred, in whole Unix seconds."""
        return int(self.occurred_at.timestamp())

    @property
    def at_ms(self) -> int:
        """When it occurred, in whole Unix milliseconds: what is done within one second has an order too."""
        return int(self.occurred_at.timestamp() * 1000)

    @property
    def key(self) -> str:
        """Twelve characters that name the event: with them a state knows what it has taken in already."""
        return hashlib.blake2b(self.event_id.encode(), digest_size=6).hexdigest()

    @classmethod
    def of(cls, event: SealedEvent, zone: ZoneInfo) -> Touch:
        """What folds read of an event of a shop in *zone*."""
        lines = tuple(Line(item.item_id, item.quantity, item.amount_minor, item.coupon_minor) for item in event.items)
        day = event.occurred_at.astimezone(zone).date()
        return cls(
            event.event_id, event.name, event.occurred_at, day, event.channel, event.store_id, event.session_id, event.query,
            event.offer_id, event.decision_id, lines, event.traits.get(TIMEZONE),
        )  # fmt: skip

    def bought(self) -> list[Line]:
        """The lines of some quantity."""
        return [line for line in self.lines if line.quantity > 0]


def take_newest(held: list[T], new: T, limit: int) -> None:
    """Put *new* in its place among the ordered *held*, unless it is there already, and keep the *limit* last."""
    place = bisect_left(held, new)
    if place == len(held) or held[place] != new:
        held.insert(place, new)
        del held[:-limit]


class Output(NamedTuple):
    """One thing that can be read of a state: a feature of the customer at a moment."""

    name: str
    dtype: Dtype
    about: str


class Fold(ABC, Generic[S]):
    """One registered fold: ``step`` takes in an event, ``joined`` puts two customers' states together, ``features`` reads.

    Whatever the order, the batches and (but for the histories' counts, which come once by the log) the repetitions in which events
    come, the state is the same as long as it is within its bounds. So a customer's state may be kept up as events come in, and
    is that of a replay.
    """

    name: str
    scope: Scope
    outputs: tuple[Output, ...]
    reads: frozenset[str] | None = None
    """The names of the events that it takes in; None: all."""
    state: type[S]

    def empty(self) -> S:
        """The state of a customer of whom nothing is known."""
        return self.state()

    @abstractmethod
    def step(self, state: S, touch: Touch) -> None:
        """Take one event into *state*, in place."""

    @abstractmethod
    def joined(self, one: S, other: S) -> S:
        """The state of a customer who proved to be both."""

    @abstractmethod
    def features(self, state: S, moment: Moment) -> dict[str, Any]:
        """The values of ``outputs`` at *moment*."""

    @cached_property
    def version(self) -> str:
        """Names the definition: other code in its own file or in this one, but for comments, is another version."""
        sources = [inspect.getsource(sys.modules[name]) for name in (type(self).__module__, __name__)]
        return hashlib.sha256("".join(ast.dump(ast.parse(source)) for source in sources).encode()).hexdigest()[:8]

    def encode(self, state: S) -> str:
        """The state as text; equal states are equal texts."""
        return f"{self.version}:{msgspec.json.encode(state, order='sorted').decode()}"

    def decode(self, text: str | None) -> S:
        """The inverse of ``encode``; nothing gives the empty state.

        Raises:
            OutdatedStateError: another definition made it, or it is damaged.
        """
        if text is None:
            return self.empty()
        version, _, told = text.partition(":")
        if version != self.version:
            raise OutdatedStateError(f"the state of {self.name} was made by another definition of it")
        try:
            return msgspec.json.decode(told, type=self.state)
        except msgspec.DecodeError as error:
            raise OutdatedStateError(f"the state of {self.name} is damaged: {error}") from None

    def nothing(self) -> Mapping[str, Any]:
        """What is read where there is no customer."""
        return {output.name: None for output in self.outputs}
