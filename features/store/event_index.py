"""Which events the log holds, by id, and what each identifier did: looked up by key, whatever the length of the log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, NamedTuple

import msgspec

from features.events.event import Consent, Item, SealedEvent
from features.people.identity_graph import keys_of
from features.people.vault import Personal
from features.state.clock import microseconds
from features.state.table_index import TableIndex

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Incoming(NamedTuple):
    """A checked event on its way into the log."""

    event: SealedEvent
    content_hash: str
    known_at: datetime
    """From when on a feature or a training set may use it: its receipt if live, its import's declaration otherwise."""
    received_at: datetime
    source: str
    consent_basis: str | None = None
    """On what basis it was collected, where an import declares it for all its rows."""
    declared_purposes: Sequence[str] | None = None
    """For what it may be used by that basis; None leaves it to the customer and the policy."""
    personal: Sequence[Personal] = ()
    """What the contact table is to keep of it."""


class Occurrence(NamedTuple):
    """That an event with a certain identifier occurred, without the event itself."""

    occurred_at: datetime
    number: int
    """By which ``numbered`` finds the event."""
    strongest: bool
    """Whether no other identifier of the event is stronger: then the event is whose the identifier is."""
    declared: Sequence[str] | None
    """For what its source declared that it may be used."""


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    """An event as the file holds it: no names, and times in microseconds."""

    event_id: str
    name: Any
    occurred_at: int
    known_at: int
    received_at: int
    source: str
    content_hash: str
    identifiers: dict[Any, str]
    channel: Any
    store_id: str | None
    session_id: str | None
    currency: str | None
    items: list[tuple[str, int, int, int, int]]
    offer_id: str | None
    campaign_id: str | None
    query: str | None
    decision_id: str | None
    traits: dict[str, str]
    previous: dict[Any, str]
    consent: str | None
    consent_basis: str | None
    declared_purposes: list[str] | None


_encode, _decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(_Stored).decode


