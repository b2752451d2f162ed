"""The churn job: who will stay away for the whole horizon?"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.state.home import Home
from features.store.feature_store import FeatureStore
from models.churn import FEATURES, MAX_RECENCY_DAYS, MIN_VISIT_DAYS, Churn, eligible, matrix
from models.probability import Floats, Logistic
from training.dataset import (
    CUTOFF_STEP_DAYS,
    Advance,
    Cuts,
    EmptyWindowError,
    Plan,
    Truth,
    moments,
    open_experiment,
)
from training.evaluation import BINARY_COLUMNS, banded
from training.metrics import (
    BINARY_MEASURES,
    Calibration,
    calibration,
    compare_binary,
    difference,
    estimates,
    mean_average_precision,
)
from training.plots import bar_plot, calibration_plot, gain_plot
from training.report import Outcome, Report
from training.run import TrackedRun

SEGMENTS = {
    "1 to 3 visit days in 13 weeks": (0, 4), "4 to 7 visit days in 13 weeks": (4, 8), "8 to 15 visit days in 13 weeks": (8, 16),
    "16 visit days or more in 13 weeks": (16, float("inf")),
}  # fmt: skip
RFM = ("recency_days", "baskets_182", "spend_minor_182")


def main(home: Home, plan: Plan, advance: Advance = lambda step: None) -> str:
    """Train, judge and register; returns the report. Inputs already trained on are not trained on again."""
    truth, cuts = open_experiment(home, plan)
    run = TrackedRun(home, "churn", cuts, plan)
    if (standing := run.standing_report()) is not None:
        return standing
    currency, seed = truth.shop.currency, plan.seed
    with run.started({"cutoff_step_days": CUTOFF_STEP_DAYS, "features": len(FEATURES)}):
        advance("checking the log")
        run.check_log(truth)
        frame = dataset(home, truth, cuts, advance)
        reference, rate = run.champion_reference()
        latest = frame[frame["event_timestamp"] == frame["event_timestamp"].max()][list(FEATURES)]
        run.gate.look_at_rows(frame, ["customer_id", "event_timestamp"], list(FEATURES))
        run.gate.look_at_labels(frame.loc[frame["event_timestamp"].isin(cuts.tests), "label"].to_numpy(dtype=bool), rate)
        run.gate.look_at_drift(latest, reference)
        run.check_data()
        run.trained_on(frame, "churn", "label")
        advance("choosing")
        kind = choose(frame, cuts, currency, seed, run)
        advance("evaluating")
        scored = evaluate(frame, cuts, currency, seed)
        units = {cuts.unit(cut): cut for cut in cuts.tests}
        report, figures = judge(scored, kind, run.settings.promotion.metric, cuts, run.look(list(units)))
        advance("fitting the final model")
        model = _fit(kind, cuts.closed_before(frame, cuts.final), cuts.horizon_days, currency, seed)
        example = pd.DataFrame([{name: float(k) for k, name in enumerate(FEATURES)}])
        outcome = Outcome(
            model=model,
            report=report,
            evaluation=scored.rename(columns={kind: "score"})[list(BINARY_COLUMNS)],
            units=units,
            rescore=lambda rival, wanted: rescored(frame, rival, wanted),
            example=example,
            output=model.predict(matrix(example.to_dict("records"))),
            plots=figures,
            reference=latest,
        )
        return run.finish(outcome)


def dataset(home: Home, truth: Truth, cuts: Cuts, advance: Advance) -> pd.DataFrame:
    """The spine of every training cutoff and test cut, with features, eligible customers only."""
    cutoffs = sorted({*cuts.training(), cuts.tuning, *cuts.tests})
    store = FeatureStore(home)
    store.apply()
    store.backfill("customer_activity", moments([*cutoffs, cuts.final]), lambda n: advance("backfilling features"))
    frame = store.historical(truth.churn_spine(cutoffs, cuts.horizon_days), "churn_v1")
    keep = [eligible(row) is None for row in frame[["recency_days", "visit_days_total"]].to_dict("records")]
    frame = frame[keep].reset_index(drop=True)
    if frame.empty or frame["label"].nunique() < 2:
        raise EmptyWindowError(f"no customer to learn churn from before {cuts.final:%Y-%m-%d}: choose a later --as-of")
    return frame


def choose(frame: pd.DataFrame, cuts: Cuts, currency: str, seed: int, run: TrackedRun) -> str:
    """The kind of model with the better average precision on the tuning cut, which no report shows."""
    at = frame["event_timestamp"] == pd.Timestamp(cuts.tuning)
    train, rows = cuts.closed_before(frame, cuts.tuning), matrix(frame[at].to_dict("records"))
    labels = frame.loc[at, "label"].to_numpy(dtype=bool)
    group = np.zeros(len(labels), dtype=str)

    def tried(kind: str) -> float:
        answers = _fit(kind, train, cuts.horizon_days, currency, seed).predict(rows)
        value = mean_average_precision(labels, answers, group)
        return run.trial(kind, {"model": kind, "cut": cuts.day(cuts.tuning)}, "average_precision", value)

    return max(("logistic", "lightgbm"), key=tried)


def evaluate(frame: pd.DataFrame, cuts: Cuts, currency: str, seed: int) -> pd.DataFrame:
    """Every model's answers on the test cuts, each fitted on what was known at its cut."""
    parts = []
    for cut in cuts.tests:
        test, train = frame[frame["event_timestamp"] == pd.Timestamp(cut)], cuts.closed_before(frame, cut)
        rows, labels = matrix(test.to_dict("records")), train["label"].to_numpy(dtype=bool)
        fitted = {k: _fit(k, train, cuts.horizon_days, currency, seed).predict(rows) for k in ("logistic", "lightgbm")}
        rfm = Logistic.fit(train[list(RFM)].to_numpy(dtype=float), labels)
        answers = {
            "recency": test["recency_days"].to_numpy(dtype=float),
            "rfm logistic": rfm.predict(test[list(RFM)].to_numpy(dtype=float)),
        }
        parts.append(_asked(test, cuts.unit(cut)).assign(**answers, **fitted))
    return pd.concat(parts, ignore_index=True)


