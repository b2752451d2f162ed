"""Next best offer: which campaign a customer is likely to answer, which of its coupons fits them, and what that is worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.artifact import read_arrays, read_ids, write_arrays, write_ids
from models.decay import HISTORY_HALF_LIFE_DAYS
from models.decision import NO_PERMISSION, Pipeline, Positions, Query, may_reach_her
from models.inputs import Input, matrix
from models.kind import ModelKind
from models.offers import Offer, OfferBook, Worth
from models.probability import Boosted, Floats, Logistic, ProbabilityModel, load_sealed, save_sealed, shifted
from models.reasons import strongest
from models.slate import SlateSelector

STRENGTH = 0.02
"""The inverse of the logistic model's penalty; chosen on the campaigns before the tests."""
STOPGAP = "kept for where nothing else may be offered"
PAIR_INPUTS: tuple[Input, ...] = (
    Input("affinity", "buys the promoted items (weight {:.1f})"),
    Input("affinity_share", "{:.0%} of recent purchases are promoted items", high=1.0),
    Input("best_affinity", "buys the items of the best coupon (weight {:.1f})"),
    Input("items_bought", "has bought {:.0f} of the promoted items"),
    Input("purchases_of_items", "bought promoted items {:.0f} times"),
    Input("affinity_with_coupons", "buys the promoted items with coupons (weight {:.1f})"),
    Input("items_offered", "{:.0f} items promoted"),
    Input("coupons", "{:.0f} coupons in the campaign"),
    Input("duration_days", "the campaign runs {:.0f} days"),
    Input("broad", either=("a targeted campaign", "a broad campaign")),
)
"""What is computed of a customer and a campaign; a model's other inputs are features of the customer. A model may take a part of them."""


TREES: Mapping[str, float] = {"num_leaves": 6, "trees": 150}
"""In which settings its trees differ from ``Boosted.DEFAULTS``: there are fewer rows to learn from."""


@dataclass(frozen=True)
class OfferContext:
    """A query's context: how well each offer fits, and the model's answer for each campaign in force."""

    query: Query
    candidates: Positions
    affinity: Floats
    probability: Floats
    """By campaign position; zero where the campaign is not in force."""
    rows: Floats
    """By campaign position; the model's input."""
    known: bool