class EventIndex(TableIndex[Incoming]):
    """The index of one home's log."""

    format: ClassVar[int] = 2
    statements: ClassVar[Mapping[str, str]] = {
        "events": "CREATE TABLE events (n INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, content BLOB NOT NULL, payload BLOB)",
        "keys": "CREATE TABLE keys (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE)",
        "declared": "CREATE TABLE declared (id INTEGER PRIMARY KEY, purposes TEXT NOT NULL UNIQUE)",
        "said": """CREATE TABLE said (
            key INTEGER NOT NULL, occurred_at INTEGER NOT NULL, n INTEGER NOT NULL, strongest INTEGER NOT NULL, declared INTEGER,
            PRIMARY KEY (key, occurred_at, n)
        ) WITHOUT ROWID""",
    }

    # --- looking up

    def hashes_of(self, event_ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each of *event_ids* that the log holds."""
        by_digest = {_digest(event_id): event_id for event_id in event_ids}
        with self._lock:
            rows = list(self._select("SELECT digest, content FROM events WHERE digest IN ({})", list(by_digest)))
        return {by_digest[digest]: content.hex() for digest, content in rows}

    def occurrences(self, keys: Collection[str]) -> list[Occurrence]:
        """Every event with any of *keys*, the latest first."""
        query = "SELECT occurred_at, n, strongest, purposes FROM said LEFT JOIN declared ON declared.id = said.declared WHERE key = ?"
        found: dict[int, tuple[int, int, int, str | None]] = {}
        with self._lock:
            for key in self._ids(keys).values():
                for row in self._run(query, [key]):
                    if row[2] or row[1] not in found:
                        found[row[1]] = row
        purposes = {text: json.loads(text) for text in {row[3] for row in found.values()} if text is not None}
        rows = sorted(found.values(), reverse=True, key=lambda row: row[:2])
        return [Occurrence(_moment(at), n, bool(strongest), None if text is None else purposes[text]) for at, n, strongest, text in rows]

    def count(self, keys: Collection[str]) -> int:
        """How many events carry any of *keys*; one that carries two of them counts twice."""
        with self._lock:
            return sum(self._run("SELECT count(*) FROM said WHERE key = ?", [key])[0][0] for key in self._ids(keys).values())

    def numbered(self, numbers: Sequence[int]) -> dict[int, Incoming]:
        """The events of these numbers, in their order; one that is gone meanwhile is left out."""
        with self._lock:
            payloads = dict(self._select("SELECT n, payload FROM events WHERE n IN ({})", numbers))
        return {n: _incoming(payloads[n]) for n in numbers if n in payloads}

    def of(self, keys: Collection[str]) -> list[Incoming]:
        """Every event that carries any of *keys*, the latest first."""
        return list(self.numbered([each.number for each in self.occurrences(keys)]).values())

    # --- keeping up: hold the lock of the log

    def forget(self, event_ids: Sequence[str], version: int) -> None:
        """Let go of events that were erased, and of identifiers that nothing is left of; *version* is the log without them."""
        with self.changing(version):
            rows = list(self._select("SELECT n, payload FROM events WHERE digest IN ({})", [_digest(event_id) for event_id in event_ids]))
            gone = {n for n, _ in rows}
            self._db.executemany("DELETE FROM events WHERE n = ?", [(n,) for n in gone])
            keys = {key for _, payload in rows if payload is not None for key in keys_of(_incoming(payload).event.identifiers)}
            for key in self._ids(keys).values():
                said = self._db.execute("SELECT occurred_at, n FROM said WHERE key = ?", [key]).fetchall()
                theirs = [(key, at, n) for at, n in said if n in gone]
                self._db.executemany("DELETE FROM said WHERE key = ? AND occurred_at = ? AND n = ?", theirs)
                if len(theirs) == len(said):
                    self._db.execute("DELETE FROM keys WHERE id = ?", [key])
        self.scrub()

    def _insert(self, rows: Sequence[Incoming]) -> None:
        [(last,)] = self._db.execute("SELECT ifnull(max(n), 0) FROM events").fetchall()
        digests = [_digest(row.event.event_id) for row in rows]
        held = {digest for (digest,) in self._select("SELECT digest FROM events WHERE digest IN ({})", digests)}
        keys = [keys_of(row.event.identifiers) for row in rows]
        ids = self._ids({key for each in keys for key in each}, make=True)
        declared = self._declared({_purposes(row) for row in rows})
        events, said = [], []
        for n, (row, digest, its) in enumerate(zip(rows, digests, keys, strict=True), last + 1):
            if digest in held:
                continue
            held.add(digest)
            events.append((n, digest, bytes.fromhex(row.content_hash), _payload(row) if its else None))
            at, by = microseconds(row.event.occurred_at), declared.get(_purposes(row))
            said += [(ids[key], at, n, key == its[0], by) for key in its]
        self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", events)
        self._db.executemany("INSERT INTO said VALUES (?, ?, ?, ?, ?)", said)

    def _declared(self, purposes: Collection[str | None]) -> dict[str | None, int]:
        texts = [text for text in purposes if text is not None]
        self._db.executemany("INSERT OR IGNORE INTO declared (purposes) VALUES (?)", [(text,) for text in texts])
        return {text: n for text in texts for (n,) in self._db.execute("SELECT id FROM declared WHERE purposes = ?", [text]).fetchall()}

    def _ids(self, keys: Collection[str], make: bool = False) -> dict[str, int]:
        if make:
            self._db.executemany("INSERT OR IGNORE INTO keys (key) VALUES (?)", [(key,) for key in sorted(keys)])
        return dict(self._select("SELECT key, id FROM keys WHERE key IN ({})", sorted(keys)))

    @staticmethod
    def _from_row(row: Mapping[str, Any]) -> Incoming:
        return _from_row(row)


def _from_row(row: Mapping[str, Any]) -> Incoming:
    event = SealedEvent(
        event_id=row["event_id"], name=row["name"], occurred_at=row["occurred_at"].astimezone(UTC), identifiers=_pairs(row["identifiers"]),
        channel=row["channel"], store_id=row["store_id"], session_id=row["session_id"], currency=row["currency"],
        items=[Item(**item) for item in row["items"] or ()], offer_id=row["offer_id"], campaign_id=row["campaign_id"], query=row["query"],
        decision_id=row["decision_id"], traits=_pairs(row["traits"]), previous=_pairs(row["previous"]), consent=_consent(row["consent"]),
    )  # fmt: skip
    known_at, received_at = (row[name].astimezone(UTC) for name in ("known_at", "received_at"))
    return Incoming(event, row["content_hash"], known_at, received_at, row["source"], row["consent_basis"], row["declared_purposes"])


def _payload(row: Incoming) -> bytes:
    e = row.event
    items = [(i.item_id, i.quantity, i.amount_minor, i.discount_minor, i.coupon_minor) for i in e.items]
    consent = None if e.consent is None else msgspec.json.encode(e.consent).decode()
    declared = None if row.declared_purposes is None else list(row.declared_purposes)
    times = microseconds(e.occurred_at), microseconds(row.known_at), microseconds(row.received_at)
    return _encode(
        _Stored(
            e.event_id, e.name, *times, row.source, row.content_hash, e.identifiers, e.channel, e.store_id, e.session_id, e.currency, items,
            e.offer_id, e.campaign_id, e.query, e.decision_id, e.traits, e.previous, consent, row.consent_basis, declared,
        )
    )  # fmt: skip


def _incoming(payload: bytes) -> Incoming:
    s = _decode(payload)
    event = SealedEvent(
        event_id=s.event_id, name=s.name, occurred_at=_moment(s.occurred_at), identifiers=s.identifiers, channel=s.channel,
        store_id=s.store_id, session_id=s.session_id, currency=s.currency, items=[Item(*item) for item in s.items], offer_id=s.offer_id,
        campaign_id=s.campaign_id, query=s.query, decision_id=s.decision_id, traits=s.traits, previous=s.previous,
        consent=_consent(s.consent),
    )  # fmt: skip
    known_at, received_at = _moment(s.known_at), _moment(s.received_at)
    return Incoming(event, s.content_hash, known_at, received_at, s.source, s.consent_basis, s.declared_purposes)


def _consent(text: str | None) -> Consent | None:
    return None if text is None else msgspec.json.decode(text, type=Consent)


def _pairs(pairs: Sequence[Mapping[str, str]] | None) -> dict[Any, str]:
    return {pair["key"]: pair["value"] for pair in pairs or ()}


def _purposes(row: Incoming) -> str | None:
    return None if row.declared_purposes is None else json.dumps(list(row.declared_purposes))


def _digest(event_id: str) -> bytes:
    return hashlib.blake2b(event_id.encode(), digest_size=16).digest()


def _moment(at: int) -> datetime:
    return _EPOCH + timedelta(microseconds=at)
