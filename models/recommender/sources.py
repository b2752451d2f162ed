"""Retrieval: what one question knows of its customer, and the sources that give its candidates by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.decision import Positions, Query
from models.recommender.kernels import Bench, Floats, Places, strongest
from models.recommender.neighbours import Neighbours
from models.recommender.owned import Owned
from models.recommender.recipes import Recipe, Source
from models.recommender.shelf import Shelf

HELD_DEPTH = 60
"""How many of the items that a customer bought are asked whether they come next."""
SPEAKERS_DEPTH = 200
"""How many of the items that a customer bought speak for others, those bought most and last: what a request costs has a bound."""
VIEWED_DEPTH = 20
POPULAR_DEPTH = 20
NEWCOMERS_DEPTH = 10
NEAR_DEPTH = 200


@dataclass(frozen=True)
class Known:
    """What a model has learnt that its sources read by key.

    Attributes:
        liked: which items speak for which, by EASE.
        together: which lie in the same baskets.
        similar: which could take each other's place.
        local: by store, what sells there now: places and how much, most first.
    """

    liked: Neighbours
    together: Neighbours
    similar: Neighbours
    local: Mapping[str, tuple[Places, Floats]]


@dataclass
class Profile:
    """One question, with what is known of its customer by catalogue position.

    Attributes:
        viewed: how fresh the customer's interest in an item is.
        bought_now: how fresh the purchase of an item in this visit is.
        about: the items that the question is about.
        alike: gives the items most like one, and how like.
        fallback: why the answer is general, if it is.
    """

    query: Query
    recipe: Recipe
    held: Owned
    viewed: Mapping[int, float]
    bought_now: Mapping[int, float]
    about: list[int]
    known: Known
    shelf: Shelf
    bench: Bench
    alike: Callable[[int], tuple[Places, Floats]]
    fallback: str | None = None

    @cached_property
    def learnt(self) -> Owned:
        """What is held of the items that the model knows."""
        inside = self.held.places < self.shelf.known
        return self.held if inside.all() else self.held.where(inside)

    @cached_property
    def speakers(self) -> Owned:
        """What of it speaks for other items."""
        mine = self.learnt
        return mine if mine.size <= SPEAKERS_DEPTH else mine.where(strongest(mine.weights, mine.places, SPEAKERS_DEPTH))

    def slots(self, places: Places) -> NDArray[np.intp]:
        """Where each of *places* stands in what is held; -1 for what is not."""
        counted = np.arange(1, self.held.size + 1, dtype=np.float32)[None, :]
        found: NDArray[np.intp] = self.bench.look_up(self.held.places, counted, places)[0].astype(np.intp) - 1
        return found

    @cached_property
    def reached(self) -> tuple[Places, Floats]:
        """What speaks for which item: all that was bought alike, and by how lately it was bought; ``(2, items)``."""
        mine = self.speakers
        strengths = np.empty((2, mine.size), np.float32)
        strengths[0], strengths[1] = 1.0, np.sqrt(mine.weights)
        return self.known.liked.spread(self.bench, mine.places, strengths)

    @cached_property
    def reached_new(self) -> Floats:
        """The same with nothing for what is held."""
        return self.bench.without(*self.reached, self.learnt.places)

    @cached_property
    def looked(self) -> tuple[Places, Floats]:
        """How like each item is to what was looked at lately, or how well it goes with what was just bought, times how fresh that is.

        An item looked at is most like itself.
        """
        looked = closest([(place, fresh, self.alike(place)) for place, fresh in self.viewed.items()])
        if not self.bought_now:
            return looked
        goes_with = [(*self.companions(place), fresh) for place, fresh in self.bought_now.items()]
        return greatest([looked, *((places, nearness * np.float32(fresh)) for places, nearness, fresh in goes_with)])

    def companions(self, place: int) -> tuple[Places, Floats]:
        """What lies in the same baskets as an item, 1 for the first."""
        if place >= self.shelf.known:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        places, nearness = self.known.together.of(place)
        return places, nearness / max(float(nearness.max(initial=0.0)), 1e-9)

    @cached_property
    def near(self) -> tuple[Places, Floats]:
        """How near each item is to those asked about, what is bought with them and what is like them, as the recipe says; 1 at most."""
        parts: list[tuple[Places, Floats]] = []
        learnt = np.array([place for place in self.about if place < self.shelf.known], np.int32)
        if "together" in self.recipe.sources and len(learnt):
            places, sums = self.known.together.spread(self.bench, learnt, np.ones((1, len(learnt)), np.float32))
            parts.append((places, sums[0]))
        if "similar" in self.recipe.sources and self.about:
            # where baskets tell enough, what takes an item's place comes after what goes with it
            share = np.float32(0.5 if parts and self.recipe.sources[0] == "together" else 1.0)
            places, likeness = closest([(place, 0.0, self.alike(place)) for place in self.about], itself=False)
            parts.append((places, likeness * share))
        return summed(parts, np.array(self.about, np.int32))


def closest(parts: list[tuple[int, float, tuple[Places, Floats]]], itself: bool = True) -> tuple[Places, Floats]:
    """Of several items' alike the greatest likeness each, weighted by freshness where *itself* is asked for."""
    if not itself:
        return greatest([near for _, _, near in parts])
    return greatest(
        [
            (np.append(near, np.int32(place)), np.append(likeness, np.float32(1)) * np.float32(fresh))
            for place, fresh, (near, likeness) in parts
        ]
    )


