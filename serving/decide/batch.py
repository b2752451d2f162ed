"""Scoring in bulk: every customer at one moment, through the very pipelines that answer HTTP, into a file that is whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from features.catalogue.shop import Shop
from features.events.event import Channel
from features.events.identifiers import kind_of
from features.people.consent import Consents, standing
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.state.clock import clock_of, microseconds
from features.state.disk import move_into_place
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.event_log import EventLog
from features.store.feature_store import FeatureStore
from features.store.outputs import remember_output
from models.kind import Answers
from models.recommendations import Listing
from models.recommender.recipes import RECIPES
from models.registry import ModelSettings
from serving.decide.engine import WITHDRAWN, Engine
from serving.decide.questions import (
    ItemChoice,
    ItemsAnswer,
    NextBestOfferRequest,
    OfferChoice,
    OffersAnswer,
    RecommendationsRequest,
    ScoreAnswer,
    ScoreRequest,
)
from serving.decide.who import Who

AnyAnswer = ScoreAnswer | ItemsAnswer | OffersAnswer
CHUNK = 500
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
    "items": pa.schema([*_COMMON, ("name", pa.string()), ("because_of", pa.string()), ("expected_at", _TIME)]),
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
) -> int:
    """Score every customer known at *as_of* by the model *name* and write *out* whole or not at all; returns the number of rows.

    One row a customer and rank; a customer to whom the question does not apply, who does not allow it, or who has not permitted
    contact by *channel*, has one row with a null score and the reason as ``fallback``, so that every customer is in the file.
    What is allowed is what is allowed now, whatever *as_of*. Memory holds one chunk of customers. *listing* says which list of a model
    that recommends items; one about items takes the customer's open cart, or what they looked at.

    Raises:
        ValueError: the suffix is neither ``.parquet`` nor ``.jsonl``, or the list needs items that nobody names in a batch.
        MissingStateError: no customer was known then, or the log ends long before.
        NoChampionError: the model has no champion.
    """
    writers: dict[str, Callable[[Path, pa.Schema], Writer]] = {".parquet": ParquetFile, ".jsonl": JsonLinesFile}
    writer_of = writers.get(out.suffix)
    if writer_of is None:
        raise ValueError(f"--out {out}: end the name in .parquet or .jsonl")
    if RECIPES[listing].asks_about == "needed":
        raise ValueError(f"--listing {listing} is about an item: ask for it over HTTP, with item_ids")
    crowd = Population.open(home, engine_of, name, as_of)
    strongest, contacts = crowd.identities.strongest(), Contacts(home, crowd.identities.vault)
    remember_output(home, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part, written = out.with_name(f".{out.name}.{os.getpid()}.part"), 0
    try:
        with writer_of(part, SCHEMAS[crowd.settings.kind.answers]) as writer:
            for chunk in crowd.chunks():
                keys = {customer: strongest[customer] for customer in chunk if customer in strongest}
                clear = contacts.identifiers(list(keys.values()))
                named = {customer: f"{kind_of(key)}:{clear[key]}" for customer, key in keys.items() if key in clear}
                rows = [
                    {**line, "identifier": named.get(row["customer_id"])}
                    for row in crowd.rows(chunk, channel)
                    for line in lines_of(crowd.ask(row, limit, channel, listing), str(row["customer_id"]))
                ]
                writer.write(rows)
                written += len(rows)
                crowd.engine.governor.sync()
                advance(crowd.asked, len(crowd.customers))
            refused = {customer: crowd.who(customer).not_reached(channel) or WITHDRAWN for customer in crowd.silent}
            writer.write([{"customer_id": customer, "as_of": as_of, "rank": 1, "fallback": why} for customer, why in refused.items()])
            written += len(refused)
        crowd.engine.governor.sync()
        move_into_place(part, out)
    finally:
        part.unlink(missing_ok=True)
    return written


def _withdrawn(identities: Identities, consents: Consents) -> set[str]:
    """The customers who do not allow their data to be used: they have no feature rows."""
    speakers = consents.speakers(identities.owners())
    return {customer for customer in speakers if not _who(identities, consents, customer).may_be_used}


def _who(identities: Identities, consents: Consents, customer: str) -> Who:
    # her row may carry a name that she had before a merge: what she says counts for both
    current = identities.current(customer)
    allowed = standing(consents, identities, current)
    return Who(customer, allowed.personalization, allowed.forbidden_channels, (current, *identities.former(current)))


def lines_of(told: AnyAnswer, customer: str) -> Iterator[dict[str, Any]]:
    """One customer's lines, best first."""
    common = {
        "customer_id": customer, "as_of": told.as_of, "model": told.model, "fallback": told.fallback, "group": told.group,
        "variants": msgspec.json.encode(told.variants).decode() if told.variants else None, "decision_id": told.decision_id,
    }  # fmt: skip
    if isinstance(told, ScoreAnswer):
        yield {**common, "rank": 1, "id": None, "score": told.score, "source": told.source, "reason": told.reason, "propensity": 1.0}
        return
    found: Sequence[ItemChoice | OfferChoice] = told.items if isinstance(told, ItemsAnswer) else told.offers
    if not found:
        nothing = {"rank": 1, "id": None, "score": None, "source": None, "reason": None, "propensity": None}
        yield {**common, **nothing, "fallback": common["fallback"] or "nothing to offer"}
    for rank, choice in enumerate(found, 1):
        line = msgspec.structs.asdict(choice)
        line["id"] = line.get("item_id") or line.get("offer_id")
        if isinstance(told, OffersAnswer):
            line["offers_version"] = told.offers_version
        yield {**common, "rank": rank, **line}


