"""Which events the log holds, by id, and what each identifier did: looked up by key, whatever the length of the log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from features.events.event import Consent, Item, SealedEvent
from features.people.identity_state import keys_of
from features.people.vault import Personal
from features.state.clock import microseconds, moment_of
from features.state.sql import BIG, put, run_many
from features.state.table_index import CHUNK, TableIndex


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

    at: int
    """When, in microseconds since 1970: a customer may have very many."""
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


_META = sa.MetaData()
_EVENTS = sa.Table(
    "events",
    _META,
    sa.Column("n", BIG, primary_key=True),
    sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("payload", sa.LargeBinary),
)
_KEYS = sa.Table("keys", _META, sa.Column("id", BIG, primary_key=True), sa.Column("key", sa.Text, nullable=False, unique=True))
_DECLARED = sa.Table("declared", _META, sa.Column("id", BIG, primary_key=True), sa.Column("purposes", sa.Text, nullable=False, unique=True))
_SAID = sa.Table(
    "said",
    _META,
    sa.Column("key", BIG, primary_key=True, autoincrement=False),
    sa.Column("occurred_at", BIG, primary_key=True),
    sa.Column("n", BIG, primary_key=True),
    sa.Column("strongest", sa.Integer, nullable=False),
    sa.Column("declared", BIG),
    sqlite_with_rowid=False,
)
_values: sa.BindParameter[Any] = sa.bindparam("values", expanding=True)
_HASHES = sa.select(_EVENTS.c.digest, _EVENTS.c.content).where(_EVENTS.c.digest.in_(_values))
_BY_DIGEST = sa.select(_EVENTS.c.n, _EVENTS.c.payload).where(_EVENTS.c.digest.in_(_values))
_PAYLOADS = sa.select(_EVENTS.c.n, _EVENTS.c.payload).where(_EVENTS.c.n.in_(_values))
_KEY_IDS = sa.select(_KEYS.c.key, _KEYS.c.id).where(_KEYS.c.key.in_(_values))
_COUNTS = (
    sa.select(_KEYS.c.key, sa.func.count())
    .select_from(_KEYS.join(_SAID, _SAID.c.key == _KEYS.c.id))
    .where(_KEYS.c.key.in_(_values))
    .group_by(_KEYS.c.key)
)
_OCCURRED = (
    sa.select(_SAID.c.occurred_at, _SAID.c.n, _SAID.c.strongest, _DECLARED.c.purposes)
    .select_from(_SAID.outerjoin(_DECLARED, _DECLARED.c.id == _SAID.c.declared))
    .where(_SAID.c.key.in_(_values))
    .order_by(_SAID.c.occurred_at.desc(), _SAID.c.n.desc())
)
_UNSAID = sa.delete(_SAID).where(
    _SAID.c.key == sa.bindparam("of_key"), _SAID.c.occurred_at == sa.bindparam("at"), _SAID.c.n == sa.bindparam("number")
)
_FORGET = sa.delete(_EVENTS).where(_EVENTS.c.n == sa.bindparam("number"))
_PUT_EVENT, _PUT_SAID = sa.insert(_EVENTS), sa.insert(_SAID)
_PUT_KEY = put(_KEYS).values(key=sa.bindparam("key")).on_conflict_do_nothing()


class EventIndex(TableIndex[Incoming]):
    """The index of one home's log."""

    format: ClassVar[int] = 2
    sql: ClassVar[tuple[sa.Table, ...]] = (_EVENTS, _KEYS, _DECLARED, _SAID)

    # --- looking up

    def hashes_of(self, event_ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each of *event_ids* that the log holds."""
        by_digest = {_digest(event_id): event_id for event_id in event_ids}
        return {by_digest[digest]: content.hex() for digest, content in self._chunked(_HASHES, list(by_digest))}

    def occurrences(self, keys: Collection[str]) -> list[Occurrence]:
        """Every event with any of *keys*, the latest first."""
        with self._lock:
            ids = list(self._ids(keys).values())
            rows = list(self._chunked(_OCCURRED, ids))
        if len(ids) > CHUNK:
            rows.sort(key=lambda row: (row[0], row[1]), reverse=True)
        purposes: dict[str | None, Sequence[str] | None] = {None: None}
        found: list[Occurrence] = []
        for at, n, strongest, text in rows:
            if text not in purposes:
                purposes[text] = json.loads(str(text))
            # an event with two of the keys stands there twice, one after the other
            if not found or found[-1].number != n:
                found.append(Occurrence(at, n, bool(strongest), purposes[text]))
            elif strongest:
                found[-1] = found[-1]._replace(strongest=True)
        return found

    def counts(self, keys: Collection[str]) -> dict[str, int]:
        """How many events carry each of *keys*; those that none carries are left out."""
        return {row[0]: row[1] for row in self._chunked(_COUNTS, sorted(keys))}

    def numbered(self, numbers: Sequence[int]) -> dict[int, Incoming]:
        """The events of these numbers, in their order; one that is gone meanwhile is left out."""
        payloads = {row[0]: row[1] for row in self._chunked(_PAYLOADS, numbers)}
        return {n: _incoming(payloads[n]) for n in numbers if n in payloads}

    def of(self, keys: Collection[str]) -> list[Incoming]:
        """Every event that carries any of *keys*, the latest first."""
        return list(self.numbered([each.number for each in self.occurrences(keys)]).values())

    # --- keeping up: hold the lease of the log

    def forget(self, event_ids: Sequence[str], version: int) -> None:
        """Let go of events that were erased, and of identifiers that nothing is left of; *version* is the log without them."""
        with self.changing(version) as connection:
            rows = list(self._chunked(_BY_DIGEST, [_digest(event_id) for event_id in event_ids], connection))
            gone = {n for n, _ in rows}
            run_many(connection, _FORGET, [(n,) for n in gone])
            keys = {key for _, payload in rows if payload is not None for key in keys_of(_incoming(payload).event.identifiers)}
            for key in self._ids(keys, connection).values():
                said = connection.execute(sa.select(_SAID.c.occurred_at, _SAID.c.n).where(_SAID.c.key == key)).fetchall()
                theirs = [(key, at, n) for at, n in said if n in gone]
                run_many(connection, _UNSAID, theirs)
                if len(theirs) == len(said):
                    connection.execute(sa.delete(_KEYS).where(_KEYS.c.id == key))
        self.scrub()

    def _insert(self, connection: Connection, rows: Sequence[Incoming]) -> None:
        last = connection.execute(sa.select(sa.func.coalesce(sa.func.max(_EVENTS.c.n), 0))).scalar_one()
        digests = [_digest(row.event.event_id) for row in rows]
        held = {digest for digest, _ in self._chunked(_HASHES, digests, connection)}
        keys = [keys_of(row.event.identifiers) for row in rows]
        ids = self._ids({key for each in keys for key in each}, connection, make=True)
        declared = self._declared({_purposes(row) for row in rows}, connection)
        events, said = [], []
        for n, (row, digest, its) in enumerate(zip(rows, digests, keys, strict=True), last + 1):
            if digest in held:
                continue
            held.add(digest)
            events.append((n, digest, bytes.fromhex(row.content_hash), _payload(row) if its else None))
            at, by = microseconds(row.event.occurred_at), declared.get(_purposes(row))
            said += [(ids[key], at, n, int(key == its[0]), by) for key in its]
        run_many(connection, _PUT_EVENT, events)
        run_many(connection, _PUT_SAID, said)

    @staticmethod
    def _declared(purposes: Collection[str | None], connection: Connection) -> dict[str | None, int]:
        texts = [text for text in purposes if text is not None]
        for text in texts:
            connection.execute(put(_DECLARED).values(purposes=text).on_conflict_do_nothing())
        return {text: n for n, text in connection.execute(sa.select(_DECLARED))} if texts else {}

    def _ids(self, keys: Collection[str], connection: Connection | None = None, make: bool = False) -> dict[str, int]:
        if make and connection is not None:
            run_many(connection, _PUT_KEY, [(key,) for key in sorted(keys)])
        return {row[0]: row[1] for row in self._chunked(_KEY_IDS, sorted(keys), connection)}

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
        event_id=s.event_id, name=s.name, occurred_at=moment_of(s.occurred_at), identifiers=s.identifiers, channel=s.channel,
        store_id=s.store_id, session_id=s.session_id, currency=s.currency, items=[Item(*item) for item in s.items], offer_id=s.offer_id,
        campaign_id=s.campaign_id, query=s.query, decision_id=s.decision_id, traits=s.traits, previous=s.previous,
        consent=_consent(s.consent),
    )  # fmt: skip
    known_at, received_at = moment_of(s.known_at), moment_of(s.received_at)
    return Incoming(event, s.content_hash, known_at, received_at, s.source, s.consent_basis, s.declared_purposes)


def _consent(text: str | None) -> Consent | None:
    return None if text is None else msgspec.json.decode(text, type=Consent)


def _pairs(pairs: Sequence[Mapping[str, str]] | None) -> dict[Any, str]:
    return {pair["key"]: pair["value"] for pair in pairs or ()}


def _purposes(row: Incoming) -> str | None:
    return None if row.declared_purposes is None else json.dumps(list(row.declared_purposes))


def _digest(event_id: str) -> bytes:
    return hashlib.blake2b(event_id.encode(), digest_size=16).digest()
