"""Why an item is shown, in the customer's words, and which of the customer's own items says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.decision import Positions
from models.recommender.sources import Profile

Told = tuple[str, str, Mapping[str, Any]]
WEAK = 0.05
"""Below this share of the strongest candidate's, what the customer bought does not speak for an item."""


def times(count: float) -> str:
    """How often, in words."""
    return "once" if count < 2 else "twice" if count < 3 else f"{count:.0f} times"


def ago(days: float) -> str:
    """How long ago, in words."""
    whole = int(max(days, 0.0))
    return "today" if whole == 0 else "yesterday" if whole == 1 else f"{whole} days ago"


def rhythm(profile: Profile, slot: int) -> str:
    """How often the customer buys what stands at *slot* of what they hold."""
    interval = float(profile.held.interval_days[slot])
    if np.isfinite(interval) and interval >= 0.5:
        return f"every {max(round(interval), 1)} days" if round(interval) > 1 else "every day"
    return f"{times(float(profile.held.counts[slot]))}, last {ago(float(profile.held.recency_days[slot]))}"


def tell(
    profile: Profile, chosen: Positions, looked_share: NDArray[Any], strength: NDArray[Any], label: Callable[[int], str]
) -> list[Told]:
    """The source that carried each chosen item, why in words, and what it is because of.

    Args:
        chosen: positions on the shelf.
        looked_share: what of each score comes from what the customer looked at, 0 to 1.
        strength: how much what the customer bought speaks for each, beside the strongest candidate.
        label: what to call an item.
    """
    shelf, promoted = profile.shelf, set(profile.query.promoted.values())
    stand_in = shelf.stand_in[chosen]
    mine = profile.slots(chosen.astype(np.int32))
    told: list[Told] = []
    speakers = _speakers(profile, stand_in)
    for n, place in enumerate(chosen.tolist()):
        if shelf.ids[place] in promoted:
            told.append(("promotion", "put forward by the shop", {}))
        elif profile.recipe.order == "trend":
            told.append(_trend(profile, place))
        elif profile.recipe.order == "near":
            told.append(_near(profile, place, label))
        elif looked_share[n] >= 0.5:
            told.append(_looked(profile, place, label))
        elif mine[n] >= 0:
            told.append(("frequency", _bought(profile, int(mine[n])), {}))
        elif place >= shelf.known and shelf.stand_in[place] >= 0:
            like = label(int(stand_in[n]))
            told.append(("newcomer", f"new here, and like {like}", {"because_of": shelf.ids[int(stand_in[n])]}))
        elif speakers[n] >= 0 and strength[n] > WEAK:
            slot = int(speakers[n])
            because = int(profile.held.places[slot])
            text = f"often bought with {label(because)}, which you {_habit(profile, slot)}"
            told.append(("ease", text, {"because_of": shelf.ids[because]}))
        else:
            told.append(("popularity", "popular now", {}))
    return told


def _speakers(profile: Profile, places: NDArray[np.int32]) -> NDArray[np.intp]:
    """The slot of what the customer holds that says most for each place; -1 for none."""
    mine = profile.speakers
    found = np.full(len(places), -1, np.intp)
    known = places >= 0
    if profile.recipe.order != "ranked" or not mine.size or not known.any():
        return found
    found[known] = profile.known.liked.loudest(profile.bench, mine.places, np.sqrt(mine.weights), places[known])
    return np.where(found >= 0, profile.slots(mine.places)[found], -1)


def _habit(profile: Profile, slot: int) -> str:
    count = float(profile.held.counts[slot])
    return f"buy {rhythm(profile, slot)}" if count >= 2 else f"bought {ago(float(profile.held.recency_days[slot]))}"


def _bought(profile: Profile, slot: int) -> str:
    mine = profile.held
    count, last = float(mine.counts[slot]), ago(float(mine.recency_days[slot]))
    if count < 2:
        return f"bought {last}"
    interval = float(mine.interval_days[slot])
    often = f"{rhythm(profile, slot)}, " if np.isfinite(interval) and interval >= 0.5 else ""
    return f"bought {times(count)}, {often}last {last}"


def _trend(profile: Profile, place: int) -> Told:
    local = profile.known.local.get(profile.query.store_id or "")
    if local is not None and place in set(local[0].tolist()):
        return "trend", "sells in this store now", {}
    return ("trend", "more bought than in the weeks before", {}) if profile.shelf.trend[place] > 0 else ("popularity", "popular now", {})


def _looked(profile: Profile, place: int, label: Callable[[int], str]) -> Told:
    if place in profile.viewed:
        return "session", "looked at recently", {}
    nearness = {one: _share(*profile.companions(one), place) for one in profile.bought_now}
    bought = max(nearness, key=lambda one: nearness[one], default=-1)
    closest = _closest(profile, place, list(profile.viewed)) if profile.viewed else -1
    if bought >= 0 and (closest < 0 or nearness[bought] > _share(*profile.alike(closest), place)):
        return "session", f"goes with {label(bought)}, just bought", {"because_of": profile.shelf.ids[bought]}
    return "session", f"like {label(closest)}, looked at recently", {"because_of": profile.shelf.ids[closest]}


def _near(profile: Profile, place: int, label: Callable[[int], str]) -> Told:
    places = profile.near[0]
    at = int(np.searchsorted(places, place))
    if at == len(places) or places[at] != place:
        if place in profile.viewed or place in set(profile.looked[0].tolist()):
            return _looked(profile, place, label)
        return "popularity", "popular now", {}
    if "together" in profile.recipe.sources:
        learnt = np.array([each for each in profile.about if each < profile.shelf.known], np.int32)
        if len(learnt) and place < profile.shelf.known:
            [found] = profile.known.together.loudest(profile.bench, learnt, np.ones(len(learnt), np.float32), np.array([place], np.int32))
            if found >= 0:
                because = int(learnt[found])
                return "together", f"often in one basket with {label(because)}", {"because_of": profile.shelf.ids[because]}
    closest = _closest(profile, place, profile.about)
    return "similar", f"like {label(closest)}", {"because_of": profile.shelf.ids[closest]}


def _closest(profile: Profile, place: int, among: list[int]) -> int:
    """Which of *among* the item is most like."""
    return max(among, key=lambda one: _share(*profile.alike(one), place))


def _share(places: NDArray[Any], shares: NDArray[Any], place: int) -> float:
    return float(shares[places == place].max(initial=0.0))
