"""What is left of an erased person: keyed hashes by which what comes of her again is known, and refused."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from features.events.event import SealedEvent
from features.events.identifiers import names_a_person
from features.people.vault import Vault
from features.state.clock import microseconds
from features.state.ports import State
from features.state.sql import BIG, put, run_many

STARTS_ANEW = ("sign_up", "consent_update")
"""By these a person who was erased begins again, from then on."""


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
_SETTLE = sa.update(_STONES).where(_STONES.c.tombstone == sa.bindparam("of")).values(settled=sa.text("1"))


class Tombstones:
    """A database of keyed hashes of identity keys, each with the moments of the erasure and of a new beginning.

    What occurred before the erasure is refused for ever, from whatever source it comes again. What occurs later is refused
    too until she signs up or consents anew, which she cannot while the erasure is under way: it would take her new life too.
    """

    def __init__(self, state: State, vault: Vault) -> None:
        self._vault = vault
        self._database = state.database("tombstones", _STONES)
        self._lock = threading.Lock()
        self._stones: dict[str, Stone] = {}
        self._stamp: Hashable | None = None

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

    def read_again(self) -> None:
        """Forget what was lifted without being kept: the event that lifted it was not stored."""
        with self._lock:
            self._stamp = None

    def add(self, identity_keys: Sequence[str], erased_at: datetime) -> int:
        """Raise a tombstone for each key, of an erasure that is under way; returns how many."""
        at = microseconds(erased_at)
        rows = [{"tombstone": self._vault.tombstone(key), "erased_at": at, "lifted_at": None, "settled": 0} for key in identity_keys]
        if rows:
            with self._lock, self._database.begin() as connection:
                connection.execute(_RAISE, rows)
        return len(rows)

    def settle(self, identity_keys: Sequence[str]) -> None:
        """Note that the erasure of these keys is done."""
        with self._lock, self._database.begin() as connection:
            run_many(connection, _SETTLE, [(self._vault.tombstone(key),) for key in identity_keys])

    def _may_stay(self, event: SealedEvent, keep: bool) -> bool:
        occurred = microseconds(event.occurred_at)
        keys = [f"{kind}:{value}" for who in (event.identifiers, event.previous) for kind, value in who.items()]
        if any(not self._stones[stone].settled for key in keys if (stone := self._vault.tombstone(key)) in self._stones):
            return False
        # a tablet that an erased person used too is no reason to refuse whoever signs in on it
        keys = [key for key in keys if names_a_person(key)] or keys
        stones = {stone: self._stones[stone] for key in keys if (stone := self._vault.tombstone(key)) in self._stones}
        if any(occurred < each.erased_at for each in stones.values()):
            return False
        asleep = [stone for stone, each in stones.items() if each.lifted_at is None or occurred < each.lifted_at]
        if asleep and event.name in STARTS_ANEW and (event.consent is None or any(event.consent.purposes.values())):
            self._lift(asleep, occurred, keep)
            return True
        return not asleep

    def _lift(self, stones: Sequence[str], at: int, keep: bool) -> None:
        if keep:
            with self._database.begin() as connection:
                connection.execute(sa.update(_STONES).where(_STONES.c.tombstone.in_(stones)).values(lifted_at=at))
        for stone in stones:
            self._stones[stone] = self._stones[stone]._replace(lifted_at=at)

    def _read_if_changed(self) -> None:
        stamp = self._database.stamp()
        if stamp is not None and stamp != self._stamp:
            with self._database.begin() as connection:
                self._stones = {
                    stone: Stone(erased_at, lifted_at, bool(settled))
                    for stone, erased_at, lifted_at, settled in connection.execute(sa.select(_STONES))
                }
            # not before: a failed read is tried again
            self._stamp = stamp
