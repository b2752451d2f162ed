"""``python -m training evaluate``: lists on several cuts, beside their sources, without their parts, and beside other libraries."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.state.disk import write_atomically
from features.state.home import Home
from models.recommender.config import RANKED, RecommenderConfig
from models.recommender.owned import COLUMNS
from models.recommender.ranker import Ranker
from models.recommender.recommender import Recommender
from models.recommender.sources import SOURCES
from models.reports import Document
from training.dataset import Advance, Cuts, Plan, Truth, days_before, open_experiment
from training.lessons import FEWEST_BOUGHT, LISTING_OF, AtCut, Lessons
from training.metrics import Estimate, MeansOverUnits, bootstrap, difference, estimates
from training.page import page
from training.peers import PEERS, lists_of, peak_bytes, tuned
from training.plots import bar_plot
from training.ranking import SERVED, SHOWN, asked_of, coverage, measured, ndcg_of, own_lists, ranking_tasks, rarity_of
from training.recommendations import best_modes, ranked
from training.rendering import markdown
from training.report import sheet_of
from training.run import TrackedRun

MEASURES = ("recall_at_10", "ndcg_at_10", "mrr", "hit_rate", "ndcg_of_kinds", "diversity", "popularity")
SHORT = ("R@10", "N@10", "MRR", "hit rate", "N@10 of kinds", "kinds in ten", "popularity of what is shown")
PARTS: Mapping[str, tuple[str, ...]] = {
    "what was bought speaks for it": ("liked", "liked_share", "liked_lately", "liked_lately_share"),
    "its own history with the customer": ("weight", "weight_share", "purchases", "recency_days", "interval_days", "due"),
    "what sells": ("popularity", "trend", "buyers", "repeat_rate", "on_sale_days"),
    "the customer's categories and brands": ("affinity_",),
}
"""The ranker's inputs in groups, each to be left out once; a name that ends in an underscore stands for all that begin so."""

YOUNG_BASKETS = 1_000
"""After so many sales a shop is judged as the beginner that it then was."""


