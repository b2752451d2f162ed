"""Scoring in bulk: every customer at one moment, through the very pipelines that answer HTTP, into a file that is whole."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa

from features.catalogue.shop import Shop
from features.events.event import Channel
from features.events.identifiers import kind_of
from features.people.consent import CONTACT_CHANNELS
from features.people.contacts import Contacts
from features.state.disk import make_folder, move_into_place
from features.state.home import Home
from features.store.compute import is_spark
from features.store.decision_log import BatchDecisions
from features.store.outputs import owners_of, part_of, remember_output
from models.kind import Answers
from models.recommender.listings import Listing
from models.recommender.recipes import RECIPES
from serving.decide.addresses import Addresses, missing
from serving.decide.batch_files import CsvFile, JsonLinesFile, ParquetFile, Writer
from serving.decide.batch_lines import NOTHING, Answered, lines_of
from serving.decide.engine import WITHDRAWN, DecisionRecord, Engine
from serving.decide.formats import CONTACT, FORMATS, FileFormat, FormatName
from serving.decide.policy import HELD_OUT
from serving.decide.population import AnyAnswer, Population
from serving.decide.questions import ItemsAnswer, ScoreAnswer

_TIME = pa.timestamp("us", tz="UTC")
_COMMON = [
    ("customer_id", pa.string()),
    ("identifier", pa.string()),
    ("as_of", _TIME),
    ("model", pa.string()),
    ("rank", pa.int64()),
    ("id", pa.string()),
    ("score", pa.float64()),
    ("source", pa.string()),
    ("reason", pa.string()),
    ("propensity", pa.float64()),
    ("fallback", pa.string()),
    ("group", pa.string()),
    ("variants", pa.string()),
    ("decision_id", pa.string()),
]
SCHEMAS: dict[Answers, pa.Schema] = {
    "score": pa.schema(_COMMON),
    "items": pa.schema(
        [
            *_COMMON,
            *((name, pa.string()) for name in ("name", "because_of")),
            ("expected_at", _TIME),
            ("price_minor", pa.int64()),
            *((name, pa.string()) for name in ("image_url", "url")),
        ]
    ),
    "offers": pa.schema(
        [
            *_COMMON,
            *((name, pa.string()) for name in ("offer_id", "campaign_id", "channel", "kind", "stage", "title", "text")),
            *((name, pa.float64()) for name in ("benefit_percent", "probability", "sending_minor", "lever")),
            *((name, pa.int64()) for name in ("benefit_minor", "margin_minor", "cost_minor")),
            ("offers_version", pa.string()),
        ]
    ),
}


SIDE_BY_SIDE: dict[Answers, tuple[str, ...]] = {
    "score": ("score", "reason"),
    "items": ("id", "name", "price_minor", "image_url", "url", "reason"),
    "offers": ("id", "campaign_id", "title", "text", "benefit_percent", "benefit_minor", "reason"),
}
"""What a file of one row a customer tells of each place of a list."""


@dataclass(frozen=True)
class Delivery:
    """How the answers leave.

    Attributes:
        form: which tool loads the file, of a CSV.
        delimiter: what divides the columns of a CSV.
        with_contact: whether addresses and numbers stand in the file. It is a sending file then: who may not be reached by the channel,
            is in the control group or gets nothing is left out.
        note: is told, before each part is written, whose contact data it has.
    """

    form: FormatName = "plain"
    delimiter: str = ","
    with_contact: bool = False
    note: Callable[[Sequence[str]], None] = lambda customers: None

    def check(self, out: Path, channel: Channel | None) -> None:
        """See that the file can be written so.

        Raises:
            ValueError: it cannot; the message names the option.
        """
        if out.suffix not in (".parquet", ".jsonl", ".csv"):
            raise ValueError(f"--out {out}: end the name in .csv, .parquet or .jsonl")
        if self.form != "plain" and out.suffix != ".csv":
            raise ValueError(f"--for {self.form}: it loads a CSV: end the name of --out in .csv")
        if FORMATS[self.form].by_customer and not self.with_contact:
            raise ValueError(f"--for {self.form}: it is a sending file: add --with-contact, and the --channel by which it goes out")
        if self.with_contact and channel not in CONTACT_CHANNELS:
            raise ValueError(f"--with-contact: say with --channel by what they are reached ({', '.join(CONTACT_CHANNELS)})")
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise ValueError(f"--delimiter {self.delimiter!r}: give one character, such as ;")


PLAIN = Delivery()


@dataclass
class BatchOutcome:
    """What became of a batch.

    Attributes:
        rows: how many rows the file has.
        customers: how many customers have any.
        left_out: of a sending file, how many customers are not in it, by the reason.
        logged, known: how many decisions were logged, and how many had been by the same batch before.
    """

    rows: int = 0
    customers: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    logged: int = 0
    known: int = 0


def score(
    home: Home,
    engine_of: Callable[[Home], Engine],
    name: str,
    as_of: datetime,
    out: Path,
    limit: int,
    advance: Callable[[int, int], None] = lambda done, of: None,
    channel: Channel | None = None,
    listing: Listing = "for_you",
    delivery: Delivery = PLAIN,
) -> BatchOutcome:
    """Score every customer known at *as_of* by the model *name* and write *out* whole or not at all.

    One row a customer and rank; a customer to whom the question does not apply, who does not allow it, or who has not permitted
    contact by *channel*, has one row with a null score and the reason as ``fallback``, so that every customer is in the file, but for
    a sending file (see ``Delivery``). Every row has its decision, which is logged before the file is there.
    What is allowed is what is allowed now, whatever *as_of*. Memory holds one chunk of customers. *listing* says which list of a model
    that recommends items; one about items takes the customer's open cart, or what they looked at.

    Raises:
        ValueError: the file cannot be written so, or the list needs items that nobody names in a batch.
        MissingStateError: no customer was known then, or the log ends long before.
        NoChampionError: the model has no champion.
    """
    delivery.check(out, channel)
    if RECIPES[listing].asks_about == "needed":
        raise ValueError(f"--listing {listing} is about an item: ask for it over HTTP, with item_ids")
    crowd = Population.open(home, engine_of, name, as_of)
    crowd.engine.champion(name)
    batch = _Batch(home, crowd, delivery, limit, channel, listing, Contacts(home, crowd.identities.vault), BatchDecisions(home))
    make_folder(out.parent.absolute())
    with whole(home, out, lambda part, owners: batch.writer(out.suffix, part, owners, ZoneInfo(Shop.load(home).timezone))) as writer:
        for chunk, answers in batch.answered(engine_of):
            batch.write(writer, chunk, answers)
            advance(crowd.asked, len(crowd.customers))
        batch.write_silent(writer)
        batch.decisions.flush()
        crowd.engine.governor.sync()
    found = batch.found
    found.logged, found.known = batch.decisions.logged, batch.decisions.known
    return found


@contextlib.contextmanager
def whole(home: Home, out: Path, writer_of: Callable[[Path, Path], Writer]) -> Iterator[Writer]:
    """Write *out*, and of a CSV whose its rows are, such that it is there whole, or not at all; an erasure finds it, whatever happens."""
    owners = owners_of(out)
    part, owners_part = part_of(out), part_of(owners)
    written = [out, part, *([owners, owners_part] if out.suffix == ".csv" else [])]
    remember_output(home, *written)
    try:
        with writer_of(part, owners_part) as writer:
            yield writer
        # what was not there yet may be off the list by now
        remember_output(home, *written)
        if out.suffix == ".csv":
            # rows and their owners of two batches must never stand side by side
            out.unlink(missing_ok=True)
            move_into_place(owners_part, owners)
        move_into_place(part, out)
    finally:
        part.unlink(missing_ok=True)
        owners_part.unlink(missing_ok=True)


def is_independent(crowd: Population, channel: Channel | None) -> bool:
    """Whether what one customer gets leaves what others get as it is, and promises nothing: then it does not matter who is asked first."""
    if crowd.settings.kind.answers == "score":
        return True
    return channel not in CONTACT_CHANNELS and not any(crowd.engine.limited())


@dataclass
class _Batch:
    """One batch under way; *contact* holds the addresses of the customers at hand."""

    home: Home
    crowd: Population
    delivery: Delivery
    limit: int
    channel: Channel | None
    listing: Listing
    contacts: Contacts
    decisions: BatchDecisions
    found: BatchOutcome = field(default_factory=BatchOutcome)
    contact: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.strongest = self.crowd.identities.strongest()
        self.addresses = Addresses(self.crowd.identities, self.contacts)
        self.answers = self.crowd.settings.kind.answers
        self.form: FileFormat = FORMATS[self.delivery.form]

    def writer(self, suffix: str, part: Path, owners: Path, zone: ZoneInfo) -> Writer:
        """What writes the file, by its name's ending."""
        schema = SCHEMAS[self.answers]
        if self.delivery.with_contact:
            schema = pa.schema([*schema, *((name, pa.string()) for name in CONTACT)])
        if suffix == ".csv":
            return CsvFile(part, owners, self.columns(), self.form, self.delivery.delimiter, zone)
        return ParquetFile(part, schema) if suffix == ".parquet" else JsonLinesFile(part, schema)

    def columns(self) -> list[str]:
        """Those of a CSV."""
        if self.form.by_customer:
            return list(self.form.row("", {}, self.side_by_side([])))
        contact = CONTACT if self.delivery.with_contact else ()
        first = ("customer_id", "identifier")
        return [*first, *contact, *(name for name in SCHEMAS[self.answers].names if name not in first)]

    def answered(self, engine_of: Callable[[Home], Engine]) -> Iterator[tuple[Sequence[str], Iterable[Answered]]]:
        """Some customers at a time, and the answers about those of them who are asked about."""
        crowd = self.crowd
        if is_spark(self.home) and not self.delivery.with_contact and is_independent(crowd, self.channel):
            from serving.decide.spread import spread

            for part in spread(self.home, crowd, engine_of, self.limit, self.channel, self.listing):
                crowd.asked += len(part)
                yield [each.customer for each in part], part
            return
        for chunk in crowd.chunks():
            yield chunk, self._asked(chunk)

    def _asked(self, chunk: Sequence[str]) -> Iterator[Answered]:
        """Ask about some customers, but for those whom a sending file cannot reach."""
        self.contact = self.addresses.of(chunk) if self.delivery.with_contact else {}
        for row in self.crowd.rows(chunk, self.channel):
            customer = str(row["customer_id"])
            why = self._unreachable(customer, self.contact)
            if why is None:
                told, record = self.crowd.ask(row, self.limit, self.channel, self.listing)
                self.decisions.add(record)
                why = self._not_sent(customer, told, record)
            if why is None:
                yield Answered(customer, list(lines_of(told, customer)))
            else:
                self.found.left_out[why] += 1

    def write(self, writer: Writer, chunk: Sequence[str], answers: Iterable[Answered]) -> None:
        """Log the decisions about some customers and write the rows."""
        named, rows = self._named(chunk), list[tuple[str, Mapping[str, Any]]]()
        for customer, found, decision in answers:
            if decision is not None:
                self.decisions.add_line(decision)
            lines = [{**line, "identifier": named.get(customer)} for line in found]
            rows += [(customer, line) for line in self._shaped(customer, lines, self.contact.get(customer, {}))]
        self._write(writer, rows)
        self.crowd.engine.governor.sync()

    def write_silent(self, writer: Writer) -> None:
        """Write a line for each customer of whom nothing may be used."""
        rows: list[tuple[str, Mapping[str, Any]]] = []
        for customer in self.crowd.silent:
            why, record = self.crowd.refusal(customer, self.channel, self.listing)
            if self.delivery.with_contact:
                self.found.left_out[why] += 1
                continue
            self.decisions.add(record)
            line = {"customer_id": customer, "as_of": self.crowd.as_of, "rank": 1, "fallback": why, "decision_id": record["decision_id"]}
            rows.append((customer, line))
        self._write(writer, rows)

    def _write(self, writer: Writer, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        customers = list(dict.fromkeys(customer for customer, _ in rows))
        if self.delivery.with_contact and customers:
            # before it can be read in the file
            self.delivery.note(customers)
        writer.write_rows(rows)
        self.found.rows += len(rows)
        self.found.customers += len(customers)

    def _named(self, chunk: Sequence[str]) -> dict[str, str]:
        """By customer their strongest identifier in clear."""
        keys = {customer: self.strongest[customer] for customer in chunk if customer in self.strongest}
        clear = self.contacts.identifiers(list(keys.values()))
        return {customer: f"{kind_of(key)}:{clear[key]}" for customer, key in keys.items() if key in clear}

    def _unreachable(self, customer: str, contact: Mapping[str, Mapping[str, str]]) -> str | None:
        """Why a customer is not in a sending file, whatever the answer would be."""
        if not self.delivery.with_contact:
            return None
        who = self.crowd.who(customer)
        if not who.may_be_used:
            return WITHDRAWN
        return who.not_reached(self.channel) or missing(contact.get(customer, {}), self.channel)

    def _not_sent(self, customer: str, told: AnyAnswer, record: DecisionRecord) -> str | None:
        """Why an answer is not in a sending file."""
        if not self.delivery.with_contact:
            return None
        policy = self.crowd.engine.governor.policy
        if record["assignment"]["held_out"] or policy.is_kept_from(policy.assigned(self.crowd.who(customer).ids[0]), self.channel):
            return HELD_OUT
        if isinstance(told, ScoreAnswer):
            return None if told.score is not None else told.fallback or NOTHING
        return None if (told.items if isinstance(told, ItemsAnswer) else told.offers) else told.fallback or NOTHING

    def _shaped(self, customer: str, lines: Sequence[dict[str, Any]], contact: Mapping[str, str]) -> list[dict[str, Any]]:
        if self.form.by_customer:
            return [self.form.row(customer, contact, self.side_by_side(lines))]
        return [{**line, **{name: contact.get(name) for name in CONTACT}} for line in lines] if self.delivery.with_contact else list(lines)

    def side_by_side(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One row of all places of a customer's list."""
        prefix = self.crowd.name.replace("-", "_")
        told: dict[str, Any] = {f"{prefix}_decision_id": lines[0]["decision_id"] if lines else None}
        for place in range(1 if self.answers == "score" else self.limit):
            line = lines[place] if place < len(lines) else {}
            number = "" if self.answers == "score" else f"_{place + 1}"
            told |= {f"{prefix}{number}_{name}": line.get(name) for name in SIDE_BY_SIDE[self.answers]}
        return told
