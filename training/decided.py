"""What an offer model learns from the offers that were decided: the features that were served, and whether the offer was redeemed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec
import numpy as np

from features.state.home import Home
from features.state.ports import MissingStateError
from models.inputs import Input
from models.next_best_offer import PAIR_INPUTS, pair_rows
from models.offers import OfferBook
from training.decisions import joined, served

WITHIN_DAYS = 28
"""Within how many days of its decision an offer counts as redeemed."""
REACHED = ("sent", "shown", "clicked", "accepted", "declined", "redeemed")
"""What tells that an offer reached its customer."""
LEAST_OFFERS, LEAST_REDEEMED = 500, 50
"""With fewer offers that reached somebody, or fewer redeemed, nothing is learnt from decisions: campaigns tell more."""


@dataclass(frozen=True)
class Decided:
    """Offers that reached their customers, and whose time to be redeemed has passed.

    Attributes:
        rows: ``(offers, inputs)``, of the features that were served with each.
        labels: whether it was redeemed.
        closed_at: when its time had passed, Unix seconds.
        left_out: why how many were not taken.
    """

    rows: np.ndarray
    labels: np.ndarray
    closed_at: np.ndarray
    left_out: dict[str, int]

    def told(self) -> str:
        """In words, for the report."""
        number, redeemed = len(self.labels), int(self.labels.sum())
        missing = "".join(f"; {count} {why}" for why, count in self.left_out.items() if count)
        if is_enough(self.labels):
            return f"Learnt also from {number} offers that were decided, {redeemed} of them redeemed{missing}."
        least = f"{LEAST_OFFERS} and {LEAST_REDEEMED} are learnt from"
        return f"Decided offers with a known outcome: {number}, {redeemed} of them redeemed; {least}{missing}."

    def joined_to(self, rows: np.ndarray, labels: np.ndarray, moment: datetime) -> tuple[np.ndarray, np.ndarray]:
        """Rows and labels of campaigns, with those of the offers whose time had passed by *moment*, once these are enough."""
        known = self.closed_at <= moment.timestamp()
        if not is_enough(self.labels[known]):
            return rows, labels
        return np.concatenate([rows, self.rows[known]]), np.concatenate([labels, self.labels[known]])


def nothing_decided(inputs: int) -> Decided:
    """Where no decision was logged."""
    return Decided(np.zeros((0, inputs)), np.zeros(0, bool), np.zeros(0), {})


def is_enough(labels: np.ndarray) -> bool:
    """Whether so many offers, and so many redeemed among them, tell anything."""
    return len(labels) >= LEAST_OFFERS and LEAST_REDEEMED <= int(labels.sum()) < len(labels)


def read_decided(home: Home, book: OfferBook, customer: Sequence[Input], until: datetime) -> Decided:
    """The offers that were decided before *until*, reached their customers, and could be redeemed for long enough.

    An offer has reached somebody once an event tells that it was sent, shown, clicked or redeemed. Held-out customers got nothing, and
    dry runs neither. An offer that the table has no more has no items to be compared with.
    """
    inputs = len(customer) + len(PAIR_INPUTS)
    try:
        found = joined(home, until, WITHIN_DAYS).rows
    except MissingStateError:
        return nothing_decided(inputs)
    offered = [row for row in found.to_pylist() if not row["is_item"] and row["closed"] and not row["held_out"] and row["customer_id"]]
    reached = [row for row in offered if any(row[name] for name in REACHED)]
    place = {offer_id: int(book.campaign_of[k]) for k, offer_id in enumerate(book.offer_ids)}
    known = [row for row in reached if row["id"] in place]
    features = served(home, sorted({row["decision_id"] for row in known}))
    rows, labels, closed_at = [], [], []
    for row in known:
        told = msgspec.json.decode(features[row["decision_id"]])
        rows.append(pair_rows(book, customer, PAIR_INPUTS, told, row["as_of"], [place[row["id"]]])[0])
        labels.append(bool(row["redeemed"]))
        closed_at.append(row["as_of"].timestamp() + WITHIN_DAYS * 86_400)
    left_out = {
        "of which it is not known that they reached anybody": len(offered) - len(reached),
        "that the table of offers has no more": len(reached) - len(known),
    }
    if not rows:
        return Decided(np.zeros((0, inputs)), np.zeros(0, bool), np.zeros(0), left_out)
    return Decided(np.array(rows), np.array(labels), np.array(closed_at), left_out)
