"""What is known of identifiers in memory: to whom each belongs, with whom it was seen, and how to take a change back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from features.events.identifiers import RANK, IdentifierKind, kind_of, names_a_person

MOST_USERS = 100
"""What so many identifiers of people were seen with is shared for good, and no further one is remembered."""


class Step(NamedTuple):
    """One thing that became known of an identifier: from *known_at* on it belongs to this customer, or (None) to nobody.

    Causes: ``seen`` first or earlier than thought; ``linked`` with another of theirs; ``merged`` two customers; ``shared`` by
    several people; ``used``, though shared, together with one more of them; ``returned`` to the one customer that all who used it
    have turned out to be; ``split`` from what a shared one had joined; ``joined`` and ``parted`` by hand.
    """

    identity_key: str
    customer_id: str | None
    known_at: datetime
    event_id: str | None
    cause: str
    through: str | None = None


def mint_customer_id(key: str) -> str:
    """The id of the customer first seen under *key*: opaque, and the same in every rebuild of the table."""
    return "c_" + hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def keys_of(identifiers: Mapping[IdentifierKind, str]) -> list[str]:
    """The identity keys of an event's sealed identifiers, the strongest first."""
    if len(identifiers) == 1:
        [(kind, value)] = identifiers.items()
        return [f"{kind}:{value}"]
    return [f"{kind}:{identifiers[kind]}" for kind in sorted(identifiers, key=RANK.__getitem__)]


