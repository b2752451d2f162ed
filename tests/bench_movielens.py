"""The fits against what others publish of MovieLens 100k: ``python tests/bench_movielens.py FILE`` prints the table.

FILE is ``ml-100k.inter`` (user, item, rating and time, parted by tabs, with a line of names), as the wheel of ``recbole`` holds it. Every
rating counts as an interaction; of each user a quarter is drawn for the test, as the Recommenders benchmark does
(github.com/recommenders-team/recommenders, README, "Algorithm Comparison": SAR, an item-item kNN, nDCG@10 .382, precision .331, recall .176;
BPR .442, LightGCN .420, BiVAE .475). Random splits flatter: this checks the arithmetic of the fits, and says nothing of what a
shop may expect.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from implicit.als import AlternatingLeastSquares
from numpy.typing import NDArray

from models.recommender.ease import columns_dual, columns_primal, dense_weights, fit_ease
from models.recommender.neighbours import Neighbours, cosine

SEEDS = 5


def split(path: Path, seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """What is learnt from and what is asked for: users by items, of the same shape."""
    ratings = pd.read_csv(path, sep="\t")
    users, items = (pd.factorize(ratings[column])[0] for column in ratings.columns[:2])
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(users)), users))
    rank = np.empty(len(users), int)
    rank[order] = np.arange(len(users)) - np.searchsorted(users[order], users[order])
    test = rank < np.round(np.bincount(users)[users] * 0.25)
    shape = users.max() + 1, items.max() + 1
    learnt, asked = (sp.csr_matrix((np.ones(int(m.sum()), np.float32), (users[m], items[m])), shape) for m in (~test, test))
    return learnt, asked


def measured(scores: NDArray[np.floating], learnt: sp.csr_matrix, asked: sp.csr_matrix) -> tuple[float, float, float]:
    """nDCG, precision and recall at 10 of what a user has not rated, the mean over users; the ideal takes min(10, number true)."""
    scores = np.where(learnt.toarray() > 0, -np.inf, scores)
    top = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    hits = np.take_along_axis(asked.toarray(), top, axis=1)
    counts = np.diff(asked.indptr)
    discount = 1.0 / np.log2(np.arange(2, 12))
    ideal = np.cumsum(discount)[np.minimum(counts, 10) - 1]
    return float((hits @ discount / ideal).mean()), float(hits.mean()), float((hits.sum(axis=1) / counts).mean())


def scored(neighbours: Neighbours | sp.csr_matrix, learnt: sp.csr_matrix) -> NDArray[np.floating]:
    """The sum of what each rated item says."""
    if isinstance(neighbours, Neighbours):
        count = learnt.shape[1]
        neighbours = sp.csr_matrix((neighbours.weights, neighbours.targets, neighbours.offsets), shape=(count, count))
    return np.asarray((learnt @ neighbours).todense())


def main() -> None:
    path = Path(sys.argv[1])
    told: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(SEEDS):
        learnt, asked = split(path, seed)
        als = AlternatingLeastSquares(factors=32, regularization=10.0, iterations=15, random_state=seed, num_threads=1)
        als.fit(learnt, show_progress=False)
        popular = np.tile(np.asarray(learnt.sum(axis=0)), (learnt.shape[0], 1))
        rows = {
            "popularity": popular,
            "cosine, 100 neighbours": scored(cosine(learnt, 100), learnt),
            "ALS of implicit, 32 factors": als.user_factors @ als.item_factors.T,
            "EASE, primal, lambda 500": learnt @ dense_weights(learnt, 500.0, columns_primal),
            "EASE, dual, lambda 500": learnt @ dense_weights(learnt, 500.0, columns_dual),
            "EASE as fitted, 100 neighbours": scored(fit_ease(learnt, 500.0, 100), learnt),
            "EASE in a block of 5 MB, cosine beyond": scored(fit_ease(learnt, 500.0, 100, 5_000_000), learnt),
        }
        for name, scores in rows.items():
            told.setdefault(name, []).append(measured(np.asarray(scores), learnt, asked))
    print(f"| model (mean of {SEEDS} random splits) | nDCG@10 | precision@10 | recall@10 |\n|---|---|---|---|")
    for name, each in told.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in np.mean(each, axis=0)) + " |")


if __name__ == "__main__":
    main()
