"""Recommendations: what a customer will like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.kind import ModelKind
from models.recommender.listings import LISTINGS


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
