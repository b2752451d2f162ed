"""Consent: for what a customer's data may be used and by which channels they may be contacted, as they said it and when."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

import duckdb
import msgspec

from features.events.event import Consent, ContactChannel, Purpose, SealedEvent
from features.events.identifiers import RANK
from features.people.identity import Identities
from features.state.clock import microseconds
from features.state.ports import EVENTS, State
from features.state.seen import Seen

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
CONTACT_CHANNELS: tuple[ContactChannel, ...] = get_args(ContactChannel)
Default = Literal["opt-in", "opt-out"]
"""What holds of a customer who has said nothing: ``opt-in`` forbids until they allow, ``opt-out`` allows until they forbid."""

FEATURES: tuple[Purpose, ...] = ("personalization",)
"""What an event must be allowed for to serve a feature of its customer."""
LEARNING: tuple[Purpose, ...] = ("personalization", "analytics")
"""What all events of a customer must be allowed for before a model may learn from them."""
STATISTICS: tuple[Purpose, ...] = ("analytics",)
"""What an event must be allowed for to count in what is true of items."""


class ConsentPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a shop may do by default; it is kept with the shop's description."""

    purposes: dict[Purpose, Default] = msgspec.field(default_factory=lambda: {"analytics": "opt-out", "personalization": "opt-out"})
    permissions: dict[ContactChannel, Default] = msgspec.field(
        default_factory=lambda: {
            "email": "opt-in", "sms": "opt-in", "push": "opt-in", "call_centre": "opt-in", "mail": "opt-out", "ads": "opt-out",
        }
    )  # fmt: skip

    def default(self, subject: str) -> bool:
        """Whether *subject*, a purpose or a channel, is allowed of a customer who has said nothing; what is not named is not."""
        named: list[tuple[str, Default]] = [*self.purposes.items(), *self.permissions.items()]
        return dict(named).get(subject, "opt-in") == "opt-out"


class Statement(NamedTuple):
    """One thing that a customer said."""

    occurred_at: datetime
    known_at: datetime
    event_id: str
    said: Mapping[str, bool]
    """Purpose or channel to allowed or not."""
    policy_version: str | None
    source: str | None


class Interval(NamedTuple):
    """From when until when (None: without end) an answer held; before the first statement there is none."""

    starts: datetime | None
    ends: datetime | None
    allowed: bool


