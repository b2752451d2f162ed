"""Other recommenders on the very same histories, cuts and customers: at their defaults, and tuned with one budget on the tuning cut."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, TFIDFRecommender
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from training.lessons import AtCut
from training.ranking import SHOWN, measured, ranking_tasks


@dataclass(frozen=True)
class Peer:
    """One model of another library.

    Attributes:
        make: of a fresh model with some settings.
        space: asks a trial of Optuna for settings.
    """

    make: Callable[..., Any]
    space: Callable[[Any], Mapping[str, Any]]


def _factors(trial: Any) -> dict[str, Any]:
    return {
        "factors": trial.suggest_categorical("factors", [32, 64, 128]),
        "regularization": trial.suggest_float("regularization", 0.01, 100.0, log=True),
        "alpha": trial.suggest_float("alpha", 0.5, 40.0, log=True),
        "iterations": trial.suggest_int("iterations", 10, 25),
    }


def _nearest(trial: Any) -> dict[str, Any]:
    return {"K": trial.suggest_int("K", 10, 1000, log=True)}


def _bm25(trial: Any) -> dict[str, Any]:
    return {**_nearest(trial), "K1": trial.suggest_float("K1", 0.1, 200.0, log=True), "B": trial.suggest_float("B", 0.0, 1.0)}


def _bpr(trial: Any) -> dict[str, Any]:
    return {
        "factors": trial.suggest_categorical("factors", [32, 64, 128]),
        "learning_rate": trial.suggest_float("learning_rate", 0.001, 0.1, log=True),
        "regularization": trial.suggest_float("regularization", 0.001, 0.1, log=True),
        "iterations": trial.suggest_int("iterations", 50, 200),
    }


PEERS: Mapping[str, Peer] = {
    "implicit ALS": Peer(lambda **kw: AlternatingLeastSquares(random_state=1, num_threads=2, **kw), _factors),
    "implicit BPR": Peer(lambda **kw: BayesianPersonalizedRanking(random_state=1, num_threads=2, **kw), _bpr),
    "implicit cosine": Peer(lambda **kw: CosineRecommender(num_threads=2, **kw), _nearest),
    "implicit TF-IDF": Peer(lambda **kw: TFIDFRecommender(num_threads=2, **kw), _nearest),
    "implicit BM25": Peer(lambda **kw: BM25Recommender(num_threads=2, **kw), _bm25),
}


def matrix_of(moment: AtCut, decayed: bool) -> sp.csr_matrix:
    """Customers by items: how often each was bought, or (*decayed*) the root of the purchases halved every 90 days."""
    matrix = moment.histories.owned(len(moment.item_ids))
    matrix.data = moment.histories.strengths(moment.cut.timestamp()) if decayed else moment.histories.columns["bought_counts"].astype(float)
    return matrix.astype(np.float32)


def lists_of(peer: Peer, settings: Mapping[str, Any], moment: AtCut, decayed: bool) -> tuple[dict[tuple[int, str], NDArray[Any]], float]:
    """What a peer shows each customer who counts, by customer number and list; and the CPU seconds of its fit."""
    matrix, started = matrix_of(moment, decayed), time.process_time()
    with threadpool_limits(1, "blas"):
        model = peer.make(**settings)
        model.fit(matrix, show_progress=False)
    spent, found = time.process_time() - started, {}
    tasks = list(ranking_tasks(moment))
    for listing in ("for_you", "also_like"):
        numbers = [task.number for task in tasks if task.listing == listing]
        for start in range(0, len(numbers), 500):
            part = np.array(numbers[start : start + 500])
            with threadpool_limits(1, "blas"):
                items, _ = model.recommend(part, matrix[part], N=SHOWN, filter_already_liked_items=listing == "also_like")
            found.update({(int(number), listing): shown[shown >= 0] for number, shown in zip(part, items, strict=True)})
    return found, spent


def scored(found: Mapping[tuple[int, str], NDArray[Any]], moment: AtCut, listing: str) -> float:
    """The mean NDCG@10 of one list."""
    values = [measured(found[task.number, listing], task.truth)[1] for task in ranking_tasks(moment) if task.listing == listing]
    return float(np.mean(values))


def tuned(peer: Peer, moment: AtCut, listing: str, trials: int, seed: int = 0) -> tuple[dict[str, Any], bool]:
    """The settings with the best NDCG@10 of one list on the tuning cut, out of *trials*; and whether purchases are to decay."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: Any) -> float:
        decayed = trial.suggest_categorical("decayed", [False, True])
        return scored(lists_of(peer, peer.space(trial), moment, decayed)[0], moment, listing)

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    best = dict(study.best_params)
    decayed = bool(best.pop("decayed"))
    return best, decayed


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
