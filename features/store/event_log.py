"""The durable, append-only, de-duplicated log of events."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from zoneinfo import ZoneInfo

import duckdb
import msgspec
import pyarrow as pa

from features.events.event import SealedEvent, identity_key
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.tombstones import Tombstones
from features.people.vault import IDENTIFIER, Vault
from features.state.ports import DEAD_LETTERS, DECISIONS, EVENTS, IDENTIFIERS, KEPT_SECONDS, LOG, MissingStateError, State
from features.state.table_index import MARK
from features.state.tables import COMPACT_ABOVE_FILES
from features.store.dead_letters import DeadLetter, DeadLetters
from features.store.event_index import EventIndex, Incoming

logger = logging.getLogger("ubiquo")
_TIME = pa.timestamp("us", tz="UTC")
_ITEM = pa.struct(
    [
        ("item_id", pa.string()),
        ("quantity", pa.int64()),
        ("amount_minor", pa.int64()),
        ("discount_minor", pa.int64()),
        ("coupon_minor", pa.int64()),
    ]
)
_PAIR = pa.struct([("key", pa.string()), ("value", pa.string())])
EVENT_SCHEMA = pa.schema(
    [
        ("event_id", pa.string()),
        ("name", pa.string()),
        ("occurred_at", _TIME),
        ("known_at", _TIME),
        ("received_at", _TIME),
        ("local_date", pa.date32()),
        ("local_hour", pa.int32()),
        ("identity_key", pa.string()),
        ("identifiers", pa.list_(_PAIR)),
        ("channel", pa.string()),
        ("store_id", pa.string()),
        ("session_id", pa.string()),
        ("currency", pa.string()),
        ("items", pa.list_(_ITEM)),
        ("offer_id", pa.string()),
        ("campaign_id", pa.string()),
        ("query", pa.string()),
        ("decision_id", pa.string()),
        ("traits", pa.list_(_PAIR)),
        ("previous", pa.list_(_PAIR)),
        ("consent", pa.string()),
        ("source", pa.string()),
        ("consent_basis", pa.string()),
        ("declared_purposes", pa.list_(pa.string())),
        ("content_hash", pa.string()),
    ]
)
MAX_SILENCE = timedelta(days=7)
"""How long before the moment of features the last event may lie."""
RETIRED_AT_ONCE = 50_000
"""How many events are retired at once: whoever writes to the log waits meanwhile."""
MAINTAIN_EVERY = 64
"""After so many appends of one process the tables are made small again."""
_TAKEN = "{!r} is already stored with other content: give a corrected event an id of its own"


@dataclass(frozen=True)
class AppendReport:
    """What one append did: every incoming event is counted in exactly one field."""

    appended: int
    repeated: int
    conflicting: int
    erased: int = 0
    """Of people who were erased: kept nowhere."""
    fresh: Sequence[Incoming] = ()
    """What was appended."""


def connect() -> duckdb.DuckDBPyConnection:
    """A DuckDB connection in memory that reads and prints times in UTC."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone='UTC'")
    return connection


