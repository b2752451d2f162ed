"""Identifiers to customers: a graph with priorities, guards and a memory, so that every merge is known at a time and reversible."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake

from features.events import SealedEvent
from features.home import Home
from features.identifiers import RANK, RULES, IdentifierKind, kind_of, names_a_person, normalise_all
from features.tables import append, compact_if_fragmented, files, without_statistics
from features.vault import Vault

SCHEMA = pa.schema(
    [
        ("identity_key", pa.string()),
        ("customer_id", pa.string()),
        ("known_at", pa.timestamp("us", tz="UTC")),
        ("event_id", pa.string()),
        ("cause", pa.string()),
        ("through", pa.string()),
        ("seq", pa.int64()),
    ]
)
BY_HAND = ("joined", "parted")
"""What people decided: a rebuild keeps it."""


class Step(NamedTuple):
    """One thing that became known of an identifier: from *known_at* on it belongs to this customer, or (None) to nobody.

    Causes: ``seen`` first or earlier than thought; ``linked`` with another of hers; ``merged`` two customers; ``shared`` by
    several people; ``split`` from what a shared one had joined; ``joined`` and ``parted`` by hand.
    """

    identity_key: str
    customer_id: str | None
    known_at: datetime
    event_id: str
    cause: str
    through: str | None = None


class Lesson(NamedTuple):
    """What an event taught, to be taught again."""

    keys: Sequence[str]
    previous: Sequence[str]
    event_id: str
    known_at: datetime


_STATE = ("_owner", "_since", "_changed", "_members", "_links", "_apart", "_moved", "_pending", "_learnt", "_read", "_seq", "_disturbed")


class PartedError(ValueError):
    """What was asked of the identity graph cannot be done; the message tells why."""


def mint_customer_id(key: str) -> str:
    """The id of the customer first seen under *key*: opaque, and the same in every rebuild of the table."""
    return "c_" + hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


class Identities:
    """The identifiers table and what follows from it. Identity keys are ``kind:keyed hash``. Safe to call from several threads.

    The identifiers of one event belong together, the strongest first, unless a guard objects:

    - a kind of which a person has one (loyalty card, user id) never joins two people who have different ones;
    - a thing (device, cookie, receipt) brings its anonymous past to a person, but never joins two people: a household's tablet
      that a second person uses is shared, and identifies nobody by itself from then on;
    - an e-mail address or a phone number that would give a person more addresses than ``RULES`` allow is a shared one (a call
      centre's number, a test address): what it had joined is split again.

    A look-up is one read of a dictionary.
    """

    def __init__(self, home: Home, vault: Vault | None = None) -> None:
        self._home = home
        self.vault = vault or Vault.open(home)
        self._lock = threading.RLock()
        self._teachable = True
        self._forget()
        self.refresh()
        # what was merged before this process began is no news to it
        self.take_disturbed()

    @classmethod
    def empty(cls, home: Home, vault: Vault) -> Identities:
        """Identities that know nobody yet, whatever the table holds: to work it out anew."""
        self = cls.__new__(cls)
        self._home, self.vault, self._lock, self._teachable = home, vault, threading.RLock(), False
        self._forget()
        return self

    def _forget(self) -> None:
        self._owner: dict[str, str | None] = {}
        self._since: dict[str, datetime] = {}
        self._changed: dict[str, datetime] = {}
        self._members: dict[str, tuple[str, ...]] = {}
        self._links: dict[str, set[str]] = {}
        self._apart: set[frozenset[str]] = set()
        self._moved: dict[str, str] = {}
        self._pending: list[Step] = []
        self._learnt: list[Lesson | Step] = []
        self._read: set[str] = set()
        self._seq = 0
        self._disturbed: set[str] = set()

    def refresh(self) -> None:
        """Read the table again: another process may have added to it, or an erasure taken from it.

        What was learnt here and is not written yet is learnt again on top of what the others have written, so that the guards
        hold over both. Readers see the old state or the new one.
        """
        with self._lock:
            standing = set(files(self._home.identifiers))
            if standing == self._read:
                return
            if self._read <= standing and not self._pending:
                self._apply_files(standing - self._read)
                return
            fresh = Identities.empty(self._home, self.vault)
            fresh._apply_files(standing)
            for again in self._learnt:
                if isinstance(again, Lesson):
                    fresh.learn_keys(*again)
                else:
                    fresh._record(again)
            fresh._learnt = self._learnt
            before, after = self._members, fresh._members
            changed = (c for c in before.keys() | after.keys() if set(before.get(c, ())) != set(after.get(c, ())))
            fresh._disturbed = self._disturbed.union(changed)
            for name in _STATE:
                setattr(self, name, getattr(fresh, name))

    def _apply_files(self, paths: Collection[str]) -> None:
        if not paths:
            return
        # an erasure writes the same texts in another of Arrow's layouts
        tables = [pq.ParquetFile(path).read().cast(SCHEMA) for path in paths]
        rows = pa.concat_tables(tables).sort_by("seq")
        columns = [rows.column(name).to_pylist() for name in (*Step._fields, "seq")]
        for *values, seq in zip(*columns, strict=True):
            self._apply(Step(*values))
            self._seq = max(self._seq, seq)
        self._read |= set(paths)

    def _apply(self, step: Step) -> None:
        key, owner = step.identity_key, step.customer_id
        if step.cause == "parted" and step.through is not None:
            self._apart.add(frozenset((key, step.through)))
            return
        before = self._owner.get(key)
        if before is not None and before != owner:
            self._disturbed |= {before, *([owner] if owner is not None else [])}
            rest = tuple(k for k in self._members[before] if k != key)
            if rest:
                self._members[before] = rest
            else:
                del self._members[before]
                if owner is not None:
                    self._moved[before] = owner
        if key not in self._owner or before != owner:
            self._owner[key] = owner
            if owner is not None:
                self._members[owner] = (*self._members.get(owner, ()), key)
                self._moved.pop(owner, None)
            if key in self._since:
                self._changed[key] = step.known_at
        self._since[key] = min(step.known_at, self._since.get(key, step.known_at))
        if step.cause == "shared":
            for other in self._links.pop(key, set()):
                self._links[other].discard(key)
        elif step.through is not None:
            self._links.setdefault(key, set()).add(step.through)
            self._links.setdefault(step.through, set()).add(key)

    def _record(self, step: Step) -> None:
        self._apply(step)
        self._pending.append(step)

    # --- look-ups

    def resolve(self, identifiers: Mapping[IdentifierKind, str], region: str | None = None) -> str | None:
        """The customer that the strongest known one of *identifiers*, in clear, belongs to, or None.

        Raises:
            IdentifierError: a value is no identifier of its kind.
        """
        return self.owner_of(self.vault.keys(normalise_all(identifiers, region)))

    def owner_of(self, keys: Iterable[str]) -> str | None:
        """The customer of the first of *keys* that has one."""
        return next((owner for key in keys if (owner := self._owner.get(key)) is not None), None)

    def customer_of(self, event: SealedEvent) -> str | None:
        """The customer of an event, or None."""
        return self.owner_of(keys_of(event.identifiers))

    def current(self, customer_id: str) -> str:
        """The customer that *customer_id* has become by merges: itself, mostly."""
        while customer_id not in self._members and customer_id in self._moved:
            customer_id = self._moved[customer_id]
        return customer_id

    def knows(self, key: str) -> bool:
        """Whether the identity key was ever seen."""
        return key in self._owner

    def members(self, customer_id: str) -> list[str]:
        """The customer's identity keys, the strongest first."""
        return sorted(self._members.get(customer_id, ()), key=lambda key: (RANK[kind_of(key)], key))

    def customers(self) -> list[str]:
        """Every customer that has an identifier, in order."""
        return sorted(self._members)

    def strongest(self) -> dict[str, str]:
        """Each customer's strongest identity key, the first of them by alphabet."""
        return {customer: min(keys, key=lambda key: (RANK[kind_of(key)], key)) for customer, keys in self._members.items()}

    def former(self, customer_id: str) -> list[str]:
        """The customers that were merged into this one."""
        return sorted(old for old in self._moved if self.current(old) == customer_id)

    def lost(self, customer_id: str) -> list[str]:
        """The keys that were hers, or of those merged into her, and identify nobody any more."""
        hers = {customer_id, *self.former(customer_id)}
        return sorted(
            {step.identity_key for step in self.steps() if step.customer_id in hers and self._owner.get(step.identity_key, "") is None}
        )

    def story(self, customer_id: str) -> list[Step]:
        """How the customer came to be: everything known of her identifiers and of what was split from them, oldest first."""
        wanted = {*self._members.get(customer_id, ())}
        steps = [step for step in self.steps() if step.identity_key in wanted or step.customer_id == customer_id]
        return sorted(steps, key=lambda step: step.known_at)

    def steps(self) -> list[Step]:
        """The whole table, in the order in which it was written."""
        if not DeltaTable.is_deltatable(str(self._home.identifiers)):
            return list(self._pending)
        rows = DeltaTable(str(self._home.identifiers)).to_pyarrow_table().sort_by("seq")
        columns = [rows.column(name).to_pylist() for name in Step._fields]
        return [*(Step(*values) for values in zip(*columns, strict=True)), *self._pending]

    def take_disturbed(self) -> set[str]:
        """The customers who gained or lost an identifier with a past since the last call: what was derived of them is out of date."""
        with self._lock:
            taken, self._disturbed = self._disturbed, set()
            return taken

    # --- learning

    def learn(self, event: SealedEvent, known_at: datetime) -> str | None:
        """The event's customer, minted if need be; what is new waits for ``flush``. None where nobody is identified."""
        if not event.identifiers:
            return None
        return self.learn_keys(keys_of(event.identifiers), keys_of(event.previous), event.event_id, known_at)

    def learn_keys(self, keys: Sequence[str], previous: Sequence[str], event_id: str, known_at: datetime) -> str | None:
        """As ``learn``, of identity keys (the strongest first) in place of an event."""
        with self._lock:
            if len(keys) == 1 and not previous and keys[0] in self._owner:
                if known_at < self._since[keys[0]]:
                    self._seen_earlier(keys[0], event_id, known_at)
                    self._learnt.append(Lesson(keys, previous, event_id, known_at))
                return self._owner[keys[0]]
            had = len(self._pending)
            owner = self._learn(keys, previous, event_id, known_at)
            if self._teachable and len(self._pending) > had:
                self._learnt.append(Lesson(keys, previous, event_id, known_at))
            return owner

    def learn_all(self, events: Iterable[tuple[SealedEvent, datetime]]) -> None:
        """Learn from each event in turn."""
        for event, known_at in events:
            self.learn(event, known_at)

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
        ours = self._members.get(mine, ()) if mine else (one,)
        others = self._members.get(theirs, ()) if theirs else (other,)
        if self._apart and any(frozenset((a, b)) in self._apart for a in ours for b in others):
            return True
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
        mine, theirs = self._owner.get(one), self._owner.get(other)
        ours = self._members.get(mine, ()) if mine else (one,)
        others = self._members.get(theirs, ()) if theirs else (other,)
        return any(frozenset((a, b)) in self._apart for a in ours for b in others)

    def _join(self, one: str, other: str, cause: str, event_id: str, known_at: datetime) -> None:
        """Make the customers of both keys one, or give a new key to the customer of the other."""
        mine, theirs = self._owner.get(one), self._owner.get(other)
        if mine is not None and mine == theirs:
            if other not in self._links.get(one, ()):
                self._record(Step(other, mine, self._not_before(other, known_at), event_id, cause, one))
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
        for key in self._members[goes]:
            through = link[1] if key == link[0] else None
            self._record(Step(key, stays, self._not_before(key, known_at), event_id, cause, through))

    def _standing(self, customer: str) -> tuple[int, datetime, str]:
        """Of two customers the one with the stronger identifier stays, then the one known longer."""
        keys = self._members[customer]
        return min(RANK[kind_of(key)] for key in keys), min(self._since[key] for key in keys), customer

    def _share(self, key: str, event_id: str, known_at: datetime) -> None:
        """Let *key* identify nobody from now on, and part what only it had joined."""
        owner = self._owner[key]
        assert owner is not None
        members = [k for k in self._members[owner] if k != key]
        self._record(Step(key, None, self._not_before(key, known_at), event_id, "shared"))
        self._fall_apart(owner, members, "split", event_id, known_at)

    def _fall_apart(self, owner: str, members: Sequence[str], cause: str, event_id: str, known_at: datetime) -> None:
        """Give each group of *members* that hangs together a customer of its own; the one known longest stays *owner*."""
        parts = sorted(self._components(members), key=lambda part: min(map(self._age, part)))
        stays = next((part for part in parts if owner in map(mint_customer_id, part)), parts[0] if parts else [])
        for part in parts:
            if part is not stays:
                name = self._name(part)
                for key in part:
                    self._record(Step(key, name, self._not_before(key, known_at), event_id, cause))

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
        self._record(Step(key, customer, known_at, event_id, cause, through))

    def _seen_earlier(self, key: str, event_id: str, known_at: datetime) -> None:
        # an import may tell of a time before the first live event: then she was known already
        if key in self._since and known_at < self._since[key]:
            self._record(Step(key, self._owner[key], known_at, event_id, "seen"))

    def _not_before(self, key: str, known_at: datetime) -> datetime:
        """A change of owner is known no earlier than what it changes."""
        return max(known_at, self._changed.get(key, self._since.get(key, known_at)))

    # --- by hand

    def join(self, one: str, other: str, known_at: datetime, why: str) -> None:
        """Make two customers one, because somebody (or a link between their contacts) says so.

        Raises:
            PartedError: one of them is unknown.
        """
        with self._lock:
            first, second = self.members(self.current(one)), self.members(self.current(other))
            if not first or not second:
                raise PartedError(f"{other if first else one} is no customer")
            had = len(self._pending)
            self._join(first[0], second[0], "joined", why, known_at)
            self._learnt += self._pending[had:]

    def parted(self, one: str, other: str) -> bool:
        """Whether two customers were parted by hand."""
        return any(frozenset((a, b)) in self._apart for a in self.members(one) for b in self.members(other))

    def part(self, customer_id: str, keys: Sequence[str], known_at: datetime, why: str) -> str:
        """Take *keys* from a customer, for good: no event will join them again. Returns the customer that they make.

        Raises:
            PartedError: she does not have them, or has no others.
        """
        with self._lock:
            members = self.members(customer_id)
            if not set(keys) <= set(members) or len(set(keys)) == len(members):
                raise PartedError(f"{customer_id} does not have these identifiers, or no others")
            rest = [key for key in members if key not in keys]
            if customer_id in map(mint_customer_id, keys):
                # hers by name: then the others go
                keys, rest = rest, list(keys)
            minted, had = self._name(keys), len(self._pending)
            for key in keys:
                self._record(Step(key, minted, self._not_before(key, known_at), why, "parted"))
            for key in keys:
                for other in rest:
                    self._record(Step(key, minted, self._not_before(key, known_at), why, "parted", other))
            self._learnt += self._pending[had:]
            return minted

    def repeat(self, step: Step) -> None:
        """Do again what was decided by hand, as a rebuild comes to its moment."""
        with self._lock:
            if self._owner.get(step.identity_key, "new") is None:
                return
            if step.cause == "joined":
                if step.through is not None and self._owner.get(step.through) is not None:
                    self._join(step.through, step.identity_key, "joined", step.event_id, step.known_at)
            else:
                self._record(step)

    # --- the table

    def flush(self) -> None:
        """Append what was learnt to the table; without news it writes nothing. Hold the lock of the log around it."""
        with self._lock:
            if not self._pending:
                return
            # what others have written meanwhile comes first
            self.refresh()
            steps, self._pending, self._learnt = self._pending, [], []
            append(self._home.identifiers, _table(steps, self._seq + 1))
            compact_if_fragmented(self._home.identifiers)
            self._seq += len(steps)
            self._read = set(files(self._home.identifiers))

    def write_anew(self) -> None:
        """Put what was learnt in the place of the whole table. Hold the lock of the log around it."""
        with self._lock:
            steps, self._pending, self._learnt = self._pending, [], []
            write_deltalake(str(self._home.identifiers), _table(steps, 1), mode="overwrite", **without_statistics(self._home.identifiers))
            self._seq, self._read = len(steps), set(files(self._home.identifiers))


def keys_of(identifiers: Mapping[IdentifierKind, str]) -> list[str]:
    """The identity keys of an event's sealed identifiers, the strongest first."""
    if len(identifiers) == 1:
        [(kind, value)] = identifiers.items()
        return [f"{kind}:{value}"]
    return [f"{kind}:{identifiers[kind]}" for kind in sorted(identifiers, key=RANK.__getitem__)]


def _table(steps: Sequence[Step], first: int) -> pa.Table:
    columns = [list(column) for column in zip(*steps, strict=True)] or [[] for _ in Step._fields]
    numbered = [*columns, list(range(first, first + len(steps)))]
    return pa.table([pa.array(c, f.type) for c, f in zip(numbered, SCHEMA, strict=True)], schema=SCHEMA)


def _is_exclusive(key: str) -> bool:
    rule = RULES[kind_of(key)]
    return rule.names_a_person and rule.most == 1