def greatest(parts: list[tuple[Places, Floats]]) -> tuple[Places, Floats]:
    """Each place once, in order, with the greatest of its values."""
    if not parts:
        return np.empty(0, np.int32), np.empty(0, np.float32)
    places, values = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.lexsort((-values, places))
    places, values = places[order].astype(np.int32), values[order].astype(np.float32)
    first = np.ones(len(places), bool)
    first[1:] = places[1:] != places[:-1]
    return places[first], values[first]


def summed(parts: list[tuple[Places, Floats]], without: Places) -> tuple[Places, Floats]:
    """The sums of several parts, each scaled to its strongest, *without* some items; 1 at most."""
    parts = [(places, values / max(float(values.max(initial=0.0)), 1e-9)) for places, values in parts if len(places)]
    if not parts:
        return np.empty(0, np.int32), np.empty(0, np.float32)
    places, inverse = np.unique(np.concatenate([places for places, _ in parts]), return_inverse=True)
    values = np.bincount(inverse, np.concatenate([values for _, values in parts]), minlength=len(places)).astype(np.float32)
    kept = ~np.isin(places, without)
    values = values[kept] / max(float(values[kept].max(initial=0.0)), 1e-9)
    return places[kept].astype(np.int32), values.astype(np.float32)


def _held(profile: Profile) -> Places:
    mine = profile.held
    return mine.places[strongest(mine.weights, mine.places, HELD_DEPTH)]


def _liked(profile: Profile) -> Places:
    places, values = profile.reached[0], profile.reached_new[0]
    return places[strongest(values, places, profile.recipe.depth)]


def _viewed(profile: Profile) -> Places:
    places, likeness = profile.looked
    return places[strongest(likeness, places, VIEWED_DEPTH * max(len(profile.viewed) + len(profile.bought_now), 1))]


def _popular(profile: Profile) -> Places:
    return profile.shelf.by_popularity[:POPULAR_DEPTH]


def _trending(profile: Profile) -> Places:
    return profile.shelf.by_trend[:NEAR_DEPTH]


def _local(profile: Profile) -> Places:
    found = profile.known.local.get(profile.query.store_id or "")
    return np.empty(0, np.int32) if found is None else found[0]


def _near(profile: Profile) -> Places:
    places, nearness = profile.near
    return places[strongest(nearness, places, NEAR_DEPTH)]


def _newcomers(profile: Profile) -> Places:
    newcomers = profile.shelf.newcomers
    if newcomers is None:
        return np.empty(0, np.int32)
    # the new ones most like what would be shown anyway
    basis = np.unique(np.concatenate([_liked(profile), _held(profile), _popular(profile)]))
    basis = basis[basis < profile.shelf.known]
    places, sums = newcomers.spread(profile.bench, basis, np.ones((1, len(basis)), np.float32))
    return places[strongest(sums[0], places, NEWCOMERS_DEPTH)]


SOURCES: dict[Source, Callable[[Profile], Places]] = {
    "held": _held, "liked": _liked, "viewed": _viewed, "popular": _popular, "local": _local, "trending": _trending,
    "newcomers": _newcomers, "similar": _near, "together": _near,
}  # fmt: skip


def retrieved(profile: Profile) -> Positions:
    """The candidates of all sources of the recipe, and what is pinned, promoted or proposed, each once."""
    functions = dict.fromkeys(SOURCES[name] for name in profile.recipe.sources)
    parts = [function(profile) for function in functions]
    query = profile.query
    fixed = [*query.promoted.values(), *(item for _, item in query.pinned)]
    promoted = [place for item in fixed if (place := profile.shelf.positions.get(item, -1)) >= 0]
    if query.proposed is not None and profile.recipe.widens:
        parts.append(query.proposed.astype(np.int32))
    return np.unique(np.concatenate([*parts, np.array(promoted, np.int32)])).astype(np.intp)
