"""The log as it could be seen at a moment: identifiers resolved, nothing from the future. Every feature reads this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from deltalake import DeltaTable

from features.catalogue import Catalogue
from features.event_log import EventLog
from features.home import Home
from features.shop import Shop


@dataclass(frozen=True)
class Timeline:
    """Ibis tables of one connection.

    Attributes:
        events: one row an event of a known customer (anonymous events have a null ``customer_id``).
        lines: one row an item of a purchase, with the item's attributes.
        baskets: one row a purchase, with its totals.
        items, offers, item_context: the catalogue.
        shop: zone and currency.
    """

    events: ir.Table
    lines: ir.Table
    baskets: ir.Table
    items: ir.Table
    offers: ir.Table
    item_context: ir.Table
    shop: Shop

    def before(self, as_of: datetime) -> Timeline:
        """Only what had occurred and was known strictly before *as_of*."""
        moment = ibis.timestamp(as_of)

        def seen(table: ir.Table) -> ir.Table:
            return table.filter(table.occurred_at < moment, table.known_at < moment)

        return Timeline(
            events=seen(self.events),
            lines=seen(self.lines),
            baskets=seen(self.baskets),
            items=self.items,
            offers=self.offers,
            item_context=self.item_context,
            shop=self.shop,
        )


def open_timeline(home: Home, identified_by: datetime, customers: Sequence[str] | None = None) -> Timeline:
    """Open the log of *home* on a DuckDB connection of its own.

    Args:
        home: the installation.
        identified_by: identifiers resolve to the customers that were known strictly before this moment.
        customers: read only these customers' events, for the micro-batch that follows an intake.

    Raises:
        MissingStateError: nothing was imported yet.
    """
    shop = Shop.load(home)
    log = EventLog(home, shop.timezone)
    files = log.files()
    connection = ibis.duckdb.connect()
    connection.raw_sql("SET TimeZone='UTC'")
    identifiers = connection.create_table(
        "identifiers_raw", DeltaTable(str(home.identifiers)).to_pyarrow_table(columns=["identity_key", "customer_id", "known_at"])
    )
    resolved = _as_known(identifiers, identified_by)
    if customers is not None:
        wanted = connection.create_table("wanted", pa.table({"customer_id": pa.array(customers, pa.string())}))
        resolved = resolved.semi_join(wanted, "customer_id")
    raw = connection.read_parquet(files, table_name="log")
    how = "left" if customers is None else "inner"
    joined = raw.join(resolved, "identity_key", how=how)
    events = connection.create_table("events", joined.select("customer_id", *raw.columns), temp=True)
    catalogue = Catalogue(home)
    items = connection.read_parquet(str(catalogue.path("items")), table_name="items")
    purchases = events.filter(events.name == "purchase")
    line = purchases.select(
        "event_id", "customer_id", "occurred_at", "known_at", "local_date", "local_hour", "store_id", item=purchases["items"].unnest()
    )
    flat = line.select(
        *[c for c in line.columns if c != "item"],
        **{name: line.item[name] for name in ("item_id", "quantity", "amount_minor", "discount_minor", "coupon_minor")},
    )
    attributes = items.select("item_id", "department", "category", "brand", "recommendable")
    lines = connection.create_table("lines", flat.left_join(attributes, "item_id").drop("item_id_right"), temp=True)
    baskets = lines.group_by("event_id", "customer_id", "occurred_at", "known_at", "local_date", "local_hour", "store_id").aggregate(
        amount_minor=lines.amount_minor.sum(),
        discount_minor=lines.discount_minor.sum(),
        coupon_minor=lines.coupon_minor.sum(),
        lines=lines.count(),
    )
    return Timeline(
        events=events,
        lines=lines,
        baskets=connection.create_table("baskets", baskets, temp=True),
        items=items,
        offers=connection.read_parquet(str(catalogue.path("offers")), table_name="offers"),
        item_context=connection.read_parquet(str(catalogue.path("item_context")), table_name="item_context"),
        shop=shop,
    )


def _as_known(identifiers: ir.Table, moment: datetime) -> ir.Table:
    """The last customer that each key was known to belong to before *moment*; ``row_number`` runs on every engine."""
    known = identifiers.filter(identifiers.known_at < ibis.timestamp(moment))
    latest = known.mutate(nth=ibis.row_number().over(ibis.window(group_by="identity_key", order_by=[ibis.desc("known_at"), "customer_id"])))
    return latest.filter(latest.nth == 0).select("identity_key", "customer_id")
