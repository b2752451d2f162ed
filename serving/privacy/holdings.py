"""Every place that holds anything of a customer: what it holds, and how it is taken out for good."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import phonenumbers
import pyarrow as pa

from features.catalogue.shop import Shop
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.vault import IDENTIFIER
from features.state.home import Home
from features.state.ports import EVENTS, Table
from features.store.decision_log import DecisionLog
from features.store.event_log import EventLog, connect
from features.store.keyed_state import KeyedState
from features.store.profile import events_of
from models.registry import Registry
from serving.decide.ledger import Ledger
from serving.intake.event_queue import EventQueue
from serving.journeys.runs import Runs

Row = dict[str, Any]
SHORTEST_ALONE = 8
_SAID_OF = {
    "loyalty_card": "card|loyalty|household|member|customer|client|kund|kart|carte|tarjeta",
    "user_id": "user|customer|client|member|account|login|kund|konto|usuario|compte",
    "email": "mail", "device": "device|advertising", "cookie": "cookie|anonymous|client|visitor|session",
    "receipt": "receipt|order|invoice|basket|transaction|bon|rechnung|facture|factura",
}  # fmt: skip
"""What may stand before an identifier of a kind, as the name of a field or a word."""


@dataclass(frozen=True)
class Subject:
    """A customer by all that they are known by."""

    customer_ids: Sequence[str]
    """Her id, and those that were merged into it."""
    keys: Sequence[str]
    """Her identity keys."""
    clear: Sequence[tuple[str, str]]
    """Kind and clear value of each identifier."""
    personal: Sequence[str] = ()
    """What else the contact table holds of them, in clear."""
    event_ids: Sequence[str] = field(default_factory=list)
    lost: Sequence[str] = ()
    """Keys that were theirs until they proved to be shared: their clear values go, while others' events may carry them."""

    @classmethod
    def of(cls, home: Home, identities: Identities, contacts: Contacts, customer_id: str) -> Subject | None:
        """The customer's subject, or None where nobody is known by that id."""
        customer_id = identities.current(customer_id)
        keys = identities.members(customer_id)
        if not keys:
            return None
        lost = identities.lost(customer_id)
        held = contacts.of([*keys, *lost])
        clear = [(c.identity_key.partition(":")[0], c.value) for c in held if c.field == IDENTIFIER]
        with contextlib.closing(EventLog(home, Shop.load(home).timezone)) as log:
            event_ids = events_of(log, keys)
        personal = [c.value for c in held if c.field != IDENTIFIER]
        return cls([customer_id, *identities.former(customer_id)], keys, clear, personal, event_ids, lost)

    def joined(self, other: Subject) -> Subject:
        """What either of them is known by."""
        fields = ("customer_ids", "keys", "clear", "personal", "event_ids", "lost")
        return Subject(*(list(dict.fromkeys([*getattr(self, field), *getattr(other, field)])) for field in fields))


class Place(Protocol):
    """One kind of store. After ``erase`` it holds nothing of the subject: ``find`` gives nothing, nor does its disk."""

    name: str

    def find(self, subject: Subject) -> Iterator[Row]:
        """Everything held of the subject, as JSON-able rows."""

    def erase(self, subject: Subject) -> int:
        """Take it out; returns how many rows."""


class Events:
    """The log of events."""

    name = "events"

    def __init__(self, home: Home) -> None:
        self._home = home

    def find(self, subject: Subject) -> Iterator[Row]:
        """Her events, used or not."""
        for row in _rows_of(self._home.tables[EVENTS], "event_id", subject.event_ids):
            yield {**row, "identifiers": [pair["key"] for pair in row["identifiers"] or []], "traits": _pairs(row["traits"])}

    def erase(self, subject: Subject) -> int:
        """Delete them and every older version of the table."""
        with contextlib.closing(EventLog(self._home, Shop.load(self._home).timezone)) as log:
            return log.erase(subject.event_ids)


