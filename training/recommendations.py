"""The recommendations job: what will each customer buy, and what of it is new to her?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.catalogue.tables import Catalogue
from features.state.home import Home
from models.decision import Query, top
from models.inputs import Input
from models.recommendations import LISTINGS
from models.recommender.recommender import PARTS, STATISTICS, Blend, Profile, Recommender, RecommenderConfig
from training.bootstrap import open_store
from training.dataset import Advance, Cuts, EmptyWindowError, Plan, Truth, days_before, moments, open_experiment
from training.evaluation import RANKING_COLUMNS, banded, split_metric
from training.metrics import RANKING_MEASURES, Floats, MeansOverUnits, bootstrap, dcg, difference, estimates, ranking_measures
from training.plots import bar_plot
from training.report import Outcome, Report
from training.run import TrackedRun

# popularity always weighs a little, so that no place goes to whoever comes first among equals
SINGLES: dict[str, Blend] = {
    "popularity": Blend(0, 0, 0, 1),
    "personal frequency": Blend(1, 0, 0, 0, repeat_exponent=0),
    "EASE": Blend(0, 1, 0, 0),
    "ALS": Blend(0, 0, 1, 0),
}
"""The parts alone, to be compared with their join. Popularity is weighted by recency, frequency decays in 90 days."""
SEGMENTS = {
    "1 to 19 items bought": (0, 20), "20 to 99 items bought": (20, 100), "100 to 299 items bought": (100, 300),
    "300 items bought or more": (300, float("inf")),
}  # fmt: skip
MEANINGLESS = {("personal frequency", "also_like")}
"""What a customer never bought she has bought never."""
GRID: dict[str, list[Blend]] = {
    "for_you": [
        Blend(1, ease, als, popularity, repeat_exponent=exponent)
        for exponent in (0.0, 0.25)
        for ease in (0.05, 0.1, 0.25)
        for als in (0.0, 0.1)
        for popularity in (0.01, 0.05, 0.1)
    ],
    "also_like": [Blend(0, 1, als, popularity) for als in (0.1, 0.3, 0.6, 1.0) for popularity in (0.01, 0.05, 0.1)],
}
JOINED = "joined"
TUNING_DEPTH = 100


@dataclass(frozen=True)
class AtCut:
    """What is known at one cut, and what was bought in the horizon after it (empty for the final one)."""

    cut: datetime
    histories: pd.DataFrame
    items: dict[str, list[Any]]
    bought: Mapping[str, set[str]]


def main(home: Home, model: str, plan: Plan, advance: Advance = lambda step: None) -> str:
    """Train, judge and register; returns the report. Inputs already trained on are not trained on again."""
    truth, cuts = open_experiment(home, model, plan)
    run = TrackedRun(home, model, cuts, plan)
    if (standing := run.standing_report()) is not None:
        return standing
    config = RecommenderConfig(seed=plan.seed + 1)
    with run.started({k: str(v) for k, v in asdict(config).items() if k not in ("blends", "seed")}):
        advance("checking the log")
        run.check_log(truth)
        at = dataset(home, truth, cuts, run.settings.feature_service, advance)
        histories = at[cuts.final].histories
        breadth = measured_histories(histories, cuts.final)
        reference, _ = run.champion_reference()
        run.gate.look_at_rows(
            pd.concat([histories[["customer_id"]], breadth], axis=1), ["customer_id"], [Input(name) for name in breadth.columns]
        )
        run.gate.look_at_drift(breadth, reference)
        run.check_data()
        run.trained_on(histories, "purchase histories")
        advance("tuning the blend")
        config = replace(config, blends=choose(fit(at[cuts.tuning], config), at[cuts.tuning], run))
        scored, catalogues = [], {}
        for cut in cuts.tests:
            advance("evaluating")
            then = fit(at[cut], config)
            catalogues[cut] = then.item_ids
            scored.append(evaluate(then, at[cut], cuts.unit(cut)))
        units = {cuts.unit(cut): cut for cut in cuts.tests}
        frame = pd.concat(scored, ignore_index=True)
        report, figures = judge(frame, config, run, run.look(list(units)))
        advance("fitting the final model")
        fitted = fit(at[cuts.final], config)
        example = synthetic_example(fitted)
        picks = [
            [c.id for c in fitted.pipeline.decide(query_of(row, cuts.final), np.random.default_rng(0)).choices] for row in rows_of(example)
        ]
        outcome = Outcome(
            model=fitted,
            report=report,
            evaluation=frame.loc[frame["model"] == JOINED, list(RANKING_COLUMNS)],
            units=units,
            rescore=lambda rival, wanted: rescored(at, catalogues, rival, wanted),
            example=example,
            output=pd.Series(picks),
            plots=figures,
            reference=breadth,
        )
        return run.finish(outcome)


def measured_histories(histories: pd.DataFrame, as_of: datetime) -> pd.DataFrame:
    """What of the histories can drift: how much each customer has bought, how broadly, and how long ago."""
    last = histories["bought_last_at"].map(lambda at: max(at, default=np.nan) if at is not None else np.nan)
    return pd.DataFrame(
        {
            "items_bought": histories["bought_item_ids"].map(len).astype(float),
            "purchases_of_items": histories["bought_counts"].map(sum).astype(float),
            "last_purchase_days": (as_of.timestamp() - last.astype(float)) / 86_400.0,
        }
    )


def dataset(home: Home, truth: Truth, cuts: Cuts, service: str, advance: Advance) -> dict[datetime, AtCut]:
    """Histories and item statistics at every cut, through the feature store."""
    store = open_store(home)
    when = [cuts.tuning, *cuts.tests, cuts.final]
    for view in ("customer_state", "item_stats"):
        store.backfill(view, moments(when), lambda n: advance("backfilling features"))
    attributes = Catalogue(home).read("items").to_pandas().astype(object).where(lambda f: f.notna(), None)
    found: dict[datetime, AtCut] = {}
    for cut in when:
        advance("joining features")
        customers = truth.churn_spine([cut])[["customer_id", "event_timestamp"]]
        histories = store.historical(customers, service)
        if cuts.window_days is not None:
            histories = within(histories, days_before(cut, cuts.window_days, cuts.timezone))
        spine = pd.DataFrame({"item_id": attributes["item_id"], "event_timestamp": cut})
        stats = store.historical(spine, "items_v1").dropna(subset=["buyers"])
        # a shop may call an attribute like any other statistic
        stats = stats.loc[stats["recommendable"].astype(bool), list(STATISTICS)].merge(
            attributes.drop(columns="recommendable"), on="item_id"
        )
        columns = (*STATISTICS, *(name for name in attributes.columns if name not in ("item_id", "recommendable")))
        after = truth.bought(cut, cuts.end(cut)) if cut < cuts.final else {}
        found[cut] = AtCut(cut, histories, {name: stats[name].tolist() for name in columns}, after)
    return found


def within(histories: pd.DataFrame, oldest: datetime) -> pd.DataFrame:
    """The customers who bought within the window; whoever did not, teaches nothing."""
    recent = histories["bought_last_at"].map(lambda at: at is not None and max(at, default=0) >= oldest.timestamp())
    return histories[recent.to_numpy(dtype=bool)].reset_index(drop=True)


def fit(moment: AtCut, config: RecommenderConfig) -> Recommender:
    """The recommender as it would have been trained at the cut."""
    return Recommender.fit(rows_of(moment.histories), moment.items, moment.cut, config)


def choose(model: Recommender, moment: AtCut, run: TrackedRun) -> dict[str, Blend]:
    """For each list the blend with the best NDCG@10 on the tuning cut, which no report shows.

    Only the items that some part alone ranks high are compared: a sum of the parts hardly puts another one first.
    """
    totals, asked = {listing: np.zeros(len(GRID[listing])) for listing in LISTINGS}, dict.fromkeys(LISTINGS, 0)
    for question in ranking_tasks(model, moment):
        asked[question.listing] += 1
        hidden = np.where(question.shown, 0.0, -np.inf)
        parts = question.profile.parts
        near = np.unique(np.concatenate([top(parts[part] + hidden, TUNING_DEPTH) for part in PARTS]))
        hits, found = np.isin(near, question.truth), min(10, len(question.truth))
        for k, blend in enumerate(GRID[question.listing]):
            picks = top(joined(model, question.profile, blend, near) + hidden[near], 10)
            totals[question.listing][k] += dcg(hits[picks]) / dcg(np.ones(found, bool))
    for listing, total in totals.items():
        for k, blend in enumerate(GRID[listing]):
            run.trial(f"{listing} {k + 1}", asdict(blend), "ndcg_at_10", float(total[k] / max(asked[listing], 1)))
    return {listing: GRID[listing][int(np.argmax(total))] for listing, total in totals.items()}


def evaluate(model: Recommender, moment: AtCut, unit: str) -> pd.DataFrame:
    """One row a customer, list and model: its measures over the full catalogue, and what was shown."""
    rows = []
    buyers = np.asarray(pd.Series(moment.items["buyers"], index=moment.items["item_id"]).loc[model.item_ids], dtype=float)
    rarity = -np.log2(buyers / len(moment.histories))
    for question in ranking_tasks(model, moment):
        listing = question.listing
        models = {name: blend for name, blend in SINGLES.items() if (name, listing) not in MEANINGLESS}
        for name, blend in {**models, JOINED: model.config.blends[listing]}.items():
            scores = np.where(question.shown, joined(model, question.profile, blend), -np.inf)
            picks = top(scores, 10)
            measures = dict(zip(RANKING_MEASURES, ranking_measures(scores, picks, question.truth), strict=True))
            rows.append(
                {
                    "customer_id": question.customer_id, "unit": unit, "listing": listing, "model": name, "segment": question.segment,
                    **measures, "novelty": float(rarity[picks].mean()), "picks": picks, "catalogue": len(model.item_ids),
                }
            )  # fmt: skip
    if not rows:
        raise EmptyWindowError(f"nobody bought anything of the catalogue in the window after {moment.cut:%Y-%m-%d}")
    return pd.DataFrame(rows)


def rescored(
    at: Mapping[datetime, AtCut], catalogues: Mapping[datetime, Sequence[str]], rival: Recommender, wanted: Mapping[str, datetime]
) -> pd.DataFrame:
    """The evaluation of a model as it stands, on cuts after all that it learnt from, over the catalogue of each cut.

    What has come into the catalogue since it was trained it cannot show, and loses by it.
    """
    rows = []
    for unit, cut in wanted.items():
        moment, catalogue = at[cut], catalogues[cut]
        where = np.array([rival.positions.get(item, -1) for item in catalogue], dtype=np.intp)
        for question in ranking_tasks(rival, moment, catalogue):
            theirs = joined(rival, question.profile, rival.config.blends[question.listing])
            known = np.where(where >= 0, theirs[np.maximum(where, 0)], -np.inf)
            scores = np.where(question.shown, known, -np.inf)
            measures = dict(zip(RANKING_MEASURES, ranking_measures(scores, top(scores, 10), question.truth), strict=True))
            row = {"customer_id": question.customer_id, "unit": unit, "listing": question.listing, "segment": question.segment}
            rows.append({**row, **measures})
    return pd.DataFrame(rows)[list(RANKING_COLUMNS)]


@dataclass(frozen=True)
class RankingTask:
    """One customer and list at a cut: what is known of her, what she then bought, and what the list may show."""

    customer_id: str
    listing: str
    profile: Profile
    truth: NDArray[np.intp]
    shown: NDArray[np.bool_]
    segment: str


def ranking_tasks(model: Recommender, moment: AtCut, catalogue: Sequence[str] | None = None) -> Iterator[RankingTask]:
    """Both lists' questions about each customer who counts, over *catalogue* (by default the model's own).

    She counts if she had bought something of the catalogue before the cut and then bought something that the list may show.
    """
    items = model.item_ids if catalogue is None else catalogue
    position = {item: k for k, item in enumerate(items)}
    for row in rows_of(moment.histories):
        after = moment.bought.get(row["customer_id"])
        before = np.array([position[i] for i in row["bought_item_ids"] if i in position], dtype=np.intp)
        if not after or not len(before):
            continue
        truth = np.array(sorted(position[i] for i in after if i in position), dtype=np.intp)
        everything, new = np.ones(len(items), bool), np.ones(len(items), bool)
        [segment] = banded([len(before)], SEGMENTS)
        new[before] = False
        profile = model.profile(query_of(row, moment.cut))
        for listing, shown in (("for_you", everything), ("also_like", new)):
            if shown[truth].any():
                yield RankingTask(row["customer_id"], listing, profile, truth[shown[truth]], shown, segment)


def joined(model: Recommender, profile: Profile, blend: Blend, items: NDArray[np.intp] | slice = slice(None)) -> Floats:
    """The sum that the pipeline serves, over the whole catalogue or some of its items."""
    total = np.zeros(len(model.item_ids))[items]
    for name in PARTS:
        weight = np.float32(getattr(blend, name))
        if weight:
            part = model.frequency(profile.liked, blend.repeat_exponent) if name == "frequency" else profile.parts[name]
            total += part[items] * weight
    return total


def judge(scored: pd.DataFrame, config: RecommenderConfig, run: TrackedRun, looks: int) -> tuple[Report, Mapping[str, object]]:
    """The table beside its baselines, the leads and the pictures."""
    cuts, metric = run.cuts, run.settings.promotion.metric
    keys_of_rows = ["customer_id", "unit", "listing"]
    # a pivot sorts by customer id; the rows are to stay in the order in which they were judged
    order = pd.MultiIndex.from_frame(scored[keys_of_rows].drop_duplicates())
    wide = scored.pivot(index=keys_of_rows, columns="model", values=list(RANKING_MEASURES)).reindex(order).reset_index()
    names, values, drawn = [], [], []
    for listing in LISTINGS:
        part = wide[wide["listing"] == listing]
        units = part["unit"].to_numpy(dtype=str)
        keys = [(measure, m) for measure in RANKING_MEASURES for m in (*SINGLES, JOINED) if (m, listing) not in MEANINGLESS]
        table_of = np.column_stack([part[key].to_numpy(dtype=float) for key in keys])
        found, resampled = bootstrap(part["customer_id"].tolist(), MeansOverUnits(units, table_of), draws=500)
        names += [f"{model}/{measure}/{listing}" for measure, model in keys]
        values.append(found)
        drawn.append(resampled)
    value, draws = np.concatenate(values), np.concatenate(drawn, axis=1)
    told = estimates(value, draws, names)
    table: dict[str, dict[str, str]] = {}
    columns_told = [f"{listing} {m}" for listing in LISTINGS for m in ("R@10", "N@10", "MRR", "coverage", "novelty")]
    for model in (*SINGLES, JOINED):
        table[model] = {}
        for listing in (each for each in LISTINGS if (model, each) not in MEANINGLESS):
            for short, measure in zip(("R@10", "N@10", "MRR"), RANKING_MEASURES, strict=True):
                table[model][f"{listing} {short}"] = f"{told[f'{model}/{measure}/{listing}']}"
            mine = scored[(scored["model"] == model) & (scored["listing"] == listing)]
            table[model][f"{listing} coverage"] = f"{coverage(mine):.3f}"
            table[model][f"{listing} novelty"] = f"{mine['novelty'].mean():.1f}"
    measured, list_name = split_metric(metric)
    lead = difference(value, draws, names, f"{JOINED}/{measured}/{list_name}", f"popularity/{measured}/{list_name}")
    over = [
        f"Lead of the join over {model} ({listing}, NDCG@10), paired: "
        f"{difference(value, draws, names, f'{JOINED}/ndcg_at_10/{listing}', f'{model}/ndcg_at_10/{listing}')}."
        for listing, model in (("for_you", "personal frequency"), ("also_like", "popularity"), ("also_like", "EASE"), ("also_like", "ALS"))
    ]
    asked = wide.groupby(["listing", "unit"]).size()
    days = " and ".join(map(cuts.day, cuts.tests))
    report = Report(
        kind=run.model,
        title=f"Recommendations over the full catalogue, {cuts.horizon_days} days; mean of the cuts {days}; "
        f"{int(asked.min())} to {int(asked.max())} customers a cut",
        served=JOINED,
        baseline="popularity",
        columns=columns_told,
        table=table,
        lead=lead,
        notes=[*over, f"Blends, chosen on an earlier cut: {dict(config.blends)}.", f"These cuts were looked at {looks} times."],
        metrics={name.replace("/", "_").replace(" ", "_"): float(v) for name, v in zip(names, value, strict=True)},
        limits=[
            "only items sold before the cut can be shown; a new item waits for the next training",
            "what is bought next is not what a list would cause to be bought",
        ],
    )
    bars = {m: told[f"{m}/ndcg_at_10/for_you"] for m in (*SINGLES, JOINED)}
    new = {m: told[f"{m}/ndcg_at_10/also_like"] for m in (*SINGLES, JOINED) if (m, "also_like") not in MEANINGLESS}
    return report, {"ndcg_for_you": bar_plot("NDCG@10, for you", bars), "ndcg_also_like": bar_plot("NDCG@10, new items", new)}


def coverage(rows: pd.DataFrame) -> float:
    """Distinct items in all top tens as a share of the catalogue, the mean of the cuts."""
    shares = [len(set(np.concatenate(part["picks"].tolist()))) / part["catalogue"].iloc[0] for _, part in rows.groupby("unit")]
    return float(np.mean(shares))


def query_of(row: Mapping[str, Any], as_of: datetime) -> Query:
    """The query that serving would make of a feature row."""
    return Query.from_row(row.get("customer_id"), as_of, row)


def rows_of(frame: pd.DataFrame) -> Sequence[Mapping[str, Any]]:
    """A frame's rows as plain dicts."""
    rows: list[Mapping[str, Any]] = frame.to_dict("records")
    return rows


def synthetic_example(model: Recommender) -> pd.DataFrame:
    """An invented customer who bought two of the catalogue's items; no one's data."""
    items = model.item_ids[:2]
    return pd.DataFrame(
        [
            {
                "bought_item_ids": items, "bought_counts": [2, 1], "bought_last_at": [1_500_000_000, 1_500_100_000],
                "bought_weights": [1.5, 1.0], "recent_item_ids": items[:1], "recent_at": [1_500_200_000], "recent_weights": [1.0],
            }
        ]
    )  # fmt: skip
