"""Which items speak for which, learnt by EASE and by factors (implicit's and MLlib's): NDCG@10 of that source alone, on the last cut.

``UBIQUO_HOME`` names the home (the demo's). The same customers, histories and judgement as ``python -m training recommendations``. With the
argument ``tune`` settings of the factors are compared on the tuning cut, where those that ``FactorSettings`` comes with were chosen.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from features.state.home import Home, configure_process
from features.store.compute import with_engine
from models.recommender.config import RecommenderConfig
from models.recommender.factors import FactorSettings, spoken_by
from models.recommender.neighbours import Neighbours
from models.recommender.recommender import Recommender
from training.bootstrap import open_store
from training.dataset import Plan, open_experiment
from training.lessons import Lessons, item_factors
from training.ranking import evaluate
from training.recommendations import ranked

CHOSEN = FactorSettings()
TRIED = {
    "implicit": [replace(CHOSEN, alpha=alpha, regularization=much) for alpha in (1.0, 3.0) for much in (0.1, 1.0)],
    "MLlib": [replace(CHOSEN, alpha=alpha, mllib_regularization=much) for alpha in (0.3, 1.0) for much in (0.0003, 0.001, 0.003, 0.01)],
}


def main() -> int:
    configure_process()
    warnings.filterwarnings("ignore")
    homes = {"implicit": with_engine(Home.from_environment(), "duckdb"), "MLlib": with_engine(Home.from_environment(), "spark")}
    home = homes["implicit"]
    truth, cuts = open_experiment(home, "recommendations", Plan())
    config = RecommenderConfig()
    lessons = Lessons(home, truth, cuts, "recommendations_v1", config, lambda step: None)
    tunes = sys.argv[1:] == ["tune"]
    cut = cuts.tuning if tunes else cuts.tests[-1]
    moment = lessons.at(cut)
    states = open_store(home).snapshot("customer_state", cut)
    table = Table("source alone", "for_you", "for_you, lately", "also_like", "fit, s", title=f"NDCG@10 on {cuts.day(cut)}")

    def judge(name: str, learn: Callable[[], Neighbours | None]) -> None:
        began = time.perf_counter()
        liked = learn()
        fitted = Recommender.fit(moment.histories, moment.stock, config, liked=liked)
        took = time.perf_counter() - began
        rows = evaluate(ranked(fitted, {}, {"any": "EASE", "new": "EASE"}), moment, cuts.day(cut))
        means = rows.groupby(["listing", "model"])["ndcg_at_10"].mean()
        shown = [means["for_you", "EASE"], means["for_you", "EASE, lately"], means["also_like", "EASE"]]
        table.add_row(name, *(f"{value:.4f}" for value in shown), f"{took:.0f}")

    judge("EASE", lambda: None)
    for name, where in homes.items():
        for settings in TRIED[name] if tunes else [CHOSEN]:

            def learn(settings: FactorSettings = settings, where: Home = where) -> Neighbours:
                factors = item_factors(where, states, moment, RecommenderConfig(als=settings), None)
                return spoken_by(factors, settings.ridge, config.ease_neighbours)

            much = settings.regularization if name == "implicit" else settings.mllib_regularization
            judge(f"{name}, alpha {settings.alpha:g}, regularization {much:g}", learn)
    console = Console(width=120)
    console.print(table)
    console.print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
