"""What is left of an erased person: keyed hashes by which what comes of them again is known, and refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from features.events.event import SealedEvent
from features.events.identifiers import names_a_person
from features.people.vault import Vault
from features.state.clock import microseconds
from features.state.looker import Looker
from features.state.ports import State
from features.state.sql import BIG, put, run_many

STARTS_ANEW = ("sign_up", "consent_update")
"""By these a person who was erased begins again, from then on."""
TICK_SECONDS = 0.1
"""Within so long of a change another may leave the same stamp: it takes the time of a disk's clock, which ticks."""


_NEVER = 2**62


class Stone(NamedTuple):
    """One erased key. No event that carries it comes in until the erasure is *settled*."""

    erased_at: int
    lifted_at: int | None
    settled: bool


_STONES = sa.Table(
    "tombstones",
    sa.MetaData(),
    sa.Column("tombstone", sa.Text, primary_key=True),
    sa.Column("erased_at", BIG, nullable=False),
    sa.Column("lifted_at", BIG),
    sa.Column("settled", sa.Integer, nullable=False),
)
_RAISE = put(_STONES)
_RAISE = _RAISE.on_conflict_do_update(
    index_elements=[_STONES.c.tombstone], set_={"erased_at": _RAISE.excluded.erased_at, "lifted_at": None, "settled": 0}
)
_SETTLE = (
    sa.update(_STONES)
    .where(_STONES.c.tombstone == sa.bindparam("of"), _STONES.c.erased_at <= sa.bindparam("at"))
    .values(settled=sa.text("1"))
)


