"""What one customer holds: the items bought and looked at, by catalogue position; and many customers' together, for a fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from models.decay import DAY, HISTORY_HALF_LIFE_DAYS, decayed
from models.recommender.kernels import Floats, Places

INTEREST_HALF_LIFE_DAYS = 2.0
JUST_BOUGHT_HALF_LIFE_DAYS = 1 / 24
JUST_BOUGHT_DAYS = 0.25
"""After which a purchase is not of this visit any more."""
SESSION_ITEMS = 5
"""How many of the items looked at last speak for their like."""
RECENT = ("recent_item_ids", "recent_at", "recent_weights")
"""What is read of the customer's interests."""
COLUMNS = ("bought_item_ids", "bought_counts", "bought_last_at", "bought_first_at", "bought_weights")
"""What is read of the fold ``history``, item by item."""


class Owned(NamedTuple):
    """The items that a customer bought and kept, as far as the catalogue knows them."""

    places: Places
    counts: Floats
    recency_days: Floats
    interval_days: Floats
    """The mean interval between purchases of it; NaN where it was bought once."""
    weights: Floats
    """The purchases, halved every 90 days."""

    @property
    def size(self) -> int:
        """How many items."""
        return len(self.places)

    def where(self, kept: NDArray[np.bool_] | NDArray[np.intp]) -> Owned:
        """Some of it, by a mask or by indices."""
        return Owned._make(column[kept] for column in self)


_NONE = np.empty(0, np.float32)
NOTHING = Owned(np.empty(0, np.int32), _NONE, _NONE, _NONE, _NONE)


def owned_of(row: Mapping[str, Any], positions: Mapping[str, int], now: float) -> Owned:
    """What the customer of a feature row holds at *now* (Unix seconds)."""
    items = row.get("bought_item_ids")
    if items is None or not len(items):
        return NOTHING
    places = np.array(list(map(positions.get, items, repeat(-1))), np.int32)
    known = np.flatnonzero(places >= 0)
    last, first = np.asarray(row["bought_last_at"], np.float64)[known], np.asarray(row["bought_first_at"], np.float64)[known]
    counts, weights = np.asarray(row["bought_counts"], np.float32)[known], np.asarray(row["bought_weights"], np.float64)[known]
    days = ((now - last) / DAY).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        interval = np.where(counts > 1, (last - first) / (counts - 1.0) / DAY, np.nan).astype(np.float32)
    return Owned(places[known], counts, days, interval, decayed(weights, last, now, HISTORY_HALF_LIFE_DAYS).astype(np.float32))


def viewed_of(row: Mapping[str, Any], positions: Mapping[str, int], now: float) -> dict[int, float]:
    """By catalogue position: how fresh the customer's interest in an item is, 1 at most, the latest first."""
    items = row.get("recent_item_ids")
    if items is None or not len(items):
        return {}
    interest = np.minimum(decayed(row["recent_weights"], row["recent_at"], now, INTEREST_HALF_LIFE_DAYS), 1.0)
    latest: dict[int, float] = {}
    for item, fresh in zip(reversed(list(items)), interest[::-1].tolist(), strict=True):
        place = positions.get(item, -1)
        if place >= 0:
            latest[place] = max(fresh, latest.get(place, 0.0))
    return dict(list(latest.items())[:SESSION_ITEMS])


def just_bought(mine: Owned) -> dict[int, float]:
    """By catalogue position: how fresh the purchase of an item in this visit is, 1 at most, the latest first."""
    lately = np.flatnonzero(mine.recency_days < JUST_BOUGHT_DAYS)
    latest = lately[np.argsort(mine.recency_days[lately], kind="stable")][:SESSION_ITEMS]
    fresh = np.exp2(-np.maximum(mine.recency_days[latest], 0.0) / JUST_BOUGHT_HALF_LIFE_DAYS)
    return dict(zip(mine.places[latest].tolist(), fresh.tolist(), strict=True))


class Histories:
    """Many customers' histories as flat arrays: what a row of the fold tells, of the items that a catalogue knows."""

    def __init__(
        self, customers: list[str], offsets: NDArray[np.int64], columns: Mapping[str, NDArray[Any]], recent: Mapping[int, Mapping[str, Any]]
    ) -> None:
        self.customers, self.offsets, self.columns, self.recent = customers, offsets, columns, recent

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], positions: Mapping[str, int]) -> Histories:
        """Of feature rows, customer by customer."""
        customers: list[str] = []
        sizes: list[int] = [0]
        recent: dict[int, Mapping[str, Any]] = {}
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in COLUMNS}
        types = dict(zip(COLUMNS, (np.int32, np.int32, np.int64, np.int64, np.float64), strict=True))
        for number, row in enumerate(rows):
            items = row["bought_item_ids"] if row.get("bought_item_ids") is not None else ()
            places = np.array(list(map(positions.get, items, repeat(-1))), np.int32)
            known = np.flatnonzero(places >= 0)
            known = known[np.argsort(places[known], kind="stable")]
            customers.append(str(row.get("customer_id")))
            sizes.append(len(known))
            if len(known):
                parts["bought_item_ids"].append(places[known])
                for name in COLUMNS[1:]:
                    parts[name].append(np.asarray(row[name], types[name])[known])
            if row.get("recent_item_ids") is not None and len(row["recent_item_ids"]):
                recent[number] = {name: row[name] for name in RECENT}
        columns = {name: np.concatenate(parts[name]) if parts[name] else np.empty(0, kind) for name, kind in types.items()}
        return cls(customers, np.cumsum(sizes), columns, recent)

    def __len__(self) -> int:
        return len(self.customers)

    @classmethod
    def joined(cls, parts: Sequence[Histories]) -> Histories:
        """Of several, one after the other."""
        customers = [customer for part in parts for customer in part.customers]
        sizes = np.concatenate([[0], *(np.diff(part.offsets) for part in parts)])
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS}
        starts = np.cumsum([0, *(len(part) for part in parts)])
        recent = {start + number: row for start, part in zip(starts.tolist(), parts, strict=False) for number, row in part.recent.items()}
        return cls(customers, np.cumsum(sizes), columns, recent)

    def places(self, customer: int) -> Places:
        """The places of what the customer of that number holds."""
        found: Places = self.columns["bought_item_ids"][self.offsets[customer] : self.offsets[customer + 1]]
        return found

    def row(self, customer: int, item_ids: Sequence[str]) -> dict[str, Any]:
        """The feature row again, of the items that the catalogue knows."""
        row = slice(self.offsets[customer], self.offsets[customer + 1])
        told: dict[str, Any] = {name: self.columns[name][row] for name in COLUMNS}
        told["bought_item_ids"] = [item_ids[place] for place in told["bought_item_ids"].tolist()]
        return {"customer_id": self.customers[customer], **told, **self.recent.get(customer, {})}

    def strengths(self, now: float) -> NDArray[np.float64]:
        """The square root of the purchases of each, halved every 90 days up to *now*."""
        weights = decayed(self.columns["bought_weights"], self.columns["bought_last_at"], now, HISTORY_HALF_LIFE_DAYS)
        found: NDArray[np.float64] = np.sqrt(weights)
        return found

    def owned(self, items: int) -> sp.csr_matrix:
        """Customers by items, ones where bought."""
        places = self.columns["bought_item_ids"]
        return sp.csr_matrix((np.ones(len(places), np.float32), places, self.offsets), shape=(len(self), items))