class Waiting:
    """The inbox, which was drained before: what is left is what its file may still show."""

    name = "inbox"

    def __init__(self, inbox: EventQueue) -> None:
        self._inbox = inbox

    def find(self, subject: Subject) -> Iterator[Row]:
        """Nothing waits once it is drained, except what came since."""
        names = set(subject.event_ids)
        yield from ({"event_id": letter.event_id} for letter in self._inbox.waiting(-1) if letter.event_id in names)

    def erase(self, subject: Subject) -> int:
        """Compute nothing more of them, and overwrite what the file still shows."""
        self._inbox.forget(subject.customer_ids)
        self._inbox.scrub()
        return 0


class DeadLetterTable:
    """Rows that could not be taken, found by their identifiers in their text."""

    name = "dead letters"

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def find(self, subject: Subject) -> Iterator[Row]:
        """The letters that name them."""
        named = mentions(subject)
        yield from (letter for letter in self._log.letters.read() if named(letter["raw"]) or named(letter["reason"]))

    def erase(self, subject: Subject) -> int:
        """Delete them."""
        return self._log.forget_letters([letter["letter_id"] for letter in self.find(subject)])


class ContactTable:
    """What is personal."""

    name = "contacts"

    def __init__(self, contacts: Contacts) -> None:
        self._contacts = contacts

    def find(self, subject: Subject) -> Iterator[Row]:
        """In clear."""
        for contact in self._contacts.of([*subject.keys, *subject.lost]):
            kind = contact.identity_key.partition(":")[0]
            yield {"kind": kind, "field": contact.field, "value": contact.value, "known_at": contact.known_at}

    def erase(self, subject: Subject) -> int:
        """Delete and overwrite."""
        return self._contacts.erase([*subject.keys, *subject.lost])


class Promises:
    """The messages that were decided to go out."""

    name = "reservations"

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def find(self, subject: Subject) -> Iterator[Row]:
        """Which decision promised what, and when."""
        yield from self._ledger.find(subject.customer_ids)

    def erase(self, subject: Subject) -> int:
        """Delete and overwrite."""
        return self._ledger.erase(subject.customer_ids)


class JourneyTable:
    """Where they are in which journey, and what was to leave for them."""

    name = "journeys"

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def find(self, subject: Subject) -> Iterator[Row]:
        """Runs and messages."""
        yield from self._runs.find(subject.customer_ids)

    def erase(self, subject: Subject) -> int:
        """Delete and overwrite."""
        return self._runs.erase(subject.customer_ids)


class IdentityTable:
    """The identifiers and what joined them."""

    name = "identity"

    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    def find(self, subject: Subject) -> Iterator[Row]:
        """How they came to be one customer."""
        for step in self._identities.steps():
            if step.identity_key in subject.keys or step.customer_id in subject.customer_ids or step.through in subject.keys:
                yield {"kind": step.identity_key.partition(":")[0], **step._asdict()}

    def erase(self, subject: Subject) -> int:
        """Delete every row that is theirs, and what others' rows say of them."""
        return self._identities.erase(subject.keys, subject.customer_ids, subject.event_ids)


class OnlineRows:
    """The online store."""

    name = "online store"

    def __init__(self, store: KeyedState) -> None:
        self._store = store

    def find(self, subject: Subject) -> Iterator[Row]:
        """Her feature rows as they are served."""
        for row in self._store.online("customer_v1", subject.customer_ids):
            if any(row.get(f"{view}_at") is not None for view in self._store.customer_views()):
                yield row

    def delete(self, subject: Subject) -> int:
        """Delete them; free pages of the file may show them yet."""
        return self._store.delete_all(subject.customer_ids)

    def erase(self, subject: Subject) -> int:
        """Delete them, and what the file still shows of them."""
        gone = self.delete(subject)
        self._store.scrub()
        return gone