class Consents:
    """What every customer of one home has said. Statements lie in the log, as events; here they are in memory, by identifier.

    Safe to call from several threads. Merged customers share their statements: the one that occurred last holds.
    """

    def __init__(self, state: State, policy: ConsentPolicy) -> None:
        self.policy = policy
        self._events = state.tables[EVENTS]
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._by_key: dict[str, dict[str, Statement]] = {}
        self._seen = Seen(self._events)
        self._noted: dict[str, tuple[list[str], Statement]] = {}
        """What was said and is not in the log yet."""
        self.refresh()

    def refresh(self) -> None:
        """Read what is new in the log. What was noted and is not there yet stays, and nobody is silent meanwhile."""
        with self._reading:
            files = self._seen.news()
            if files is not None and not files:
                return
            rows = _spoken(sorted(self._seen.everything() if files is None else files))
            with self._lock:
                # erased: what is gone must go here too, in one step for those who read
                by_key: dict[str, dict[str, Statement]] = {} if files is None else {key: dict(said) for key, said in self._by_key.items()}
                for keys, statement in rows:
                    self._noted.pop(statement.event_id, None)
                    _file(by_key, keys, statement)
                for keys, statement in self._noted.values():
                    _file(by_key, keys, statement)
                self._by_key = by_key
            self._seen.note()

    def note(self, event: SealedEvent, known_at: datetime) -> bool:
        """Take an event of this moment into account at once; returns whether it was a statement."""
        if not event.identifiers or not is_statement(event):
            return False
        keys = [f"{kind}:{event.identifiers[kind]}" for kind in sorted(event.identifiers, key=RANK.__getitem__)]
        statement = _statement(event.name, event.channel, event.consent, event.occurred_at, known_at, event.event_id)
        with self._lock:
            if event.event_id in self._noted or not any(event.event_id in self._by_key.get(key, ()) for key in keys):
                # else the log has told it already, and nothing is to be waited for
                self._noted[event.event_id] = (keys, statement)
                _file(self._by_key, keys, statement)
        return True

    def settle(self, until: datetime) -> None:
        """All that was received before a moment is in the log by now, or was taken out of it: what was noted of it counts no more."""
        with self._lock:
            if not any(statement.known_at < until for _, statement in self._noted.values()):
                return
        self.refresh()
        with self._lock:
            for event_id, (keys, statement) in list(self._noted.items()):
                if statement.known_at < until:
                    del self._noted[event_id]
                    for key in keys:
                        self._by_key.get(key, {}).pop(event_id, None)
                        if not self._by_key.get(key, True):
                            del self._by_key[key]

    def forget(self, keys: Iterable[str]) -> None:
        """Let go of what was said under *keys*: by a person who is erased."""
        gone = set(keys)
        with self._lock:
            for key in gone:
                self._by_key.pop(key, None)
            self._noted = {name: each for name, each in self._noted.items() if not gone & set(each[0])}

    def of(self, keys: Iterable[str]) -> list[Statement]:
        """What was said under any of *keys*, in the order in which it occurred."""
        if not self._by_key:
            return []
        with self._lock:
            found: dict[str, Statement] = {}
            for key in keys:
                for s in self._by_key.get(key, {}).values():
                    # the whole statement, where a part of it lies under another of their keys
                    if s.event_id not in found or len(s.said) > len(found[s.event_id].said):
                        found[s.event_id] = s
        return sorted(found.values(), key=lambda s: (s.occurred_at, s.known_at, s.event_id))

    def allows(self, keys: Iterable[str], subject: Purpose | ContactChannel, declared: bool | None = None) -> bool:
        """Whether *subject* is allowed now: by what was said last, or else by what a source *declared*, or else by the policy."""
        answer = self.policy.default(subject) if declared is None else declared
        for statement in self.of(keys):
            answer = statement.said.get(subject, answer)
        return answer

    def usable(self, keys: Sequence[str], purpose: Purpose, occurred_at: datetime, declared: Sequence[str] | None = None) -> bool:
        """Whether what occurred then may be used now: it was allowed at the time and is not withdrawn.

        What a source *declared* of its rows stands in for what the customer has not said.
        """
        return self.judge(keys, purpose)(microseconds(occurred_at), declared)

    def judge(self, keys: Sequence[str], purpose: Purpose) -> Callable[[int, Sequence[str] | None], bool]:
        """As ``usable``, for many events of one customer; their times are microseconds since 1970."""
        default = self.policy.default(purpose)
        intervals = [
            (
                0 if each.starts is None else microseconds(each.starts),
                math.inf if each.ends is None else microseconds(each.ends),
                each.allowed,
            )
            for each in self.intervals(keys, purpose)
        ]

        def usable(at: int, declared: Sequence[str] | None) -> bool:
            answer = default if declared is None else purpose in declared
            for starts, ends, allowed in intervals:
                if starts <= at < ends:
                    answer = allowed
            return answer

        return usable

    def forbidden_channels(self, keys: Iterable[str]) -> frozenset[str]:
        """The channels by which they may not be contacted now."""
        answers: dict[str, bool] = {channel: self.policy.default(channel) for channel in CONTACT_CHANNELS}
        for statement in self.of(keys):
            answers |= {k: v for k, v in statement.said.items() if k in answers}
        return frozenset(channel for channel, allowed in answers.items() if not allowed)

    def intervals(self, keys: Iterable[str], purpose: Purpose) -> list[Interval]:
        """When *purpose* was allowed and when not, for those who said anything: usable is what was allowed at the time and is not
        withdrawn now, so whoever withdrew has one interval without beginning or end.
        """
        said = [(s.occurred_at, s.said[purpose]) for s in self.of(keys) if purpose in s.said]
        if not said:
            return []
        if not said[-1][1]:
            return [Interval(None, None, False)]
        ends = [at for at, _ in said[1:]]
        return [Interval(at, end, allowed) for (at, allowed), end in zip(said, [*ends, None], strict=True) if end is None or at < end]

    @property
    def silent(self) -> bool:
        """Whether nobody has said anything yet."""
        return not self._by_key

    def keys(self) -> list[str]:
        """The identity keys under which anything was said."""
        with self._lock:
            return sorted(self._by_key)

    def speakers(self, owners: Mapping[str, str | None]) -> dict[str, list[str]]:
        """Of the customers to whom *owners* gives identity keys, those who said anything, with the keys that they said it under."""
        found: dict[str, list[str]] = {}
        for key in sorted(owners):
            customer = owners[key]
            if customer is not None and key in self._by_key:
                found.setdefault(customer, []).append(key)
        return found

    def digest(self) -> str:
        """Names everything that was said, and the policy."""
        with self._lock:
            said = sorted((k, *map(str, s)) for k, statements in self._by_key.items() for s in statements.values())
        return hashlib.sha256(repr((said, msgspec.json.encode(self.policy, order="sorted"))).encode()).hexdigest()


