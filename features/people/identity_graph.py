"""The graph of identifiers in memory: priorities, guards and a memory, so that every merge is known at a time and reversible."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from features.events.identifiers import RANK, RULES, IdentifierKind, kind_of, names_a_person

BY_HAND = ("joined", "parted")
"""What people decided: a rebuild keeps it."""
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


class PartedError(ValueError):
    """What was asked of the identity graph cannot be done; the message tells why."""


def mint_customer_id(key: str) -> str:
    """The id of the customer first seen under *key*: opaque, and the same in every rebuild of the table."""
    return "c_" + hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


class IdentityGraph:
    """Which identity keys (``kind:keyed hash``) belong to which customer, worked out step by step.

    The identifiers of one event belong together, the strongest first, unless a guard objects:

    - a kind of which a person has one (loyalty card, user id) never joins two people who have different ones;
    - a thing (device, cookie, receipt) brings its anonymous past to a person, but never joins two people: a household's tablet
      that a second person uses is shared, and identifies nobody by itself from then on;
    - an e-mail address or a phone number that would give a person more addresses than ``RULES`` allow is a shared one (a call
      centre's number, a test address): what it had joined is split again.

    Who used a shared identifier is remembered: should they turn out to be one customer, it is theirs again. So it makes no
    difference whether a customer's identifiers were seen together before a device of theirs was seen with each, or after.

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

    def strongest(self) -> dict[str, str]:
        """Each customer's strongest identity key, the first of them by alphabet."""
        return {customer: min(keys, key=lambda key: (RANK[kind_of(key)], key)) for customer, keys in list(self._members.items())}

    def former(self, customer_id: str) -> list[str]:
        """The customers that were merged into this one."""
        return sorted(old for old in list(self._moved) if self.current(old) == customer_id)

    def changed_since(self, before: IdentityGraph) -> set[str]:
        """The customers who do not have the identifiers that they had."""
        customers = self._members.keys() | before._members.keys()
        return {c for c in customers if set(before._members.get(c, ())) != set(self._members.get(c, ()))}

    # --- learning

    def learn(self, keys: Sequence[str], previous: Sequence[str], event_id: str, known_at: datetime) -> str | None:
        """The customer of an event with *keys*, the strongest first, minted if need be; None where nobody is identified.

        *previous* are keys by which the customer was known before. The graph learns all of it or, where that raises, nothing.
        """
        if len(keys) == 1 and not previous and keys[0] in self._owner:
            self._seen_earlier(keys[0], event_id, known_at)
            return self._owner[keys[0]]
        learnt, changes = len(self.news), list[Callable[[], Any]]()
        self._undo = changes
        try:
            return self._learn(keys, previous, event_id, known_at)
        except BaseException:
            self._undo = None
            del self.news[learnt:]
            for change in reversed(changes):
                change()
            raise
        finally:
            self._undo = None

    def _learn(self, keys: Sequence[str], previous: Sequence[str], event_id: str, known_at: datetime) -> str | None:
        usable = [key for key in keys if self._owner.get(key, "new") is not None]
        if not usable:
            return None
        anchor = usable[0]
        for key in usable[1:]:
            anchor = self._bring_together(anchor, key, event_id, known_at)
        if anchor not in self._owner:
            self._attach(anchor, mint_customer_id(anchor), None, "seen", event_id, known_at)
        for key in keys:
            self._seen_earlier(key, event_id, known_at)
            self._use_if_shared(key, anchor, event_id, known_at)
        for key in previous:
            # said outright, so no guard but a parting by hand stands against it
            if self._owner.get(key, "new") is not None and not self._parted(anchor, key):
                self._join(anchor, key, "linked", event_id, known_at)
        return self._owner[anchor]

    def _bring_together(self, anchor: str, key: str, event_id: str, known_at: datetime) -> str:
        """Join *key* to the stronger *anchor* if nothing objects; returns the anchor of the event from here on."""
        if self._owner.get(key, "new") is None or (anchor in self._owner and self._owner[anchor] is None):
            return anchor
        if not self._objection(anchor, key):
            self._join(anchor, key, "linked", event_id, known_at)
            return anchor
        rule = RULES[kind_of(key)]
        if self._parted(anchor, key):
            pass  # somebody has said whose it is
        elif key in self._owner and not (rule.names_a_person and rule.most == 1):
            self._share(key, event_id, known_at)
        elif key not in self._owner and not _is_exclusive(anchor) and anchor in self._owner and names_a_person(key):
            # the anchor has joined too many: it is the shared one, and what it joined falls apart
            self._share(anchor, event_id, known_at)
            self._attach(key, mint_customer_id(key), None, "seen", event_id, known_at)
            return key
        if anchor not in self._owner:
            self._attach(anchor, mint_customer_id(anchor), None, "seen", event_id, known_at)
        if key not in self._owner:
            self._attach(key, mint_customer_id(key), None, "seen", event_id, known_at)
        return anchor

    def _objection(self, one: str, other: str) -> bool:
        """Whether a guard stands against *one* and *other* being of the same customer."""
        mine, theirs = self._owner.get(one), self._owner.get(other)
        if mine is not None and mine == theirs:
            return False
        if self._parted(one, other):
            return True
        ours, others = self._around(one), self._around(other)
        both_people = any(map(names_a_person, ours)) and any(map(names_a_person, others))
        if both_people and not (names_a_person(one) and names_a_person(other)):
            return True
        counts: dict[str, int] = {}
        for key in (*ours, *others):
            kind = kind_of(key)
            counts[kind] = counts.get(kind, 0) + 1
        smaller = {kind_of(key) for key in (ours if len(ours) < len(others) else others)}
        return any(counts[kind] > RULES[kind].most for kind in smaller)

    def _parted(self, one: str, other: str) -> bool:
        if not self._apart:
            return False
        return any(frozenset((a, b)) in self._apart for a in self._around(one) for b in self._around(other))

    def _around(self, key: str) -> Sequence[str]:
        """The keys of the customer that *key* belongs to, or it alone."""
        owner = self._owner.get(key)
        return (key,) if owner is None else self._members[owner]

    def _join(self, one: str, other: str, cause: str, event_id: str, known_at: datetime) -> None:
        """Make the customers of both keys one, or give a new key to the customer of the other."""
        mine, theirs = self._owner.get(one), self._owner.get(other)
        if one == other and mine is not None:
            # whoever is said to have been known by what they are known by now
            return
        if mine is not None and mine == theirs:
            if other not in self._links.get(one, ()):
                self.record(Step(other, mine, self._not_before(other, known_at), event_id, cause, one))
            return
        if mine is None and theirs is None:
            mine = mint_customer_id(one)
            self._attach(one, mine, None, "seen", event_id, known_at)
        if mine is None:
            assert theirs is not None
            self._attach(one, theirs, other, cause, event_id, known_at)
        elif theirs is None:
            self._attach(other, mine, one, cause, event_id, known_at)
        else:
            self._merge(one, other, cause if cause in BY_HAND else "merged", event_id, known_at)

    def _merge(self, one: str, other: str, cause: str, event_id: str, known_at: datetime) -> None:
        mine, theirs = self._owner[one], self._owner[other]
        assert mine is not None
        assert theirs is not None
        stays, goes, link = (mine, theirs, (other, one)) if self._standing(mine) <= self._standing(theirs) else (theirs, mine, (one, other))
        moved = self._members[goes]
        for key in moved:
            through = link[1] if key == link[0] else None
            self.record(Step(key, stays, self._not_before(key, known_at), event_id, cause, through))

        for shared in sorted({each for key in moved for each in self._used.get(key, ())}):
            self._return_if_theirs(shared, stays, event_id, known_at)

    def _use_if_shared(self, key: str, user: str, event_id: str, known_at: datetime) -> None:
        if self._owner.get(key, "new") is not None:
            return
        people = [user] if names_a_person(user) else sorted(filter(names_a_person, self._around(user)), key=lambda k: (RANK[kind_of(k)], k))
        users = self._users.get(key, set())
        if people and people[0] not in users and len(users) < MOST_USERS:
            self.record(Step(key, None, self._not_before(key, known_at), event_id, "used", people[0]))

    def _return_if_theirs(self, shared: str, customer: str, event_id: str, known_at: datetime) -> None:
        """Give a shared identifier back where all who used it have turned out to be this one customer."""
        users = self._users[shared]
        if shared not in self._all_known or self._parted(shared, next(iter(self._members[customer]))):
            return
        if len(users) >= MOST_USERS or any(self._owner.get(user) not in (customer, None) for user in users):
            return
        kind = kind_of(shared)
        if sum(kind_of(key) == kind for key in self._members[customer]) >= RULES[kind].most:
            return
        through = min(user for user in users if self._owner.get(user) == customer)
        self.record(Step(shared, customer, self._not_before(shared, known_at), event_id, "returned", through))

    def _standing(self, customer: str) -> tuple[int, datetime, str]:
        """Of two customers the one with the stronger identifier stays, then the one known longer."""
        keys = self._members[customer]
        return min(RANK[kind_of(key)] for key in keys), min(self._since[key] for key in keys), customer

    def _share(self, key: str, event_id: str, known_at: datetime) -> None:
        """Let *key* identify nobody from now on, and part what only it had joined."""
        owner = self._owner[key]
        assert owner is not None
        members = [k for k in self._members[owner] if k != key]
        self.record(Step(key, None, self._not_before(key, known_at), event_id, "shared"))
        self._fall_apart(owner, members, "split", event_id, known_at)

    def _fall_apart(self, owner: str, members: Sequence[str], cause: str, event_id: str, known_at: datetime) -> None:
        """Give each group of *members* that hangs together a customer of its own; the one known longest stays *owner*."""
        parts = sorted(self._components(members), key=lambda part: min(map(self._age, part)))
        stays = next((part for part in parts if owner in map(mint_customer_id, part)), parts[0] if parts else [])
        for part in parts:
            if part is not stays:
                name = self._name(part)
                for key in part:
                    self.record(Step(key, name, self._not_before(key, known_at), event_id, cause))

    def _age(self, key: str) -> tuple[datetime, int, str]:
        return self._since[key], RANK[kind_of(key)], key

    def _name(self, keys: Sequence[str]) -> str:
        """The customer id of a group of keys on their own: what it was before a merge, else that of the key known longest."""
        minted = [mint_customer_id(key) for key in sorted(keys, key=self._age)]
        return next((each for each in minted if each in self._moved), minted[0])

    def _components(self, members: Sequence[str]) -> list[list[str]]:
        left, parts = set(members), []
        for start in members:
            if start not in left:
                continue
            left.discard(start)
            part, edge = [start], [start]
            while edge:
                near = self._links.get(edge.pop(), set()) & left
                left -= near
                part += sorted(near)
                edge += near
            parts.append(part)
        return parts

    def _attach(self, key: str, customer: str, through: str | None, cause: str, event_id: str, known_at: datetime) -> None:
        self.record(Step(key, customer, known_at, event_id, cause, through))

    def _seen_earlier(self, key: str, event_id: str, known_at: datetime) -> None:
        # an import may tell of a time before the first live event: then she was known already
        if key in self._since and known_at < self._since[key]:
            self.record(Step(key, self._owner[key], known_at, event_id, "seen"))

    def _not_before(self, key: str, known_at: datetime) -> datetime:
        """A change of owner is known no earlier than what it changes."""
        return max(known_at, self._changed.get(key, self._since.get(key, known_at)))

    # --- by hand

    def join(self, one: str, other: str, known_at: datetime, why: str) -> None:
        """Make two customers one, because somebody (or a link between their contacts) says so.

        Raises:
            PartedError: one of them is unknown.
        """
        first, second = self.members(self.current(one)), self.members(self.current(other))
        if not first or not second:
            raise PartedError(f"{other if first else one} is no customer")
        self._join(first[0], second[0], "joined", why, known_at)

    def parted(self, one: str, other: str) -> bool:
        """Whether two customers were parted by hand."""
        return any(frozenset((a, b)) in self._apart for a in self.members(one) for b in self.members(other))

    def part(self, customer_id: str, keys: Sequence[str], known_at: datetime, why: str) -> str:
        """Take *keys* from a customer, for good: no event will join them again. Returns the customer that they make.

        Raises:
            PartedError: she does not have them, or has no others.
        """
        members = self.members(customer_id)
        if not set(keys) <= set(members) or len(set(keys)) == len(members):
            raise PartedError(f"{customer_id} does not have these identifiers, or no others")
        rest = [key for key in members if key not in keys]
        if customer_id in map(mint_customer_id, keys):
            # hers by name: then the others go
            keys, rest = rest, list(keys)
        minted = self._name(keys)
        for key in keys:
            self.record(Step(key, minted, self._not_before(key, known_at), why, "parted"))
        for key in keys:
            for other in rest:
                self.record(Step(key, minted, self._not_before(key, known_at), why, "parted", other))
        return minted

    def repeat(self, step: Step) -> None:
        """Do again what was decided by hand, as a rebuild comes to its moment."""
        if self._owner.get(step.identity_key, "new") is None:
            return
        if step.cause == "joined":
            if step.through is not None and self._owner.get(step.through) is not None:
                self._join(step.through, step.identity_key, "joined", step.event_id or "", step.known_at)
        else:
            self.record(step)


def _is_exclusive(key: str) -> bool:
    rule = RULES[kind_of(key)]
    return rule.names_a_person and rule.most == 1


def keys_of(identifiers: Mapping[IdentifierKind, str]) -> list[str]:
    """The identity keys of an event's sealed identifiers, the strongest first."""
    if len(identifiers) == 1:
        [(kind, value)] = identifiers.items()
        return [f"{kind}:{value}"]
    return [f"{kind}:{identifiers[kind]}" for kind in sorted(identifiers, key=RANK.__getitem__)]
