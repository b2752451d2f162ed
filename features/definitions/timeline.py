"""The log as it could be seen at a moment: what every windowed feature reads. ``features.store.timeline`` opens it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import ibis.expr.types as ir

from features.catalogue.shop import Shop
from features.definitions.compute import Compute


@dataclass(frozen=True)
class Timeline:
    """Ibis tables of one connection, on whatever works them out.

    Attributes:
        events: one row an event of a known customer (anonymous events have a null ``customer_id``).
        lines: one row an item of a purchase, with the item's attributes.
        baskets: one row a purchase, with its totals.
        refunds: one row a refund, with its total as a positive amount.
        items, offers, item_context: the catalogue.
        shop: zone and currency.
        consents: names what customers had said when it was opened.
        compute: what works out expressions of these tables.
    """

    events: ir.Table
    lines: ir.Table
    baskets: ir.Table
    refunds: ir.Table
    items: ir.Table
    offers: ir.Table
    item_context: ir.Table
    shop: Shop
    consents: str
    compute: Compute

    def close(self) -> None:
        """Let go of the tables, in memory or elsewhere; nothing of it can be read any more."""
        self.compute.close()

    def before(self, as_of: datetime) -> Timeline:
        """Only what had occurred and was known strictly before *as_of*."""
        moment = self.compute.moment(as_of)

        def seen(table: ir.Table) -> ir.Table:
            return table.filter(table.occurred_at < moment, table.known_at < moment)

        return Timeline(
            events=seen(self.events),
            lines=seen(self.lines),
            baskets=seen(self.baskets),
            refunds=seen(self.refunds),
            items=self.items,
            offers=self.offers,
            item_context=self.item_context,
            shop=self.shop,
            consents=self.consents,
            compute=self.compute,
        )
