"""The last stage of a list: kinds apart, what the shop promotes in its place, another selection each week."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from models.decision import LastSlotExplorer, Positions, Query, Scores, top
from models.recommender.sources import Profile

POOL = 5
"""Of how many candidates for each place a list that changes from week to week draws."""
TEMPERATURE = 0.5
"""How far the draw of a week may depart from the order, in units of the logarithm of the score."""


@dataclass(frozen=True)
class Arranger:
    """Puts scored candidates into their places."""

    explorer: LastSlotExplorer = field(default_factory=LastSlotExplorer)

    def __call__(
        self, profile: Profile, query: Query, candidates: Positions, scores: Scores, rng: np.random.Generator
    ) -> tuple[Positions, Scores]:
        """The picks and the chance that each had of its place.

        What is pinned or promoted and the selection of a week are certain, given the question.
        """
        if not len(candidates):
            return np.empty(0, np.intp), np.empty(0)
        wanted = query.limit + (self.explorer.pool if query.explore else 0)
        if profile.recipe.rotates:
            scores = _of_the_week(query, profile, candidates, scores)
        ranked = top(scores, wanted)
        if query.diversity > 0:
            ranked = apart(scores, profile.shelf.family[candidates], wanted, query.diversity)
        if not query.promoted and not query.pinned:
            return self.explorer.pick(ranked, query, rng)
        index = {profile.shelf.ids[place]: k for k, place in enumerate(candidates.tolist())}
        fixed = {place: index[item] for place, item in sorted(placed(query, index).items())}
        free = ranked[~np.isin(ranked, list(fixed.values()))]
        room = query.limit - len(fixed)
        drawn, chances = self.explorer.pick(free, replace(query, limit=room), rng)
        return _with_promoted(fixed, drawn, chances)


def apart(scores: Scores, families: NDArray[np.int32], limit: int, diversity: float) -> Positions:
    """The *limit* best, taken one by one; each further one of a family keeps ``1 - diversity`` of its score once more.

    Families below 0 are nobody's. With all scores positive this is greedy maximization of a sum with diminishing returns.
    """
    left = scores - min(float(scores.min(initial=0.0)), 0.0)
    keep = 1.0 - diversity
    picks = np.empty(min(limit, len(scores)), np.intp)
    for place in range(len(picks)):
        best = int(np.argmax(left))
        picks[place] = best
        left[best] = -1.0
        if families[best] >= 0:
            same = (families == families[best]) & (left >= 0)
            left[same] *= keep
    return picks


def _of_the_week(query: Query, profile: Profile, candidates: Positions, scores: Scores) -> Scores:
    """The scores with a draw that holds for one customer and calendar week: sampling without replacement by the Gumbel trick.

    Kool et al., "Stochastic Beams and Where to Find Them", ICML 2019, section 2. Drawn by item, not by position: the same items
    come whatever else is on the shelf.
    """
    year, week, _ = query.as_of.isocalendar()
    best = top(scores, POOL * query.limit)
    drawn = np.full(len(scores), -np.inf)
    for at in best.tolist():
        name = f"{query.customer_id}/{year}/{week}/{profile.shelf.ids[candidates[at]]}"
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big") / 2.0**56
        drawn[at] = np.log(max(scores[at], 1e-9)) - TEMPERATURE * np.log(-np.log(min(max(number, 1e-12), 1 - 1e-12)))
    floor = float(drawn[best].min())
    behind = np.exp(floor - drawn.max()) * 1e-3 * scores / max(float(scores.max()), 1e-9)
    found: Scores = np.where(np.isfinite(drawn), np.exp(drawn - drawn.max()), behind)
    return found


def placed(query: Query, allowed: Container[str]) -> dict[int, str]:
    """By place in the list, the item that a question puts there, of those *allowed*.

    What is pinned comes before what is promoted. An item that is named twice stands at its first place; one whose place is taken stands
    at the next that nobody claims, and one whose place the list does not reach is chosen like any other.
    """
    found: dict[int, str] = {}
    standing: set[str] = set()
    displaced: list[tuple[int, str]] = []
    for place, item in (*query.pinned, *sorted(query.promoted.items())):
        if item not in allowed or place > query.limit or item in standing:
            continue
        standing.add(item)
        if place in found:
            displaced.append((place, item))
        else:
            found[place] = item
    for place, item in displaced:
        free = next((n for n in range(place + 1, query.limit + 1) if n not in found), None)
        if free is not None:
            found[free] = item
    return found


def _with_promoted(fixed: dict[int, int], drawn: Positions, chances: Scores) -> tuple[Positions, Scores]:
    picks, odds, rest = [], [], list(zip(drawn.tolist(), chances.tolist(), strict=True))
    for place in range(1, len(fixed) + len(rest) + 1):
        if place in fixed:
            picks.append(fixed[place])
            odds.append(1.0)
        elif rest:
            pick, chance = rest.pop(0)
            picks.append(pick)
            odds.append(chance)
    # a promoted item whose place lies beyond the end of a short list comes last
    late = [index for index in fixed.values() if index not in picks]
    return np.array(picks + late, np.intp), np.array(odds + [1.0] * len(late))
