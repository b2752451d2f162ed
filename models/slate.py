"""Which of the scored candidates make up the list: the best, or drawn by known chances; at most one of each group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.decision import Positions, Query, Scores

Groups = NDArray[np.intp]


@dataclass(frozen=True)
class SlateSelector:
    """Fills a list place by place. When asked to explore, each place is drawn from what is left by a softmax of the scores.

    A place's propensity is the chance of its choice given those before it; that of the whole list is their product. With n left, each
    has the chance ``(1 - uniform) * softmax + uniform / n``, so that none is less than ``uniform / n``.

    Attributes:
        groups: the groups of candidates; once one of a group is chosen, the others are out. Codes below 0 are groups of their own.
    """

    groups: Callable[[Positions], Groups]

    def __call__(
        self, context: object, query: Query, candidates: Positions, scores: Scores, rng: np.random.Generator
    ) -> tuple[Positions, Scores]:
        """The picks and the chance that each had of its place."""
        groups = self.groups(candidates)
        if not query.explore:
            best = _one_a_group(np.lexsort((np.arange(len(scores)), -scores)), groups)[: max(query.limit, 0)]
            return best, np.ones(len(best))
        free = np.ones(len(scores), bool)
        picks: list[int] = []
        chances: list[float] = []
        while len(picks) < query.limit and free.any():
            left = np.flatnonzero(free)
            shares = chances_of(scores[left], query.temperature, query.uniform)
            drawn = int(rng.choice(len(left), p=shares)) if len(left) > 1 else 0
            picks.append(int(left[drawn]))
            chances.append(float(shares[drawn]))
            free[left[drawn]] = False
            free &= (groups != groups[left[drawn]]) | (groups < 0)
        return np.array(picks, np.intp), np.array(chances, np.float64)


def chances_of(scores: NDArray[Any], temperature: float, uniform: float) -> Scores:
    """The chance of each of the candidates that are left: they add up to 1, and none is less than ``uniform / n``.

    Scores are told in shares of the largest, so that one temperature fits money of any size.
    """
    unit = float(np.abs(scores).max()) * temperature
    if unit < np.finfo(np.float64).tiny:
        return np.full(len(scores), 1.0 / len(scores))
    # from the best down, so that no exponential overflows, however low the temperature
    told = np.exp((scores - scores.max()) / unit)
    chances: Scores = (1.0 - uniform) * told / told.sum() + uniform / len(scores)
    chances /= chances.sum()
    return chances


def _one_a_group(order: Positions, groups: Groups) -> Positions:
    seen: set[int] = set()
    kept = [k for k in order.tolist() if (group := int(groups[k])) < 0 or not (group in seen or seen.add(group))]  # type: ignore[func-returns-value]
    return np.array(kept, np.intp)
