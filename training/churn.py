"""The churn job: who will stay away for the whole horizon?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.definitions.domain import Leaving
from features.state.home import Home
from models.churn import Churn
from models.eligibility import Eligibility
from models.inputs import Input, matrix
from models.probability import Boosted, Floats, Logistic
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
from training.evaluation import BINARY_COLUMNS, banded
from training.horizon import advice
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
from training.tuning import Settings, of_probabilities, tuned, tuning_note


@dataclass(frozen=True)
class ChurnTrainer:
    """Fits the candidates, all alike but for their kind."""

    inputs: tuple[Input, ...]
    eligibility: Eligibility
    horizon_days: int
    currency: str
    seed: int
    rfm: tuple[str, ...]
    settings: Settings = field(default_factory=dict)

    def fit(self, kind: str, train: pd.DataFrame) -> Churn:
        """A model of that kind, ``logistic`` or ``lightgbm``.

        Raises:
            EmptyWindowError: all training rows say the same.
        """
        labels = labels_of(train)
        rows = matrix(train.to_dict("records"), self.inputs)
        return Churn.fit(kind, rows, labels, self.inputs, self.horizon_days, self.currency, self.seed, self.eligibility, self.settings)

    def predict(self, kind: str, train: pd.DataFrame, test: pd.DataFrame) -> Floats:
        """What a model of that kind, fitted on *train*, says of *test*."""
        return self.fit(kind, train).predict(matrix(test.to_dict("records"), self.inputs))


def labels_of(train: pd.DataFrame) -> NDArray[np.bool_]:
    """The labels to learn from.

    Raises:
        EmptyWindowError: all say the same.
    """
    labels: NDArray[np.bool_] = train["label"].to_numpy(dtype=bool)
    if len(set(labels.tolist())) < 2:
        raise EmptyWindowError("every training customer has the same label: the window before the cut is too short")
    return labels


def main(home: Home, model: str, plan: Plan, advance: Advance = lambda step: None) -> ModelReport:
    """Train, judge and register; returns the report. Inputs already trained on are not trained on again."""
    truth, cuts = open_experiment(home, model, plan)
    run = TrackedRun(home, model, cuts, plan)
    if (standing := run.standing_report()) is not None:
        return standing
    inputs, leaving = inputs_of(truth.domain, run.settings.kind.name), truth.domain.leaving
    names = [each.name for each in inputs]
    trainer = ChurnTrainer(inputs, eligibility_of(truth.domain), cuts.horizon_days, truth.shop.currency, plan.seed, leaving.rfm)
    with run.started({"cutoff_step_days": CUTOFF_STEP_DAYS, "features": len(inputs)}):
        advance("checking the log")
        run.check_log(truth)
        frame = dataset(home, truth, cuts, trainer.eligibility, run.settings.feature_service, advance)
        reference, rate = run.champion_reference()
        latest = frame[frame["event_timestamp"] == frame["event_timestamp"].max()][names]
        run.gate.look_at_rows(frame, ["customer_id", "event_timestamp"], inputs)
        run.gate.look_at_labels(frame.loc[frame["event_timestamp"].isin(cuts.tests), "label"].to_numpy(dtype=bool), rate)
        run.gate.look_at_drift(latest, reference, inputs)
        run.check_data()
        run.trained_on(frame, model, "label")
        if plan.trials:
            advance(f"tuning, {plan.trials} trials")
            trainer = replace(trainer, settings=tune(frame, cuts, trainer, run, plan.trials))
        advance("choosing")
        kind = choose(frame, cuts, trainer, run)
        advance("evaluating")
        scored = evaluate(frame, cuts, trainer, leaving)
        units = {cuts.unit(cut): cut for cut in cuts.tests}
        report, figures = judge(scored, kind, run, trainer.eligibility, run.look(list(units)))
        report.notes += advice(truth, frame, cuts, float(scored["label"].mean()))
        if plan.trials:
            report.notes.append(tuning_note("lightgbm", trainer.settings, plan.trials))
        advance("fitting the final model")
        fitted = trainer.fit(kind, cuts.closed_before(frame, cuts.final))
        example = pd.DataFrame([{name: float(k) for k, name in enumerate(names)}])
        outcome = Outcome(
            model=fitted,
            report=report,
            evaluation=scored.rename(columns={kind: "score"})[list(BINARY_COLUMNS)],
            units=units,
            rescore=lambda rival, wanted: rescored(frame, rival, wanted, leaving),
            example=example,
            output=fitted.predict(matrix(example.to_dict("records"), inputs)),
            plots=figures,
            reference=latest,
            settings=trainer.settings,
        )
        return run.finish(outcome)


def dataset(home: Home, truth: Truth, cuts: Cuts, eligibility: Eligibility, service: str, advance: Advance) -> pd.DataFrame:
    """The spine of every training cutoff and test cut, with features, eligible customers only."""
    cutoffs = sorted({*cuts.training(), cuts.tuning, *cuts.tests})
    spine = truth.churn_spine(cutoffs, cuts.horizon_days)
    frame = eligible_frame(home, spine, [*cutoffs, cuts.final], eligibility, service, advance)
    if frame["label"].nunique() < 2:
        raise EmptyWindowError(f"no customer to learn churn from before {cuts.final:%Y-%m-%d}: choose a later --as-of")
    return frame


def choose(frame: pd.DataFrame, cuts: Cuts, trainer: ChurnTrainer, run: TrackedRun) -> str:
    """The kind of model with the better average precision on the tuning cut, which no report shows.

    There are two: a search would bring nothing.
    """

    def tried(kind: str) -> float:
        value = precision_at_tuning(frame, cuts, trainer, kind)
        return run.trial(kind, {"model": kind, "cut": cuts.day(cuts.tuning)}, "average_precision", value)

    return max(("logistic", "lightgbm"), key=tried)


def tune(frame: pd.DataFrame, cuts: Cuts, trainer: ChurnTrainer, run: TrackedRun, trials: int) -> Settings:
    """The settings of the trees with the best average precision on the tuning cut."""

    def score(settings: Settings) -> float:
        return precision_at_tuning(frame, cuts, replace(trainer, settings=settings), "lightgbm")

    return tuned(run, "lightgbm", of_probabilities, Boosted.DEFAULTS, "average_precision", score, trials, trainer.seed)


def precision_at_tuning(frame: pd.DataFrame, cuts: Cuts, trainer: ChurnTrainer, kind: str) -> float:
    """The average precision on the tuning cut of a model that knows only what was before."""
    test, train = frame[frame["event_timestamp"] == pd.Timestamp(cuts.tuning)], cuts.closed_before(frame, cuts.tuning)
    labels = test["label"].to_numpy(dtype=bool)
    return mean_average_precision(labels, trainer.predict(kind, train, test), np.zeros(len(labels), dtype=str))


def evaluate(frame: pd.DataFrame, cuts: Cuts, trainer: ChurnTrainer, leaving: Leaving) -> pd.DataFrame:
    """Every model's answers on the test cuts, each fitted on what was known at its cut."""
    parts = []
    for cut in cuts.tests:
        test, train = frame[frame["event_timestamp"] == pd.Timestamp(cut)], cuts.closed_before(frame, cut)
        rfm = Logistic.fit(train[list(trainer.rfm)].to_numpy(dtype=float), labels_of(train))
        answers = {
            "recency": test["recency_days"].to_numpy(dtype=float),
            "rfm logistic": rfm.predict(test[list(trainer.rfm)].to_numpy(dtype=float)),
            **{kind: trainer.predict(kind, train, test) for kind in ("logistic", "lightgbm")},
        }
        parts.append(_asked(test, cuts.unit(cut), leaving).assign(**answers))
    return pd.concat(parts, ignore_index=True)


