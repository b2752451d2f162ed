"""Items as factors, learnt by alternating least squares: which of them speak for which, in the form in which EASE says it.

Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008. A customer whose factors are those that best
explain what they hold likes an item by ``y_target (Y'Y + ridge I)^-1 y_source``, summed over what they hold: so much each source speaks for
each target, whoever the customer is. What serves therefore need not know how it was learnt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from implicit.als import AlternatingLeastSquares
from threadpoolctl import threadpool_limits

from models.recommender.ease import TARGETS, Floats, strongest_sources, without_self
from models.recommender.neighbours import Neighbours, strongest_of_rows


@dataclass(frozen=True)
class FactorSettings:
    """Settings of alternating least squares.

    Attributes:
        factors: how many numbers describe an item.
        alpha: how much more a purchase counts than that nothing was bought.
        regularization: of implicit, and of Spark's MLlib, which multiplies it with how often an item or customer occurs.
        ridge: keeps the factors of a customer of few purchases small.
    """

    factors: int = 64
    iterations: int = 10
    alpha: float = 1.0
    regularization: float = 1.0
    mllib_regularization: float = 0.003
    ridge: float = 1.0


def learn_factors(matrix: sp.csr_matrix, settings: FactorSettings, seed: int) -> Floats:
    """The factors of items, ``(items, factors)``, learnt in this process by implicit.

    Args:
        matrix: customers by items, how much each was bought.
    """
    model = AlternatingLeastSquares(
        factors=settings.factors, regularization=settings.regularization, alpha=settings.alpha, iterations=settings.iterations,
        random_state=seed, num_threads=2,
    )  # fmt: skip
    with threadpool_limits(1, "blas"):
        model.fit(matrix.astype(np.float32).tocsr(), show_progress=False)
    found: Floats = np.asarray(model.item_factors, np.float32)
    return found


def spoken_by(factors: Floats, ridge: float, neighbours: int) -> Neighbours:
    """For every item the *neighbours* that speak for it most; takes ``items * items`` steps, and the memory of one block of them."""
    wide = factors.astype(np.float64)
    inverse = np.linalg.inv(wide.T @ wide + ridge * np.eye(wide.shape[1]))

    def block(start: int, stop: int) -> Floats:
        return without_self((wide[start:stop] @ inverse @ wide.T).astype(np.float32), start)

    return Neighbours(strongest_of_rows(strongest_sources(block, len(wide), neighbours), TARGETS))