class Tombstones:
    """A database of keyed hashes of identity keys, each with the moments of the erasure and of a new beginning.

    What occurred before the erasure is refused for ever, from whatever source it comes again. What occurs later is refused
    too until they sign up or consent anew, which they cannot while the erasure is under way: it would take their new life too.
    """

    def __init__(self, state: State, vault: Vault) -> None:
        self._vault = vault
        self._database = state.database("tombstones", _STONES)
        self._looker = Looker(self._database)
        self._lock = threading.Lock()
        self._stones: dict[str, Stone] = {}
        self._stamp: Hashable | None = None
        self._stamped_at, self._is_settled = 0.0, False
        self._tried: dict[str, int] = {}
        """By tombstone the moment of a new beginning that is let in and may not be stored yet."""
        self._begun: dict[str, int] = {}
        """Of one that is stored, by whichever process, and not written down yet: it is once it reaches the log."""

    def welcome(self, events: Iterable[SealedEvent], keep: bool = False) -> list[bool]:
        """For each event whether it may be kept; a new beginning is written down only where *keep* says that it will be."""
        with self._lock:
            self._read_if_changed()
            if not self._stones:
                return [True for _ in events]
            return [self._may_stay(event, keep) for event in events]

    def stand_since(self, identity_keys: Iterable[str], moment: datetime) -> bool:
        """Whether any of these keys was erased since *moment*."""
        with self._lock:
            self._read_if_changed()
            at = microseconds(moment)
            return bool(self._stones) and any(
                (stone := self._stones.get(self._vault.tombstone(key))) is not None and stone.erased_at >= at for key in identity_keys
            )

    def standing(self, identity_keys: Iterable[str]) -> set[str]:
        """Those of these keys that were ever erased, as far as was read last."""
        with self._lock:
            return {key for key in identity_keys if self._vault.tombstone(key) in self._stones} if self._stones else set()

    def read_again(self) -> None:
        """Forget what was lifted without being kept: the event that lifted it was not stored."""
        with self._lock:
            self._stamp = None
            self._tried.clear()

    def begun(self, event: SealedEvent) -> None:
        """Take in that an event is stored: whoever begins anew by it is welcome from then on, whichever process let it in."""
        if not _begins_anew(event):
            return
        with self._lock:
            self._read_if_changed()
            if self._stones:
                for stone in self._of_the_person(event):
                    self._begun[stone] = min(microseconds(event.occurred_at), self._begun.get(stone, _NEVER))
                self._wake()

    def add(self, identity_keys: Sequence[str], erased_at: datetime) -> int:
        """Raise a tombstone for each key, of an erasure that is under way; returns how many."""
        at = microseconds(erased_at)
        rows = [{"tombstone": self._vault.tombstone(key), "erased_at": at, "lifted_at": None, "settled": 0} for key in identity_keys]
        if rows:
            with self._lock, self._database.begin() as connection:
                connection.execute(_RAISE, rows)
        return len(rows)

    def settle(self, identity_keys: Sequence[str], erased_at: datetime | None = None) -> None:
        """Note that the erasure of these keys is done, or that of *erased_at*: one that was asked for since may not be."""
        at = _NEVER if erased_at is None else microseconds(erased_at)
        with self._lock, self._database.begin() as connection:
            run_many(connection, _SETTLE, [(self._vault.tombstone(key), at) for key in identity_keys])

    def close(self) -> None:
        """Let go of the database; it is opened again where it is needed."""
        with self._lock:
            self._looker.close()

    def _may_stay(self, event: SealedEvent, keep: bool) -> bool:
        occurred = microseconds(event.occurred_at)
        keys = [f"{kind}:{value}" for who in (event.identifiers, event.previous) for kind, value in who.items()]
        if any(not self._stones[stone].settled for key in keys if (stone := self._vault.tombstone(key)) in self._stones):
            return False
        stones = {stone: self._stones[stone] for stone in self._of_the_person(event)}
        if any(occurred < each.erased_at for each in stones.values()):
            return False
        asleep = [stone for stone, each in stones.items() if each.lifted_at is None or occurred < each.lifted_at]
        if asleep and _begins_anew(event):
            self._lift(asleep, occurred, keep)
            return True
        return not asleep

    def _of_the_person(self, event: SealedEvent) -> list[str]:
        """The tombstones that stand for whoever the event is of."""
        keys = [f"{kind}:{value}" for who in (event.identifiers, event.previous) for kind, value in who.items()]
        # a tablet that an erased person used too is no reason to refuse whoever signs in on it
        keys = [key for key in keys if names_a_person(key)] or keys
        return [stone for key in keys if (stone := self._vault.tombstone(key)) in self._stones]

    def _lift(self, stones: Sequence[str], at: int, keep: bool) -> None:
        if keep:
            with self._database.begin() as connection:
                connection.execute(sa.update(_STONES).where(_STONES.c.tombstone.in_(stones)).values(lifted_at=at))
        for stone in stones:
            self._stones[stone] = self._stones[stone]._replace(lifted_at=at)
            if not keep:
                self._tried[stone] = at

    def _wake(self) -> None:
        """Let new beginnings count that are not written down; those of whom is erased again, or that are, need not be remembered."""
        for lifted in (self._tried, self._begun):
            for stone, at in list(lifted.items()):
                found = self._stones.get(stone)
                is_over = found is None or not found.settled or at < found.erased_at
                if found is None or is_over or (found.lifted_at is not None and found.lifted_at <= at):
                    if lifted is self._begun or is_over:
                        del lifted[stone]
                    continue
                self._stones[stone] = found._replace(lifted_at=at)

    def _read_if_changed(self) -> None:
        stamp, now = self._database.stamp(), time.monotonic()
        is_same = stamp == self._stamp
        if stamp is not None and not (is_same and self._is_settled):
            self._stones = {
                stone: Stone(erased_at, lifted_at, bool(settled))
                for stone, erased_at, lifted_at, settled in self._looker.read(sa.select(_STONES))
            }
            self._wake()
            # not before: a failed read is tried again
            self._stamped_at = self._stamped_at if is_same else now
            self._stamp, self._is_settled = stamp, is_same and now - self._stamped_at > TICK_SECONDS


def _begins_anew(event: SealedEvent) -> bool:
    return event.name in STARTS_ANEW and (event.consent is None or any(event.consent.purposes.values()))
