"""A batch asked on many machines: customers' rows by Spark, each task with the models of its own process, the answers back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa

from features.catalogue.shop import Shop
from features.definitions.feature import Moment
from features.definitions.folds.registered import NAMES
from features.definitions.view import views_of
from features.events.event import Channel
from features.state.clock import microseconds
from features.state.home import Home, configure_process
from features.state.settings import Settings
from features.store.feature_store import expanded
from features.store.packing import packed
from features.store.spark_compute import brought_back, in_parts, read_parquet
from features.store.spark_session import open_session
from models.recommender.listings import Listing
from serving.decide.batch_lines import Answered, lines_of
from serving.decide.engine import Engine
from serving.decide.population import Asking, Population
from serving.decide.who import Who

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

AT_ONCE = 500
"""How many customers' answers come back as one batch."""
PART_CUSTOMERS = 5_000
"""How many customers are asked about by one task, more or less; the driver holds the answers of two tasks."""
SENT = "sent_"
"""Begins the names of the columns that tell what was sent to a customer by now."""
_SCHEMA = pa.schema([("customer_id", pa.string()), ("lines", pa.binary()), ("decision", pa.binary())])


@dataclass(frozen=True)
class Errand:
    """What a task needs to ask: where the home lies, but none of its secrets, and whom the permissions are not those of everybody.

    Attributes:
        settings: those of the home, without secret and key.
        engine_of: opens the champions of a home.
        usual: what is allowed of a customer who is not among *others*.
        others: those who have said something, or have had several ids.
        folds: which are read of what was sent to a customer by now; none where nothing of it is read.
    """

    root: Path
    settings: Settings
    engine_of: Callable[[Home], Engine]
    name: str
    as_of: datetime
    now: datetime
    limit: int
    channel: Channel | None
    listing: Listing
    usual: Who
    others: Mapping[str, Who]
    folds: Sequence[str]

    def who(self, customer: str) -> Who:
        """A customer with what they allow."""
        usual = self.usual
        return self.others.get(customer) or Who(customer, usual.may_be_used, usual.forbidden_channels, (customer,))


def spread(
    home: Home, crowd: Population, engine_of: Callable[[Home], Engine], limit: int, channel: Channel | None, listing: Listing
) -> Iterator[list[Answered]]:
    """The answers about all customers, in the order of their ids, some at a time; each comes with its decision.

    The driver holds who has said something or was merged, and two parts of the answers. Every process of an executor opens the home, which
    must lie in the same place on each machine, and loads the champions once.
    """
    usual = crowd.who("")
    everybody = ((customer, crowd.who(customer)) for customer in crowd.customers)
    others = {c: who for c, who in everybody if who != Who(c, usual.may_be_used, usual.forbidden_channels, (c,))}
    settings = msgspec.structs.replace(home.settings, secret="", api_key="", engine="duckdb")
    folds = crowd.sent_folds(channel)
    errand = Errand(
        home.root, settings, engine_of, crowd.name, crowd.as_of, crowd.now, limit, channel, listing, usual, others, folds
    )  # fmt: skip

    def step(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return packed(answered(batches, errand))

    decoder = msgspec.msgpack.Decoder(list[dict[str, Any]])
    for batch in brought_back(_rows(home, crowd, bool(folds)), step):
        parts = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        yield [Answered(customer, decoder.decode(lines), decision) for customer, lines, decision in parts]


def _rows(home: Home, crowd: Population, with_sent: bool) -> DataFrame:
    """The customers' rows of all views that the model reads, in the order of their ids."""
    session = open_session(home)
    views = [crowd.store.views[name] for name in crowd.settings.kind.views]
    frame: DataFrame | None = None
    for view in views:
        one = read_parquet(session, [str(crowd.store.snapshot(view.name, crowd.as_of))]).select("customer_id", *view.columns)
        frame = one if frame is None else frame.join(one, "customer_id", "left")
    assert frame is not None
    if with_sent:
        sent = read_parquet(session, [str(crowd.store.snapshot("customer_state", crowd.now))])
        frame = frame.join(sent.select("customer_id", *(sent[name].alias(f"{SENT}{name}") for name in NAMES)), "customer_id", "left")
    return in_parts(frame, "customer_id", len(crowd.customers), PART_CUSTOMERS).sortWithinPartitions("customer_id")


def answered(batches: Iterable[pa.RecordBatch], errand: Errand) -> Iterator[pa.RecordBatch]:
    """The answers about the customers of some rows, on an executor."""
    asking = _asking(errand)
    shop = Shop.load(Home(errand.root, errand.settings))
    then, now = Moment(errand.as_of, shop.timezone), Moment(errand.now, shop.timezone)
    settings = asking.engine.reading(errand.name)
    wanted = set(_columns_of(shop, settings.feature_service, asking.engine))
    stamps = {f"{view}_at": microseconds(errand.as_of) for view in settings.kind.views}
    for batch in batches:
        for start in range(0, len(batch), AT_ONCE):
            found: list[tuple[str, bytes, bytes]] = []
            for held in batch.slice(start, AT_ONCE).to_pylist():
                sent = {name.removeprefix(SENT): held.pop(name) for name in list(held) if name.startswith(SENT)}
                held = {name: value for name, value in held.items() if name in wanted}
                row = {**expanded(held, then, settings.kind.folds), **stamps, **(expanded(sent, now, errand.folds) if sent else {})}
                row = {name: None if value != value else value for name, value in row.items()}
                customer = row["customer_id"]
                told, record = asking.ask(errand.who(customer), row, errand.limit, errand.channel, errand.listing)
                lines = msgspec.msgpack.encode(list(lines_of(told, customer)))
                found.append((customer, lines, msgspec.json.encode(record)))
            columns = [pa.array(column, kind.type) for column, kind in zip(zip(*found, strict=True), _SCHEMA, strict=True)]
            yield pa.record_batch(columns, schema=_SCHEMA)


_opened: dict[tuple[Path, str, datetime, datetime], Asking] = {}
"""What this process asks: its models are loaded once, for all tasks that it is given."""


def _asking(errand: Errand) -> Asking:
    key = (errand.root, errand.name, errand.as_of, errand.now)
    if key not in _opened:
        configure_process()
        engine = errand.engine_of(Home(errand.root, errand.settings))
        _opened.clear()
        _opened[key] = Asking(engine, errand.name, engine.reading(errand.name).kind.answers, errand.as_of, errand.now)
    return _opened[key]


def _columns_of(shop: Shop, service: str, engine: Engine) -> Iterator[str]:
    """What a feature service tells of a customer."""
    from features.store.feature_store import SERVICES

    yield "customer_id"
    for name in {**SERVICES, **engine.services()}[service]:
        yield from views_of(shop.domain)[name].columns
