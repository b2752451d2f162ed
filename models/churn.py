"""Churn: the probability that a customer stays away for the whole horizon, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from numpy.typing import NDArray

from models.eligibility import Eligibility
from models.inputs import Input, matrix
from models.kind import ModelKind, Score
from models.probability import Boosted, Floats, Logistic, ProbabilityModel, load_sealed, save_sealed
from models.reasons import strongest


class Churn:
    """One fitted probability model over its inputs, the horizon that it answers for, and whom it can answer for."""

    unit: Literal["probability", "days"] = "probability"

    def __init__(
        self, model: ProbabilityModel, inputs: Sequence[Input], horizon_days: int, currency: str, eligibility: Eligibility | None = None
    ) -> None:
        self.model, self.inputs, self.horizon_days, self.currency = model, tuple(inputs), horizon_days, currency
        self.eligibility = eligibility or Eligibility()

    @classmethod
    def fit(
        cls,
        kind: str,
        rows: Floats,
        labels: NDArray[Any],
        inputs: Sequence[Input],
        horizon_days: int,
        currency: str,
        seed: int = 0,
        eligibility: Eligibility | None = None,
        settings: Mapping[str, float] | None = None,
    ) -> Churn:
        """Fit the model of that *kind*: ``logistic`` or ``lightgbm``, the trees with *settings* where they are given."""
        if kind == "logistic":
            return cls(Logistic.fit(rows, labels), inputs, horizon_days, currency, eligibility)
        directions = [each.direction for each in inputs]
        return cls(Boosted.fit(rows, labels, seed, monotone=directions, settings=settings), inputs, horizon_days, currency, eligibility)

    @property
    def source(self) -> str:
        """What computed the probability."""
        return self.model.kind

    def why_not(self, row: Mapping[str, Any]) -> str | None:
        """Why the question makes no sense for this customer; None where it does."""
        return self.eligibility.why_not(row)

    def predict(self, rows: Floats) -> Floats:
        """One probability a row."""
        return self.model.predict(rows)

    def predict_frame(self, frame: pd.DataFrame, params: Mapping[str, Any]) -> Floats:
        """One probability a row of a frame of feature rows."""
        return self.predict(matrix(frame.to_dict("records"), self.inputs))

    def contributions(self, rows: Floats) -> Floats:
        """What each input adds to the log-odds of each row."""
        return self.model.contributions(rows)

    def answer(self, row: Mapping[str, Any]) -> Score:
        """The probability for one customer and the reasons, strongest first."""
        values = matrix([row], self.inputs)
        contributions = self.model.contributions(values)[0]
        return Score(float(self.model.predict(values)[0]), strongest(self.inputs, values[0], contributions, self.currency))

    def save(self, folder: Path) -> None:
        """Write a sealed folder."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {"horizon_days": self.horizon_days, "currency": self.currency, "eligibility": self.eligibility}
        save_sealed(folder, KIND.name, self.model, self.inputs, **about)

    @classmethod
    def load(cls, folder: Path) -> Churn:
        """Read what ``save`` wrote.

        Raises:
            DamagedArtifactError: a file is missing or altered.
        """
        model, inputs, about = load_sealed(folder, KIND.name)
        return cls(model, inputs, about["horizon_days"], about["currency"], Eligibility.from_about(about))


KIND = ModelKind(
    name="churn",
    answers="score",
    question="Is this customer about to leave?",
    views=("customer_activity",),
    metrics=("auc", "average_precision", "lift_at_10pct", "brier"),
    baseline="recency",
    load=Churn.load,
    # recency is no probability
    unranked=("brier",),
)
