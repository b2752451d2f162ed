"""What is left of an erased person: keyed hashes by which what comes of her again is known, and refused."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import NamedTuple

from features.events.event import SealedEvent
from features.events.identifiers import names_a_person
from features.people.vault import Vault
from features.state.clock import microseconds
from features.state.disk import transaction
from features.state.home import Home

STARTS_ANEW = ("sign_up", "consent_update")
"""By these a person who was erased begins again, from then on."""


class Stone(NamedTuple):
    """One erased key. No event that carries it comes in until the erasure is *settled*."""

    erased_at: int
    lifted_at: int | None
    settled: bool


class Tombstones:
    """A SQLite file of keyed hashes of identity keys, each with the moments of the erasure and of a new beginning.

    What occurred before the erasure is refused for ever, from whatever source it comes again. What occurs later is refused
    too until she signs up or consents anew, which she cannot while the erasure is under way: it would take her new life too.
    """

    def __init__(self, home: Home, vault: Vault) -> None:
        self._vault = vault
        self._path = home.tombstones
        self._lock = threading.Lock()
        self._stones: dict[str, Stone] = {}
        self._stamp: tuple[int, int] | None = None

    def welcome(self, events: Iterable[SealedEvent], keep: bool = False) -> list[bool]:
        """For each event whether it may be kept; a new beginning is written down only where *keep* says that it will be."""
        with self._lock:
            self._read_if_changed()
            if not self._stones:
                return [True for _ in events]
            return [self._may_stay(event, keep) for event in events]

    def read_again(self) -> None:
        """Forget what was lifted without being kept: the event that lifted it was not stored."""
        with self._lock:
            self._stamp = None

    def add(self, identity_keys: Sequence[str], erased_at: datetime) -> int:
        """Raise a tombstone for each key, of an erasure that is under way; returns how many."""
        rows = [(self._vault.tombstone(key), microseconds(erased_at)) for key in identity_keys]
        with self._lock, self._open() as db:
            db.executemany("INSERT INTO tombstones VALUES (?, ?, NULL, FALSE) ON CONFLICT DO UPDATE SET "
                           "erased_at = excluded.erased_at, lifted_at = NULL, settled = FALSE", rows)  # fmt: skip
        return len(rows)

    def settle(self, identity_keys: Sequence[str]) -> None:
        """Note that the erasure of these keys is done."""
        with self._lock, self._open() as db:
            db.executemany("UPDATE tombstones SET settled = TRUE WHERE tombstone = ?", [(self._vault.tombstone(k),) for k in identity_keys])

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
            with self._open() as db:
                db.executemany("UPDATE tombstones SET lifted_at = ? WHERE tombstone = ?", [(at, stone) for stone in stones])
        for stone in stones:
            self._stones[stone] = self._stones[stone]._replace(lifted_at=at)

    def _open(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(
            self._path,
            "CREATE TABLE IF NOT EXISTS tombstones (tombstone TEXT PRIMARY KEY, erased_at INTEGER NOT NULL, "
            "lifted_at INTEGER, settled INTEGER NOT NULL)",
        )

    def _read_if_changed(self) -> None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return
        if (status.st_mtime_ns, status.st_size) != self._stamp:
            with self._open() as db:
                self._stones = {
                    stone: Stone(erased_at, lifted_at, bool(settled))
                    for stone, erased_at, lifted_at, settled in db.execute("SELECT * FROM tombstones")
                }
            # not before: a failed read is tried again
            self._stamp = (status.st_mtime_ns, status.st_size)