def rescored(frame: pd.DataFrame, rival: Churn, wanted: Mapping[str, datetime]) -> pd.DataFrame:
    """The evaluation of a model as it stands, on cuts after all that it learnt from."""
    parts = []
    for unit, cut in wanted.items():
        test = frame[frame["event_timestamp"] == pd.Timestamp(cut)]
        parts.append(_asked(test, unit).assign(score=rival.predict(matrix(test.to_dict("records")))))
    return pd.concat(parts, ignore_index=True)[list(BINARY_COLUMNS)]


def _asked(test: pd.DataFrame, unit: str) -> pd.DataFrame:
    """Who was asked about at a cut, and what then happened."""
    asked = {
        "customer_id": test["customer_id"],
        "unit": unit,
        "group": unit,
        "segment": banded(test["visit_days_91"], SEGMENTS),
        "label": test["label"].astype(bool),
    }
    return pd.DataFrame(asked)


def judge(scored: pd.DataFrame, served: str, metric: str, cuts: Cuts, looks: int) -> tuple[Report, Mapping[str, object]]:
    """The table beside its baselines, the lead and the pictures."""
    models = {m: (scored[m].to_numpy(dtype=float), m != "recency") for m in ("recency", "rfm logistic", "logistic", "lightgbm")}
    labels, groups = scored["label"].to_numpy(dtype=bool), scored["group"].to_numpy(dtype=str)
    names, values, drawn = compare_binary(scored["customer_id"].tolist(), groups, labels, models)
    found = estimates(values, drawn, names)
    honesty = {m: calibration(labels, models[m][0]) for m in models if models[m][1]}
    table = {m: _row(found, m, honesty.get(m)) for m in models}
    lead = difference(values, drawn, names, f"{served}/{metric}", f"recency/{metric}")
    others = difference(values, drawn, names, f"{served}/auc", "rfm logistic/auc")
    report = Report(
        kind="churn",
        title=f"Churn: no visit in {cuts.horizon_days} days; mean of the cuts {' and '.join(map(cuts.day, cuts.tests))}; "
        f"base rate {labels.mean():.1%}, {len(labels)} rows",
        served=served,
        baseline="recency",
        columns=["AUC", "AP", "Brier", "lift@10%", "ECE (noise floor)", "calibration slope / intercept (p)"],
        table=table,
        lead=lead,
        notes=[f"Lead in AUC over the RFM logistic, paired: {others}.", f"These cuts were looked at {looks} times."],
        metrics={f"{m}_{k}".replace(" ", "_"): found[f"{m}/{k}"].value for m in models for k in BINARY_MEASURES},
        limits=[
            f"answers only for customers with at least {MIN_VISIT_DAYS} visit days and a visit in the last {MAX_RECENCY_DAYS} days",
            f"staying away for {cuts.horizon_days} days is not yet leaving for good",
            "it tells who will stay away, not whom a message would bring back",
        ],
    )
    bars = {m: found[f"{m}/average_precision"] for m in models}
    figures = {
        "calibration": calibration_plot(labels, models[served][0]),
        "gain": gain_plot(labels, {m: v for m, (v, _) in models.items()}),
        "average_precision": bar_plot("Average precision", bars),
    }
    return report, figures


def _row(found: Mapping[str, object], model: str, honesty: Calibration | None) -> dict[str, str]:
    row = {
        "AUC": f"{found[f'{model}/auc']}",
        "AP": f"{found[f'{model}/average_precision']}",
        "lift@10%": f"{found[f'{model}/lift_at_10pct']}",
    }
    if honesty is not None:
        row["Brier"] = f"{found[f'{model}/brier']}"
        row["ECE (noise floor)"] = f"{honesty.ece:.3f} ({honesty.ece_floor:.3f})"
        row["calibration slope / intercept (p)"] = f"{honesty.slope:.2f} / {honesty.intercept:.2f} ({honesty.p_value:.3f})"
    return row


def _fit(kind: str, train: pd.DataFrame, horizon_days: int, currency: str, seed: int) -> Churn:
    labels: NDArray[np.bool_] = train["label"].to_numpy(dtype=bool)
    if len(set(labels.tolist())) < 2:
        raise EmptyWindowError("every training customer has the same label: the window before the cut is too short")
    rows: Floats = matrix(train.to_dict("records"))
    return Churn.fit(kind, rows, labels, horizon_days, currency, seed)
