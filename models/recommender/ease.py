"""EASE, the linear item-item model with a closed form, in its two exact forms.

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, eq. 8: ``B = I - P diag(1/diag P)`` with
``P = (X'X + lambda I)^-1``. With fewer customers than items the Woodbury identity gives the same P from a customers by
customers inverse: ``P = (I - X' (X X' + lambda I)^-1 X) / lambda``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float32]
Block = Callable[[int, int], Floats]
BLOCK = 512


class Neighbours:
    """Which items speak for which: a sparse ``(items, items)`` matrix, sources by targets, and its transpose."""

    def __init__(self, weights: sp.csr_matrix) -> None:
        self.by_source = weights
        self.by_target: sp.csr_matrix = weights.T.tocsr()

    def scores(self, sources: NDArray[np.intp], strengths: Floats) -> Floats:
        """What *sources*, liked by *strengths*, say together of every item; costs as much as they have neighbours."""
        items = self.by_source.shape[0]
        liked = sp.csr_matrix((strengths, sources.astype(np.int32), np.array([0, len(sources)], np.int32)), shape=(1, items))
        said = liked @ self.by_source
        dense = np.zeros(items, np.float32)
        dense[said.indices] = said.data
        return dense

    def loudest_source(self, target: int, liked: Floats) -> int | None:
        """The item that speaks most for *target*, given how much each item is liked; None if none speaks for it."""
        row = slice(self.by_target.indptr[target], self.by_target.indptr[target + 1])
        sources = self.by_target.indices[row]
        said = self.by_target.data[row] * liked[sources]
        if not len(said) or said.max() <= 0:
            return None
        return int(sources[np.argmax(said)])


def columns_primal(matrix: sp.csr_matrix, penalty: float) -> Block:
    """Blocks of B's columns from the items by items inverse; for catalogues smaller than the customer base."""
    gram = (matrix.T @ matrix).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    with threadpool_limits(2):
        inverse = np.linalg.inv(gram)
    diagonal = np.diag(inverse)

    def block(start: int, stop: int) -> Floats:
        weights = -inverse[:, start:stop] / diagonal[start:stop]
        return _without_self(weights.T.astype(np.float32), start)

    return block


def columns_dual(matrix: sp.csr_matrix, penalty: float) -> Block:
    """Blocks of B's columns from the customers by customers inverse; for catalogues larger than the customer base."""
    kernel = (matrix @ matrix.T).toarray().astype(np.float64)
    kernel[np.diag_indices_from(kernel)] += penalty
    with threadpool_limits(2):
        smoothed = np.linalg.inv(kernel).astype(np.float32) @ matrix.toarray()
    diagonal = 1.0 - np.asarray(matrix.multiply(smoothed).sum(axis=0)).ravel()
    transposed = matrix.T.tocsr()

    def block(start: int, stop: int) -> Floats:
        weights = (transposed @ smoothed[:, start:stop]) / diagonal[start:stop]
        return _without_self(weights.T.astype(np.float32), start)

    return block


def fit_ease(matrix: sp.csr_matrix, penalty: float, neighbours: int) -> Neighbours:
    """Fit EASE and keep, for every target item, the *neighbours* sources with the largest weights.

    Args:
        matrix: customers by items, non-negative.
        penalty: lambda.
        neighbours: how many sources a target keeps. On the shop of the demo 100 recommend items new to the customer as
            well as all of them do; what a customer buys again is not learnt from neighbours anyway.
    """
    customers, items = matrix.shape
    block = (columns_primal if items <= customers else columns_dual)(matrix.astype(np.float32).tocsr(), penalty)
    keep = min(neighbours, max(items - 1, 0))

    def strongest(start: int) -> tuple[NDArray[np.int32], Floats]:
        weights = block(start, min(start + BLOCK, items))
        index = np.argpartition(-np.abs(weights), keep - 1, axis=1)[:, :keep] if keep else np.empty((len(weights), 0), int)
        return index.astype(np.int32), np.take_along_axis(weights, index, axis=1)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(strongest, range(0, items, BLOCK)))
    sources = np.concatenate([p[0] for p in parts]) if parts else np.empty((0, 0), np.int32)
    weights = np.concatenate([p[1] for p in parts]) if parts else np.empty((0, 0), np.float32)
    by_target = sp.csr_matrix(
        (weights.ravel(), sources.ravel(), np.arange(0, items * keep + 1, max(keep, 1))[: items + 1]), shape=(items, items)
    )
    by_source = by_target.T.tocsr()
    by_source.eliminate_zeros()
    return Neighbours(by_source)


def dense_weights(matrix: sp.csr_matrix, penalty: float, form: Callable[[sp.csr_matrix, float], Block]) -> Floats:
    """All of B by one of the forms, for small catalogues and for checking one form against the other."""
    items = matrix.shape[1]
    block = form(matrix.astype(np.float32).tocsr(), penalty)
    return np.concatenate([block(s, min(s + BLOCK, items)) for s in _steps(items)]).T


def _steps(items: int) -> Iterator[int]:
    return iter(range(0, items, BLOCK))


def _without_self(by_target: NDArray[Any], start: int) -> Floats:
    by_target[np.arange(len(by_target)), start + np.arange(len(by_target))] = 0.0
    return by_target
