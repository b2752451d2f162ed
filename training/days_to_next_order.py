"""The job of days to the next order: in how many days will a customer have ordered again, as likely as not?"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import numpy as np
import pandas as pd

from features.definitions.domain import Leaving
from features.state.home import Home
from models.days_to_next_order import DaysToNextOrder
from models.eligibility import Eligibility
from models.inputs import matrix
from models.probability import Floats
from models.reports import ModelReport
from training.dataset import (
    CUTOFF_STEP_DAYS,
    Advance,
    Cuts,
    EmptyWindowError,
    Plan,
    Truth,
    eligibility_of,
    eligible_frame,
    inputs_of,
    open_experiment,
)
from training.evaluation import DURATION_COLUMNS, banded
from training.metrics import DURATION_MEASURES, compare_durations, difference, estimates
from training.plots import bar_plot
from training.report import Outcome, Report
from training.run import TrackedRun

BASELINES = ("usual interval", "constant")
SERVED = "logistic"


def main(home: Home, model: str, plan: Plan, advance: Advance = lambda step: None) -> ModelReport:
    """Train, judge and register; returns the report. Inputs already trained on are not trained on again."""
    truth, cuts = open_experiment(home, model, plan)
    run = TrackedRun(home, model, cuts, plan)
    if (standing := run.standing_report()) is not None:
        return standing
    inputs, leaving, eligibility = inputs_of(truth.domain, run.settings.kind.name), truth.domain.leaving, eligibility_of(truth.domain)
    names = [each.name for each in inputs]

    def fit(train: pd.DataFrame) -> DaysToNextOrder:
        rows, days = matrix(train.to_dict("records"), inputs), train["days"].to_numpy(dtype=float)
        try:
            return DaysToNextOrder.fit(rows, days, inputs, cuts.horizon_days, truth.shop.currency, eligibility)
        except ValueError as error:
            raise EmptyWindowError(str(error)) from None

    with run.started({"cutoff_step_days": CUTOFF_STEP_DAYS, "features": len(inputs)}):
        advance("checking the log")
        run.check_log(truth)
        frame = dataset(home, truth, cuts, eligibility, run.settings.feature_service, advance)
        reference, _ = run.champion_reference()
        latest = frame[frame["event_timestamp"] == frame["event_timestamp"].max()][names]
        run.gate.look_at_rows(frame, ["customer_id", "event_timestamp"], inputs)
        run.gate.look_at_drift(latest, reference, inputs)
        run.check_data()
        run.trained_on(frame, model, "days")
        advance("evaluating")
        parts = []
        for cut in cuts.tests:
            test, train = frame[frame["event_timestamp"] == pd.Timestamp(cut)], cuts.closed_before(frame, cut)
            told = {"usual interval": usual_interval(test, train, cuts.horizon_days), "constant": float(train["days"].median())}
            fitted = fit(train)
            told[SERVED] = fitted.predict(matrix(test.to_dict("records"), inputs))
            parts.append(_asked(test, cuts.unit(cut), leaving).assign(**told))
        scored = pd.concat(parts, ignore_index=True)
        units = {cuts.unit(cut): cut for cut in cuts.tests}
        report, figures = judge(scored, run, eligibility, run.look(list(units)))
        advance("fitting the final model")
        final = fit(cuts.closed_before(frame, cuts.final))
        example = pd.DataFrame([{name: float(k) for k, name in enumerate(names)}])
        outcome = Outcome(
            model=final,
            report=report,
            evaluation=scored.rename(columns={SERVED: "score"})[list(DURATION_COLUMNS)],
            units=units,
            rescore=lambda rival, wanted: rescored(frame, rival, wanted, leaving),
            example=example,
            output=final.predict_frame(example, {}),
            plots=figures,
            reference=latest,
        )
        return run.finish(outcome)


def dataset(home: Home, truth: Truth, cuts: Cuts, eligibility: Eligibility, service: str, advance: Advance) -> pd.DataFrame:
    """The spine of every training cutoff and test cut, with features and ``days``, eligible customers only."""
    cutoffs = sorted({*cuts.training(), *cuts.tests})
    return eligible_frame(home, truth.next_order_spine(cutoffs, cuts.horizon_days), [*cutoffs, cuts.final], eligibility, service, advance)


def usual_interval(test: pd.DataFrame, train: pd.DataFrame, horizon_days: int) -> Floats:
    """What is left of each customer's usual interval; for whoever has none, the median of all, and nobody later than the horizon."""
    left = (test["gap_mean_days"] - test["recency_days"]).to_numpy(dtype=float)
    return np.clip(np.where(np.isnan(left), float(train["days"].median()), left), 0.0, float(horizon_days))


