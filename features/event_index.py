"""Which events the log holds, by id, and what each identifier did: looked up by key, whatever the length of the log.

A SQLite file beside the log, derived from it: it names the version of the log that it knows, catches up with what came after, and is
made anew where it cannot. So it needs no syncing, no backup and no repair.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow.parquet as pq

from features import tables
from features.clock import microseconds
from features.disk import DamagedStateError, NoSpaceError, open_database, roll_back
from features.events import Consent, Item, SealedEvent
from features.identity_graph import keys_of
from features.vault import Personal

logger = logging.getLogger("ubiquo")
FORMAT = 1
"""Of the file; one of another format is made anew."""
_CHUNK = 500
_BATCH = 20_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TABLES = """
    CREATE TABLE mark (format INTEGER NOT NULL, version INTEGER NOT NULL);
    CREATE TABLE events (n INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, content BLOB NOT NULL, payload BLOB);
    CREATE TABLE keys (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
    CREATE TABLE declared (id INTEGER PRIMARY KEY, purposes TEXT NOT NULL UNIQUE);
    CREATE TABLE said (
        key INTEGER NOT NULL, occurred_at INTEGER NOT NULL, n INTEGER NOT NULL, strongest INTEGER NOT NULL, declared INTEGER,
        PRIMARY KEY (key, occurred_at, n)
    ) WITHOUT ROWID;
"""


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


class EventIndex:
    """The index of one home's log. Safe to call from several threads; who writes holds the lock of the log."""

    def __init__(self, path: Path, log: Path) -> None:
        self._path, self._log = path, log
        self._lock = threading.Lock()
        self._db = self._opened()

    def _opened(self) -> sqlite3.Connection:
        try:
            db = self._connection()
            stands = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'mark'").fetchone() == (1,)
            if stands and db.execute("SELECT format FROM mark").fetchone() == (FORMAT,):
                return db
            db.close()
        except NoSpaceError:
            raise
        except (DamagedStateError, sqlite3.DatabaseError, OSError) as error:
            # a file that is cut short is told as an error of the disk
            logger.warning("%s cannot be read (%s); it is made anew from the log", self._path, error)
        for name in (self._path.name, f"{self._path.name}-wal", f"{self._path.name}-shm"):
            self._path.with_name(name).unlink(missing_ok=True)
        db = self._connection()
        db.executescript(f"BEGIN; {_TABLES} INSERT INTO mark VALUES ({FORMAT}, -1); COMMIT;")
        return db

    def _connection(self) -> sqlite3.Connection:
        # a power cut may take back the last transactions, and the version with them
        return open_database(
            self._path, "PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", "PRAGMA secure_delete=ON", "PRAGMA cache_size=-32000",
        )  # fmt: skip

    @property
    def version(self) -> int:
        """The version of the log that it knows; -1 before the first."""
        with self._lock:
            [(version,)] = self._db.execute("SELECT version FROM mark").fetchall()
        return int(version)

    # --- looking up

    def hashes_of(self, event_ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each of *event_ids* that the log holds."""
        by_digest = {_digest(event_id): event_id for event_id in event_ids}
        found = {}
        with self._lock:
            for some in _chunks(list(by_digest)):
                rows = self._db.execute(f"SELECT digest, content FROM events WHERE digest IN ({_marks(some)})", some).fetchall()
                found.update({by_digest[digest]: content.hex() for digest, content in rows})
        return found

    def occurrences(self, keys: Collection[str]) -> list[Occurrence]:
        """Every event with any of *keys*, the latest first."""
        query = "SELECT occurred_at, n, strongest, purposes FROM said LEFT JOIN declared ON declared.id = said.declared WHERE key = ?"
        found: dict[int, tuple[int, int, int, str | None]] = {}
        with self._lock:
            for key in self._ids(keys).values():
                for row in self._db.execute(query, [key]).fetchall():
                    if row[2] or row[1] not in found:
                        found[row[1]] = row
        purposes = {text: json.loads(text) for text in {row[3] for row in found.values()} if text is not None}
        rows = sorted(found.values(), reverse=True, key=lambda row: row[:2])
        return [Occurrence(_moment(at), n, bool(strongest), None if text is None else purposes[text]) for at, n, strongest, text in rows]

    def numbered(self, numbers: Sequence[int]) -> dict[int, Incoming]:
        """The events of these numbers, in their order; one that is gone meanwhile is left out."""
        payloads: dict[int, bytes] = {}
        with self._lock:
            for some in _chunks(numbers):
                payloads.update(self._db.execute(f"SELECT n, payload FROM events WHERE n IN ({_marks(some)})", some).fetchall())
        return {n: _incoming(payloads[n]) for n in numbers if n in payloads}

    def of(self, keys: Collection[str]) -> list[Incoming]:
        """Every event that carries any of *keys*, the latest first."""
        return list(self.numbered([each.number for each in self.occurrences(keys)]).values())

    # --- keeping up: hold the lock of the log

    def catch_up(self) -> None:
        """Take note of what was committed to the log and is not known here: after a crash, or where the file was lost."""
        version, current = self.version, tables.version(self._log)
        if version == current:
            return
        news = tables.appended_since(self._log, version) if 0 <= version < current else None
        if news is None:
            self._make_anew(current)
        else:
            self._take(_read(news), current)

    def add(self, rows: Iterable[Incoming], version: int) -> None:
        """Note events that were just appended in *version* of the log."""
        self._take(rows, version)

    def forget(self, event_ids: Sequence[str], version: int) -> None:
        """Let go of events that were erased, and of identifiers that nothing is left of; *version* is the log without them."""
        with self._lock, self._transaction():
            numbers: list[int] = []
            for some in _chunks([_digest(event_id) for event_id in event_ids]):
                numbers += [n for (n,) in self._db.execute(f"SELECT n FROM events WHERE digest IN ({_marks(some)})", some)]
            of_them: set[str] = set()
            for some in _chunks(numbers):
                for (payload,) in self._db.execute(f"SELECT payload FROM events WHERE payload IS NOT NULL AND n IN ({_marks(some)})", some):
                    of_them.update(keys_of(_incoming(payload).event.identifiers))
                self._db.execute(f"DELETE FROM events WHERE n IN ({_marks(some)})", some)
            gone = set(numbers)
            for key in self._ids(of_them).values():
                rows = self._db.execute("SELECT occurred_at, n FROM said WHERE key = ?", [key]).fetchall()
                self._db.executemany(
                    "DELETE FROM said WHERE key = ? AND occurred_at = ? AND n = ?", [(key, *row) for row in rows if row[1] in gone]
                )
                if all(n in gone for _, n in rows):
                    self._db.execute("DELETE FROM keys WHERE id = ?", [key])
            self._db.execute("UPDATE mark SET version = ?", [version])
        with self._lock:
            # what was overwritten must not stand in the write-ahead log either
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    def _make_anew(self, version: int) -> None:
        if version < 0:
            files: list[str] = []
        else:
            files = tables.files(self._log)
            logger.warning("the index of the event log is made anew from %d files", len(files))
        with self._lock, self._transaction():
            for table in ("events", "said", "keys", "declared"):
                self._db.execute(f"DELETE FROM {table}")
        self._take(_read(files), version)

    def _take(self, rows: Iterable[Incoming], version: int) -> None:
        with self._lock, self._transaction():
            [(last,)] = self._db.execute("SELECT ifnull(max(n), 0) FROM events").fetchall()
            for some in _batches(rows):
                self._insert(some, last)
                last += len(some)
            self._db.execute("UPDATE mark SET version = ?", [version])

    def _insert(self, rows: Sequence[Incoming], last: int) -> None:
        digests = [_digest(row.event.event_id) for row in rows]
        held: set[bytes] = set()
        for some in _chunks(digests):
            held.update(digest for (digest,) in self._db.execute(f"SELECT digest FROM events WHERE digest IN ({_marks(some)})", some))
        events, said = [], []
        keys = [keys_of(row.event.identifiers) for row in rows]
        ids = self._ids({key for each in keys for key in each}, make=True)
        declared = self._declared({_purposes(row) for row in rows})
        for n, (row, digest, its) in enumerate(zip(rows, digests, keys, strict=True), last + 1):
            if digest in held:
                continue
            held.add(digest)
            events.append((n, digest, bytes.fromhex(row.content_hash), _payload(row) if row.event.identifiers else None))
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
        found: dict[str, int] = {}
        for some in _chunks(sorted(keys)):
            found.update(self._db.execute(f"SELECT key, id FROM keys WHERE key IN ({_marks(some)})", some).fetchall())
        return found

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._db.execute("COMMIT")
        else:
            roll_back(self._db)


def _read(files: Sequence[str]) -> Iterator[Incoming]:
    """The events of files of the log."""
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH):
            yield from map(_from_row, batch.to_pylist())


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


def _marks(values: Sequence[Any]) -> str:
    return ",".join("?" * len(values))


def _chunks(values: Sequence[Any]) -> Iterator[list[Any]]:
    return (list(values[start : start + _CHUNK]) for start in range(0, len(values), _CHUNK))


def _batches(rows: Iterable[Incoming]) -> Iterator[list[Incoming]]:
    batch: list[Incoming] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