class Decisions:
    """The decision log."""

    name = "decisions"

    def __init__(self, log: DecisionLog) -> None:
        self._log = log

    def find(self, subject: Subject) -> Iterator[Row]:
        """What was answered to them."""
        self._log.flush()
        yield from _rows_of(self._log.table, "customer_id", subject.customer_ids)

    def erase(self, subject: Subject) -> int:
        """Delete every decision about them."""
        return self._log.erase(subject.customer_ids)

    def erase_everywhere(self, subject: Subject) -> int:
        """As ``erase``, and what other services have just answered."""
        return self._log.erase_everywhere(subject.customer_ids)


class RunTables:
    """What training runs have logged by customer. Registered models themselves hold items' parameters alone."""

    name = "model runs"

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def find(self, subject: Subject) -> Iterator[Row]:
        """Her rows in every evaluation."""
        for _, name, frame in self._registry.frames():
            for row in _theirs(frame, subject).to_dict("records"):
                yield {"table": name, **{str(k): _plain(v) for k, v in row.items()}}

    def erase(self, subject: Subject) -> int:
        """Log each table that has them anew, without them."""
        gone = 0
        for run_id, name, frame in self._registry.frames():
            theirs = _theirs(frame, subject)
            if len(theirs):
                self._registry.replace_frame(run_id, name, frame.drop(theirs.index).reset_index(drop=True))
                gone += len(theirs)
        return gone


class Stages:
    """What imports that were broken off had read; a repeated import reads it again, past their tombstones."""

    name = "import stages"

    def __init__(self, home: Home) -> None:
        self._folder = home.root / "imports"

    def find(self, subject: Subject) -> Iterator[Row]:
        """Whole files: nothing in them is by customer yet."""
        yield from ({"file": path.name} for path in self._files())

    def erase(self, subject: Subject) -> int:
        """Delete the files."""
        files = self._files()
        for path in files:
            path.unlink()
        return len(files)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.duckdb*"))


def mentions(subject: Subject) -> Callable[[str], bool]:
    """Whether a text names one of the subject's identifiers, as a word of its own; a phone number in whatever punctuation.

    What is short or all digits is found only behind a word that says what it is: a card's four digits may be anybody's amount.
    """
    words = [re.escape(key.partition(":")[2]) for key in subject.keys]
    named, numbers = [], []
    for kind, value in subject.clear:
        if kind == "phone":
            numbers.append(r"\D{0,3}".join(str(phonenumbers.parse(value).national_number)))
        elif len(value) < SHORTEST_ALONE or value.isdigit():
            named.append(rf"(?:{_SAID_OF[kind]})\w*\W{{1,5}}{re.escape(value)}")
        else:
            words.append(re.escape(value))
    parts = [*(rf"(?<![\w@]){word}(?![\w@])" for word in words), *(rf"{each}(?!\w)" for each in named), *(rf"{n}(?!\d)" for n in numbers)]
    if not parts:
        return lambda text: False
    pattern = re.compile("|".join(parts), re.IGNORECASE)
    return lambda text: pattern.search(text) is not None


def _rows_of(table: Table, column: str, values: Sequence[str]) -> Iterator[Row]:
    files = table.files()
    if not values or not files:
        return
    connection = connect()
    connection.register("wanted", pa.table({column: pa.array(values, pa.string())}))
    relation = connection.execute(f"SELECT * FROM read_parquet(?) SEMI JOIN wanted USING ({column})", [files])
    names = [each[0] for each in relation.description or []]
    yield from (dict(zip(names, row, strict=True)) for row in relation.fetchall())


def _theirs(frame: pd.DataFrame, subject: Subject) -> pd.DataFrame:
    if "customer_id" not in frame.columns:
        return frame.iloc[:0]
    return frame[frame["customer_id"].isin(list(subject.customer_ids))]


def _pairs(pairs: Sequence[dict[str, str]] | None) -> dict[str, str]:
    return {pair["key"]: pair["value"] for pair in pairs or []}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
