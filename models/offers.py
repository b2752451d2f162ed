"""Offers: what can be offered, when it is in force, on which items, and what it is worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from models.attributes import Attributes
from models.decay import DAY, decayed

ATTRIBUTES = ("campaign_id", "campaign_type", "kind", "stage", "category")
"""By what offers are filtered."""


@dataclass(frozen=True)
class Offer:
    """One offer of one campaign, in force in ``[valid_from, valid_until)``; what is unsaid is None or empty."""

    offer_id: str
    campaign_id: str
    campaign_type: str
    valid_from: datetime
    valid_until: datetime
    item_ids: tuple[str, ...] = ()
    kind: str = "coupon"
    stage: str | None = None
    title: str | None = None
    text: str | None = None
    category: str | None = None
    channels: tuple[str, ...] = ()
    store_ids: tuple[str, ...] = ()
    benefit_percent: float | None = None
    benefit_minor: int | None = None
    cost_minor: int | None = None
    margin_minor: int | None = None
    budget: int | None = None
    stock: int | None = None
    lever: float = 1.0
    eligible: str | None = None
    transactional: bool = False
    fallback: bool = False

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Offer:
        """An offer from a row of the catalogue."""
        told: dict[str, Any] = {name: value for name, value in row.items() if value is not None and name in cls.__dataclass_fields__}
        whole: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
        return cls(**whole)


@dataclass(frozen=True)
class Worth:
    """What items bring in: mean price (minor units) and number of purchases by item, and the assumed margin rate."""

    item_ids: Sequence[str]
    price_minor: NDArray[np.float64]
    purchases: NDArray[np.float64]
    margin_rate: float


class OfferBook:
    """All offers, with the arrays that fit a customer's history to them."""

    def __init__(self, offers: Iterable[Offer], worth: Worth, broad_types: Sequence[str] = ()) -> None:
        self.offers = sorted(offers, key=lambda offer: (offer.campaign_id, offer.offer_id))
        self.offer_ids = [offer.offer_id for offer in self.offers]
        self.campaign_ids = sorted({offer.campaign_id for offer in self.offers})
        self._campaign = {c: k for k, c in enumerate(self.campaign_ids)}
        self.campaign_of = np.array([self._campaign[offer.campaign_id] for offer in self.offers], dtype=np.intp)
        self._item = {i: k for k, i in enumerate(sorted({i for offer in self.offers for i in offer.item_ids}))}
        self.by_offer = self._incidence([offer.item_ids for offer in self.offers])
        self.by_campaign = (self._campaign_rows() @ self.by_offer).sign().tocsr()
        self.valid_from = np.array([offer.valid_from.timestamp() for offer in self.offers])
        self.valid_until = np.array([offer.valid_until.timestamp() for offer in self.offers])
        self.coupons = np.bincount(self.campaign_of, minlength=len(self.campaign_ids)).astype(np.float64)
        self.items_offered = np.diff(self.by_campaign.indptr).astype(np.float64)
        first = [int(np.argmax(self.campaign_of == c)) for c in range(len(self.campaign_ids))]
        self.duration_days = (self.valid_until[first] - self.valid_from[first]) / DAY
        self.types = [self.offers[k].campaign_type for k in first]
        self.broad = np.array([kind in broad_types for kind in self.types], dtype=np.float64)
        self.starts = [self.offers[k].valid_from for k in first]
        estimated, price, self.popularity = self._value(worth)
        own = np.array([np.nan if offer.margin_minor is None else offer.margin_minor for offer in self.offers], dtype=np.float64)
        self.margin_minor = np.where(np.isnan(own), estimated, own)
        self.cost_minor = np.array([_cost(offer, price[k]) for k, offer in enumerate(self.offers)], dtype=np.float64)
        self.lever = np.array([offer.lever for offer in self.offers], dtype=np.float64)
        self.is_fallback = np.array([offer.fallback for offer in self.offers], dtype=bool)
        self.category_of = codes([offer.category for offer in self.offers])
        told = {name: [getattr(offer, name) for offer in self.offers] for name in ATTRIBUTES}
        self.attributes = Attributes.of({**told, "channel": [offer.channels for offer in self.offers]})

    def campaign_position(self, campaign_id: str) -> int:
        """Where a campaign stands among ``campaign_ids``."""
        return self._campaign[campaign_id]

    def in_force(self, as_of: datetime) -> NDArray[np.intp]:
        """Positions of the offers in force at *as_of*."""
        now = as_of.timestamp()
        return np.flatnonzero((self.valid_from <= now) & (self.valid_until > now))

    def history_on_items(self, row: Mapping[str, Any], as_of: datetime, half_life_days: float) -> tuple[Any, Any, float]:
        """The customer's decayed purchase weights and purchase counts on the offered items, and their weight on all items."""
        weights, counts = np.zeros(len(self._item)), np.zeros(len(self._item))
        if row.get("bought_item_ids") is None:
            return weights, counts, 0.0
        faded = decayed(row["bought_weights"], row["bought_last_at"], as_of.timestamp(), half_life_days)
        where = np.array([self._item.get(item, -1) for item in row["bought_item_ids"]], dtype=np.intp)
        known = where >= 0
        weights[where[known]] = faded[known]
        counts[where[known]] = np.asarray(row["bought_counts"], dtype=np.float64)[known]
        return weights, counts, float(faded.sum())

    def with_coupons(self, row: Mapping[str, Any], counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Which share of their purchases of each offered item the customer made with a coupon; *counts* are those purchases."""
        shares = np.zeros(len(self._item))
        for item, count in zip(row.get("coupon_item_ids") or (), row.get("coupon_counts") or (), strict=True):
            place = self._item.get(item)
            if place is not None:
                # what was returned is no purchase, though a coupon was used on it
                shares[place] = min(count / max(counts[place], 1.0), 1.0)
        return shares

    def _incidence(self, item_sets: Sequence[Sequence[str]]) -> sp.csr_matrix:
        indices = [self._item[item] for items in item_sets for item in items]
        indptr = np.cumsum([0, *(len(items) for items in item_sets)])
        return sp.csr_matrix((np.ones(len(indices)), indices, indptr), shape=(len(item_sets), len(self._item)))

    def _campaign_rows(self) -> sp.csr_matrix:
        offers = len(self.offers)
        return sp.csr_matrix((np.ones(offers), (self.campaign_of, np.arange(offers))), shape=(len(self.campaign_ids), offers))

    def _value(self, worth: Worth) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Margin of one redemption: the margin rate on the mean price of the items, weighted by their sales; that price; the sales."""
        price, sales = np.zeros(len(self._item)), np.zeros(len(self._item))
        for item_id, item_price, purchases in zip(worth.item_ids, worth.price_minor, worth.purchases, strict=True):
            position = self._item.get(item_id)
            if position is not None:
                price[position], sales[position] = item_price, purchases
        sold = np.asarray(self.by_offer @ sales)
        mean_price = np.divide(self.by_offer @ (price * sales), sold, out=np.zeros(len(sold)), where=sold > 0)
        return mean_price * worth.margin_rate, mean_price, sold


def _cost(offer: Offer, price: float) -> float:
    """What one that is taken costs the shop: as it says, or else what the customer gets."""
    if offer.cost_minor is not None:
        return float(offer.cost_minor)
    if offer.benefit_minor is not None:
        return float(offer.benefit_minor)
    return price * (offer.benefit_percent or 0.0) / 100.0


def codes(words: Sequence[str | None]) -> NDArray[np.intp]:
    """A number a word, equal ones for equal words; what is unsaid has one of its own each time."""
    numbers: dict[str, int] = {}
    own = itertools.count(-1, -1)
    return np.array([next(own) if word is None else numbers.setdefault(word, len(numbers)) for word in words], dtype=np.intp)