class IdentityState:
    """Which identity keys (``kind:keyed hash``) belong to which customer, as the steps so far have it.

    A look-up is one read of a dictionary.
    """

    def __init__(self) -> None:
        self.news: list[Step] = []
        """What was worked out here, in contrast to what was only applied."""
        self.disturbed: set[str] = set()
        """The customers who gained or lost an identifier with a past."""
        self._owner: dict[str, str | None] = {}
        self._since: dict[str, datetime] = {}
        self._changed: dict[str, datetime] = {}
        self._members: dict[str, tuple[str, ...]] = {}
        self._links: dict[str, set[str]] = {}
        self._users: dict[str, set[str]] = {}
        """The identifiers of people with which each shared one was seen."""
        self._used: dict[str, set[str]] = {}
        """The shared identifiers that each was seen with: the inverse."""
        self._shared_by: dict[str, str] = {}
        """By which event each shared identifier proved to be one."""
        self._all_known: dict[str, bool] = {}
        """The shared ones of which both who had it and who made it a shared one are remembered, as they were not always."""
        self._apart: set[frozenset[str]] = set()
        self._moved: dict[str, str] = {}
        self._undo: list[Callable[[], Any]] | None = None
        """While a lesson is being learnt: how to take back each change, the oldest first."""

    def apply(self, step: Step) -> None:
        """Take over a step that was worked out before."""
        key, owner = step.identity_key, step.customer_id
        if step.cause == "parted" and step.through is not None:
            pair = frozenset((key, step.through))
            if pair not in self._apart:
                self._apart.add(pair)
                self._note(lambda: self._apart.discard(pair))
            return
        if step.cause == "used":
            if step.through is not None:
                self._note_user(key, step.through)
            if step.event_id is not None and step.event_id == self._shared_by.get(key):
                self._set(self._all_known, key, True)
            self._set(self._changed, key, max(step.known_at, self._changed.get(key, step.known_at)))
            return
        before, rest = self._owner.get(key), tuple[str, ...]()
        if before is not None and before != owner:
            news = {before, *([owner] if owner is not None else [])} - self.disturbed
            self.disturbed |= news
            self._note(lambda: self.disturbed.difference_update(news))
            rest = tuple(k for k in self._members[before] if k != key)
            if rest:
                self._set(self._members, before, rest)
            else:
                self._set(self._members, before, None)
                if owner is not None:
                    self._set(self._moved, before, owner)
        if key not in self._owner or before != owner:
            self._own(key, owner)
            if owner is not None:
                self._set(self._members, owner, (*self._members.get(owner, ()), key))
                self._set(self._moved, owner, None)
            if key in self._since:
                self._set(self._changed, key, step.known_at)
        self._set(self._since, key, min(step.known_at, self._since.get(key, step.known_at)))
        if step.cause == "shared":
            # whoever it belonged to has used it, though it may have been seen with a thing of theirs alone
            for user in filter(names_a_person, {*rest, *self._links.get(key, ())}):
                self._note_user(key, user)
            for other in list(self._links.get(key, ())):
                self._unlink(key, other)
            self._set(self._shared_by, key, step.event_id)
            self._set(self._all_known, key, None)
        elif step.cause == "returned" and owner is not None:
            for other in list(self._users.get(key, ())):
                self._forget_user(key, other)
                self._link(key, other)
            if owner not in self.disturbed:
                # its own past comes with it
                self.disturbed.add(owner)
                self._note(lambda: self.disturbed.discard(owner))
        elif step.through is not None and step.through != key:
            self._link(key, step.through)

    def _note(self, undo: Callable[[], Any]) -> None:
        if self._undo is not None:
            self._undo.append(undo)

    def _set(self, held: dict[str, Any], key: str, value: Any) -> None:
        """Set a value of one of the dictionaries, or (None) take it out, so that it can be undone."""
        before = held.get(key)
        if value is None:
            held.pop(key, None)
        else:
            held[key] = value
        self._note(lambda: held.pop(key, None) if before is None else held.__setitem__(key, before))

    def _own(self, key: str, owner: str | None) -> None:
        # None is a value here: known, and nobody's
        known, before = key in self._owner, self._owner.get(key)
        self._owner[key] = owner
        self._note(lambda: self._owner.__setitem__(key, before) if known else self._owner.pop(key, None))

    def _link(self, one: str, other: str) -> None:
        if other in self._links.get(one, ()):
            return
        self._links.setdefault(one, set()).add(other)
        self._links.setdefault(other, set()).add(one)
        self._note(lambda: self._unlink(one, other))

    def _unlink(self, one: str, other: str) -> None:
        for key, gone in ((one, other), (other, one)):
            links = self._links.get(key, set())
            links.discard(gone)
            if not links:
                self._links.pop(key, None)
        self._note(lambda: self._link(one, other))

    def _note_user(self, shared: str, user: str) -> None:
        if user not in self._users.get(shared, ()):
            self._users.setdefault(shared, set()).add(user)
            self._used.setdefault(user, set()).add(shared)
            self._note(lambda: self._forget_user(shared, user))

    def _forget_user(self, shared: str, user: str) -> None:
        for held, key, gone in ((self._users, shared, user), (self._used, user, shared)):
            held[key].discard(gone)
            if not held[key]:
                del held[key]
        self._note(lambda: self._note_user(shared, user))

    def record(self, step: Step) -> None:
        """Apply a step as news."""
        self.apply(step)
        self.news.append(step)

    # --- look-ups

    def owner_of(self, keys: Iterable[str]) -> str | None:
        """The customer of the first of *keys* that has one."""
        return next((owner for key in keys if (owner := self._owner.get(key)) is not None), None)

    def owners_before(self, keys: Iterable[str], moment: datetime) -> dict[str, str | None] | None:
        """The customer of each of *keys* that was known before *moment*; None where one has changed hands since."""
        found = {}
        for key in keys:
            if key not in self._owner or self._since[key] >= moment:
                continue
            if self._changed.get(key, self._since[key]) >= moment:
                return None
            found[key] = self._owner[key]
        return found

    def changed_hands_since(self, moment: datetime) -> list[str]:
        """The identity keys whose owner, once known, has changed at *moment* or later; one pass over those that ever have."""
        return [key for key, at in list(self._changed.items()) if at >= moment]

    def current(self, customer_id: str) -> str:
        """The customer that *customer_id* has become by merges: itself, mostly."""
        while customer_id not in self._members and customer_id in self._moved:
            customer_id = self._moved[customer_id]
        return customer_id

    def knows(self, key: str) -> bool:
        """Whether the identity key was ever seen."""
        return key in self._owner

    def owners(self) -> dict[str, str | None]:
        """The customer of every identity key; None where it identifies nobody."""
        return dict(self._owner)

    def members(self, customer_id: str) -> list[str]:
        """The customer's identity keys, the strongest first."""
        return sorted(self._members.get(customer_id, ()), key=lambda key: (RANK[kind_of(key)], key))

    def customers(self) -> list[str]:
        """Every customer that has an identifier, in order."""
        return sorted(self._members)

    def count(self) -> int:
        """How many customers have an identifier."""
        return len(self._members)

    def strongest(self) -> dict[str, str]:
        """Each customer's strongest identity key, the first of them by alphabet."""
        return {customer: min(keys, key=lambda key: (RANK[kind_of(key)], key)) for customer, keys in list(self._members.items())}

    def former(self, customer_id: str) -> list[str]:
        """The customers that were merged into this one."""
        return sorted(old for old in list(self._moved) if self.current(old) == customer_id)

    def changed_since(self, before: IdentityState) -> set[str]:
        """The customers who do not have the identifiers that they had."""
        customers = self._members.keys() | before._members.keys()
        return {c for c in customers if set(before._members.get(c, ())) != set(self._members.get(c, ()))}
