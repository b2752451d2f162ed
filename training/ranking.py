"""How lists are judged: over the whole catalogue, on cuts in time, beside every one of their sources alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.decision import top
from models.recommender.config import SINGLES, Mode
from models.recommender.listings import LISTINGS
from models.recommender.ranker import Objective, Ranker
from models.recommender.recommender import Recommender
from models.recommender.sources import retrieved
from training.dataset import EmptyWindowError
from training.evaluation import RANKING_COLUMNS, banded, split_metric
from training.lessons import LISTING_OF, AtCut, Lessons
from training.metrics import RANKING_MEASURES, Estimate, MeansOverUnits, bootstrap, dcg, difference, estimates
from training.plots import bar_plot
from training.report import Report
from training.run import TrackedRun

SERVED = "as served"
SEGMENTS = {
    "1 to 19 items bought": (0, 20), "20 to 99 items bought": (20, 100), "100 to 299 items bought": (100, 300),
    "300 items bought or more": (300, float("inf")),
}  # fmt: skip
MEANINGLESS = {("personal frequency", "also_like")}
"""What a customer never bought they have bought never."""
JUDGED = 5_000
"""How many customers a cut is judged on, drawn at random where there are more."""
SHOWN = 100
"""How far down a list a first hit counts for its reciprocal rank."""


class RankingTask(NamedTuple):
    """One customer and list at a cut: what they then bought of what the list may show, and what it may not."""

    number: int
    customer_id: str
    listing: str
    truth: NDArray[np.int32]
    hidden: NDArray[np.int32]
    segment: str


def ranking_tasks(moment: AtCut) -> Iterator[RankingTask]:
    """Both lists' questions about each customer who counts.

    They count if they had bought something of the catalogue before the cut and then bought something that the list may show.
    """
    numbers = [number for number, customer in enumerate(moment.histories.customers) if customer in moment.bought]
    if len(numbers) > JUDGED:
        numbers = sorted(np.random.default_rng(0).choice(numbers, JUDGED, replace=False).tolist())
    for number in numbers:
        customer, before = moment.histories.customers[number], moment.histories.places(number)
        if not len(before):
            continue
        [segment] = banded([len(before)], SEGMENTS)
        truth = moment.bought[customer]
        yield RankingTask(number, customer, "for_you", truth, before[:0], segment)
        new = truth[~np.isin(truth, before)]
        if len(new):
            yield RankingTask(number, customer, "also_like", new, before, segment)


class AskedCandidates(NamedTuple):
    """One task with its candidates, and what a ranker is told of each."""

    task: RankingTask
    places: NDArray[np.int32]
    rows: NDArray[np.float32]


def asked_of(model: Recommender, moment: AtCut, listing: str) -> list[AskedCandidates]:
    """Every task of a list at a cut, as a ranker would meet it."""
    found = []
    for task in ranking_tasks(moment):
        if task.listing == listing:
            profile = model.profile(moment.query(task.number, listing))
            places = retrieved(profile).astype(np.int32)
            places = places[~np.isin(places, task.hidden)]
            found.append(AskedCandidates(task, places, model.rows(profile, places)))
    return found


def ndcg_of(ranker: Ranker, asked: Sequence[AskedCandidates], inputs: Sequence[int] | slice = slice(None)) -> NDArray[np.float64]:
    """NDCG@10 of each task ordered by the ranker alone, which takes only some *inputs*."""
    ordered = ((each, np.argsort(-ranker.predict(each.rows[:, inputs]), kind="stable")) for each in asked)
    return np.array([measured(each.places[order], each.task.truth)[1] for each, order in ordered])


def own_lists(model: Recommender, moment: AtCut) -> dict[str, dict[tuple[int, str], NDArray[np.intp]]]:
    """What we serve, and what each source alone would."""
    count = len(model.item_ids)
    everything = np.arange(count, dtype=np.int32)
    lists: dict[str, dict[tuple[int, str], NDArray[np.intp]]] = {name: {} for name in (*SINGLES, SERVED)}
    for task in ranking_tasks(moment):
        query = moment.query(task.number, task.listing)
        lists[SERVED][task.number, task.listing] = model.pipeline.order(query, SHOWN)
        profile = model.profile(query)
        for single in SINGLES:
            if (single, task.listing) not in MEANINGLESS:
                scores = model.relative(profile, everything, single)
                scores[task.hidden] = -np.inf
                lists[single][task.number, task.listing] = top(scores, min(SHOWN, count - len(task.hidden)))
    return lists


def evaluate(model: Recommender, moment: AtCut, unit: str) -> pd.DataFrame:
    """One row a customer, list and model: its measures over the full catalogue, and what was shown."""
    rows: list[dict[str, Any]] = []
    rarity, lists = rarity_of(moment), own_lists(model, moment)
    for task in ranking_tasks(moment):
        for name, found in lists.items():
            shown = found.get((task.number, task.listing))
            if shown is None:
                continue
            measures = dict(zip(RANKING_MEASURES, measured(shown, task.truth), strict=True))
            rows.append(
                {
                    "customer_id": task.customer_id, "unit": unit, "listing": task.listing, "model": name, "segment": task.segment,
                    **measures, "novelty": float(rarity[shown[:10]].mean()) if len(shown) else np.nan, "picks": shown[:10],
                    "catalogue": len(model.item_ids),
                }
            )  # fmt: skip
    if not rows:
        raise EmptyWindowError(f"nobody bought anything of the catalogue in the window after {moment.cut:%Y-%m-%d}")
    return pd.DataFrame(rows)


def rarity_of(moment: AtCut) -> NDArray[np.float64]:
    """The self-information of each item, in bits: minus the logarithm of the share of the customers who bought it."""
    buyers = np.asarray(moment.stock.statistics["buyers"], float)
    rarity: NDArray[np.float64] = -np.log2(buyers / max(len(moment.histories), 1))
    return rarity


def measured(shown: NDArray[Any], truth: NDArray[Any]) -> tuple[float, float, float]:
    """Recall@10, NDCG@10 and the reciprocal rank of the first hit of a list; 0 where nothing of it was bought.

    Recall and the ideal DCG count at most ten of what was bought.
    """
    hits = np.isin(shown, truth)
    ideal = min(10, len(truth))
    first = 1.0 / (int(np.argmax(hits)) + 1) if hits.any() else 0.0
    return float(hits[:10].sum()) / ideal, dcg(hits[:10]) / dcg(np.ones(ideal, bool)), first


def rescored(lessons: Lessons, items: Mapping[datetime, Sequence[str]], rival: Recommender, wanted: Mapping[str, datetime]) -> pd.DataFrame:
    """The evaluation of a model as it stands, on cuts after all that it learnt from, over the catalogue of each cut.

    What has come into the catalogue since it was trained it cannot show, and loses by it.
    """
    rows = []
    for unit, cut in wanted.items():
        moment, position = lessons.at(cut), {item: k for k, item in enumerate(items[cut])}
        for task in ranking_tasks(moment):
            shown = rival.pipeline.order(moment.query(task.number, task.listing), SHOWN)
            places = [position[rival.shelf.ids[place]] for place in shown if rival.shelf.ids[place] in position]
            measures = dict(zip(RANKING_MEASURES, measured(np.array(places, np.intp), task.truth), strict=True))
            row = {"customer_id": task.customer_id, "unit": unit, "listing": task.listing, "segment": task.segment}
            rows.append({**row, **measures})
    return pd.DataFrame(rows)[list(RANKING_COLUMNS)]


def judge(scored: pd.DataFrame, modes: Mapping[Objective, Mode], run: TrackedRun, looks: int) -> tuple[Report, Mapping[str, object]]:
    """The table beside its baselines, the leads and the pictures."""
    cuts, metric = run.cuts, run.settings.promotion.metric
    keys_of_rows = ["customer_id", "unit", "listing"]
    # a pivot sorts by customer id; the rows are to stay in the order in which they were judged
    order = pd.MultiIndex.from_frame(scored[keys_of_rows].drop_duplicates())
    wide = scored.pivot(index=keys_of_rows, columns="model", values=list(RANKING_MEASURES)).reindex(order).reset_index()
    models = (*SINGLES, SERVED)
    names, values, drawn = [], [], []
    for listing in LISTINGS:
        part = wide[wide["listing"] == listing]
        units = part["unit"].to_numpy(dtype=str)
        keys = [(measure, m) for measure in RANKING_MEASURES for m in models if (m, listing) not in MEANINGLESS]
        table_of = np.column_stack([part[key].to_numpy(dtype=float) for key in keys])
        found, resampled = bootstrap(part["customer_id"].tolist(), MeansOverUnits(units, table_of), draws=500)
        names += [f"{model}/{measure}/{listing}" for measure, model in keys]
        values.append(found)
        drawn.append(resampled)
    value, draws = np.concatenate(values), np.concatenate(drawn, axis=1)
    told = estimates(value, draws, names)
    table: dict[str, dict[str, str]] = {}
    columns_told = [f"{listing} {m}" for listing in LISTINGS for m in ("R@10", "N@10", "MRR", "coverage", "novelty")]
    for model in models:
        table[model] = {}
        for listing in (each for each in LISTINGS if (model, each) not in MEANINGLESS):
            for short, measure in zip(("R@10", "N@10", "MRR"), RANKING_MEASURES, strict=True):
                table[model][f"{listing} {short}"] = f"{told[f'{model}/{measure}/{listing}']}"
            mine = scored[(scored["model"] == model) & (scored["listing"] == listing)]
            table[model][f"{listing} coverage"] = f"{coverage(mine):.3f}"
            table[model][f"{listing} novelty"] = f"{mine['novelty'].mean():.1f}"
    quality = {
        model: {f"{measure}_{listing}": told[name] for name in names for of, measure, listing in [name.rsplit("/", 2)] if of == model}
        for model in models
    }
    for model, listing in ((m, each) for m in models for each in LISTINGS if (m, each) not in MEANINGLESS):
        mine = scored[(scored["model"] == model) & (scored["listing"] == listing)]
        # of one catalogue and all customers: there is no interval
        for name, alone in (("coverage", coverage(mine)), ("novelty", float(mine["novelty"].mean()))):
            quality[model][f"{name}_{listing}"] = Estimate(alone, float("nan"), float("nan"))
    measure, list_name = split_metric(metric)
    lead = difference(value, draws, names, f"{SERVED}/{measure}/{list_name}", f"popularity/{measure}/{list_name}")
    rivals = {
        f"{single} ({listing})": difference(value, draws, names, f"{SERVED}/ndcg_at_10/{listing}", f"{single}/ndcg_at_10/{listing}")
        for listing in LISTINGS
        for single in SINGLES
        if (single, listing) not in MEANINGLESS
    }
    asked = wide.groupby(["listing", "unit"]).size()
    days = " and ".join(map(cuts.day, cuts.tests))
    report = Report(
        kind=run.model,
        title=f"Recommendations over the full catalogue, {cuts.horizon_days} days; mean of the cuts {days}; "
        f"{int(asked.min())} to {int(asked.max())} customers a cut",
        served=SERVED,
        baseline="popularity",
        columns=columns_told,
        table=table,
        lead=lead,
        rivals=rivals,
        notes=[
            *(f"Lead over {name}, NDCG@10, paired: {gap}." for name, gap in rivals.items()),
            f"Ordered by, chosen on an earlier cut: {', '.join(f'{LISTING_OF[o]}: {mode}' for o, mode in modes.items())}.",
            f"These cuts were looked at {looks} times.",
        ],
        metrics={name.replace("/", "_").replace(" ", "_").replace(",", ""): float(v) for name, v in zip(names, value, strict=True)},
        quality=quality,
        groups=LISTINGS,
        limits=[
            "an item that nobody bought before the cut is not judged; it is shown by its likeness to others",
            "what is bought next is not what a list would cause to be bought",
        ],
    )
    bars = {m: told[f"{m}/ndcg_at_10/for_you"] for m in models}
    new = {m: told[f"{m}/ndcg_at_10/also_like"] for m in models if (m, "also_like") not in MEANINGLESS}
    return report, {"ndcg_for_you": bar_plot("NDCG@10, for you", bars), "ndcg_also_like": bar_plot("NDCG@10, new items", new)}


def coverage(rows: pd.DataFrame) -> float:
    """Distinct items in all top tens as a share of the catalogue, the mean of the cuts."""
    shares = [len(set(np.concatenate(part["picks"].tolist()))) / part["catalogue"].iloc[0] for _, part in rows.groupby("unit")]
    return float(np.mean(shares))
