"""What a fit is told of items and baskets, and what is learnt from them beside EASE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from models.recommender.content import Contents
from models.recommender.kernels import Floats, Places
from models.recommender.neighbours import cosine, strongest_of_rows
from models.recommender.shelf import LOCAL, STATISTICS


@dataclass(frozen=True)
class Stock:
    """What a fit is told of items, column by column; only items that may be recommended.

    Attributes:
        ids: the items that were ever sold.
        statistics: by name (``STATISTICS``), one number an item.
        attributes: by name, one value an item.
        catalogue: all items that the catalogue has, sold or not.
    """

    ids: Sequence[str]
    statistics: Mapping[str, NDArray[Any]]
    attributes: Mapping[str, Sequence[Any]]
    catalogue: frozenset[str] = frozenset()

    def known_by(self, min_buyers: int) -> Stock:
        """Only the items that so many customers bought.

        Raises:
            ValueError: there is none.
        """
        keep = np.flatnonzero(np.asarray(self.statistics["buyers"]) >= min_buyers).tolist()
        if not keep:
            raise ValueError(f"no item was bought by {min_buyers} customers: the window is too short")
        ids = [self.ids[k] for k in keep]
        statistics = {name: np.asarray(self.statistics[name], np.float64)[keep] for name in STATISTICS}
        return Stock(
            ids, statistics, {name: [values[k] for k in keep] for name, values in self.attributes.items()}, self.catalogue or frozenset(ids)
        )


@dataclass(frozen=True)
class Baskets:
    """What lay in the same baskets lately, and what sells where.

    Attributes:
        together: baskets by known items, ones.
        local: by store, the places of what sells there and how much of it, most first.
    """

    together: sp.csr_matrix
    local: Mapping[str, tuple[Places, Floats]] = field(default_factory=dict)


def alike_by_buyers_and_words(owned: sp.csr_matrix, contents: Contents, count: int) -> sp.csr_matrix:
    """For each item the *count* most alike, half by who bought it and half by its words; 1 for the most alike of each item.

    Args:
        owned: customers by items, ones.
    """
    both = cosine(owned, 2 * count) + contents.similar(2 * count)
    best = np.maximum(both.max(axis=1).toarray().ravel(), 1e-9)
    return strongest_of_rows((sp.diags(1.0 / best) @ both).tocsr(), count)


def local_favourites(stores: Sequence[str], places: Places, amounts: Floats) -> dict[str, tuple[Places, Floats]]:
    """What sells most in each store, of lines of store, item and amount; 1 for the first."""
    frame = pd.DataFrame({"store": stores, "place": places, "amount": amounts})
    frame = frame.groupby(["store", "place"], as_index=False)["amount"].sum()
    frame = frame.sort_values(["store", "amount", "place"], ascending=[True, False, True])
    found = {}
    for store, part in frame.groupby("store"):
        best = part.head(LOCAL)
        found[str(store)] = (best["place"].to_numpy(np.int32), (best["amount"] / best["amount"].max()).to_numpy(np.float32))
    return found
