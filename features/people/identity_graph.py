"""How identifiers come to belong together: priorities, guards and a memory, so that every merge is known at a time and reversible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from features.events.identifiers import RANK, RULES, kind_of, names_a_person
from features.people.identity_state import MOST_USERS, IdentityState, Step, mint_customer_id

BY_HAND = ("joined", "parted")
"""What people decided: a rebuild keeps it."""


class PartedError(ValueError):
    """What was asked of the identity graph cannot be done; the message tells why."""


class IdentityGraph(IdentityState):
    """Which identity keys (``kind:keyed hash``) belong to which customer, worked out step by step.

    The identifiers of one event belong together, the strongest first, unless a guard objects:

    - a kind of which a person has one (loyalty card, user id) never joins two people who have different ones;
    - a thing (device, cookie, receipt) brings its anonymous past to a person, but never joins two people: a household's tablet
      that a second person uses is shared, and identifies nobody by itself from then on;
    - an e-mail address or a phone number that would give a person more addresses than ``RULES`` allow is a shared one (a call
      centre's number, a test address): what it had joined is split again.

    Who used a shared identifier is remembered: should they turn out to be one customer, it is theirs again. So it makes no
    difference whether a customer's identifiers were seen together before a device of theirs was seen with each, or after.
    """

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
        # an import may tell of a time before the first live event: then they were known already
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
            PartedError: they do not have them, or have no others.
        """
        members = self.members(customer_id)
        if not set(keys) <= set(members) or len(set(keys)) == len(members):
            raise PartedError(f"{customer_id} does not have these identifiers, or no others")
        rest = [key for key in members if key not in keys]
        if customer_id in map(mint_customer_id, keys):
            # theirs by name: then the others go
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