def rescored(frame: pd.DataFrame, rival: DaysToNextOrder, wanted: Mapping[str, datetime], leaving: Leaving) -> pd.DataFrame:
    """The evaluation of a model as it stands, on cuts after all that it learnt from."""
    parts = []
    for unit, cut in wanted.items():
        test = frame[frame["event_timestamp"] == pd.Timestamp(cut)]
        parts.append(_asked(test, unit, leaving).assign(score=rival.predict_frame(test, {})))
    return pd.concat(parts, ignore_index=True)[list(DURATION_COLUMNS)]


def _asked(test: pd.DataFrame, unit: str, leaving: Leaving) -> pd.DataFrame:
    segment = banded(test[leaving.segmented_by], leaving.segments)
    return pd.DataFrame({"customer_id": test["customer_id"], "unit": unit, "segment": segment, "days": test["days"].astype(float)})


def judge(scored: pd.DataFrame, run: TrackedRun, eligibility: Eligibility, looks: int) -> tuple[Report, Mapping[str, object]]:
    """The table beside its baselines, the lead and the picture."""
    cuts = run.cuts
    foretold = {model: scored[model].to_numpy(dtype=float) for model in (*BASELINES, SERVED)}
    days, units = scored["days"].to_numpy(dtype=float), scored["unit"].to_numpy(dtype=str)
    names, values, drawn = compare_durations(scored["customer_id"].tolist(), units, days, foretold)
    found = estimates(values, drawn, names)
    metric = run.settings.promotion.metric
    # of an error, less is better
    sign = -1.0 if metric == "mae_days" else 1.0
    # which simple rule is better differs from shop to shop: the lead is the one over the better of the two
    baseline = max(BASELINES, key=lambda rule: sign * found[f"{rule}/{metric}"].value)
    ours, theirs = f"{SERVED}/{metric}", f"{baseline}/{metric}"
    lead = difference(values, drawn, names, theirs, ours) if sign < 0 else difference(values, drawn, names, ours, theirs)
    none = float((days >= cuts.horizon_days).mean())
    report = Report(
        kind=run.model,
        title=f"Days to the next order, at most {cuts.horizon_days}; mean of the cuts {' and '.join(map(cuts.day, cuts.tests))}; "
        f"{len(days)} rows, {none:.1%} without an order",
        served=SERVED,
        baseline=baseline,
        columns=["mean absolute error, days", "within 3 days"],
        table={
            model: {
                "mean absolute error, days": f"{found[f'{model}/mae_days']}",
                "within 3 days": f"{found[f'{model}/within_3_days']}",
            }
            for model in foretold
        },
        lead=lead,
        notes=[f"These cuts were looked at {looks} times."],
        metrics={f"{m}_{k}".replace(" ", "_"): found[f"{m}/{k}"].value for m in foretold for k in DURATION_MEASURES},
        quality={m: {k: found[f"{m}/{k}"] for k in DURATION_MEASURES} for m in foretold},
        limits=[
            f"answers only for customers with at least {eligibility.min_visit_days} visit days "
            f"and a visit in the last {eligibility.max_recency_days} days",
            f"{cuts.horizon_days} days means: as likely as not, no order within that time",
            "a median: half of the customers come earlier, half later",
        ],
    )
    return report, {"mae_days": bar_plot("Mean absolute error, days", {m: found[f"{m}/mae_days"] for m in foretold})}