class EventLog:
    """The Delta table of events of one home. Appends from several processes take turns by a lease."""

    def __init__(self, state: State, timezone: str) -> None:
        self._state = state
        self._events = state.tables[EVENTS]
        self._zone = ZoneInfo(timezone)
        self.letters = DeadLetters(state)
        self._appends = 0

    @cached_property
    def vault(self) -> Vault:
        """The vault of the home."""
        return Vault.open(self._state)

    @cached_property
    def contacts(self) -> Contacts:
        """The contact table of the home."""
        return Contacts(self._state, self.vault)

    @cached_property
    def index(self) -> EventIndex:
        """By which events are found without reading the log."""
        return EventIndex(self._state.database("event_index", MARK), self._events)

    @cached_property
    def _tombstones(self) -> Tombstones:
        return Tombstones(self._state, self.vault)

    def close(self) -> None:
        """Let go of the files of the index and of who was erased; they are opened again where they are needed."""
        for name in ("index", "_tombstones"):
            if (opened := self.__dict__.pop(name, None)) is not None:
                opened.close()

    def append(self, batch: Sequence[Incoming], identities: Identities) -> AppendReport:
        """Store the events not stored yet, in one atomic commit; safe to repeat after a crash at any point.

        An event whose id is stored with other content becomes a dead letter; a faithful repeat is only counted.
        Identifiers are written first: without their events they mean nothing, whereas events need them.

        Raises:
            MovedOnError: another process has written to the log meanwhile, as the lease was lost; nothing was appended: try again.
        """
        if not batch:
            return AppendReport(0, 0, 0)
        with self._state.lease.hold(LOG):
            welcome = self._tombstones.welcome((row.event for row in batch), keep=True)
            self.index.catch_up()
            # a lease may be lost: what is appended must not stand on top of what was never looked at
            seen = self.index.version
            stored = self.hashes_of([row.event.event_id for row in batch])
            fresh: list[Incoming] = []
            letters: list[DeadLetter] = []
            repeated = 0
            for row, is_welcome in zip(batch, welcome, strict=True):
                if not is_welcome:
                    continue
                if row.event.event_id not in stored:
                    stored[row.event.event_id] = row.content_hash
                    fresh.append(row)
                elif stored[row.event.event_id] != row.content_hash:
                    letters.append(self._letter(row, "event_id", _TAKEN.format(row.event.event_id)))
                else:
                    repeated += 1
            fresh, table = self._taken(fresh, letters, identities)
            self.contacts.remember((personal, row.known_at) for row in fresh for personal in row.personal)
            identities.flush()
            if fresh:
                self.index.add(fresh, self._events.append(table, expected_version=seen))
            self.letters.keep(letters)
            files = self._events.files()
        self._tidy(len(files))
        return AppendReport(len(fresh), repeated, len(letters), len(batch) - sum(welcome), fresh)

    def _taken(self, rows: list[Incoming], letters: list[DeadLetter], identities: Identities) -> tuple[list[Incoming], pa.Table]:
        """The events that can be stored, as a table, with what they teach of identity learnt; the others become *letters*.

        One event that cannot be stored must not hold up the others, now and at every later try.
        """
        taken = []
        for row in rows:
            try:
                identities.learn(row.event, row.known_at)
            except Exception as error:
                logger.exception("an event cannot be understood as to whose it is; it becomes a dead letter")
                reason = f"what they tell of the customer cannot be taken in ({type(error).__name__})"
                letters.append(self._letter(row, "identifiers", reason))
            else:
                taken.append(row)
        try:
            return taken, self.to_arrow(taken)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            kept = []
            for row in taken:
                try:
                    self.to_arrow([row])
                except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
                    logger.exception("an event cannot be stored; it becomes a dead letter")
                    letters.append(self._letter(row, "$", f"a value in it cannot be stored ({type(error).__name__})"))
                else:
                    kept.append(row)
            return kept, self.to_arrow(kept)

    def maintain(self, kept_seconds: float = KEPT_SECONDS) -> None:
        """Keep the tables of the log in few files, and the dead letters within their bound."""
        with self._state.lease.hold(LOG):
            for name in (EVENTS, IDENTIFIERS):
                self._state.tables[name].maintain(kept_seconds)
            self.letters.maintain(kept_seconds)

    def recover(self) -> None:
        """Take back what a power cut left half written, and see that all that was stored is there.

        Raises:
            DamagedStateError: something is not; the message names the file and the way back.
        """
        with self._state.lease.hold(LOG):
            for name in (EVENTS, IDENTIFIERS, DEAD_LETTERS):
                self._state.tables[name].recover()
        with self._state.lease.hold(DECISIONS):
            self._state.tables[DECISIONS].recover()

    def repair(self) -> list[str]:
        """Give up what cannot be read of any table; returns what was given up."""
        with self._state.lease.hold(LOG), self._state.lease.hold(DECISIONS):
            return [lost for table in self._state.tables.values() for lost in table.repair()]

    def stamp_anew(self, now: datetime) -> int:
        """Let events that a clock which was wrong has stamped with a time to come be known from *now* on; returns how many."""
        if not self.exists:
            return 0
        with self._state.lease.hold(LOG):
            return self._events.lower(("known_at", "received_at"), now)

    def _tidy(self, files: int = 0) -> None:
        self._appends += 1
        if self._appends % MAINTAIN_EVERY == 0 or files > COMPACT_ABOVE_FILES:
            self.maintain()

    def reject(self, letters: Sequence[DeadLetter]) -> None:
        """Keep rows that could not be taken, encrypted; the same letter from a repeated import is kept once."""
        if letters:
            with self._state.lease.hold(LOG):
                self.letters.keep(letters)
            self._tidy()

    def _letter(self, row: Incoming, field: str, reason: str) -> DeadLetter:
        clear = {p.identity_key.partition(":")[0]: p.value for p in row.personal if p.field == IDENTIFIER}
        event = msgspec.to_builtins(row.event)
        # in clear what is not known yet, and by its keyed hash what is
        event["identifiers"] = {**event.get("identifiers", {}), **clear}
        return DeadLetter(row.received_at, row.source, field, reason, msgspec.json.encode(event).decode())

    def forget_letters(self, letter_ids: Sequence[str]) -> int:
        """Delete dead letters: what was replayed, or belonged to a person who is erased."""
        with self._state.lease.hold(LOG):
            return self.letters.forget(letter_ids)

    @property
    def exists(self) -> bool:
        """Whether any event is stored."""
        return bool(self._events.files())

    def version(self) -> int:
        """The Delta version of the log, which names its exact content.

        Raises:
            MissingStateError: the log is empty.
        """
        self._found()
        return self._events.version()

    def files(self) -> list[str]:
        """The Parquet files that make up the current version."""
        return self._found()

    def count(self) -> int:
        """How many events are stored."""
        if not self.exists:
            return 0
        [(count,)] = connect().execute("SELECT count(*) FROM read_parquet(?)", [self.files()]).fetchall()
        return int(count)

    def known_before(self, moment: datetime) -> int:
        """How many events had occurred and were known before *moment*: the log only grows, so an equal number is an equal past."""
        query = "SELECT count(*) FROM read_parquet(?) WHERE known_at < ? AND occurred_at < ?"
        [(count,)] = connect().execute(query, [self.files(), moment, moment]).fetchall()
        return int(count)

    def latest_received(self) -> datetime | None:
        """The last moment at which an event was known or received by the shop's clock, or None for an empty log."""
        if not self.exists:
            return None
        query = "SELECT max(greatest(known_at, occurred_at)) FROM read_parquet(?)"
        [(latest,)] = connect().execute(query, [self.files()]).fetchall()
        return latest if latest is None else latest.astimezone(UTC)

    def keys_since(self, moment: datetime) -> set[str]:
        """The identity keys of every event that was known or received from *moment* on: one scan of three columns."""
        query = """SELECT DISTINCT pair.key || ':' || pair.value FROM
                   (SELECT unnest(identifiers) AS pair FROM read_parquet(?) WHERE known_at >= ? OR received_at >= ?)"""
        return {key for (key,) in connect().execute(query, [self.files(), moment, moment]).fetchall()}

    def check_reaches(self, as_of: datetime) -> None:
        """See that events came until shortly before *as_of*: features would take a log's silence for the customers'.

        Raises:
            MissingStateError: the last event lies too far before.
        """
        latest = self.latest_received()
        if latest is not None and as_of - latest > MAX_SILENCE:
            raise MissingStateError(
                f"the log ends {latest:%Y-%m-%d}, {(as_of - latest).days} days before {as_of:%Y-%m-%d}: every customer would seem to have "
                f"stayed away since. Import what is missing, or use --as-of {latest + timedelta(days=1):%Y-%m-%d}"
            )

    def _found(self) -> list[str]:
        found = self._events.files()
        if not found:
            raise MissingStateError(f"the event log of {self._state.place} is empty: import events first (python -m features import)")
        return found

    def hashes_of(self, event_ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each of *event_ids* that the log holds."""
        return self.index.hashes_of(event_ids)

    def catch_up(self) -> None:
        """Take note of what a crash kept from the index."""
        if self.index.version != self._events.version():
            with self._state.lease.hold(LOG):
                self.index.catch_up()

    def erase(self, event_ids: Sequence[str]) -> int:
        """Delete events and every older version of the log; returns how many there were.

        Raises:
            MovedOnError: another process has written to the log meanwhile, as the lease was lost; nothing was deleted: try again.
        """
        with self._state.lease.hold(LOG):
            self.index.catch_up()
            # the index must not be taken for one of events that it has never seen
            gone = self._events.erase("event_id", event_ids, expected_version=self.index.version)
            self.index.forget(event_ids, gone.version)
            return gone.rows

    def retire(self, before: datetime, most: int = RETIRED_AT_ONCE) -> int:
        """Delete the events that occurred before a moment, some at a time, and every older version of the log; returns how many.

        What was said of consent stays, however old: else nobody would know that it was withdrawn. So does what follows from them: who is
        who, and online rows until they are made anew.
        """
        if not self.exists:
            return 0
        query = "SELECT event_id FROM read_parquet(?) WHERE occurred_at < ? AND consent IS NULL AND name <> 'message_unsubscribe' LIMIT ?"
        old = [event_id for (event_id,) in connect().execute(query, [self.files(), before, most]).fetchall()]
        return self.erase(old) if old else 0

    def to_arrow(self, rows: Sequence[Incoming]) -> pa.Table:
        """Events as the log holds them."""
        events = [row.event for row in rows]
        local = [event.occurred_at.astimezone(self._zone) for event in events]
        columns = {
            "known_at": [row.known_at for row in rows],
            "received_at": [row.received_at for row in rows],
            "local_date": [moment.date() for moment in local],
            "local_hour": [moment.hour for moment in local],
            "identity_key": [identity_key(event) for event in events],
            "identifiers": [list(event.identifiers.items()) for event in events],
            "traits": [list(event.traits.items()) for event in events],
            "previous": [list(event.previous.items()) for event in events],
            "consent": [None if event.consent is None else msgspec.json.encode(event.consent).decode() for event in events],
            "source": [row.source for row in rows],
            "consent_basis": [row.consent_basis for row in rows],
            "declared_purposes": [row.declared_purposes for row in rows],
            "content_hash": [row.content_hash for row in rows],
        }
        arrays = {name: pa.array(values, EVENT_SCHEMA.field(name).type) for name, values in columns.items()}
        arrays["items"] = _items_to_arrow(events)
        for name in set(EVENT_SCHEMA.names) - set(arrays):
            arrays[name] = pa.array([getattr(event, name) for event in events], EVENT_SCHEMA.field(name).type)
        return pa.table([arrays[name] for name in EVENT_SCHEMA.names], schema=EVENT_SCHEMA)


def _items_to_arrow(events: Sequence[SealedEvent]) -> pa.Array:
    """The events' items as one list array, built column by column: ten times faster than from a dict a line."""
    offsets = [0]
    for event in events:
        offsets.append(offsets[-1] + len(event.items))
    lines = [item for event in events for item in event.items]
    children = [pa.array([getattr(line, f.name) for line in lines], f.type) for f in _ITEM]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(children, fields=list(_ITEM)))