def main(home: Home, model: str, plan: Plan, cuts_back: int, trials: int, advance: Advance = lambda step: None) -> Document:
    """Judge the lists of *cuts_back* cuts beside their sources and peers; keeps an HTML page in MLflow.

    Peers are tuned by *trials* trials each on the tuning cut, which is not among those that are judged; the ablation is of that cut too.
    """
    import mlflow

    truth, cuts = open_experiment(home, model, plan)
    run = TrackedRun(home, model, cuts, plan)
    config = RecommenderConfig(seed=plan.seed + 1, learner=run.settings.learner)
    lessons = Lessons(home, truth, cuts, run.settings.feature_service, config, advance)
    judged = judged_cuts(cuts, cuts_back)
    lessons.prepare([cuts.tuning, *judged])
    modes, _ = best_modes(lessons, cuts.tuning)
    parts, spent = [], {"ours": 0.0}
    for cut in judged:
        started = time.process_time()
        model_then = ranked(lessons.judged(cut), lessons.rankers(cut), modes)
        spent["ours"] += time.process_time() - started
        last = model_then
        advance("judging our lists")
        parts.append(_judged(own_lists(model_then, lessons.at(cut)), lessons.at(cut), model_then, cuts.unit(cut)))
    tables = {}
    if trials:
        for name, peer in PEERS.items():
            advance(f"tuning {name}")
            settings = {listing: tuned(peer, lessons.at(cuts.tuning), listing, trials) for listing in LISTING_OF.values()}
            for cut in judged:
                moment = lessons.at(cut)
                plain, seconds = lists_of(peer, {}, moment, decayed=False)
                spent[name] = spent.get(name, 0.0) + seconds
                model_then = lessons.sources(cut)
                parts.append(_judged({f"{name}, defaults": plain}, moment, model_then, cuts.unit(cut)))
                best: dict[tuple[int, str], NDArray[np.intp]] = {}
                for listing, (chosen, decayed) in settings.items():
                    shown, _ = lists_of(peer, chosen, moment, decayed)
                    best |= {key: value for key, value in shown.items() if key[1] == listing}
                parts.append(_judged({f"{name}, tuned": best}, moment, model_then, cuts.unit(cut)))
    rows = pd.concat(parts, ignore_index=True)
    notes = [
        f"Cuts {', '.join(map(cuts.day, judged))}; tuned and ablated on {cuts.day(cuts.tuning)}; {trials} trials a peer and list."
        + (" The tuning saw what the earlier cuts are judged by, which favours the peers." if judged[0] < cuts.tuning else ""),
        f"Ordered by: {', '.join(f'{LISTING_OF[objective]}: {mode}' for objective, mode in modes.items())}.",
        f"CPU seconds of all fits of these cuts: {', '.join(f'{name} {seconds:.0f}' for name, seconds in spent.items())}; "
        f"memory at most {peak_bytes() / 1e9:.1f} GB.",
    ]
    figures = {}
    for listing in LISTING_OF.values():
        tables[f"{listing}: every model"] = table(rows[rows["listing"] == listing])
        tables[f"{listing}: by how much the customer has bought"] = by_segment(rows[rows["listing"] == listing])
        means = _estimates(rows[rows["listing"] == listing])
        figures[f"ndcg_{listing}"] = bar_plot(f"NDCG@10, {listing}", means)
    advance("leaving parts out")
    tables["without a part, on the tuning cut (NDCG@10)"] = ablation(lessons, cuts.tuning, config.seed)
    tables["what the sources retrieve, on the tuning cut"] = recall_of_sources(lessons.sources(cuts.tuning), lessons.at(cuts.tuning))
    tables["of customers of whom little is known, on the last cut (for_you, NDCG@10)"] = cold_start(last, lessons.at(judged[-1]))
    if (young := young_cut(truth, cuts)) is not None:
        tables |= young_shop(lessons, young, cuts.unit(young))
    run.look(list(map(cuts.unit, judged)))
    sheets = [sheet_of(frame, name) for name, frame in tables.items()]
    document = Document(f"Recommendations, evaluated as of {cuts.day(cuts.final)}", [*notes, *sheets])
    with run.started({"trials": trials}):
        mlflow.log_text(page(document.title, [*document.parts, *figures.items()]), "evaluation.html")
    write_atomically(home.root / "reports" / "evaluated" / f"{model}.md", markdown(document).encode())
    return document


def judged_cuts(cuts: Cuts, count: int) -> list[datetime]:
    """The last *count* cuts a horizon apart whose horizon has closed, oldest first; never the tuning cut."""
    found: list[datetime] = []
    days = cuts.horizon_days
    while len(found) < count and (cut := days_before(cuts.final, days, cuts.timezone)) > days_before(cuts.start, -112, cuts.timezone):
        if cut != cuts.tuning:
            found.append(cut)
        days += cuts.horizon_days
    return found[::-1]


def young_cut(truth: Truth, cuts: Cuts) -> datetime | None:
    """The first midnight by which ``YOUNG_BASKETS`` baskets had been sold; None where that is not before the tuning cut."""
    days = 1
    while (cut := days_before(cuts.start, -days, cuts.timezone)) < cuts.tuning:
        if truth.lines(cuts.start, cut)["event_id"].nunique() >= YOUNG_BASKETS:
            return cut
        days += 1
    return None


def young_shop(lessons: Lessons, cut: datetime, unit: str) -> dict[str, pd.DataFrame]:
    """What the lists are worth by sources alone, where too little was sold to learn an order from; nothing where nobody could be asked."""
    try:
        moment = lessons.at(cut)
    except ValueError:
        # no item has enough buyers yet
        return {}
    if not any(True for _ in ranking_tasks(moment)):
        return {}
    model = ranked(lessons.sources(cut), {}, dict.fromkeys(LISTING_OF, RANKED))
    rows = _judged(own_lists(model, moment), moment, model, unit)
    title = f"of a shop after its first {YOUNG_BASKETS:,} baskets ({cut:%Y-%m-%d}), sources joined"
    return {f"{title}: {listing}": table(part) for listing, part in rows.groupby("listing")}


