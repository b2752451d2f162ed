"""What this process has just learnt of customers, and their online rows may not know yet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from datetime import datetime

from features.definitions.folds.registered import Touch
from features.events.event import SealedEvent
from features.people.identity import Former, Identities
from features.people.identity_state import keys_of


class RecentlyLearnt:
    """What happened lately to each customer, who has no past, and who proved to be whom.

    An answer that is asked for at once finds here what its customer did as somebody else: a visitor who signs in is known at the
    next request. It is let go once the online rows tell.
    """

    def __init__(self, identities: Identities) -> None:
        self._identities = identities
        self.is_missing: Callable[[], bool] = lambda: False
        """Whether events went by unseen, so that whoever seems new may have a past."""
        self._lock = threading.Lock()
        self._touches: dict[str, list[tuple[datetime, Touch]]] = {}
        self._formers: dict[str, list[Former]] = {}
        self.minted: dict[str, datetime] = {}
        """Customers first seen since this process began, who have no past to look up, and when that was."""
        self.ahead: set[str] = set()
        """Customers whose online rows a clock that was wrong has stamped with a time to come, or another definition has made."""

    def learn(self, event: SealedEvent, at: datetime) -> str | None:
        """Learn from an event who is who; returns its customer."""
        if not event.identifiers:
            return None
        keys = [*keys_of(event.identifiers), *keys_of(event.previous)]
        before = {owner for key in keys if (owner := self._identities.owner_of([key])) is not None}
        members = {owner: tuple(self._identities.members(owner)) for owner in before} if len(before) > 1 else {}
        known_before = self._identities.customer_of(event)
        customer = self._identities.learn(event, at)
        if customer is None:
            return None
        with self._lock:
            if known_before is None and not before and not self.is_missing():
                self.minted[customer] = at
            for former in before - {customer}:
                if self._identities.current(former) == customer:
                    # their rows tell of a past, if they have one
                    self.minted.pop(former, None)
                    known = {each.customer_id: each for each in (*self._formers.pop(former, ()), *self._formers.get(customer, ()))}
                    self._formers[customer] = [*(known | {former: Former(former, at, members.get(former, ()))}).values()]
        return customer

    def show(self, customer: str, at: datetime, touch: Touch) -> None:
        """Let an event count in the next answer."""
        with self._lock:
            self._touches.setdefault(customer, []).append((at, touch))

    def fresh(self, customer_id: str) -> Sequence[tuple[datetime, Touch]]:
        """What happened lately to a customer, oldest first; their online row may know some of it: compare with its moment."""
        with self._lock:
            return sorted(self._touches.get(customer_id, ()), key=lambda each: each[0])

    def formers(self, customer_id: str) -> Sequence[Former]:
        """Who lately proved to be the same customer."""
        with self._lock:
            known = tuple(self._formers.get(customer_id, ()))
        # what fell apart again since, say a tablet that another signs in on, is not theirs
        return tuple(each for each in known if all(self._identities.owner_of([key]) == customer_id for key in each.keys))

    def make_anew(self, customer_id: str) -> None:
        """Have the customer's online rows made anew soon."""
        self.ahead.add(customer_id)

    def told(self, customers: Collection[str], until: datetime) -> None:
        """From here on the rows of *customers* tell all, and those of everybody all that was received before *until*."""
        with self._lock:
            gone = set(customers)
            self.minted = {who: at for who, at in self.minted.items() if at >= until and who not in gone}
            touches = {who: [each for each in held if each[0] >= until] for who, held in self._touches.items()}
            formers = {who: [each for each in held if each.learnt_at >= until] for who, held in self._formers.items()}
            self._touches = {who: left for who, left in touches.items() if left}
            self._formers = {who: left for who, left in formers.items() if left}

    def forget(self, customer_ids: Collection[str]) -> None:
        """Let go of customers who were erased."""
        gone = set(customer_ids)
        with self._lock:
            for customer in gone:
                self._touches.pop(customer, None)
                self._formers.pop(customer, None)
                self.minted.pop(customer, None)
                self.ahead.discard(customer)
            formers = {who: [each for each in held if each.customer_id not in gone] for who, held in self._formers.items()}
            self._formers = {who: left for who, left in formers.items() if left}