class NextBestOffer:
    """One fitted probability model over features of the customer and of the pair, and what items were worth when it was trained.

    Its log-odds are moved by ``shifts``, one for targeted campaigns and one for broad ones: by how much models have missed those.
    """

    def __init__(
        self,
        model: ProbabilityModel,
        customer: Sequence[Input],
        worth: Worth,
        currency: str,
        broad_types: Sequence[str] = (),
        shifts: tuple[float, float] = (0.0, 0.0),
        pair: Sequence[Input] = PAIR_INPUTS,
    ) -> None:
        self.model, self.worth, self.currency, self.broad_types = model, worth, currency, tuple(broad_types)
        self.shifts = shifts
        self.customer, self.pair = tuple(customer), tuple(pair)
        self.inputs = (*self.customer, *self.pair)
        self._broad = [each.name for each in self.inputs].index("broad")

    @classmethod
    def fit(
        cls,
        kind: str,
        rows: Floats,
        labels: NDArray[Any],
        customer: Sequence[Input],
        worth: Worth,
        currency: str,
        broad_types: Sequence[str] = (),
        seed: int = 0,
        shifts: tuple[float, float] = (0.0, 0.0),
        settings: Mapping[str, float] | None = None,
    ) -> NextBestOffer:
        """Fit the model of that *kind*: ``logistic`` or ``lightgbm``; *customer* names the inputs before those of the pair.

        The trees take *settings* in place of those of ``TREES``.
        """
        if kind == "logistic":
            return cls(Logistic.fit(rows, labels, STRENGTH), customer, worth, currency, broad_types, shifts)
        return cls(Boosted.fit(rows, labels, seed, settings={**TREES, **(settings or {})}), customer, worth, currency, broad_types, shifts)

    def book(self, offers: Iterable[Offer]) -> OfferBook:
        """The offers as this model sees them."""
        return OfferBook(offers, self.worth, self.broad_types)

    def predict(self, rows: Floats) -> Floats:
        """The probability that the campaign of each row is redeemed."""
        broad = rows[:, self._broad] > 0
        return shifted(self.model.predict(rows), np.where(broad, self.shifts[1], self.shifts[0]))

    def predict_frame(self, frame: pd.DataFrame, params: Mapping[str, Any]) -> Floats:
        """One probability a row of a frame of customers' and pairs' features."""
        return self.predict(frame[[each.name for each in self.inputs]].to_numpy(dtype=np.float64))

    def contributions(self, rows: Floats) -> Floats:
        """What each input adds to the log-odds of each row."""
        return self.model.contributions(rows)

    def pipeline(self, book: OfferBook) -> Pipeline[OfferContext]:
        """The pipeline over the offers of *book*: in force, the best coupon of each campaign, probability times margin."""
        return Pipeline(
            ids=book.offer_ids,
            prepare=lambda query: self._context(book, query),
            source=lambda context: context.candidates,
            filters=[
                (STOPGAP, lambda context, candidates: book.is_fallback[candidates] == context.query.stopgap),
                ("attribute", lambda context, candidates: _has_attributes(book, context, candidates)),
                ("excluded", lambda context, candidates: _not_among(book, context.query.exclude_ids, candidates)),
                (NO_PERMISSION, lambda context, candidates: _permitted(book, context, candidates)),
                ("another coupon of its campaign fits better", lambda context, candidates: _best_coupon(book, context, candidates)),
            ],
            scorers=[("priority", lambda context, candidates: self._priority(book, context, candidates))],
            selector=SlateSelector(lambda candidates: book.category_of[candidates]),
            explain=lambda context, chosen, shares: self._explain(book, context, chosen),
            fallback=lambda context: None if context.known else "nothing is known of this customer yet: average probabilities",
        )

    def _context(self, book: OfferBook, query: Query) -> OfferContext:
        candidates = book.in_force(query.as_of)
        campaigns = np.unique(book.campaign_of[candidates])
        rows = np.zeros((len(book.campaign_ids), len(self.inputs)))
        probability = np.zeros(len(book.campaign_ids))
        if len(campaigns):
            rows[campaigns] = pair_rows(book, self.customer, self.pair, query.row, query.as_of, campaigns)
            probability[campaigns] = self.predict(rows[campaigns])
        return OfferContext(
            query, candidates, coupon_affinity(book, query.row, query.as_of), probability, rows, query.row.get("tenure_days") is not None
        )

    def _priority(self, book: OfferBook, context: OfferContext, candidates: Positions) -> Floats:
        """What an offer is expected to bring, in minor units: probability x (margin - cost) x lever x the caller's factors, less what it
        costs to send; a part that the query leaves out counts as 1, a cost as 0.
        """
        query = context.query
        score = np.ones(len(candidates))
        if "value" not in query.without:
            score *= book.margin_minor[candidates]
            if "cost" not in query.without:
                score -= book.cost_minor[candidates]
        if "probability" not in query.without:
            score *= context.probability[book.campaign_of[candidates]]
        if "lever" not in query.without:
            score *= book.lever[candidates]
        for name, factor in query.factors.items():
            if name not in query.without:
                score *= factor[candidates]
        return score - (0.0 if query.without & {"cost", "value"} else query.costs)

    def _explain(self, book: OfferBook, context: OfferContext, chosen: Positions) -> list[tuple[str, str, Mapping[str, Any]]]:
        told: list[tuple[str, str, Mapping[str, Any]]] = []
        for position in chosen:
            offer, campaign = book.offers[position], book.campaign_of[position]
            row = context.rows[campaign : campaign + 1]
            reasons = strongest(self.inputs, row[0], self.model.contributions(row)[0], self.currency)
            said = [str(r["text"]) for r in reasons if r["effect"] == "raises"] or [str(r["text"]) for r in reasons]
            details = {
                "campaign_id": offer.campaign_id,
                "kind": offer.kind,
                "stage": offer.stage,
                "title": offer.title,
                "text": offer.text,
                "channel": context.query.channel,
                "benefit_percent": offer.benefit_percent,
                "benefit_minor": offer.benefit_minor,
                "probability": float(context.probability[campaign]),
                "margin_minor": round(float(book.margin_minor[position])),
                "cost_minor": round(float(book.cost_minor[position])),
                "sending_minor": context.query.costs,
                "lever": offer.lever,
                "factors": {name: float(factor[position]) for name, factor in context.query.factors.items()},
                "affinity": float(context.affinity[position]),
                "reasons": reasons,
            }
            told.append(("priority", "; ".join(said), details))
        return told

    def save(self, folder: Path) -> None:
        """Write a sealed folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_ids(folder / "item_ids.json", self.worth.item_ids)
        write_arrays(folder / "worth.npz", price_minor=self.worth.price_minor, purchases=self.worth.purchases)
        about = {"currency": self.currency, "margin_rate": self.worth.margin_rate, "broad_types": list(self.broad_types)}
        save_sealed(folder, KIND.name, self.model, self.inputs, shifts=self.shifts, **about)

    @classmethod
    def load(cls, folder: Path) -> NextBestOffer:
        """Read what ``save`` wrote; what is not computed of the pair is taken for a feature of the customer.

        A model of the time before models were moved stays as it is.

        Raises:
            DamagedArtifactError: a file is missing or altered.
        """
        model, inputs, about = load_sealed(folder, KIND.name)
        computed = {each.name for each in PAIR_INPUTS}
        customer = [each for each in inputs if each.name not in computed]
        pair = [each for each in inputs if each.name in computed]
        arrays = read_arrays(folder / "worth.npz")
        worth = Worth(read_ids(folder / "item_ids.json"), arrays["price_minor"], arrays["purchases"], about["margin_rate"])
        targeted, broad = about.get("shifts", (0.0, 0.0))
        return cls(model, customer, worth, about["currency"], about["broad_types"], (targeted, broad), pair)


def pair_rows(
    book: OfferBook,
    customer: Sequence[Input],
    pair: Sequence[Input],
    row: Mapping[str, Any],
    as_of: datetime,
    campaigns: Sequence[int] | NDArray[np.intp],
) -> Floats:
    """A model's input for one customer and each of *campaigns* (positions): the *customer* inputs, then those of the *pair*."""
    chosen = np.asarray(campaigns, dtype=np.intp)
    weights, counts, everything = book.history_on_items(row, as_of, HISTORY_HALF_LIFE_DAYS)
    incidence = book.by_campaign[chosen]
    affinity = np.asarray(incidence @ weights)
    per_offer = np.asarray(book.by_offer @ weights)
    best_of = np.full(len(book.campaign_ids), -np.inf)
    np.maximum.at(best_of, book.campaign_of, per_offer)
    best = best_of[chosen]
    pairs = {
        "affinity": affinity,
        # rounding alone could bring it above 1
        "affinity_share": np.minimum(affinity / everything, 1.0) if everything else np.zeros(len(chosen)),
        "best_affinity": best,
        "items_bought": np.asarray(incidence @ (counts > 0)),
        "purchases_of_items": np.asarray(incidence @ counts),
        "affinity_with_coupons": np.asarray(incidence @ (weights * book.with_coupons(row, counts))),
        "items_offered": book.items_offered[chosen],
        "coupons": book.coupons[chosen],
        "duration_days": book.duration_days[chosen],
        "broad": book.broad[chosen],
    }
    rows = np.empty((len(chosen), len(customer) + len(pair)))
    rows[:, : len(customer)] = matrix([{each.name: row.get(each.name) for each in customer}], customer)
    rows[:, len(customer) :] = np.column_stack([pairs[each.name] for each in pair])
    return rows


