"""What an offer model learns from decisions: the features that were served, and whether what reached the customer was redeemed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from scene import NEW_YEAR, TinyShop, customer, event

from features.store.decision_log import DecisionLog
from models.inputs import Input
from models.next_best_offer import PAIR_INPUTS
from models.offers import Offer, OfferBook, Worth
from training.decided import LEAST_OFFERS, LEAST_REDEEMED, WITHIN_DAYS, Decided, is_enough, nothing_decided, read_decided
from training.next_best_offer import OfferTrainer

AT = NEW_YEAR - timedelta(days=60)
DAY = timedelta(days=1)
CUSTOMER = (Input("recency_days"), Input("tenure_days"))
NAMES = [each.name for each in (*CUSTOMER, *PAIR_INPUTS)]
WORTH = Worth(["i1", "i2"], np.array([100.0, 200.0]), np.ones(2), 0.25)


@pytest.fixture
def book() -> OfferBook:
    told = [Offer(name, name, "A", AT - DAY, AT + 90 * DAY, (item,)) for name, item in (("o1", "i1"), ("o2", "i2"))]
    return OfferBook(told, WORTH)


def decide(shop: TinyShop, *said: tuple[str, str, str, dict[str, Any]]) -> None:
    """Log decisions: their name, the card, the offer, and what else is so."""
    shop.add(*(event(f"first-{card}", "purchase", AT - 2 * DAY, card, items=[("i1", 1, 100)]) for card in sorted({s[1] for s in said})))
    log = DecisionLog(shop.home)
    for name, card, offer, more in said:
        log.append(
            {
                "decision_id": name, "kind": "next-best-offer", "customer_id": customer(card), "as_of": more.pop("at", AT), "model": "m/1",
                "feature_at": None, "fallback": None, "request": more.pop("request", {}),
                "features": {"recency_days": 7.0, "tenure_days": 400.0, **more.pop("features", {})},
                "choices": [{"offer_id": offer, "score": 1.0, "source": "priority", "propensity": 0.5}], "assignment": more,
            }
        )  # fmt: skip
    log.close()


def column(rows: np.ndarray, name: str) -> list[float]:
    return [float(value) for value in rows[:, NAMES.index(name)]]


def test_what_reached_somebody_is_a_lesson_with_the_features_that_were_served(tiny: TinyShop, book: OfferBook) -> None:
    bought = {
        "bought_item_ids": ["i2"], "bought_weights": [3.0], "bought_counts": [3], "bought_last_at": [int(AT.timestamp())],
        "bought_first_at": [int(AT.timestamp())],
    }  # fmt: skip
    decide(
        tiny,
        ("sent", "1", "o1", {}),
        ("redeemed", "2", "o2", {"features": {"recency_days": 3.0, **bought}}),
        ("unseen", "3", "o1", {}),
        ("held", "4", "o1", {"held_out": True, "group": "control"}),
        ("looked", "5", "o1", {"request": {"dry_run": True}}),
        ("gone", "6", "o9", {}),
        ("young", "7", "o1", {"at": NEW_YEAR - (WITHIN_DAYS - 1) * DAY}),
    )  # fmt: skip
    names = ("sent", "redeemed", "held", "looked", "gone", "young")
    tiny.add(*(event(f"m-{n}", "message_sent", NEW_YEAR - 20 * DAY if n == "young" else AT + DAY, f"{k}", decision_id=n, channel="email")
               for k, n in zip((1, 2, 4, 5, 6, 7), names, strict=True)))  # fmt: skip
    tiny.add(event("r", "offer_redeem", AT + 5 * DAY, "2", offer_id="o2"))
    found = read_decided(tiny.home, book, CUSTOMER, NEW_YEAR)
    assert found.labels.tolist() == [True, False]
    assert column(found.rows, "recency_days") == [3.0, 7.0]
    assert column(found.rows, "items_bought") == [1.0, 0.0], "what was served then, not what is known now"
    assert found.closed_at.tolist() == [(AT + WITHIN_DAYS * DAY).timestamp()] * 2
    assert found.left_out == {"of which it is not known that they reached anybody": 1, "that the table of offers has no more": 1}


def test_without_decisions_there_is_nothing_to_learn(tiny: TinyShop, book: OfferBook) -> None:
    found = read_decided(tiny.home, book, CUSTOMER, NEW_YEAR)
    assert (found.rows.shape, len(found.labels)) == ((0, len(NAMES)), 0)


def lessons(offers: int, redeemed: int, closed: Sequence[float] | None = None) -> Decided:
    rows = np.full((offers, len(NAMES)), 2.0)
    rows[:redeemed, NAMES.index("recency_days")] = 50.0
    labels = np.arange(offers) < redeemed
    return Decided(rows, labels, np.array(closed) if closed is not None else np.full(offers, AT.timestamp()), {})


def test_few_decisions_tell_nothing_and_only_what_had_come_out_by_then_counts() -> None:
    rows, labels = np.zeros((4, len(NAMES))), np.array([True, False, True, False])
    assert not is_enough(lessons(LEAST_OFFERS - 1, LEAST_REDEEMED).labels)
    assert not is_enough(lessons(LEAST_OFFERS, LEAST_REDEEMED - 1).labels)
    assert is_enough(lessons(LEAST_OFFERS, LEAST_REDEEMED).labels)
    enough = lessons(LEAST_OFFERS, LEAST_REDEEMED)
    assert len(enough.joined_to(rows, labels, AT)[0]) == LEAST_OFFERS + 4
    assert len(enough.joined_to(rows, labels, AT - DAY)[0]) == 4, "nobody knew that yet"
    half = lessons(2 * LEAST_OFFERS, LEAST_REDEEMED, [(AT + k * DAY).timestamp() for k in (0, 9) for _ in range(LEAST_OFFERS)])
    assert len(half.joined_to(rows, labels, AT + DAY)[0]) == LEAST_OFFERS + 4


def test_the_model_goes_by_what_was_decided_once_that_is_enough() -> None:
    rng = np.random.default_rng(2)
    rows = np.abs(rng.normal(size=(400, len(NAMES))))
    labels = rng.random(400) < 0.2
    asked = np.full((1, len(NAMES)), 2.0)
    asked[0, NAMES.index("recency_days")] = 50.0

    def told(decided: Decided) -> float:
        trainer = OfferTrainer(CUSTOMER, WORTH, "USD", (), 0, decided)
        return float(trainer.fit("logistic", rows, labels, AT).predict(asked)[0])

    assert told(lessons(3_000, 300)) > 0.8, "with that recency every decided offer was redeemed"
    assert told(lessons(3_000, 300)) > told(nothing_decided(len(NAMES))) + 0.3
