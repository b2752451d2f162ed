"""The recommendations job: what will each customer buy, and what of it is new to them?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime

import numpy as np
import pandas as pd

from features.state.home import Home
from models.decision import Query
from models.inputs import Input
from models.recommender.config import JOINED, RANKED, SINGLES, Mode, RecommenderConfig
from models.recommender.ranker import DEFAULTS, Objective, Ranker
from models.recommender.recommender import Recommender
from models.reports import ModelReport
from training.dataset import Advance, Plan, open_experiment
from training.evaluation import RANKING_COLUMNS
from training.lessons import LISTING_OF, Lessons
from training.ranking import SERVED, AskedCandidates, asked_of, evaluate, judge, ndcg_of, rescored
from training.report import Outcome
from training.run import TrackedRun
from training.tuning import Settings, of_rankers, tuned, tuning_note


def main(home: Home, model: str, plan: Plan, advance: Advance = lambda step: None) -> ModelReport:
    """Train, judge and register; returns the report. Inputs already trained on are not trained on again."""
    truth, cuts = open_experiment(home, model, plan)
    run = TrackedRun(home, model, cuts, plan)
    if (standing := run.standing_report()) is not None:
        return standing
    config = RecommenderConfig(seed=plan.seed + 1, learner=run.settings.learner)
    with run.started({k: str(v) for k, v in asdict(config).items() if k not in ("modes", "seed")}):
        advance("checking the log")
        run.check_log(truth)
        lessons = Lessons(home, truth, cuts, run.settings.feature_service, config, advance)
        lessons.prepare([cuts.tuning, *cuts.tests, cuts.final])
        final = lessons.at(cuts.final)
        reference, _ = run.champion_reference()
        breadth = final.breadth.drop(columns="customer_id")
        run.gate.look_at_rows(final.breadth, ["customer_id"], [Input(name) for name in breadth.columns])
        run.gate.look_at_drift(breadth, reference)
        run.check_data()
        run.trained_on(final.breadth, "purchase histories")
        if plan.trials:
            advance(f"tuning, {plan.trials} trials a list")
            tune(lessons, cuts.tuning, run, plan)
        modes = choose(lessons, cuts.tuning, run, advance)
        scored, items = [], {}
        for cut in cuts.tests:
            then = ranked(lessons.judged(cut), lessons.rankers(cut), modes)
            advance("evaluating")
            items[cut] = list(then.item_ids)
            scored.append(evaluate(then, lessons.at(cut), cuts.unit(cut)))
        units = {cuts.unit(cut): cut for cut in cuts.tests}
        frame = pd.concat(scored, ignore_index=True)
        report, figures = judge(frame, modes, run, run.look(list(units)))
        report.notes += [tuning_note(LISTING_OF[objective], settings, plan.trials) for objective, settings in lessons.settings.items()]
        fitted = lessons.whole(cuts.final)
        fitted = ranked(fitted, lessons.rankers(cuts.final), modes)
        if config.learner != "EASE":
            report.notes.append(f"Which items speak for which was learnt by {config.learner}: what is named EASE here is that.")
        example = synthetic_example(fitted)
        queries = [Query.from_row(None, cuts.final, row) for row in example.to_dict("records")]
        picks = [[c.id for c in fitted.pipeline.decide(query, np.random.default_rng(0)).choices] for query in queries]
        outcome = Outcome(
            model=fitted,
            report=report,
            evaluation=frame.loc[frame["model"] == SERVED, list(RANKING_COLUMNS)],
            units=units,
            rescore=lambda rival, wanted: rescored(lessons, items, rival, wanted),
            example=example,
            output=pd.Series(picks),
            plots=figures,
            reference=breadth,
            settings={f"{LISTING_OF[objective]}/{name}": value for objective, of in lessons.settings.items() for name, value in of.items()},
        )
        return run.finish(outcome)


def ranked(sources: Recommender, rankers: Mapping[Objective, Ranker], modes: Mapping[Objective, Mode]) -> Recommender:
    """The sources with their rankers; where there is none that was chosen, frequency and EASE are added up."""
    held = {objective: mode if mode != RANKED or objective in rankers else JOINED for objective, mode in modes.items()}
    return sources.ranked_by(rankers, held)


def tune(lessons: Lessons, cut: datetime, run: TrackedRun, plan: Plan) -> None:
    """Give the lessons the settings of each ranker's trees with the best NDCG@10 on the tuning cut, where there is a ranker."""
    for objective, listing in LISTING_OF.items():
        if lessons.ranker(cut, objective, {}) is None:
            continue
        asked = asked_of(lessons.sources(cut), lessons.at(cut), listing)

        def score(settings: Settings, objective: Objective = objective, asked: Sequence[AskedCandidates] = asked) -> float:
            ranker = lessons.ranker(cut, objective, settings)
            assert ranker is not None
            return float(ndcg_of(ranker, asked).mean())

        lessons.settings[objective] = tuned(run, listing, of_rankers, DEFAULTS, "ndcg_at_10", score, plan.trials, plan.seed)


def choose(lessons: Lessons, cut: datetime, run: TrackedRun, advance: Advance) -> dict[Objective, Mode]:
    """For each list what orders it best on the tuning cut, which no report shows: the ranker, or a source alone where that is better."""
    advance("choosing on the tuning cut")
    chosen, means = best_modes(lessons, cut)
    for (listing, name), value in means.items():
        run.trial(f"{listing} {name}", {"listing": listing, "model": name}, "ndcg_at_10", value)
    return chosen


def best_modes(lessons: Lessons, cut: datetime) -> tuple[dict[Objective, Mode], dict[tuple[str, str], float]]:
    """For each list what orders it best on a cut; and the NDCG@10 of every way, by list and name."""
    model = ranked(lessons.judged(cut), lessons.rankers(cut), dict.fromkeys(LISTING_OF, RANKED))
    rows = evaluate(model, lessons.at(cut), "tuning")
    chosen: dict[Objective, Mode] = {}
    found: dict[tuple[str, str], float] = {}
    for objective, listing in LISTING_OF.items():
        means = rows[rows["listing"] == listing].groupby("model")["ndcg_at_10"].mean()
        found |= {(listing, str(name)): float(value) for name, value in means.items()}
        served = model.config.modes[objective]
        best = max((name for name in means.index if name in SINGLES), key=lambda name: float(means[name]), default=served)
        chosen[objective] = best if best in means.index and means[best] > means[SERVED] else served
    return chosen, found


def synthetic_example(model: Recommender) -> pd.DataFrame:
    """An invented customer who bought two of the catalogue's items; no one's data."""
    items = model.item_ids[:2]
    return pd.DataFrame(
        [
            {
                "bought_item_ids": items, "bought_counts": [2, 1], "bought_last_at": [1_500_000_000, 1_500_100_000],
                "bought_first_at": [1_499_000_000, 1_500_100_000], "bought_weights": [1.5, 1.0], "recent_item_ids": items[:1],
                "recent_at": [1_500_200_000], "recent_weights": [1.0],
            }
        ]
    )  # fmt: skip
