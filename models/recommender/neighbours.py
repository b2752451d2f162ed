"""Which items speak for which: a sparse matrix of items by items, read by key."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from implicit.nearest_neighbours import CosineRecommender
from numpy.typing import NDArray

from models.recommender.kernels import Bench, Floats, Places


class Neighbours:
    """A sparse ``(items, items)`` matrix, sources by targets; its rows are in the order of the targets."""

    def __init__(self, by_source: sp.csr_matrix) -> None:
        by_source.sort_indices()
        self.offsets: NDArray[np.int64] = by_source.indptr.astype(np.int64)
        self.targets: Places = by_source.indices.astype(np.int32)
        self.weights: Floats = by_source.data.astype(np.float32)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def spread(self, bench: Bench, sources: Places, strengths: Floats) -> tuple[Places, Floats]:
        """What *sources* say together, once for each row of *strengths*; see ``Bench.spread``."""
        return bench.spread(self.offsets, self.targets, self.weights, sources, strengths)

    def loudest(self, bench: Bench, mine: Places, strengths: Floats, places: Places) -> NDArray[np.intp]:
        """Which of *mine* (its index) says most for each of *places*; -1 where none does."""
        offsets, sources, weights = self.turned()
        return bench.loudest(offsets, sources, weights, mine, strengths, places)

    def turned(self) -> tuple[Any, Any, Any]:
        """The matrix the other way round, targets by sources: made once, and only where reasons are asked for."""
        return self._by_target

    @cached_property
    def _by_target(self) -> tuple[Any, Any, Any]:
        turned = sp.csr_matrix((self.weights, self.targets, self.offsets), shape=(len(self), len(self))).T.tocsr()
        return turned.indptr, turned.indices, turned.data

    def of(self, source: int) -> tuple[Places, Floats]:
        """The targets of one source and how much it says for each."""
        row = slice(self.offsets[source], self.offsets[source + 1])
        return self.targets[row], self.weights[row]

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Everything to keep, under ``<array>_<name>``."""
        return {f"offsets_{name}": self.offsets, f"targets_{name}": self.targets, f"weights_{name}": self.weights}

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]], name: str) -> Neighbours:
        """The inverse of ``arrays``."""
        offsets = arrays[f"offsets_{name}"]
        shape = (len(offsets) - 1, len(offsets) - 1)
        return cls(sp.csr_matrix((arrays[f"weights_{name}"], arrays[f"targets_{name}"], offsets), shape=shape))


def cosine(matrix: sp.csr_matrix, count: int) -> sp.csr_matrix:
    """For each column the *count* most alike others by cosine, itself left out: ``(columns, columns)``."""
    model = CosineRecommender(K=count + 1, num_threads=2)
    model.fit(matrix.astype(np.float64), show_progress=False)
    alike = model.similarity.tocsr()
    alike.setdiag(0.0)
    alike.eliminate_zeros()
    return alike


def bought_together(baskets: sp.csr_matrix, count: int, prior: float = 10.0) -> sp.csr_matrix:
    """For each item the *count* that lie most in the same baskets, by cosine with *prior* baskets of each added.

    The prior keeps two items that met once and never else from being each other's nearest.

    Args:
        baskets: baskets by items, ones.
    """
    frequency = np.asarray(baskets.sum(axis=0), np.float64).ravel()
    alike = cosine(baskets, 2 * count)
    sizes, damped = np.sqrt(frequency), np.sqrt(frequency + prior)
    alike = sp.diags(sizes / damped) @ alike @ sp.diags(sizes / damped)
    return strongest_of_rows(alike.tocsr(), count)


def strongest_of_rows(matrix: sp.csr_matrix, count: int) -> sp.csr_matrix:
    """The *count* greatest of each row."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    nth = np.arange(len(order)) - matrix.indptr[rows[order]]
    kept = order[nth < count]
    return sp.csr_matrix((matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape)
