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
from features.state.looker import Looker
from features.state.ports import State
from features.state.sql import put, run_many

logger = logging.getLogger("ubiquo")
_KINDS = ("key", "customer", "event")
LOOK_SECONDS = 1.0
"""How often it is looked whether another process has hidden anybody; what this one hides it knows at once."""
LOOK_AGAIN_SECONDS = 0.1
"""How soon it is looked again where it could not be."""
PURGED_SECONDS = 1.0
"""How long whoever asks waits for another thread that forgets who was purged."""
FORGET_AGAIN_SECONDS = 10.0
"""How soon that is tried again where it failed: a store that is away may keep whoever tries waiting."""


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
_NOBODY: dict[str, frozenset[str]] = dict.fromkeys(_KINDS, frozenset())


class Hidden:
    """Identity keys, customer ids and event ids that no reader may use; a small database, empty once they are purged.

    It is read again where it has changed, so other processes know too. Safe to call from several threads.
    """

    def __init__(self, state: State, purged: Callable[[], object] = lambda: None) -> None:
        """Read them; *purged* is called wherever some are purged, which stay hidden until it has not failed."""
        self._database = state.database("hidden", _HIDDEN)
        self._looker = Looker(self._database)
        self._on_hidden: list[Callable[[frozenset[str]], object]] = []
        self._on_purged: list[Callable[[], object]] = [purged]
        self._seen = _Seen(None, _NOBODY)
        self._purged = _NOBODY
        """Who is hidden no more, and may still be remembered."""
        self._told = _NOBODY
        self._is_purged = False
        self._forget_at = self._waits_until = 0.0
        self._forgetting = threading.Lock()
        self._looking = threading.RLock()
        self._wanted: object = object()
        self._reached: object = None
        """What it was told last when it was to look, and what of that it has done."""
        self._is_reachable = True
        if self._look():
            self._reached = self._wanted
            # what follows from the log is read after this
            self._is_purged = False
        self._look_at = 0.0

    def followed_by(self, hidden: Callable[[frozenset[str]], object], purged: Callable[[], object]) -> None:
        """From now on call *hidden* with the identity keys that are hidden newly, and *purged* before any are hidden no more.

        Neither may ask here who is hidden.
        """
        self._on_hidden.append(hidden)
        self._on_purged.append(purged)

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

    def close(self) -> None:
        """Let go of the database; it is opened again where it is needed."""
        with self._looking:
            self._looker.close()

    def _read(self) -> dict[str, frozenset[str]]:
        # it is asked for with every identifier that is looked up
        if self._reached is not self._wanted:
            # who asks while another looks waits for what that sees
            with self._looking:
                wanted = self._wanted
                if self._reached is not wanted and (self._is_reachable or time.monotonic() >= self._look_at) and self._look():
                    self._reached = wanted
        elif time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_SECONDS
            with self._looking:
                self._look()
        if self._is_purged:
            self._forget()
        return self._told

    def _look(self) -> bool:
        """Whether it could be looked."""
        self._look_at = time.monotonic() + LOOK_SECONDS
        try:
            self._read_if_changed()
        except (OSError, SQLAlchemyError) as error:
            if self._is_reachable:
                # nobody can be hidden either while it cannot be reached
                logger.error("%s cannot be read, so whoever was hidden before stays so: %s", self._database.place, error)
            self._is_reachable = False
            self._look_at = time.monotonic() + LOOK_AGAIN_SECONDS
            return False
        self._is_reachable = True
        return True

    def _read_if_changed(self) -> None:
        stamp, now = self._database.stamp(), time.monotonic()
        seen = self._seen
        if seen.stamp == stamp and (stamp is None or seen.is_settled):
            return
        found: dict[str, set[str]] = {kind: set() for kind in _KINDS}
        for kind, value in self._looker.read(sa.select(_HIDDEN)) if stamp is not None else ():
            found[kind].add(value)
        values = {kind: frozenset(each) for kind, each in found.items()}
        since = seen.stamped_at if seen.stamp == stamp else now
        # whom it hides is told whatever comes of the rest
        self._seen = _Seen(stamp, values, since, now - since > TICK_SECONDS)
        if values == seen.values and stamp == seen.stamp:
            return
        gone = {kind: seen.values[kind] - values[kind] for kind in _KINDS}
        if any(gone.values()) or values == seen.values:
            # they were purged; where nothing differs somebody may have been hidden and purged since it was looked
            self._purged = {kind: self._purged[kind] | gone[kind] for kind in _KINDS}
            self._waits_until = time.monotonic() + PURGED_SECONDS
            self._is_purged = True
        self._tell()
        if new := values["key"] - seen.values["key"]:
            for hidden in self._on_hidden:
                hidden(new)

    def _tell(self) -> None:
        self._told = {kind: self._seen.values[kind] | self._purged[kind] for kind in _KINDS}

    def _forget(self) -> None:
        """Have everybody forget who was purged, and hide them no more: who is nowhere any more must not be remembered either."""
        # one does it, which may take long where what is purged lies in a lake that is away; others wait for a moment, if at all
        if not self._forgetting.acquire(timeout=max(0.0, self._waits_until - time.monotonic())):
            return
        try:
            forgotten = self._purged
            if not self._is_purged or time.monotonic() < self._forget_at:
                return
            try:
                for purged in self._on_purged:
                    purged()
            except BaseException as error:
                self._forget_at = time.monotonic() + FORGET_AGAIN_SECONDS
                if not isinstance(error, (OSError, SQLAlchemyError)):
                    raise
                logger.error("who was purged stays hidden, as what is left cannot be read: %s", error)
                return
            with self._looking:
                # unless more were purged meanwhile
                self._is_purged = self._purged is not forgotten
                self._purged = {kind: self._purged[kind] - forgotten[kind] for kind in _KINDS}
                self._tell()
        finally:
            self._forgetting.release()
