"""What this process has just learnt of customers, and their online rows may not know yet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from features.definitions.folds.registered import Touch
from features.events.event import SealedEvent
from features.people.identity import Former, Identities
from features.people.identity_graph import keys_of


class RecentlyLearnt:
    """What happened lately to each customer, who has no past, and who proved to be whom.

    An answer that is asked for at once finds here what its customer did as somebody else: a visitor who signs in is known at the
    next request. It is let go once the online rows tell.
    """

    def __init__(self, identities: Identities) -> None:
        self._identities = identities
        self._touches: dict[str, list[tuple[datetime, Touch]]] = {}
        self._formers: dict[str, list[Former]] = {}
        self.minted: set[str] = set()
        """Customers first seen by this process, who have no past to look up."""
        self.ahead: set[str] = set()
        """Customers whose online rows a clock that was wrong has stamped with a time to come, or another definition has made."""

    def learn(self, event: SealedEvent, at: datetime) -> str | None:
        """Learn from an event who is who; returns its customer."""
        if not event.identifiers:
            return None
        keys = [*keys_of(event.identifiers), *keys_of(event.previous)]
        before = {owner for key in keys if (owner := self._identities.owner_of([key])) is not None}
        known_before = self._identities.customer_of(event)
        customer = self._identities.learn(event, at)
        if customer is None:
            return None
        if known_before is None and not before:
            self.minted.add(customer)
        for former in before - {customer}:
            if self._identities.current(former) == customer:
                known = self._formers.setdefault(customer, [])
                known.extend([Former(former, at), *self._formers.pop(former, ())])
        return customer

    def show(self, customer: str, at: datetime, touch: Touch) -> None:
        """Let an event count in the next answer."""
        self._touches.setdefault(customer, []).append((at, touch))

    def fresh(self, customer_id: str) -> Sequence[tuple[datetime, Touch]]:
        """What happened lately to a customer, oldest first; their online row may know some of it: compare with its moment."""
        return sorted(self._touches.get(customer_id, ()), key=lambda each: each[0])

    def formers(self, customer_id: str) -> Sequence[Former]:
        """Who lately proved to be the same customer."""
        return tuple(self._formers.get(customer_id, ()))

    def make_anew(self, customer_id: str) -> None:
        """Have the customer's online rows made anew soon."""
        self.ahead.add(customer_id)

    def told(self, customers: Collection[str], until: datetime) -> None:
        """From here on the rows of *customers* tell all, and those of everybody all that was received before *until*."""
        self.minted.difference_update(customers)
        for held in (self._touches, self._formers):
            for customer in list(held):
                left = [each for each in held[customer] if _moment(each) >= until]
                if left:
                    held[customer] = left  # type: ignore[assignment]
                else:
                    held.pop(customer, None)

    def forget(self, customer_ids: Collection[str]) -> None:
        """Let go of customers who were erased."""
        for customer in customer_ids:
            self._touches.pop(customer, None)
            self._formers.pop(customer, None)
            self.minted.discard(customer)
            self.ahead.discard(customer)


def _moment(each: tuple[datetime, Touch] | Former) -> datetime:
    return each.learnt_at if isinstance(each, Former) else each[0]
