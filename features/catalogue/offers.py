"""What an offer says of itself, and the offers in force with the items that their attributes choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from features.catalogue.tables import Catalogue
from features.events.event import Channel, LongText, Text
from features.state.home import Home

OfferKind = Literal["coupon", "product", "message", "service"]
Stage = Literal["upsell", "cross-sell", "retain", "win-back", "thank", "rating", "refer"]
Minor = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class OfferTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be said of an offer beside its id and when it is in force; money is in minor units."""

    campaign_id: Text | None = None
    """Offers of one campaign compete: the customer gets the one that fits best. Unsaid, each offer is one of its own."""
    campaign_type: Text | None = None
    kind: OfferKind = "coupon"
    stage: Stage | None = None
    """What it is for."""
    title: Text | None = None
    text: LongText | None = None
    category: Text | None = None
    """Of one category a list holds one offer."""
    channels: list[Channel] = []
    """Through what it may go out or be shown; none named: through any."""
    item_ids: list[Text] = []
    where: dict[Text, list[Text]] | None = None
    """The items that have one of these values of each attribute, beside those of ``item_ids``."""
    benefit_percent: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    benefit_minor: Minor | None = None
    """What the customer gets: a share off the price, or an amount."""
    cost_minor: Minor | None = None
    """What one that is taken costs the shop; unsaid, what the customer gets (of a share, that share of the mean price of its items)."""
    margin_minor: Minor | None = None
    """What one that is taken brings before that cost; unsaid, the margin rate on the mean price of its items."""
    budget: Count | None = None
    """How often it may be given out in all."""
    stock: Count | None = None
    """How many there are to redeem."""
    lever: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 1.0
    """By what the shop multiplies its priority."""
    store_ids: list[Text] = []
    """In which stores it holds; none named: in all."""
    eligible: str | None = None
    """A condition in CEL on the customer and the question."""
    transactional: bool = False
    """Whether it is owed to the customer, such as a receipt: no cap of marketing holds it."""
    fallback: bool = False
    """Whether it stands in where nothing else may be offered."""


def offers_in_force(home: Home) -> list[dict[str, Any]]:
    """The rows of the offers' table, ``item_ids`` with the items that ``where`` chooses from the items' table."""
    catalogue = Catalogue(home)
    rows: list[dict[str, Any]] = catalogue.read("offers").to_pylist()
    if any(row["where"] for row in rows):
        items = catalogue.read("items")
        # many offers choose alike
        chosen = {where: _chosen(items, msgspec.json.decode(where)) for where in {row["where"] for row in rows} if where}
        for row in rows:
            if row["where"]:
                row["item_ids"] = list(dict.fromkeys([*(row["item_ids"] or ()), *chosen[row["where"]]]))
    return rows


def _chosen(items: pa.Table, where: Mapping[str, list[str]]) -> list[str]:
    kept = pa.array([True] * len(items))
    for name, values in where.items():
        if name not in items.column_names:
            # an attribute that the items lost since: it chooses none
            return []
        column = items[name].combine_chunks()
        if pa.types.is_list(column.type):
            hits = pc.is_in(column.flatten(), value_set=pa.array(values, pa.string()))
            owners = set(pc.filter(pc.list_parent_indices(column), hits).to_pylist())
            fits = pa.array([k in owners for k in range(len(items))])
        else:
            fits = pc.is_in(column.cast(pa.string()), value_set=pa.array(values, pa.string()))
        kept = pc.and_(kept, fits)
    found: list[str] = items["item_id"].filter(kept).to_pylist()
    return found