def _judged(lists: Mapping[str, Mapping[tuple[int, str], NDArray[np.intp]]], moment: AtCut, model: Recommender, unit: str) -> pd.DataFrame:
    """One row a customer, list and model."""
    family, rank = model.shelf.family, model.shelf.popularity_share
    rarity, rows = rarity_of(moment), []
    for task in ranking_tasks(moment):
        kinds = np.unique(family[task.truth])
        for name, found in lists.items():
            shown = found.get((task.number, task.listing))
            if shown is None:
                continue
            recall, ndcg, first = measured(shown, task.truth)
            ten = shown[:10]
            # a kind counts where it is shown first
            _, firsts = np.unique(family[shown], return_index=True)
            of_kinds = measured(family[shown][np.sort(firsts)], kinds)[1]
            rows.append(
                {
                    "customer_id": task.customer_id, "unit": unit, "listing": task.listing, "model": name, "segment": task.segment,
                    "recall_at_10": recall, "ndcg_at_10": ndcg, "mrr": first, "hit_rate": float(recall > 0), "ndcg_of_kinds": of_kinds,
                    "diversity": len(np.unique(family[ten])) / max(len(ten), 1), "popularity": float(rank[ten].mean()) if len(ten) else 0.0,
                    "novelty": float(rarity[ten].mean()) if len(ten) else np.nan, "picks": ten, "catalogue": len(model.item_ids),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame, draws: int = 300) -> pd.DataFrame:
    """Every model of one list: its measures, and our paired lead over it in NDCG@10."""
    order = pd.MultiIndex.from_frame(rows[["customer_id", "unit"]].drop_duplicates())
    models = list(dict.fromkeys(rows["model"]))
    wide = rows.pivot(index=["customer_id", "unit"], columns="model", values=list(MEASURES)).reindex(order)
    columns = [(measure, model) for measure in MEASURES for model in models]
    values = np.column_stack([wide[column].to_numpy(dtype=float) for column in columns])
    units = wide.index.get_level_values("unit").to_numpy(dtype=str)
    found, drawn = bootstrap(list(wide.index.get_level_values("customer_id")), MeansOverUnits(units, values), draws)
    names = [f"{model}/{measure}" for measure, model in columns]
    told = estimates(found, drawn, names)
    lines = []
    for model in models:
        mine = rows[rows["model"] == model]
        line = {"model": model} | {short: f"{told[f'{model}/{m}'].value:.3f}" for m, short in zip(MEASURES, SHORT, strict=True)}
        line["coverage@10"], line["novelty"] = f"{coverage(mine):.3f}", f"{mine['novelty'].mean():.1f}"
        lead = "" if model == SERVED else f"{difference(found, drawn, names, f'{SERVED}/ndcg_at_10', f'{model}/ndcg_at_10')}"
        lines.append({**line, "our lead, N@10": lead})
    return pd.DataFrame(lines)


def by_segment(rows: pd.DataFrame) -> pd.DataFrame:
    """NDCG@10 of every model by how much its customers had bought."""
    means = rows.pivot_table(index="model", columns="segment", values="ndcg_at_10", aggfunc="mean", sort=False)
    counts = rows[rows["model"] == SERVED].groupby("segment").size()
    means.columns = [f"{name} ({counts.get(name, 0)})" for name in means.columns]
    return means.map(lambda value: f"{value:.3f}").reset_index()


def _estimates(rows: pd.DataFrame) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for model, part in rows.groupby("model", sort=False):
        values = part["ndcg_at_10"].to_numpy(dtype=float)[:, None]
        units = part["unit"].to_numpy(dtype=str)
        value, drawn = bootstrap(part["customer_id"].tolist(), MeansOverUnits(units, values), 200)
        found[str(model)] = estimates(value, drawn, ["n"])["n"]
    return found


def ablation(lessons: Lessons, cut: datetime, seed: int) -> pd.DataFrame:
    """The rankers learnt again without each group of inputs, and what that does to NDCG@10; a lead above 0 says that it earns its place."""
    lines = []
    model, moment = lessons.sources(cut), lessons.at(cut)
    names = [each.name for each in model.ranker_inputs]
    for objective, listing in LISTING_OF.items():
        lessons_of = [lessons.lesson(before, objective) for before in lessons.before(cut)]
        if sum(int(labels.sum()) for _, labels, _ in lessons_of) < FEWEST_BOUGHT:
            continue
        rows, labels, groups = (np.concatenate(each) for each in zip(*lessons_of, strict=True))
        asked = asked_of(model, moment, listing)
        values = {}
        for part, left_out in {"nothing": (), **PARTS}.items():
            keep = [
                k
                for k, name in enumerate(names)
                if not any(name == out or (out.endswith("_") and name.startswith(out)) for out in left_out)
            ]
            ranker = Ranker.fit(rows[:, keep], labels, groups, [model.ranker_inputs[k] for k in keep], objective, seed)
            values[part] = ndcg_of(ranker, asked, keep)
        customers = [each.task.customer_id for each in asked]
        for part, value in values.items():
            gap = values["nothing"] - value
            found, drawn = bootstrap(customers, MeansOverUnits(np.array(["cut"] * len(gap)), np.column_stack([value, gap])), 300)
            told_gap = estimates(found, drawn, ["value", "gap"])
            lost = "" if part == "nothing" else f"{told_gap['gap']}"
            lines.append({"list": listing, "without": part, "N@10": f"{value.mean():.4f}", "lost by it": lost})
    return pd.DataFrame(lines)


def cold_start(model: Recommender, moment: AtCut, most: int = 1_000) -> pd.DataFrame:
    """What the list is worth where only the last few items of a customer were known, beside popularity."""
    tasks = [task for task in ranking_tasks(moment) if task.listing == "for_you"][:most]
    popular = model.shelf.by_popularity[:SHOWN]
    lines = []
    for known in (0, 1, 3, 10):
        values = []
        for task in tasks:
            query = moment.query(task.number, "for_you")
            row = dict(query.row)
            latest = np.sort(np.argsort(-np.asarray(row["bought_last_at"]), kind="stable")[:known])
            row |= {name: [row[name][k] for k in latest] for name in COLUMNS}
            shown = model.pipeline.order(replace(query, row=row), SHOWN)
            values.append((measured(shown, task.truth)[1], measured(popular, task.truth)[1]))
        table_of = np.array(values)
        customers = [task.customer_id for task in tasks]
        found, drawn = bootstrap(customers, MeansOverUnits(np.array(["cut"] * len(values)), table_of), 300)
        lead = difference(found, drawn, ["ours", "popularity"], "ours", "popularity")
        lines.append({"items known": f"{known}", SERVED: f"{found[0]:.3f}", "popularity": f"{found[1]:.3f}", "lead": f"{lead}"})
    return pd.DataFrame(lines)


def recall_of_sources(model: Recommender, moment: AtCut) -> pd.DataFrame:
    """Which share of what is bought next each source retrieves, alone and as the only one to do so: the ceiling of any ranker."""
    sums: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for task in ranking_tasks(moment):
        profile = model.profile(moment.query(task.number, task.listing))
        found = {name: np.setdiff1d(SOURCES[name](profile), task.hidden) for name in profile.recipe.sources}
        for name, places in found.items():
            others = np.concatenate([each for other, each in found.items() if other != name] or [places[:0]])
            hits = np.isin(task.truth, places)
            alone = hits & ~np.isin(task.truth, others)
            sums.setdefault((task.listing, name), []).append((hits.mean(), alone.mean(), float(len(places))))
        union = np.unique(np.concatenate(list(found.values())))
        sums.setdefault((task.listing, "all"), []).append((float(np.isin(task.truth, union).mean()), 0.0, float(len(union))))
    lines = []
    for (listing, source), values in sums.items():
        recall, alone, size = np.mean(values, axis=0)
        lines.append(
            {"list": listing, "source": source, "recall": f"{recall:.3f}", "it alone": f"{alone:.3f}", "candidates": f"{size:.0f}"}
        )
    return pd.DataFrame(sorted(lines, key=lambda line: line["list"]))
