"""The items of a shop, as a merchandiser looks for them: by a part of a name or an id, and by the values of their attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.attributes import Attribute, ListAttribute, NumberAttribute, Range, TextAttribute, WrongWishError
from models.recommender.shelf import Shelf
from serving.decide.questions import Between
from serving.decide.rules import RuleContent

MOST_PARTS = 8
"""How many words of a search count."""
FACETS, FACET_VALUES = 3, 8
"""For how many attributes, and how many values of each, it is told how many of the found items have them."""
Truths = NDArray[np.bool_]


@dataclass(frozen=True)
class ItemFacet:
    """The commonest values of an attribute among items, with how many have each."""

    attribute: str
    values: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class FoundItems:
    """What a search found: how many, and the ids of the first, what sells most first."""

    count: int
    item_ids: Sequence[str]
    facets: Sequence[ItemFacet]


class _Index:
    """The words of one shelf, to be searched for a part of them."""

    def __init__(self, shelf: Shelf) -> None:
        self.ids = _folded(shelf.ids)
        columns = shelf.attributes.columns.items()
        self.words = {name: _folded(column.words) for name, column in columns if isinstance(column, TextAttribute | ListAttribute)}


def _folded(words: Sequence[str]) -> pa.Array:
    return pa.array([word.casefold() for word in words], pa.string())


def _holding(words: pa.Array, part: str) -> Truths:
    """Which words hold *part*."""
    return np.asarray(pc.match_substring(words, part).to_numpy(zero_copy_only=False), bool)


_INDEXES: WeakKeyDictionary[Shelf, _Index] = WeakKeyDictionary()


def find_items(shelf: Shelf, said: str, wanted: Sequence[tuple[str, str]], most: int) -> FoundItems:
    """The items in which every word of *said* is part of the id or of a value, and that have the *wanted* values of attributes.

    Costs a few passes over the items and their words, without the interpreter's lock but for moments; the first search on a new shelf makes
    an index besides. docs/rules.md says how long that takes.

    Raises:
        WrongWishError: a value fits its attribute not.
    """
    kept = np.ones(len(shelf.ids), bool)
    everywhere = np.arange(len(shelf.ids))
    for name, value in wanted:
        if name not in shelf.attributes.columns:
            raise WrongWishError(f"{name!r} is no attribute of items: use one of {', '.join(shelf.attributes)}")
        kept &= shelf.attributes[name].fits(wish_of(value, shelf.attributes[name]), everywhere)
    parts = said.casefold().split()[:MOST_PARTS]
    if parts:
        index = _INDEXES.get(shelf)
        if index is None:
            index = _INDEXES[shelf] = _Index(shelf)
        for part in parts:
            kept &= _having(shelf, index, part)
    places = np.flatnonzero(kept)
    best = places[np.lexsort((places, -shelf.popularity_share[places], ~shelf.on_sale[places]))][:most]
    return FoundItems(len(places), [shelf.ids[place] for place in best.tolist()], _facets(shelf, places, wanted))


def wish_of(value: str, attribute: Attribute) -> frozenset[str] | Range:
    """What was typed of an attribute: a value, or ``100..500`` of numbers."""
    if not isinstance(attribute, NumberAttribute):
        return frozenset([value])
    low, dots, high = value.partition("..")
    try:
        ends = [float(text) if text.strip() else None for text in (low, high if dots else low)]
    except ValueError:
        raise WrongWishError("it holds numbers: give a number, or two as 100..500") from None
    return Range(*ends)


def _having(shelf: Shelf, index: _Index, part: str) -> Truths:
    found = _holding(index.ids, part)
    for name, words in index.words.items():
        column = shelf.attributes[name]
        assert isinstance(column, TextAttribute | ListAttribute)
        # the last place is that of the code of what is unknown
        is_meant = np.append(_holding(words, part), False)
        if isinstance(column, TextAttribute):
            found |= is_meant[column.codes]
        else:
            owners = np.repeat(np.arange(len(shelf.ids)), np.diff(column.offsets))
            found[owners[is_meant[column.codes]]] = True
    return found


def _facets(shelf: Shelf, places: NDArray[np.intp], wanted: Sequence[tuple[str, str]]) -> list[ItemFacet]:
    found: list[ItemFacet] = []
    taken = {name for name, _ in wanted}
    for name, column in shelf.attributes.columns.items():
        if len(found) == FACETS or name in taken or not isinstance(column, TextAttribute):
            continue
        if not 1 < len(column.words) <= max(len(shelf.ids) // 2, 2):
            continue
        codes = column.codes[places]
        counts = np.bincount(codes[codes >= 0], minlength=len(column.words))
        common = [(column.words[k], int(counts[k])) for k in np.argsort(-counts, kind="stable")[:FACET_VALUES] if counts[k]]
        if len(common) > 1:
            found.append(ItemFacet(name, common))
    return found


def item_facts(shelf: Shelf, item_id: str) -> dict[str, Any]:
    """What is known of one item of the shelf: attributes, price, and how it sells as of the training."""
    place = shelf.positions[item_id]
    is_learnt = place < shelf.known
    attributes: list[tuple[str, str, str]] = []
    for name, column in shelf.attributes.columns.items():
        if isinstance(column, NumberAttribute):
            values = [] if np.isnan(column.values[place]) else [f"{column.values[place]:g}"]
        elif isinstance(column, ListAttribute):
            values = column.at(place)
        else:
            assert isinstance(column, TextAttribute)
            values = [text] if (text := column.at(place)) is not None else []
        attributes += [(name, value, column.kind) for value in values]
    sold = {name: float(shelf.statistics[name][place]) for name in ("buyers", "purchases_28")} if is_learnt else {}
    return {
        "attributes": attributes,
        "price": shelf.price_of(place),
        "on_sale": bool(shelf.on_sale[place]),
        "is_learnt": is_learnt,
        "rank": 1 + round((1.0 - float(shelf.popularity_share[place])) * len(shelf.ids)) if is_learnt else None,
        "count": len(shelf.ids),
        "sold": sold,
    }


def said_values(rule: RuleContent) -> list[tuple[str, str]]:
    """What a rule says under ``where``, one line an attribute, as a form shows it."""
    found = []
    for name, values in rule.where.items():
        if isinstance(values, Between):
            low, high = (("" if end is None else f"{end:g}") for end in (values.min, values.max))
            found.append((name, f"{low}..{high}"))
        else:
            found.append((name, "\n".join(value if isinstance(value, str) else f"{value:g}" for value in values)))
    return found
