"""Who has been erased and is still being taken out of the files: from the moment they ask, nobody sees anything of theirs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from features.people.tombstones import TICK_SECONDS
from features.state.ports import State
from features.state.sql import put, run_many

logger = logging.getLogger("ubiquo")
_KINDS = ("key", "customer", "event")
LOOK_SECONDS = 1.0
"""How often it is looked whether another process has hidden anybody; what this one hides it knows at once."""


class _Seen(NamedTuple):
    """What was read, and from which state of the file."""

    stamp: Hashable | None
    values: dict[str, frozenset[str]]
    stamped_at: float = 0.0
    is_settled: bool = False
    """Whether it was read so long after the stamp was first seen that a later change leaves another."""


_HIDDEN = sa.Table(
    "hidden",
    sa.MetaData(),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, primary_key=True),
    sqlite_with_rowid=False,
)
_HIDE = put(_HIDDEN).on_conflict_do_nothing()
_SHOW = sa.delete(_HIDDEN).where(_HIDDEN.c.kind == sa.bindparam("of_kind"), _HIDDEN.c.value == sa.bindparam("of_value"))
_NOTHING = _Seen(None, dict.fromkeys(_KINDS, frozenset()))


class Hidden:
    """Identity keys, customer ids and event ids that no reader may use; a small database, empty once they are purged.

    It is read again where it has changed, so other processes know too. Safe to call from several threads.
    """

    def __init__(self, state: State, changed: Callable[[], object] = lambda: None) -> None:
        """Read them; *changed* is called where another process has hidden or purged anybody, before that is told."""
        self._changed = changed
        self._database = state.database("hidden", _HIDDEN)
        self._lock = threading.Lock()
        self._seen = _NOTHING
        self._look_at = 0.0
        self._looking = threading.RLock()
        self._wanted = self._reached = object()
        """What it was told last when it was to look, and what of that it has done."""

    @property
    def keys(self) -> frozenset[str]:
        """The identity keys."""
        return self._read()["key"]

    @property
    def customers(self) -> frozenset[str]:
        """The customers' ids, former ones too."""
        return self._read()["customer"]

    @property
    def events(self) -> frozenset[str]:
        """The events' ids."""
        return self._read()["event"]

    def add(self, keys: Iterable[str], customers: Iterable[str], events: Iterable[str]) -> None:
        """Hide these; what is hidden already stays so."""
        rows = [(kind, value) for kind, values in zip(_KINDS, (keys, customers, events), strict=True) for value in values]
        with self._database.begin() as connection:
            run_many(connection, _HIDE, rows)
        self.look_again()

    def remove(self, keys: Iterable[str], customers: Iterable[str], events: Iterable[str]) -> None:
        """Let go of what is nowhere any more, leaving no trace in the file."""
        rows = [(kind, value) for kind, values in zip(_KINDS, (keys, customers, events), strict=True) for value in values]
        with self._database.begin() as connection:
            run_many(connection, _SHOW, rows)
        self.look_again()

    def look_again(self) -> None:
        """Whoever asks from here on is told of whom another process has hidden by now."""
        self._wanted = object()

    def _read(self) -> dict[str, frozenset[str]]:
        # it is asked for with every identifier that is looked up
        if self._reached is self._wanted:
            if time.monotonic() < self._look_at:
                return self._seen.values
            return self._looked()
        # who asks while another looks waits for what that sees
        with self._looking:
            if self._reached is (wanted := self._wanted):
                return self._seen.values
            values = self._looked()
            self._reached = wanted
            return values

    def _looked(self) -> dict[str, frozenset[str]]:
        self._look_at = time.monotonic() + LOOK_SECONDS
        try:
            return self._read_if_changed()
        except (OSError, SQLAlchemyError) as error:
            # nobody can be hidden either while it cannot be reached
            logger.error("%s cannot be read, so whoever was hidden before stays so: %s", self._database.place, error)
            return self._seen.values

    def _read_if_changed(self) -> dict[str, frozenset[str]]:
        stamp, now = self._database.stamp(), time.monotonic()
        if stamp is None:
            return _NOTHING.values
        seen = self._seen
        if seen.stamp != stamp or not seen.is_settled:
            with self._lock, self._database.begin() as connection:
                found: dict[str, set[str]] = {kind: set() for kind in _KINDS}
                for kind, value in connection.execute(sa.select(_HIDDEN)):
                    found[kind].add(value)
            values = {kind: frozenset(each) for kind, each in found.items()}
            if values != seen.values:
                # who is nowhere any more must not be remembered either
                self._changed()
            since = seen.stamped_at if seen.stamp == stamp else now
            seen = self._seen = _Seen(stamp, values, since, now - since > TICK_SECONDS)
        return seen.values
