"""How old purchases fade: each is halved every so many days."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DAY = 86_400.0
HISTORY_HALF_LIFE_DAYS = 90.0
"""At which the weights of the fold ``history`` are halved."""


def decayed(
    weights: Sequence[float] | NDArray[Any], last_at: Sequence[int] | NDArray[Any], now: float, half_life_days: float
) -> NDArray[np.float64]:
    """Weights as they stand *now*, given each one's value at its own last moment (Unix seconds)."""
    ages = now - np.asarray(last_at, np.float64)
    return np.asarray(weights, np.float64) * np.exp2(-ages / (DAY * half_life_days))
