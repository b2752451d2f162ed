"""How far a model misses the campaigns that come after it: what its probabilities have to be moved by to be honest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.probability import log_odds

SPREAD_OF_SHIFTS = 0.25
"""How large a lasting shift is expected to be, in log-odds; chosen on the campaigns before the tests."""
SPREAD_OF_CAMPAIGNS = 0.5
"""How much campaigns differ beyond it; chosen likewise."""


def miss(labels: NDArray[np.bool_], foretold: NDArray[np.float64]) -> tuple[float, float]:
    """What must be added to the log-odds of one campaign to meet what happened, held near zero, and how much that tells."""
    logit, added = log_odds(foretold), 0.0
    for _ in range(25):
        now = 1.0 / (1.0 + np.exp(-(logit + added)))
        added += float((labels - now).sum() - added) / (float((now * (1.0 - now)).sum()) + 1.0)
    now = 1.0 / (1.0 + np.exp(-(logit + added)))
    return added, float((now * (1.0 - now)).sum())


def lasting_shift(misses: Sequence[tuple[float, float]]) -> float:
    """What to add to the log-odds of the next campaign, given the misses of those before it.

    A campaign is one draw, however many customers it was sent to: a large one that was missed far says little of the next.
    """
    weights = np.array([1.0 / (SPREAD_OF_CAMPAIGNS**2 + 1.0 / told) for _, told in misses])
    return float(weights @ np.array([added for added, _ in misses]) / (weights.sum() + SPREAD_OF_SHIFTS**-2)) if misses else 0.0
