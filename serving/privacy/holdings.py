"""Every place that holds anything of a customer: what it holds, and how it is taken out for good."""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pandas as pd
import phonenumbers
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.catalogue.shop import Shop
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.vault import IDENTIFIER
from features.state.disk import move_into_place, write_atomically
from features.state.home import Home
from features.state.ports import EVENTS, Table
from features.store.decision_log import DecisionLog
from features.store.event_log import EventLog, connect
from features.store.keyed_state import KeyedState
from features.store.outputs import is_owners, outputs, owners_of
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
    """A customer by all that she is known by."""

    customer_ids: Sequence[str]
    """Her id, and those that were merged into it."""
    keys: Sequence[str]
    """Her identity keys."""
    clear: Sequence[tuple[str, str]]
    """Kind and clear value of each identifier."""
    personal: Sequence[str] = ()
    """What else the contact table holds of her, in clear."""
    event_ids: Sequence[str] = field(default_factory=list)
    lost: Sequence[str] = ()
    """Keys that were hers until they proved to be shared: their clear values go, while others' events may carry them."""

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
        """Overwrite what the file still shows."""
        self._inbox.scrub()
        return 0


class DeadLetterTable:
    """Rows that could not be taken, found by her identifiers in their text."""

    name = "dead letters"

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def find(self, subject: Subject) -> Iterator[Row]:
        """The letters that name her."""
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
        """How she came to be one customer."""
        for step in self._identities.steps():
            if step.identity_key in subject.keys or step.customer_id in subject.customer_ids or step.through in subject.keys:
                yield {"kind": step.identity_key.partition(":")[0], **step._asdict()}

    def erase(self, subject: Subject) -> int:
        """Delete every row that is hers, and what others' rows say of her."""
        return self._identities.erase(subject.keys, subject.customer_ids, subject.event_ids)


class Snapshots:
    """Feature snapshots."""

    name = "feature snapshots"

    def __init__(self, home: Home) -> None:
        self._folder = home.snapshots

    def find(self, subject: Subject) -> Iterator[Row]:
        """Her rows at every moment."""
        for path in self._files():
            yield from _parquet_rows(path, subject)

    def erase(self, subject: Subject) -> int:
        """Write each file that has her anew, without her."""
        return sum(_without(path, subject) for path in self._files())

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.rglob("*.parquet") if "customer_id" in pq.read_schema(path).names)


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
        """What was answered to her."""
        self._log.flush()
        yield from _rows_of(self._log.table, "customer_id", subject.customer_ids)

    def erase(self, subject: Subject) -> int:
        """Delete every decision about her."""
        return self._log.erase(subject.customer_ids)


class BatchFiles:
    """Files that batches were scored into, wherever they were written."""

    name = "batch files"

    def __init__(self, home: Home) -> None:
        self._home = home

    def find(self, subject: Subject) -> Iterator[Row]:
        """Her lines."""
        for path in outputs(self._home):
            if path.suffix == ".parquet":
                yield from _parquet_rows(path, subject)
            elif owners_of(path).exists():
                yield from ({"file": path.name, "line": line.decode("utf-8", "replace")} for line in OwnedFile(path).of(subject))
            elif not is_owners(path):
                yield from (msgspec.json.decode(line) for line in path.read_bytes().splitlines() if _is_hers(line, subject))

    def erase(self, subject: Subject) -> int:
        """Write each file that has her anew, without her."""
        gone = 0
        for path in outputs(self._home):
            if path.suffix == ".parquet":
                gone += _without(path, subject)
            elif owners_of(path).exists():
                gone += OwnedFile(path).erase(subject)
            elif not is_owners(path):
                lines = path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if not _is_hers(line, subject)]
                if len(kept) < len(lines):
                    write_atomically(path, b"".join(kept), mode=stat.S_IMODE(path.stat().st_mode))
                gone += len(lines) - len(kept)
        return gone


