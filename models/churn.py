"""Churn: the probability that a customer stays away for the whole horizon, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.probability import Boosted, Floats, Logistic, ProbabilityModel, load_sealed, save_sealed
from models.reasons import strongest

KIND = "churn"
FEATURES: tuple[str, ...] = (
    "recency_days", "tenure_days", "visit_days_7", "visit_days_14", "visit_days_28", "visit_days_56", "visit_days_91",
    "visit_days_182", "baskets_28", "baskets_91", "spend_minor_28", "spend_minor_91", "spend_minor_182", "lines_28",
    "lines_91", "gap_mean_days", "gap_sd_days", "gap_p90_days", "gap_max_days", "gap_last_days", "recency_over_gap_mean",
    "recency_over_gap_p90", "visit_trend", "spend_trend", "basket_minor_91", "discount_share_91", "coupon_minor_182",
    "private_share_91", "weekend_share_91", "evening_share_91", "stores_91", "departments_91", "categories_91", "items_91",
    "messages_91", "redemptions_182",
)  # fmt: skip
MONOTONE = {"recency_days": 1, "visit_days_28": -1, "visit_days_56": -1, "visit_days_91": -1, "visit_days_182": -1}
MIN_VISIT_DAYS = 3
MAX_RECENCY_DAYS = 91


def eligible(row: Mapping[str, Any]) -> str | None:
    """None if the question makes sense for this customer, else why it does not."""
    if row.get("recency_days") is None or np.isnan(row["recency_days"]):
        return "no purchase is known of this customer"
    if row["recency_days"] > MAX_RECENCY_DAYS:
        return f"no visit in the last {MAX_RECENCY_DAYS} days: already gone"
    if row["visit_days_total"] < MIN_VISIT_DAYS:
        return f"fewer than {MIN_VISIT_DAYS} visit days so far: too new to tell"
    return None


class Churn:
    """One fitted probability model over ``FEATURES`` and the horizon that it answers for."""

    def __init__(self, model: ProbabilityModel, horizon_days: int, currency: str) -> None:
        self.model, self.horizon_days, self.currency = model, horizon_days, currency

    @classmethod
    def fit(cls, kind: str, rows: Floats, labels: NDArray[Any], horizon_days: int, currency: str, seed: int = 0) -> Churn:
        """Fit the model of that *kind*: ``logistic`` or ``lightgbm``."""
        if kind == "logistic":
            return cls(Logistic.fit(rows, labels), horizon_days, currency)
        directions = [MONOTONE.get(name, 0) for name in FEATURES]
        return cls(Boosted.fit(rows, labels, seed, monotone=directions), horizon_days, currency)

    def predict(self, rows: Floats) -> Floats:
        """One probability a row of ``matrix``."""
        return self.model.predict(rows)

    def answer(self, row: Mapping[str, Any]) -> tuple[float, list[Mapping[str, Any]]]:
        """The probability for one customer and the reasons, strongest first."""
        values = matrix([row])
        contributions = self.model.contributions(values)[0]
        return float(self.model.predict(values)[0]), strongest(FEATURES, values[0], contributions, self.currency)

    def save(self, folder: Path) -> None:
        """Write a sealed folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_sealed(folder, KIND, self.model, FEATURES, horizon_days=self.horizon_days, currency=self.currency)

    @classmethod
    def load(cls, folder: Path) -> Churn:
        """Read what ``save`` wrote.

        Raises:
            DamagedArtifactError: a file is missing or altered.
            ValueError: the model was trained on other features than this code computes.
        """
        model, about = load_sealed(folder, KIND, FEATURES)
        return cls(model, about["horizon_days"], about["currency"])


def matrix(rows: Sequence[Mapping[str, Any]]) -> Floats:
    """Feature rows as floats in the order of ``FEATURES``; None becomes NaN."""
    return np.array([[_number(row[name]) for name in FEATURES] for row in rows], dtype=np.float64).reshape(-1, len(FEATURES))


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
