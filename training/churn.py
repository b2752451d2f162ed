"""The churn job: who will stay away for the whole horizon?"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.home import Home
from features.store import FeatureStore
from models.churn import FEATURES, Churn, eligible, matrix
from models.probability import Floats, Logistic
from training.dataset import (
    CUTOFF_STEP_DAYS,
    HORIZON_DAYS,
    Advance,
    Cuts,
    EmptyWindowError,
    Truth,
    days_before,
    moments,
    open_experiment,
    training_cutoffs,
)
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
from training.run import Report, TrackedRun

RFM = ("recency_days", "baskets_182", "spend_minor_182")


def main(home: Home, as_of: datetime | None = None, seed: int = 0, advance: Advance = lambda step: None) -> str:
    """Train, judge and register; returns the report. Inputs already trained on are not trained on again."""
    truth, cuts = open_experiment(home, as_of)
    run = TrackedRun(home, "churn", cuts.final, seed)
    if (standing := run.standing_report()) is not None:
        return standing
    frame = dataset(home, truth, cuts, advance)
    with run.started({"horizon_days": HORIZON_DAYS, "cutoff_step_days": CUTOFF_STEP_DAYS, "features": len(FEATURES)}):
        kind = choose(frame, cuts, truth.shop.currency, seed)
        advance("evaluating")
        scored = evaluate(frame, cuts, truth.shop.currency, seed)
        looks = run.look([f"{cut:%Y-%m-%d}" for cut in cuts.tests])
        report, figures = judge(scored, kind, looks)
        advance("fitting the final model")
        model = _fit(kind, closed_before(frame, cuts.final, cuts.timezone), truth.shop.currency, seed)
        example = pd.DataFrame([{name: float(k) for k, name in enumerate(FEATURES)}])
        unit = scored.rename(columns={kind: "score"})[["customer_id", "unit", "group", "label", "score"]]
        run.finish(model, report, unit, example, model.predict(matrix(example.to_dict("records"))), figures)
    return report.text()


def dataset(home: Home, truth: Truth, cuts: Cuts, advance: Advance) -> pd.DataFrame:
    """The spine of every training cutoff and test cut, with features, eligible customers only."""
    cutoffs = training_cutoffs(cuts.final, cuts.start, truth.shop.timezone)
    store = FeatureStore(home)
    store.apply()
    store.backfill("customer_activity", moments([*cutoffs, cuts.final]), lambda n: advance("backfilling features"))
    frame = store.historical(truth.churn_spine(cutoffs), "churn_v1")
    keep = [eligible(row) is None for row in frame[["recency_days", "visit_days_total"]].to_dict("records")]
    frame = frame[keep].reset_index(drop=True)
    if frame.empty or frame["label"].nunique() < 2:
        raise EmptyWindowError(f"no customer to learn churn from before {cuts.final:%Y-%m-%d}: choose a later --as-of")
    return frame


def closed_before(frame: pd.DataFrame, cut: datetime, timezone: str) -> pd.DataFrame:
    """The rows whose label window had closed by *cut*."""
    closed = {m: days_before(m.to_pydatetime(), -HORIZON_DAYS, timezone) <= cut for m in frame["event_timestamp"].unique()}
    return frame[frame["event_timestamp"].map(closed)]


def choose(frame: pd.DataFrame, cuts: Cuts, currency: str, seed: int) -> str:
    """The kind of model with the better average precision on the tuning cut, which no report shows."""
    at = frame["event_timestamp"] == pd.Timestamp(cuts.tuning)
    train, rows = closed_before(frame, cuts.tuning, cuts.timezone), matrix(frame[at].to_dict("records"))
    labels = frame.loc[at, "label"].to_numpy(dtype=bool)
    group = np.zeros(len(labels), dtype=str)
    return max(
        ("logistic", "lightgbm"),
        key=lambda kind: mean_average_precision(labels, _fit(kind, train, currency, seed).predict(rows), group),
    )


def evaluate(frame: pd.DataFrame, cuts: Cuts, currency: str, seed: int) -> pd.DataFrame:
    """Every model's answers on the test cuts, each fitted on what was known at its cut."""
    parts = []
    for cut in cuts.tests:
        test, train = frame[frame["event_timestamp"] == pd.Timestamp(cut)], closed_before(frame, cut, cuts.timezone)
        rows, labels = test.to_dict("records"), train["label"].to_numpy(dtype=bool)
        rfm = Logistic.fit(train[list(RFM)].to_numpy(dtype=float), labels)
        parts.append(
            pd.DataFrame(
                {
                    "customer_id": test["customer_id"],
                    "unit": f"{cut:%Y-%m-%d}",
                    "group": f"{cut:%Y-%m-%d}",
                    "label": test["label"].astype(bool),
                    "recency": test["recency_days"].astype(float),
                    "rfm logistic": rfm.predict(test[list(RFM)].to_numpy(dtype=float)),
                    **{k: _fit(k, train, currency, seed).predict(matrix(rows)) for k in ("logistic", "lightgbm")},
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def judge(scored: pd.DataFrame, served: str, looks: int) -> tuple[Report, Mapping[str, object]]:
    """The table beside its baselines, the lead and the pictures."""
    models = {m: (scored[m].to_numpy(dtype=float), m != "recency") for m in ("recency", "rfm logistic", "logistic", "lightgbm")}
    labels, groups = scored["label"].to_numpy(dtype=bool), scored["group"].to_numpy(dtype=str)
    names, values, drawn = compare_binary(scored["customer_id"].tolist(), groups, labels, models)
    found = estimates(values, drawn, names)
    honesty = {m: calibration(labels, models[m][0]) for m in models if models[m][1]}
    table = {m: _row(found, m, honesty.get(m)) for m in models}
    lead = difference(values, drawn, names, f"{served}/average_precision", "recency/average_precision")
    others = difference(values, drawn, names, f"{served}/auc", "rfm logistic/auc")
    cuts = sorted(set(groups))
    report = Report(
        kind="churn",
        title=f"Churn: no visit in {HORIZON_DAYS} days; mean of the cuts {' and '.join(cuts)}; "
        f"base rate {labels.mean():.1%}, {len(labels)} rows",
        served=served,
        baseline="recency",
        columns=["AUC", "AP", "Brier", "lift@10%", "ECE (noise floor)", "calibration slope / intercept (p)"],
        table=table,
        lead=lead,
        notes=[f"Lead in AUC over the RFM logistic, paired: {others}.", f"These cuts were looked at {looks} times."],
        metrics={f"{m}_{k}".replace(" ", "_"): found[f"{m}/{k}"].value for m in models for k in BINARY_MEASURES},
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


def _fit(kind: str, train: pd.DataFrame, currency: str, seed: int) -> Churn:
    labels: NDArray[np.bool_] = train["label"].to_numpy(dtype=bool)
    if len(set(labels.tolist())) < 2:
        raise EmptyWindowError("every training customer has the same label: the window before the cut is too short")
    rows: Floats = matrix(train.to_dict("records"))
    return Churn.fit(kind, rows, labels, HORIZON_DAYS, currency, seed)
