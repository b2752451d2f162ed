"""Recommendations: what a customer will like."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from models.kind import ModelKind

Listing = Literal[
    "for_you", "also_like", "similar", "bought_together", "buy_again", "up_sell", "trending", "basket", "session", "email"
]  # fmt: skip
"""Every list that can be asked for; ``models.recommender.recipes`` tells what each holds."""
LISTINGS = ("for_you", "also_like")
"""The lists that are judged by what customers buy next."""


def _load(folder: Path) -> Any:
    # implicit and SciPy are needed to answer, not to know what there is
    from models.recommender.recommender import Recommender

    return Recommender.load(folder)


KIND = ModelKind(
    name="recommendations",
    answers="items",
    question="What will this customer like?",
    views=("customer_state",),
    folds=("history", "cart"),
    metrics=tuple(f"{measure}_{listing}" for measure in ("ndcg_at_10", "recall_at_10", "mrr") for listing in LISTINGS),
    baseline="popularity",
    load=_load,
)
Learner = Literal["EASE", "ALS"]
"""What learns which items speak for which; it stands in reports and modes under EASE, whichever it is."""
