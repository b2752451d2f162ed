"""What the reports of training say of a model, laid out to be drawn: intervals beside each other, history, calibration and gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from babel.numbers import format_decimal

from models.reports import CalibrationPoint, InputDrift, Measured, ModelReport, TrainedVersion
from serving.console.words import Words

WIDTH = 240
"""How wide a row of intervals is drawn, in units of its own."""
DIGITS = "#,##0.000"
LOWER_IS_BETTER = ("brier", "mae", "ece", "log_loss")
"""How the names of measures of error begin."""
BARS_WIDTH, BARS_HEIGHT = 110, 26


class DrawnInterval(NamedTuple):
    """One row of intervals: a name, what is written beside it, and where its point and its ends lie, from 0 to ``WIDTH``."""

    name: str
    text: str
    at: float
    low: float | None
    high: float | None
    is_served: bool
    is_baseline: bool


class Compared(NamedTuple):
    """One measure of a model beside the simple ones."""

    measure: str
    is_error: bool
    is_main: bool
    rows: Sequence[DrawnInterval]
    ends: tuple[str, str]


class Bars(NamedTuple):
    """How an input was spread and is now: a bar a band, as ``x, y, width, height``."""

    before: Sequence[tuple[float, float, float, float]]
    now: Sequence[tuple[float, float, float, float]]


def measure_name(metric: str, words: Words) -> str:
    """What a measure is called."""
    say = words.say
    known = {
        "auc": "AUC",
        "average_precision": say("average precision"),
        "lift_at_10pct": say("lift of the top 10%"),
        "brier": say("Brier score"),
        "mae_days": say("mean error, in days"),
        "within_3_days": say("right within 3 days"),
    }
    if metric in known:
        return known[metric]
    for measure, name in (("ndcg_at_10_", "NDCG@10"), ("recall_at_10_", "recall@10"), ("mrr_", "MRR")):
        if metric.startswith(measure):
            return f"{name}, {metric.removeprefix(measure).replace('_', ' ')}"
    return metric.replace("_", " ")


def spoken(measured: Measured, words: Words) -> str:
    """A value with its 95% interval."""
    value, *ends = (None if each is None else format_decimal(each, DIGITS, locale=words.locale) for each in measured_ends(measured))
    return f"{value} [{'; '.join(map(str, ends))}]" if None not in ends else str(value)


def measured_ends(measured: Measured) -> tuple[float, float | None, float | None]:
    """A value and the ends of its interval."""
    return measured.value, measured.low, measured.high


def compared(report: ModelReport, metrics: Sequence[str], words: Words) -> list[Compared]:
    """Each of *metrics* that was measured, the main one first: every row of the report with its interval."""
    found = []
    for metric in sorted(metrics, key=lambda each: each != report.metric):
        values = {name: measures[metric] for name, measures in report.quality.items() if metric in measures}
        if report.served not in values:
            continue
        ends = [end for each in values.values() for end in measured_ends(each) if end is not None]
        low, high = min(ends), max(ends)
        span = (high - low) or 1.0
        rows = [_interval(name, each, low, span, report, words) for name, each in values.items()]
        is_error = metric.startswith(LOWER_IS_BETTER)
        ends_told = words.number(low, 3), words.number(high, 3)
        found.append(Compared(measure_name(metric, words), is_error, metric == report.metric, rows, ends_told))
    return found


def _interval(name: str, each: Measured, low: float, span: float, report: ModelReport, words: Words) -> DrawnInterval:
    def place(value: float | None) -> float | None:
        return None if value is None else round(6 + (value - low) / span * (WIDTH - 12), 1)

    at = place(each.value)
    assert at is not None
    return DrawnInterval(name, spoken(each, words), at, place(each.low), place(each.high), name == report.served, name == report.baseline)


def history_plot(history: Sequence[TrainedVersion], words: Words) -> dict[str, Any] | None:
    """Value, its interval and the baseline by version; None for fewer than two. Versions of another measure than the last are left out."""
    same = [each for each in history if each.metric == history[-1].metric]
    if len(same) < 2:
        return None
    say = words.say
    series = [
        {"label": say("model"), "y": [each.value.value for each in same], "points": True},
        {"label": say("the simple one"), "y": [each.baseline_value.value for each in same], "points": True},
        {"label": say("95% from"), "y": [each.value.low for each in same], "dash": [4, 4], "colour": 0},
        {"label": say("95% to"), "y": [each.value.high for each in same], "dash": [4, 4], "colour": 0},
    ]
    return {
        "x": [each.version for each in same], "series": series, "xlabel": say("version"), "x_name": say("version"), "whole": True,
        "ylabel": measure_name(same[-1].metric, words),
    }  # fmt: skip


def calibration_plot(points: Sequence[CalibrationPoint], words: Words) -> dict[str, Any] | None:
    """Foretold beside observed, in percent, with the diagonal; None where answers are no probabilities."""
    if not points:
        return None
    say, x = words.say, _ascending([100 * each.predicted for each in points])
    highest = max([*x, *(100 * (each.observed.high or each.observed.value) for each in points)])
    series = [
        {"label": say("what happened"), "y": [100 * each.observed.value for each in points], "points": True},
        {"label": say("as foretold"), "y": x, "dash": [2, 4]},
        {"label": say("95% from"), "y": [_percent(each.observed.low) for each in points], "dash": [4, 4], "colour": 0},
        {"label": say("95% to"), "y": [_percent(each.observed.high) for each in points], "dash": [4, 4], "colour": 0},
    ]
    return {
        "x": x, "series": series, "xlabel": say("foretold, in %"), "ylabel": say("happened, in %"), "x_name": say("foretold"),
        "yrange": [0, round(highest * 1.05 + 1)], "height": 240,
    }  # fmt: skip


def gain_plot(points: Sequence[CalibrationPoint], words: Words) -> tuple[dict[str, Any], float] | None:
    """How many of those it is about the customers with the highest scores hold, and the share that the first tenth holds.

    None where answers are no probabilities, or nothing came true.
    """
    positives = [each.observed.value * each.rows for each in reversed(points)]
    if not points or not sum(positives):
        return None
    rows = [each.rows for each in reversed(points)]
    x, y = [0.0], [0.0]
    for count, positive in zip(rows, positives, strict=True):
        x.append(x[-1] + 100 * count / sum(rows))
        y.append(y[-1] + 100 * positive / sum(positives))
    say = words.say
    series = [{"label": say("by the model"), "y": y, "points": True}, {"label": say("by chance"), "y": x, "dash": [2, 4]}]
    plot = {
        "x": x, "series": series, "xlabel": say("customers with the highest scores, in %"), "x_name": say("customers"),
        "ylabel": say("of those it is about, in %"), "yrange": [0, 102], "height": 240,
    }  # fmt: skip
    return plot, y[1] / 100


def bars(drift: InputDrift) -> Bars:
    """The bands of one input, before and now, side by side."""
    most = max([*drift.before, *drift.now, 1e-9])
    step = BARS_WIDTH / max(len(drift.before), 1)

    def drawn(shares: Sequence[float], offset: float) -> list[tuple[float, float, float, float]]:
        heights = [round(share / most * BARS_HEIGHT, 1) for share in shares]
        return [(round(k * step + offset, 1), round(BARS_HEIGHT - h, 1), round(step * 0.4, 1), h) for k, h in enumerate(heights)]

    return Bars(drawn(drift.before, 0.0), drawn(drift.now, step * 0.42))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _ascending(values: Sequence[float]) -> list[float]:
    """The same, each a little above the one before where they are equal: what draws them asks for that."""
    found: list[float] = []
    for value in values:
        found.append(round(max(value, found[-1] + 1e-6) if found else value, 6))
    return found
