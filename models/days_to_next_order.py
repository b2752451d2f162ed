"""Days to the next order: when a customer is as likely to have come again as not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.artifact import read_arrays, seal, verify, write_arrays
from models.eligibility import Eligibility
from models.inputs import Input, matrix, read_inputs
from models.kind import ModelKind, Score
from models.probability import Floats, Logistic
from models.reasons import strongest

STEPS = (1, 2, 3, 5, 7, 10, 14, 21, 28, 42, 56, 84, 112, 168, 252, 364)
"""After how many days the chance of having come again is learnt, as far as the horizon reaches."""
_ARRAYS = ("medians", "means", "scales", "weights")


class DaysToNextOrder:
    """The chance of having ordered again after each of ``steps`` days, and the day on which it passes one half."""

    unit: Literal["probability", "days"] = "days"
    source = "logistic"

    def __init__(
        self,
        chances: Sequence[Logistic],
        steps: Sequence[int],
        horizon_days: int,
        inputs: Sequence[Input],
        currency: str,
        eligibility: Eligibility,
    ) -> None:
        self.chances, self.steps, self.inputs = list(chances), tuple(steps), tuple(inputs)
        self.horizon_days, self.currency, self.eligibility = horizon_days, currency, eligibility

    @classmethod
    def fit(
        cls, rows: Floats, days: NDArray[Any], inputs: Sequence[Input], horizon_days: int, currency: str, eligibility: Eligibility
    ) -> DaysToNextOrder:
        """Fit one logistic model a step on *days* until the next order, *horizon_days* where none came within it."""
        steps = [step for step in STEPS if step < horizon_days] + [horizon_days]
        # a step by which all or nobody had come tells nothing
        told = [step for step in steps if 0 < int((days < step).sum()) < len(days)]
        if not told:
            raise ValueError(f"within {horizon_days} days all customers, or none, ordered again: choose another horizon")
        return cls([Logistic.fit(rows, days < step) for step in told], told, horizon_days, inputs, currency, eligibility)

    def why_not(self, row: Mapping[str, Any]) -> str | None:
        """Why the question makes no sense for this customer; None where it does."""
        return self.eligibility.why_not(row)

    def curve(self, rows: Floats) -> Floats:
        """The chance of having ordered again by each step, never falling; shape ``(rows, steps)``."""
        return np.maximum.accumulate(np.column_stack([each.predict(rows) for each in self.chances]), axis=1)

    def predict(self, rows: Floats) -> Floats:
        """The day on which the chance passes one half, between two steps on a straight line; the horizon where it never does."""
        curve = np.column_stack([np.zeros(len(rows)), self.curve(rows)])
        steps = np.array([0, *self.steps], dtype=np.float64)
        after = np.argmax(curve >= 0.5, axis=1)
        found = np.full(len(rows), float(self.horizon_days))
        some = np.flatnonzero(after > 0)
        low, high = curve[some, after[some] - 1], curve[some, after[some]]
        share = (0.5 - low) / np.maximum(high - low, 1e-12)
        found[some] = steps[after[some] - 1] + share * (steps[after[some]] - steps[after[some] - 1])
        return found

    def predict_frame(self, frame: pd.DataFrame, params: Mapping[str, Any]) -> Floats:
        """The days of each row of a frame of feature rows."""
        return self.predict(matrix(frame.to_dict("records"), self.inputs))

    def contributions(self, rows: Floats) -> Floats:
        """What each input adds to the log-odds of not having come again yet, the mean of the steps."""
        return np.asarray(-np.mean([each.contributions(rows) for each in self.chances], axis=0))

    def answer(self, row: Mapping[str, Any]) -> Score:
        """The days for one customer and what lengthens or shortens them, strongest first."""
        values = matrix([row], self.inputs)
        reasons = strongest(self.inputs, values[0], self.contributions(values)[0], self.currency)
        return Score(float(self.predict(values)[0]), reasons)

    def save(self, folder: Path) -> None:
        """Write a sealed folder."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.stack([getattr(each, name) for each in self.chances]) for name in _ARRAYS}
        write_arrays(folder / "steps.npz", **arrays, intercept=np.array([each.intercept for each in self.chances]))
        about = {
            "steps": self.steps, "horizon_days": self.horizon_days, "inputs": self.inputs, "currency": self.currency,
            "eligibility": self.eligibility,
        }  # fmt: skip
        (folder / "days_to_next_order.json").write_bytes(msgspec.json.encode(about))
        seal(folder, KIND.name)

    @classmethod
    def load(cls, folder: Path) -> DaysToNextOrder:
        """Read what ``save`` wrote.

        Raises:
            DamagedArtifactError: a file is missing or altered.
        """
        verify(folder, KIND.name)
        arrays = read_arrays(folder / "steps.npz")
        about = msgspec.json.decode((folder / "days_to_next_order.json").read_bytes())
        medians, means, scales, weights = (arrays[name] for name in _ARRAYS)
        chances = [
            Logistic(medians[k], means[k], scales[k], weights[k], float(intercept)) for k, intercept in enumerate(arrays["intercept"])
        ]
        eligibility = Eligibility.from_about(about)
        return cls(chances, about["steps"], about["horizon_days"], read_inputs(about), about["currency"], eligibility)


KIND = ModelKind(
    name="days-to-next-order",
    answers="score",
    question="In how many days will this customer have ordered again, as likely as not?",
    views=("customer_activity",),
    metrics=("mae_days", "within_3_days"),
    baseline="the better simple rule",
    load=DaysToNextOrder.load,
)