@dataclass
class Population:
    """Every customer known at a moment, and what a model is asked of each; memory holds one chunk of them.

    Attributes:
        settings: what is read of each.
        customers: who has feature rows, in the order in which they are asked.
        silent: who does not allow their data to be used, and so has none.
        now: when the answers go out.
        asked: how many have been asked, the chunk at hand among them.
        counted: whether it has been looked up, once for all chunks, what was sent to each by now.
    """

    engine: Engine
    name: str
    settings: ModelSettings
    as_of: datetime
    store: FeatureStore
    identities: Identities
    consents: Consents
    customers: Sequence[str]
    silent: Sequence[str]
    now: datetime
    asked: int = 0
    counted: bool = False

    @classmethod
    def open(cls, home: Home, engine_of: Callable[[Home], Engine], name: str, as_of: datetime) -> Population:
        """Everybody known at *as_of*, for the model *name*.

        Raises:
            MissingStateError: no customer was known then, or the log ends long before.
        """
        shop = Shop.load(home)
        EventLog(home, shop.timezone).check_reaches(as_of)
        engine = engine_of(home)
        store, settings = FeatureStore(home, engine.services()), engine.reading(name)
        kind = settings.kind
        store.apply()
        for view in kind.views:
            store.backfill(view, {as_of: None})
        customers = pq.ParquetFile(store.snapshot(kind.views[0], as_of)).read(columns=["customer_id"])["customer_id"].to_pylist()
        if not customers:
            raise MissingStateError(f"no customer was known before {as_of.isoformat()}: choose a later --as-of")
        identities, consents = Identities(home), Consents(home, shop.consent)
        silent = sorted(_withdrawn(identities, consents) - set(customers))
        now = max(as_of, clock_of(home.settings)())
        return cls(engine, name, settings, as_of, store, identities, consents, customers, silent, now)

    def chunks(self) -> Iterator[Sequence[str]]:
        """The customers, some at a time."""
        for start in range(0, len(self.customers), CHUNK):
            chunk = self.customers[start : start + CHUNK]
            self.asked = start + len(chunk)
            yield chunk

    def rows(self, chunk: Sequence[str], channel: Channel | None) -> list[dict[str, Any]]:
        """Feature rows as the online reader would give them: None for unknown, and the moment of each view.

        What was sent to a customer is told as of now, whatever the moment of the batch: that is when its messages go out.
        """
        rows = _rows(self.store, self.settings, chunk, self.as_of)
        if not (folds := self.engine.reads(self.name, (channel,))):
            return rows
        if not self.counted:
            self.store.backfill("customer_state", {self.now: None})
            self.counted = True
        spine = pd.DataFrame({"customer_id": chunk, "event_timestamp": pd.Timestamp(self.now)})
        frame = self.store.historical(spine, "state_v1", folds).drop(columns="event_timestamp")
        sent = {row["customer_id"]: row for row in frame.to_dict("records")}
        return [{**row, **{name: _plain(value) for name, value in sent.get(row["customer_id"], {}).items()}} for row in rows]

    def who(self, customer: str) -> Who:
        """A customer with what they allow now."""
        return _who(self.identities, self.consents, customer)

    def ask(self, row: Mapping[str, Any], limit: int, channel: Channel | None, listing: Listing, dry_run: bool = False) -> AnyAnswer:
        """The answer that HTTP would give about the customer of a feature row; the same batch run again keeps its decisions' ids."""
        who, answers = self.who(row["customer_id"]), self.settings.kind.answers
        said = f"{self.name}/{listing}/{channel}/{self.as_of.isoformat()}/{row['customer_id']}"
        name = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        told: AnyAnswer
        if answers == "score":
            told, _ = self.engine.score(self.name, ScoreRequest(channel=channel), who, row, self.as_of)
        elif answers == "items":
            wish = RecommendationsRequest(limit=limit, channel=channel, listing=listing, dry_run=dry_run)
            told, _ = self.engine.recommendations(self.name, wish, who, row, self.as_of, name, self.now)
        else:
            offer = NextBestOfferRequest(limit=limit, channel=channel, dry_run=dry_run)
            told, _ = self.engine.next_best_offer(self.name, offer, who, row, self.as_of, name, self.now)
        return told


def _rows(store: FeatureStore, settings: ModelSettings, customers: Sequence[str], as_of: datetime) -> list[dict[str, Any]]:
    """Feature rows as the online reader would give them: None for unknown, and the moment of each view."""
    spine = pd.DataFrame({"customer_id": customers, "event_timestamp": pd.Timestamp(as_of)})
    frame = store.historical(spine, settings.feature_service, settings.kind.folds).drop(columns="event_timestamp")
    frame = frame.astype(object).where(frame.notna(), None)
    stamps = {f"{view}_at": microseconds(as_of) for view in settings.kind.views}
    return [{**{k: _plain(v) for k, v in row.items()}, **stamps} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


class Writer(Protocol):
    """A file being written."""

    def __enter__(self) -> Writer: ...
    def __exit__(self, *error: object) -> None: ...
    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows."""
        ...


class ParquetFile:
    """Rows as Parquet, one row group a chunk."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema)

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows."""
        self._writer.write_table(pa.Table.from_pylist([dict(row) for row in rows], self._schema))


class JsonLinesFile:
    """Rows as JSON, one a line."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._names = schema.names
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> JsonLinesFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows."""
        for row in rows:
            self._file.write(msgspec.json.encode({name: row.get(name) for name in self._names}) + b"\n")