def coupon_affinity(book: OfferBook, row: Mapping[str, Any], as_of: datetime) -> Floats:
    """How much the customer buys each offer's items, by offer position; how well they sell at all breaks ties."""
    weights, _, _ = book.history_on_items(row, as_of, HISTORY_HALF_LIFE_DAYS)
    return np.asarray(book.by_offer @ weights + 1e-3 * book.popularity / max(float(book.popularity.max(initial=0.0)), 1.0))


def _best_coupon(book: OfferBook, context: OfferContext, candidates: Positions) -> NDArray[np.bool_]:
    campaign, affinity = book.campaign_of[candidates], context.affinity[candidates]
    order = np.lexsort((candidates, -affinity, campaign))
    first = np.ones(len(order), bool)
    first[1:] = campaign[order][1:] != campaign[order][:-1]
    keep = np.zeros(len(candidates), bool)
    keep[order[first]] = True
    return keep


def _has_attributes(book: OfferBook, context: OfferContext, candidates: Positions) -> NDArray[np.bool_]:
    """Whether an offer has what is wished for; one that names no channel goes by every one."""
    include, exclude = context.query.include, context.query.exclude
    kept = book.attributes.keep({name: wish for name, wish in include.items() if name != "channel"}, exclude, candidates)
    if "channel" in include:
        by_any = np.array([not book.offers[k].channels for k in candidates], bool)
        kept &= by_any | book.attributes.keep({"channel": include["channel"]}, {}, candidates)
    return kept


def _permitted(book: OfferBook, context: OfferContext, candidates: Positions) -> NDArray[np.bool_]:
    """An offer goes by one of its own channels, and by the one that the answer goes through."""
    forbidden = context.query.forbidden_channels
    own = np.array([not book.offers[k].channels or not forbidden.issuperset(book.offers[k].channels) for k in candidates], bool)
    return own & may_reach_her(context.query, candidates)


def _not_among(book: OfferBook, ids: frozenset[str], candidates: Positions) -> NDArray[np.bool_]:
    return np.array([book.offer_ids[p] not in ids for p in candidates], dtype=bool)


KIND = ModelKind(
    name="next-best-offer",
    answers="offers",
    question="What should this customer be offered next?",
    views=("customer_activity", "customer_state"),
    folds=("history",),
    metrics=("auc", "average_precision", "lift_at_10pct", "brier"),
    baseline="past redemptions",
    load=NextBestOffer.load,
    # a count is no probability
    unranked=("brier",),
)
