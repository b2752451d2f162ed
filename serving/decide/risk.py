"""How likely a customer is to leave, by the champion in force, wherever a condition asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.churn import Churn
from models.inputs import matrix

LEAVING = "churn"
"""The kind of model that tells it."""
Champion = tuple[Churn, float | None]


class ChurnRisk:
    """Asks the champion. It is asked for no customer whose conditions do not name it.

    Args:
        champion: the champion of the moment and the base rate that it was trained on; None where there is none.
    """

    def __init__(self, champion: Callable[[], Champion | None]) -> None:
        self._champion = champion

    @property
    def usual(self) -> float | None:
        """The share of customers who left, where the champion was trained."""
        found = self._champion()
        return None if found is None else found[1]

    def probability(self, row: Mapping[str, Any]) -> float | None:
        """How likely the customer of a row is to leave; None where the question makes no sense, or nobody can tell."""
        return self.probabilities([row])[0]

    def probabilities(self, rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """As ``probability``, for many at once."""
        found = self._champion()
        if found is None:
            return [None] * len(rows)
        model = found[0]
        asked = [k for k, row in enumerate(rows) if all(name in row for name in self._names(model)) and model.why_not(row) is None]
        told: list[float | None] = [None] * len(rows)
        if asked:
            values = model.predict(matrix([rows[k] for k in asked], model.inputs))
            for k, value in zip(asked, np.asarray(values, np.float64).tolist(), strict=True):
                told[k] = value
        return told

    @staticmethod
    def _names(model: Churn) -> list[str]:
        return [each.name for each in model.inputs]
