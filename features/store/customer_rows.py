"""The online rows of customers, kept up with the log: states folded event by event, windowed features computed anew."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from zoneinfo import ZoneInfo

from features.catalogue.shop import Shop
from features.definitions.folds.registered import CustomerState, Touch
from features.definitions.timeline import Timeline
from features.events.event import SealedEvent
from features.people.consent import Consents
from features.people.identity import Identities
from features.state.clock import AHEAD, microseconds, moment_of
from features.state.home import Home
from features.state.ports import UnreachableError
from features.store.event_log import EventLog
from features.store.keyed_state import KeyedState, Row, RowsTell
from features.store.prepared_compute import Prepared
from features.store.snapshots import compute, states
from features.store.timeline import open_timeline

logger = logging.getLogger("ubiquo")
CUSTOMERS_AT_ONCE, EVENTS_AT_ONCE = 5_000, 20_000
"""Of how many customers, and how many of their events, are held in memory at once while their rows are made."""
BEHIND = timedelta(minutes=10)
"""How long windowed features may follow what the states tell."""
ACTIVITY, STATE = "customer_activity", "customer_state"


class CustomerRows:
    """Writes the rows that the service reads of customers.

    Args:
        home: the installation.
        store: where the rows lie.
        log: the events.
        identities, consents: who is who and what they allow; read from the home unless given.
    """

    def __init__(
        self, home: Home, store: KeyedState, log: EventLog, identities: Identities | None = None, consents: Consents | None = None
    ) -> None:
        shop = Shop.load(home)
        self._home, self._store, self._log = home, store, log
        self._identities = identities or Identities(home)
        self._consents = consents or Consents(home, shop.consent)
        self._zone = ZoneInfo(shop.timezone)
        self._prepared = Prepared(home)
        self._told: RowsTell | None = None
        """What the store said of itself before anything was written."""
        self.written: set[str] = set()
        """Whose rows were written or deleted since."""

    def close(self) -> None:
        """Let go of what was kept for the next few customers."""
        self._prepared.close()

    def bring_up_to(self, moment: datetime, since: datetime) -> int:
        """Make anew, as of *moment*, the rows of those of whom anything became known since; returns how many they are.

        It costs what their events cost, not what the shop's do. The others' rows stay as they are: of an earlier moment, which
        every answer tells.
        """
        self._log.catch_up()
        touched = sorted({owner for key in self._log.keys_since(since) if (owner := self._identities.owner_of([key])) is not None})
        self.rebuild(touched, moment, is_now=False)
        self.compute(touched, moment, is_now=False)
        return len(touched)

    def begin(self, until: datetime | None) -> int:
        """Begin to write: what the store has lost of rows that told of everything received before a moment is made anew.

        Returns of how many customers that was.

        Raises:
            UnreachableError: the store has lost rows again meanwhile.
        """
        self._told, self.written = self._store.told(), set()
        if until is None or self._told is None or self._told.until >= until:
            return 0
        since = self._told.until
        logger.error("rows written since %s are lost online: they are made anew from the log", since.isoformat())
        self.rebuild(touched := self._touched_since(since), until)
        # of what the states told already, windowed features may have been lost as well
        self.compute(self._touched_since(since - BEHIND), until)
        self.tell_until(until)
        return len(touched)

    def tell_until(self, moment: datetime) -> None:
        """Note that the rows, as written since ``begin``, tell of everything received before a moment: should some be lost, it is known.

        Raises:
            UnreachableError: the store has lost rows meanwhile; the next ``begin`` makes them anew.
        """
        if not self._store.tell(moment, self._told):
            raise UnreachableError("the server of the online rows was replaced, or lost some, while they were written: it is tried again")

    def _touched_since(self, since: datetime) -> list[str]:
        keys = self._log.keys_since(since) if self._log.exists else set()
        owners = {owner for key in keys if (owner := self._identities.owner_of([key])) is not None}
        # what was lost may be that a row was deleted, as its customer was merged
        return sorted(owners | self._identities.disturbed_since(since))

    def fold(
        self,
        events: Mapping[str, Sequence[SealedEvent]],
        until: datetime,
        is_new: Callable[[str], bool],
        usable: Callable[[str, datetime], bool],
    ) -> set[str]:
        """Take each customer's *events* into their state, which then is of *until*.

        Args:
            events: by customer, those that reached the log since their rows were written.
            until: everything received before is in the log.
            is_new: whether a customer has no past, so that no row is no loss.
            usable: whether an event of a customer may be used.

        Returns:
            The customers whose rows have to be made anew from the log: there is none, or it cannot be read.
        """
        online = dict(zip(events, self._store.online("state_v1", list(events)), strict=True)) if events else {}
        again: set[str] = set()
        later: dict[int, list[str]] = {}
        rows = []
        for customer, theirs in events.items():
            allowed = [event for event in theirs if usable(customer, event.occurred_at)]
            # not online yet is not the same as without a past: the log knows
            if online[customer][f"{STATE}_at"] is None and not is_new(customer):
                again.add(customer)
                continue
            if not allowed:
                continue
            if (at := online[customer][f"{STATE}_at"] or 0) >= microseconds(until):
                # somebody has written it as of such a moment: before these were in the log, or with them, as the lease was lost
                later.setdefault(at, []).append(customer)
                continue
            try:
                state = CustomerState.from_row(online[customer])
                for event in allowed:
                    state.step(Touch.of(event, self._zone))
                rows.append({"customer_id": customer, **state.to_row()})
            except Exception:
                # one customer's odd row or event must not keep the others' rows from being written
                logger.exception("a customer's row cannot be brought up to date; it is made anew from the log")
                again.add(customer)
        self._push(STATE, rows, until)
        for at, some in later.items():
            if at <= microseconds(until + AHEAD):
                self.rebuild(some, moment_of(at))
            else:
                again.update(some)
        return again

    def rebuild(self, customers: Sequence[str], at: datetime, is_now: bool = True) -> None:
        """States anew from the log: of customers who were merged, split, or have said what may be used."""
        for some in self._in_parts(customers):
            found = self._replayed(some, at)
            self._push(STATE, [{"customer_id": c, **state.to_row()} for c, state in found.items()], at, is_now)
            self._delete(STATE, [c for c in some if c not in found], at, is_now)

    def compute(self, customers: Sequence[str], at: datetime, is_now: bool = True) -> None:
        """The windowed features of *customers* at a moment before which everything is in the log."""
        for some in self._in_parts(customers):
            found: set[str] = set()
            with contextlib.closing(self._timeline_of(some, at)) as opened:
                for _, table in compute(opened, self._store.views[ACTIVITY], {at: None}):
                    rows = [{k: v for k, v in row.items() if k != "event_timestamp"} for row in table.to_pylist()]
                    found |= {row["customer_id"] for row in rows}
                    self._push(ACTIVITY, rows, at, is_now)
            self._delete(ACTIVITY, [c for c in some if c not in found], at, is_now)

    def _push(self, view: str, rows: Sequence[Row], at: datetime, is_now: bool = True) -> None:
        # before: an answer that is lost says nothing
        self.written |= {row["customer_id"] for row in rows}
        self._store.push(view, rows, at, is_now)

    def _delete(self, view: str, customers: Sequence[str], at: datetime, is_now: bool) -> None:
        self.written |= set(customers)
        # whoever has lost the lease and does not know tells of a moment that has passed: newer rows stay
        self._store.delete(view, customers, at, is_now)

    def _replayed(self, customers: Sequence[str], at: datetime) -> dict[str, CustomerState]:
        if not self._log.exists:
            return {}
        try:
            # its tables lie in memory until it is closed, whoever may still point at it
            with contextlib.closing(self._timeline_of(customers, at)) as opened:
                return {customer: state for _, customer, state in states(opened, [at])}
        except (ArithmeticError, TypeError, ValueError):
            if len(customers) == 1:
                logger.exception("a customer's row cannot be made from the log: the customer goes without one")
                return {}
            middle = len(customers) // 2
            return self._replayed(customers[:middle], at) | self._replayed(customers[middle:], at)

    def _in_parts(self, customers: Sequence[str]) -> Iterator[Sequence[str]]:
        """Few enough customers at a time for their events to be held in memory; one with more events than that comes alone."""
        for start in range(0, len(customers), CUSTOMERS_AT_ONCE):
            members = {customer: self._identities.members(customer) for customer in customers[start : start + CUSTOMERS_AT_ONCE]}
            counts = self._log.index.counts([key for keys in members.values() for key in keys])
            part: list[str] = []
            held = 0
            for customer, keys in members.items():
                events = sum(counts.get(key, 0) for key in keys)
                if part and held + events > EVENTS_AT_ONCE:
                    yield part
                    part, held = [], 0
                part.append(customer)
                held += events
            yield part

    def _timeline_of(self, customers: Sequence[str], at: datetime) -> Timeline:
        few = partial(self._prepared.begin, at)
        return open_timeline(self._home, at, customers, consents=self._consents, identities=self._identities, few=few)