def is_statement(event: SealedEvent) -> bool:
    """Whether the event says what may be done."""
    return event.consent is not None or event.name == "message_unsubscribe"


class Standing(NamedTuple):
    """What is allowed of one customer now."""

    personalization: bool
    forbidden_channels: frozenset[str]


def standing(consents: Consents, identities: Identities, customer_id: str | None) -> Standing:
    """What may be done with and for a customer; of nobody there is nothing to use."""
    keys = identities.members(customer_id) if customer_id is not None else []
    # their row holds what is usable and nothing else, so only a withdrawal stands against using it
    return Standing(consents.allows(keys, "personalization", declared=True), consents.forbidden_channels(keys))


def told(consents: Consents, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Purpose and channel to what holds, since when, by which words and from where: for people to read."""
    statements = consents.of(keys)
    answer: dict[str, dict[str, Any]] = {}
    for subject in (*PURPOSES, *CONTACT_CHANNELS):
        last = next((s for s in reversed(statements) if subject in s.said), None)
        answer[subject] = (
            {"allowed": consents.policy.default(subject), "since": None, "source": "policy", "policy_version": None}
            if last is None
            else {
                "allowed": last.said[subject], "since": last.occurred_at, "source": last.source, "policy_version": last.policy_version,
            }
        )  # fmt: skip
    return answer


def _statement(
    name: str, channel: str | None, consent: Consent | None, occurred_at: datetime, known_at: datetime, event_id: str
) -> Statement:
    said: dict[str, bool] = {}
    if name == "message_unsubscribe":
        said[channel if channel in CONTACT_CHANNELS else "email"] = False
    if consent is not None:
        said.update([*consent.purposes.items(), *consent.permissions.items()])
    version, source = (consent.policy_version, consent.source) if consent is not None else (None, None)
    return Statement(occurred_at, known_at, event_id, said, version, source)


def _file(by_key: dict[str, dict[str, Statement]], keys: Sequence[str], statement: Statement) -> None:
    """Under the strongest key, and what is forbidden under all: that must stand even where the strongest proves to be shared."""
    by_key.setdefault(keys[0], {})[statement.event_id] = statement
    forbidden = {subject: False for subject, allowed in statement.said.items() if not allowed}
    if forbidden:
        for key in keys[1:]:
            by_key.setdefault(key, {}).setdefault(statement.event_id, statement._replace(said=forbidden))


def _spoken(paths: Sequence[str]) -> list[tuple[list[str], Statement]]:
    """The statements in these files of the log, with the keys of their events, the strongest first."""
    if not paths:
        return []
    query = """SELECT identifiers, name, channel, consent, occurred_at, known_at, event_id FROM read_parquet(?)
               WHERE (consent IS NOT NULL OR name = 'message_unsubscribe') AND identity_key IS NOT NULL"""
    found = []
    for identifiers, name, channel, consent, occurred_at, known_at, event_id in _connect().execute(query, [list(paths)]).fetchall():
        pairs = sorted(identifiers, key=lambda pair: RANK[pair["key"]])
        said = None if consent is None else msgspec.json.decode(consent, type=Consent)
        statement = _statement(name, channel, said, occurred_at.astimezone(UTC), known_at.astimezone(UTC), event_id)
        found.append(([f"{pair['key']}:{pair['value']}" for pair in pairs], statement))
    return found


def _connect() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET TimeZone='UTC'")
    return connection