def rescored(frame: pd.DataFrame, rival: Churn, wanted: Mapping[str, datetime], leaving: Leaving) -> pd.DataFrame:
    """The evaluation of a model as it stands, on cuts after all that it learnt from."""
    parts = []
    for unit, cut in wanted.items():
        test = frame[frame["event_timestamp"] == pd.Timestamp(cut)]
        parts.append(_asked(test, unit, leaving).assign(score=rival.predict(matrix(test.to_dict("records"), rival.inputs))))
    return pd.concat(parts, ignore_index=True)[list(BINARY_COLUMNS)]


def _asked(test: pd.DataFrame, unit: str, leaving: Leaving) -> pd.DataFrame:
    """Who was asked about at a cut, and what then happened."""
    asked = {
        "customer_id": test["customer_id"],
        "unit": unit,
        "group": unit,
        "segment": banded(test[leaving.segmented_by], leaving.segments),
        "label": test["label"].astype(bool),
    }
    return pd.DataFrame(asked)


def judge(scored: pd.DataFrame, served: str, run: TrackedRun, eligibility: Eligibility, looks: int) -> tuple[Report, Mapping[str, object]]:
    """The table beside its baselines, the lead and the pictures."""
    cuts, metric = run.cuts, run.settings.promotion.metric
    models = {m: (scored[m].to_numpy(dtype=float), m != "recency") for m in ("recency", "rfm logistic", "logistic", "lightgbm")}
    labels, groups = scored["label"].to_numpy(dtype=bool), scored["group"].to_numpy(dtype=str)
    names, values, drawn = compare_binary(scored["customer_id"].tolist(), groups, labels, models)
    found = estimates(values, drawn, names)
    honesty = {m: calibration(labels, models[m][0]) for m in models if models[m][1]}
    table = {m: _row(found, m, honesty.get(m)) for m in models}
    lead = difference(values, drawn, names, f"{served}/{metric}", f"recency/{metric}")
    rivals = {other: difference(values, drawn, names, f"{served}/auc", f"{other}/auc") for other in models if other != served}
    report = Report(
        kind=run.model,
        title=f"Churn: no visit in {cuts.horizon_days} days; mean of the cuts {' and '.join(map(cuts.day, cuts.tests))}; "
        f"base rate {labels.mean():.1%}, {len(labels)} rows",
        served=served,
        baseline="recency",
        columns=["AUC", "AP", "Brier", "lift@10%", "ECE (noise floor)", "calibration slope / intercept (p)"],
        table=table,
        lead=lead,
        rivals=rivals,
        notes=[f"Lead in AUC over the RFM logistic, paired: {rivals['rfm logistic']}.", f"These cuts were looked at {looks} times."],
        metrics={f"{m}_{k}".replace(" ", "_"): found[f"{m}/{k}"].value for m in models for k in BINARY_MEASURES},
        quality={m: {k: found[f"{m}/{k}"] for k in BINARY_MEASURES} for m in models},
        limits=[
            f"answers only for customers with at least {eligibility.min_visit_days} visit days "
            f"and a visit in the last {eligibility.max_recency_days} days",
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
