"""The shelf: everything that may be shown now, the items that the model knows first, behind them those that it has not learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from models.attributes import Attributes, NumberAttribute, TextAttribute, Wish
from models.recommender.content import Contents, words_of
from models.recommender.kernels import Floats, Places
from models.recommender.neighbours import Neighbours
from models.recommender.ranker import ITEM_INPUTS

STATISTICS = ("popularity", "buyers", "purchases", "purchases_28", "price_minor", "on_sale_days")
"""What is measured of each item; see ``ITEM_STATISTICS`` of the features."""
GROUPS = 6
"""By how many text attributes customers are compared with items."""
STAND_IN_SHARE = 0.8
"""What a new item keeps of the score of the item most like it, at best."""
KIND, DETAILS = ("category", "type"), ("brand", "size")
"""What an item is called by where the catalogue has no name, and what tells it apart from its like."""
LINKS = ("image_url", "url")
"""Columns of the catalogue that are shown, and nothing to filter by or to learn from."""
LOCAL = 200
"""How many items are kept of what sells in each store."""


def groups_of(attributes: Attributes, items: int) -> list[str]:
    """The text attributes that put several of so many items together, the first few."""
    told = {name: column for name, column in attributes.columns.items() if isinstance(column, TextAttribute)}
    return [name for name, column in told.items() if 1 < len(column.words) <= max(items // 2, 2)][:GROUPS]


class Shelf:
    """Items by position, with what is known of each.

    Attributes:
        ids: position to item id; the first ``known`` are the model's.
        on_sale: whether each may be shown.
        features: ``(items, ITEM_INPUTS)``; NaN for items that the model does not know.
        by_popularity: all positions, what sells most now first; items that nobody bought come last, by their id.
        stand_in: for each item the known item whose scores it borrows: itself, or for a newcomer the most alike; -1 for none.
        newcomers: from each known item to the newcomers for which it stands in.
    """

    def __init__(
        self,
        ids: Sequence[str],
        attributes: Attributes,
        statistics: Mapping[str, NDArray[Any]],
        on_sale: NDArray[np.bool_] | None = None,
        groups: Sequence[str] = (),
    ) -> None:
        self.ids, self.attributes = list(ids), attributes
        self.positions = {item_id: k for k, item_id in enumerate(self.ids)}
        self.statistics, self.known = statistics, len(statistics["popularity"])
        count = len(self.ids)
        self.on_sale = np.ones(count, bool) if on_sale is None else on_sale
        self.everything_on_sale = bool(self.on_sale.all())
        popularity = np.zeros(count)
        popularity[: self.known] = statistics["popularity"]
        buyers, purchases = (np.asarray(statistics[name], np.float64) for name in ("buyers", "purchases"))
        lately = np.asarray(statistics["purchases_28"], np.float64)
        self.features: Floats = np.full((count, len(ITEM_INPUTS)), np.nan, np.float32)
        self.features[: self.known] = np.column_stack(
            [
                np.log1p(popularity[: self.known]),
                # a week's half-life keeps a third of a steady month
                popularity[: self.known] / np.maximum(lately, 1.0),
                np.log1p(buyers),
                purchases / np.maximum(buyers, 1.0),
                np.asarray(statistics["on_sale_days"], np.float64),
            ]
        )
        self.price: Floats = np.full(count, np.nan, np.float32)
        self.price[: self.known] = statistics["price_minor"]
        self.by_popularity: Places = np.lexsort((np.arange(count), -popularity)).astype(np.int32)
        self.popularity_share: Floats = np.zeros(count, np.float32)
        self.popularity_share[self.by_popularity] = 1.0 - np.arange(count, dtype=np.float32) / max(count, 1)
        # what little sells may double by chance: of the steadier half
        trend = np.nan_to_num(self.features[:, 1]) * np.sqrt(popularity)
        self.by_trend: Places = np.lexsort((np.arange(count), -trend)).astype(np.int32)
        self.trend: Floats = (trend / max(float(trend.max(initial=0.0)), 1e-9)).astype(np.float32)
        self._group(popularity, groups)
        self.links: Mapping[str, Sequence[str | None]] = {}
        """By name, one picture or page an item."""
        self._values: dict[str, tuple[Places, NDArray[np.intp]]] = {}
        self.stand_in: Places = np.where(np.arange(count) < self.known, np.arange(count), -1).astype(np.int32)
        self.stand_in_likeness: Floats = np.where(self.stand_in >= 0, np.float32(1), np.float32(0))
        self.newcomers: Neighbours | None = None

    def _group(self, popularity: NDArray[np.float64], groups: Sequence[str]) -> None:
        """Code the text attributes by which customers and items are compared, and find each item's share within its value."""
        told = {name: column for name, column in self.attributes.columns.items() if isinstance(column, TextAttribute)}
        self.groups = list(groups)
        count = len(self.ids)
        self.codes: Places = np.full((len(self.groups), count), -1, np.int32)
        self.shares: Floats = np.zeros((len(self.groups), count), np.float32)
        self.widths = np.array([len(told[name].words) if name in told else 0 for name in self.groups], np.int64)
        for k, name in enumerate(self.groups):
            if not self.widths[k]:
                # the catalogue does not tell it any more
                continue
            codes = told[name].codes
            totals = np.bincount(codes[codes >= 0], popularity[codes >= 0], minlength=len(told[name].words))
            self.codes[k] = codes
            self.shares[k] = np.where(codes >= 0, popularity / np.maximum(totals[codes], 1e-9), 0.0)
        # the finest attribute that still puts several items together: three of one kind are a list of one kind
        finest = int(np.argmax(self.widths)) if self.groups else -1
        self.family: Places = self.codes[finest] if self.groups else np.full(count, -1, np.int32)

    def with_values(self, include: Mapping[str, Wish], trend: bool) -> Places | None:
        """The items that have an included value, of the attribute with the fewest such, what sells or (*trend*) rises most first.

        None where no text attribute is asked for. Costs as much as there are such items.
        """
        found: Places | None = None
        for name, wish in include.items():
            column = self.attributes.columns.get(name)
            if isinstance(column, TextAttribute) and isinstance(wish, frozenset):
                places, starts = self._by_value(name, column)
                parts = [places[starts[code] : starts[code + 1]] for code in column.codes_of(wish)]
                together = np.concatenate([places[:0], *parts])
                found = together if found is None or len(together) < len(found) else found
        if found is None:
            return None
        order: NDArray[np.float32] = self.trend if trend else self.popularity_share
        return found[np.lexsort((found, -order[found]))]

    def _by_value(self, name: str, column: TextAttribute) -> tuple[Places, NDArray[np.intp]]:
        if name not in self._values:
            places = np.argsort(column.codes, kind="stable").astype(np.int32)
            self._values[name] = places, np.searchsorted(column.codes[places], np.arange(len(column.words) + 1))
        return self._values[name]

    def price_of(self, place: int) -> int | None:
        """What one item costs in minor units: as the catalogue tells, or else as was paid for it; None where nobody knows."""
        told = self.attributes.columns.get("price_minor")
        price = float(told.values[place]) if isinstance(told, NumberAttribute) else np.nan
        price = float(self.price[place]) if np.isnan(price) else price
        return None if np.isnan(price) else round(price)

    @cached_property
    def is_alone(self) -> NDArray[np.bool_]:
        """Which items no other has the same texts of ``KIND`` and ``DETAILS`` as."""
        told = [self.attributes.columns.get(name) for name in (*KIND, *DETAILS)]
        codes = np.zeros(len(self.ids), np.int64)
        for column in told:
            if isinstance(column, TextAttribute):
                # small again after each, so that however many texts there are the product is in range
                codes = np.unique(codes * (len(column.words) + 1) + column.codes + 1, return_inverse=True)[1].astype(np.int64)
        alone: NDArray[np.bool_] = np.bincount(codes)[codes] == 1
        return alone

    def text_of(self, place: int) -> dict[str, Any]:
        """The texts of one item, by attribute."""
        return {name: column.at(place) for name, column in self.attributes.columns.items() if hasattr(column, "at")}

    def stocked(self, items: Mapping[str, Sequence[Any]], contents: Contents, seen: frozenset[str] | set[str]) -> Shelf:
        """The shelf as the catalogue stands now: attributes as they are, new items behind, what is sold no more marked.

        Args:
            items: columns of equal length: ``item_id``, ``recommendable`` and the attributes.
            contents: the words of the known items.
            seen: the items that the catalogue had when the model was fitted: others are newcomers.
        """
        row_of = {item_id: k for k, item_id in enumerate(items["item_id"])}
        behind = [item_id for item_id in items["item_id"] if self.positions.get(item_id, self.known) >= self.known]
        ids = [*self.ids[: self.known], *behind]
        rows = [row_of.get(item_id, -1) for item_id in ids]
        names = [name for name in items if name not in ("item_id", "recommendable", *LINKS)]
        columns = {name: [items[name][k] if k >= 0 else None for k in rows] for name in names}
        allowed = items["recommendable"]
        on_sale = np.array([k >= 0 and bool(allowed[k]) for k in rows], bool)
        shelf = Shelf(ids, Attributes.of(columns), self.statistics, on_sale, self.groups)
        shelf.links = {name: [items[name][k] if k >= 0 else None for k in rows] for name in LINKS if name in items}
        newcomers = [k for k in range(self.known, len(ids)) if ids[k] not in seen and on_sale[k]]
        nearest, likeness = contents.closest([words_of({name: values[place] for name, values in columns.items()}) for place in newcomers])
        like_some = nearest >= 0
        new, nearest, likeness = np.array(newcomers, np.int32)[like_some], nearest[like_some], likeness[like_some]
        if len(new):
            shelf.stand_in[new], shelf.stand_in_likeness[new] = nearest, STAND_IN_SHARE * np.minimum(likeness, 1.0)
            shelf.newcomers = Neighbours(sp.csr_matrix((likeness, (nearest, new)), shape=(len(ids), len(ids)), dtype=np.float32))
        return shelf