class OwnedFile:
    """A file of which another beside it tells whose each row is (``owners_of``)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owners: list[str] = msgspec.json.decode(owners_of(path).read_bytes(), type=list[str])
        rows = path.read_bytes().splitlines(keepends=True) if path.suffix == ".jsonl" else _csv_rows(path.read_bytes())
        # a CSV has a header
        self._head, self._rows = (rows[:1], rows[1:]) if path.suffix == ".csv" else ([], rows)

    def of(self, subject: Subject) -> list[bytes]:
        """The rows of a customer."""
        return [row for row, owner in zip(self._rows, self._owners, strict=False) if owner in subject.customer_ids]

    def erase(self, subject: Subject) -> int:
        """Write the file anew without a customer's rows, with the same rights."""
        if len(self._rows) != len(self._owners):
            # broken off between the two files: nobody can tell whose a row is, and the file can be made anew
            kept = []
        else:
            kept = [(row, owner) for row, owner in zip(self._rows, self._owners, strict=True) if owner not in subject.customer_ids]
        gone = len(self._rows) - len(kept)
        if gone:
            mode = stat.S_IMODE(self._path.stat().st_mode)
            write_atomically(self._path, b"".join([*self._head, *(row for row, _ in kept)]), mode=mode)
            write_atomically(owners_of(self._path), msgspec.json.encode([owner for _, owner in kept]), mode=mode)
        return gone


class RunTables:
    """What training runs have logged by customer. Registered models themselves hold items' parameters alone."""

    name = "model runs"

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def find(self, subject: Subject) -> Iterator[Row]:
        """Her rows in every evaluation."""
        for _, name, frame in self._registry.frames():
            for row in _hers(frame, subject).to_dict("records"):
                yield {"table": name, **{str(k): _plain(v) for k, v in row.items()}}

    def erase(self, subject: Subject) -> int:
        """Log each table that has her anew, without her."""
        gone = 0
        for run_id, name, frame in self._registry.frames():
            hers = _hers(frame, subject)
            if len(hers):
                self._registry.replace_frame(run_id, name, frame.drop(hers.index).reset_index(drop=True))
                gone += len(hers)
        return gone


class Stages:
    """What imports that were broken off had read; a repeated import reads it again, past her tombstones."""

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


def _parquet_rows(path: Path, subject: Subject) -> Iterator[Row]:
    table = pq.ParquetFile(path).read()
    yield from table.filter(_mine(table, subject)).to_pylist()


def _without(path: Path, subject: Subject) -> int:
    """Write a Parquet file anew without the subject's rows, whole or not at all; returns how many they were."""
    file = pq.ParquetFile(path)
    customers = file.read(columns=[name for name in ("customer_id",) if name in file.schema_arrow.names])
    count = int(pc.sum(_mine(customers, subject)).as_py() or 0)
    if count:
        table = pq.ParquetFile(path).read()
        part = path.with_name(f".{path.name}.part")
        pq.write_table(table.filter(pc.invert(_mine(table, subject))), part)
        move_into_place(part, path)
    return count


def _csv_rows(content: bytes) -> list[bytes]:
    """The rows of a CSV as they are written; one may go over several lines."""
    rows: list[bytes] = []
    for line in content.splitlines(keepends=True):
        # a row ends where its quotes are closed
        if rows and rows[-1].count(b'"') % 2:
            rows[-1] += line
        else:
            rows.append(line)
    return rows


def _is_hers(line: bytes, subject: Subject) -> bool:
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError:
        # somebody has written something else there: the search will tell whether it names her
        return False
    return isinstance(row, dict) and row.get("customer_id") in subject.customer_ids


def _mine(table: pa.Table, subject: Subject) -> pa.Array:
    if "customer_id" not in table.column_names:
        return pa.repeat(False, len(table))
    return pc.is_in(table["customer_id"], pa.array(list(subject.customer_ids), pa.string()))


def _hers(frame: pd.DataFrame, subject: Subject) -> pd.DataFrame:
    if "customer_id" not in frame.columns:
        return frame.iloc[:0]
    return frame[frame["customer_id"].isin(list(subject.customer_ids))]


def _pairs(pairs: Sequence[dict[str, str]] | None) -> dict[str, str]:
    return {pair["key"]: pair["value"] for pair in pairs or []}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
