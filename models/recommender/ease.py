"""EASE, the linear item-item model with a closed form: exact in two forms while they fit in memory, above it within the popular block.

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, eq. 8: ``B = I - P diag(1/diag P)`` with
``P = (X'X + lambda I)^-1``. With fewer customers than items the Woodbury identity gives the same P from a customers by
customers inverse: ``P = (I - X' (X X' + lambda I)^-1 X) / lambda``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from models.recommender.neighbours import Neighbours, cosine, strongest_of_rows

Floats = NDArray[np.float32]
Block = Callable[[int, int], Floats]
Form = Literal["primal", "dual", "block"]
BLOCK = 512
TARGETS = 1_000
"""Of how many items one speaks at most, the strongest: the popular would speak for more the larger the catalogue is."""
MEMORY_BYTES = 4 * 2**30
"""What one exact fit may take at its peak."""


def form_of(customers: int, items: int, memory_bytes: int = MEMORY_BYTES) -> Form:
    """The cheapest exact form that fits in *memory_bytes*, by what each holds at its peak; ``block`` where neither does."""
    primal, dual = 3 * 8 * items**2, 3 * 8 * customers**2 + 3 * 4 * customers * items
    if items <= customers and primal <= memory_bytes:
        return "primal"
    if dual <= memory_bytes:
        return "dual"
    return "primal" if primal <= memory_bytes else "block"


def columns_primal(matrix: sp.csr_matrix, penalty: float) -> Block:
    """Blocks of B's columns from the items by items inverse; for catalogues smaller than the customer base."""
    gram = (matrix.T @ matrix).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    with threadpool_limits(2):
        inverse = np.linalg.inv(gram)
    diagonal = np.diag(inverse)

    def block(start: int, stop: int) -> Floats:
        weights = -inverse[:, start:stop] / diagonal[start:stop]
        return without_self(weights.T.astype(np.float32), start)

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
        return without_self(weights.T.astype(np.float32), start)

    return block


def fit_ease(matrix: sp.csr_matrix, penalty: float, neighbours: int, memory_bytes: int = MEMORY_BYTES) -> Neighbours:
    """Fit EASE and keep, for every target item, the *neighbours* sources with the largest weights.

    Above *memory_bytes* the items that most customers bought are fitted together, as many as fit, and all others by their nearest
    by cosine, brought to the scale of the block's weights.

    Args:
        matrix: customers by items, non-negative.
        penalty: lambda.
        neighbours: how many sources a target keeps.
    """
    matrix = matrix.astype(np.float32).tocsr()
    form = form_of(matrix.shape[0], matrix.shape[1], memory_bytes)
    if form == "block":
        return Neighbours(strongest_of_rows(_with_block(matrix, penalty, neighbours, memory_bytes).T.tocsr(), TARGETS))
    block = (columns_primal if form == "primal" else columns_dual)(matrix, penalty)
    return Neighbours(strongest_of_rows(strongest_sources(block, matrix.shape[1], neighbours), TARGETS))


def strongest_sources(block: Block, items: int, neighbours: int) -> sp.csr_matrix:
    """Sources by targets, each target's strongest alone."""
    keep = min(neighbours, max(items - 1, 0))

    def strongest(start: int) -> tuple[NDArray[np.int32], Floats]:
        weights = block(start, min(start + BLOCK, items))
        index = np.argpartition(-np.abs(weights), keep - 1, axis=1)[:, :keep] if keep else np.empty((len(weights), 0), int)
        return index.astype(np.int32), np.take_along_axis(weights, index, axis=1)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(strongest, range(0, items, BLOCK)))
    sources = np.concatenate([p[0] for p in parts]) if parts else np.empty((0, 0), np.int32)
    weights = np.concatenate([p[1] for p in parts]) if parts else np.empty((0, 0), np.float32)
    by_target = sp.csr_matrix((weights.ravel(), sources.ravel(), np.arange(items + 1) * keep), shape=(items, items))
    by_source = by_target.T.tocsr()
    by_source.eliminate_zeros()
    return by_source


def _with_block(matrix: sp.csr_matrix, penalty: float, neighbours: int, memory_bytes: int) -> sp.csr_matrix:
    """Targets by sources: EASE within the block of the items that most customers bought, the nearest by cosine elsewhere."""
    items = matrix.shape[1]
    bought = np.asarray((matrix > 0).sum(axis=0)).ravel()
    size = min(items, int((memory_bytes / 24) ** 0.5))
    popular = np.sort(np.argsort(-bought, kind="stable")[:size])
    within = strongest_sources(columns_primal(matrix[:, popular], penalty), size, neighbours).T.tocoo()
    exact = sp.csr_matrix((within.data, (popular[within.row], popular[within.col])), shape=(items, items))
    alike = cosine(matrix, neighbours)
    # on the pairs that both know, so much of EASE's weight is one of cosine's
    both = alike.multiply(exact > 0)
    scale = float(exact.multiply(both > 0).sum() / both.sum()) if both.nnz else 1.0
    rare = np.ones(items)
    rare[popular] = 0.0
    return (exact + sp.diags(rare * scale) @ alike).tocsr()


def dense_weights(matrix: sp.csr_matrix, penalty: float, form: Callable[[sp.csr_matrix, float], Block]) -> Floats:
    """All of B by one of the forms, for small catalogues and for checking one form against the other."""
    items = matrix.shape[1]
    block = form(matrix.astype(np.float32).tocsr(), penalty)
    return np.concatenate([block(s, min(s + BLOCK, items)) for s in _steps(items)]).T


def _steps(items: int) -> Iterator[int]:
    return iter(range(0, items, BLOCK))


def without_self(by_target: NDArray[Any], start: int) -> Floats:
    """Weights of targets by sources, the first target being item *start*, with nothing for what speaks for itself."""
    by_target[np.arange(len(by_target)), start + np.arange(len(by_target))] = 0.0
    return by_target
