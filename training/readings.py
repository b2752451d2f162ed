"""Figures that are read aloud: each with one sentence that says what it shows of this very data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.evaluation import by_segment
from training.kept import calibration_points
from training.metrics import BinaryScores, Estimate, Floats, bootstrap, estimates
from training.page import png

TOP = 0.1
"""The share of the customers by whom a lift is told."""


class Reading(NamedTuple):
    """A figure and the sentence that reads it."""

    figure: Figure
    sentence: str

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return (
            f'<img alt="{escape(self.sentence, quote=True)}" src="data:image/png;base64,{png(self.figure)}"><p>{escape(self.sentence)}</p>'
        )


class MarkdownText(str):
    """Markdown that a notebook shows as what it means."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)


def canvas(title: str, x: str, y: str, size: tuple[float, float] = (6.5, 4.5)) -> tuple[Figure, Axes]:
    """An empty figure whose axes say what they measure."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def calibration_reading(labels: NDArray[np.bool_], probabilities: Floats) -> Reading:
    """Foretold and observed shares in ten bands, with Wilson's intervals: are the probabilities honest?"""
    points = calibration_points(labels, probabilities)
    figure, axes = canvas("Foretold and observed", "foretold probability, mean of a tenth of the rows", "observed share (95% interval)")
    foretold = np.array([point.predicted for point in points])
    ends = np.array([[point.observed.low or 0.0, point.observed.value, point.observed.high or 0.0] for point in points])
    axes.errorbar(foretold, ends[:, 1], yerr=[ends[:, 1] - ends[:, 0], ends[:, 2] - ends[:, 1]], fmt="o", capsize=3)
    limit = float(max(foretold.max(), ends[:, 2].max()))
    axes.plot([0, limit], [0, limit], color="grey", linewidth=1, label="honest")
    axes.legend()
    held = int(((ends[:, 0] <= foretold) & (foretold <= ends[:, 2])).sum())
    worst = int(np.abs(ends[:, 1] - foretold).argmax())
    return Reading(
        figure,
        f"In {held} of {len(points)} bands the honest line passes through the interval; the widest miss is where {foretold[worst]:.1%} was "
        f"foretold and {ends[worst, 1]:.1%} came true.",
    )


def lift_reading(customers: Sequence[str], labels: NDArray[np.bool_], scores: Floats, draws: int = 200) -> Reading:
    """How many times as often it comes true among the highest scores as among all, by how many are addressed."""
    figure, axes = canvas("Lift", "share of customers addressed, the highest scores first", "times as often as at random")
    order, shares = np.argsort(-scores, kind="stable"), np.linspace(0.02, 1.0, 50)
    reached = np.cumsum(labels[order])
    counts = np.maximum((shares * len(labels)).astype(int), 1)
    axes.plot(shares, reached[counts - 1] / counts / max(labels.mean(), 1e-12))
    axes.axhline(1, color="grey", linewidth=1, label="at random")
    axes.axvline(TOP, color="tab:orange", linewidth=1, label=f"the first {TOP:.0%}")
    axes.legend()
    sorted_scores = BinaryScores(labels, scores, False)
    values, drawn = bootstrap(customers, lambda weights: np.array([sorted_scores.measures(weights)["lift_at_10pct"]]), draws)
    lift = estimates(values, drawn, ["lift"])["lift"]
    found = reached[max(int(len(labels) * TOP), 1) - 1] / max(int(labels.sum()), 1)
    return Reading(
        figure,
        f"The first {TOP:.0%} hold {found:.0%} of all cases: {lift.value:.1f} times as many as at random (95% interval "
        f"{lift.low:.1f} to {lift.high:.1f}).",
    )


def effects_reading(reference: pd.DataFrame, contributions: Floats, unit: str, count: int = 4) -> Reading:
    """How the strongest inputs move the answer over their range: the mean contribution in each tenth of the customers."""
    strongest = np.argsort(-np.abs(contributions).mean(axis=0))[:count]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    columns = 2 if len(strongest) > 1 else 1
    panels = np.atleast_1d(figure.subplots(-(-len(strongest) // columns), columns)).ravel()
    for place, panel in zip(strongest, panels, strict=False):
        values = reference.iloc[:, place].to_numpy(dtype=float)
        known = np.flatnonzero(~np.isnan(values))
        bands = [part for part in np.array_split(known[np.argsort(values[known], kind="stable")], 10) if len(part)]
        panel.plot([np.median(values[part]) for part in bands], [contributions[part, place].mean() for part in bands], marker="o")
        panel.axhline(0, color="grey", linewidth=1)
        panel.set(xlabel=str(reference.columns[place]), ylabel=f"adds to the {unit}")
    for panel in panels[len(strongest) :]:
        panel.set_visible(False)
    first = int(strongest[0])
    name, moved = str(reference.columns[first]), contributions[:, first]
    return Reading(
        figure,
        f"{name} moves answers most: by {np.abs(moved).mean():.2f} of the {unit} in the mean, between {moved.min():+.2f} and "
        f"{moved.max():+.2f}.",
    )


def segments_reading(evaluation: pd.DataFrame, metric: str, less_is_better: bool = False) -> Reading:
    """A measure by segment of customers with its interval: for whom is the model weak?"""
    found = by_segment(evaluation, metric, draws=200)
    figure, axes = canvas(f"{metric} by segment", "segment of customers (rows)", f"{metric} (95% interval)", (7.5, 4.5))
    names = [f"{name}\n({rows})" for name, (rows, _) in found.items()]
    _bars(axes, names, [estimate for _, estimate in found.values()])
    if not found:
        return Reading(figure, "No segment is large enough to tell.")
    of = {name: estimate.value for name, (_, estimate) in found.items()}
    best = (min if less_is_better else max)(of, key=lambda name: of[name])
    worst = (max if less_is_better else min)(of, key=lambda name: of[name])
    return Reading(figure, f"Best for customers of “{best}” ({of[best]:.3f}), weakest for “{worst}” ({of[worst]:.3f}).")


def errors_reading(days: Floats, foretold: Floats, horizon: float) -> Reading:
    """Foretold and true days, in ten bands: half of the customers should come earlier, half later."""
    figure, axes = canvas("Days foretold, and what came", "days foretold, median of a tenth of the rows", "days that it took")
    bands = [part for part in np.array_split(np.argsort(foretold, kind="stable"), 10) if len(part)]
    at = [float(np.median(foretold[part])) for part in bands]
    low, middle, high = (np.array([np.quantile(days[part], q) for part in bands]) for q in (0.25, 0.5, 0.75))
    axes.errorbar(at, middle, yerr=[middle - low, high - middle], fmt="o", capsize=3, label="median, and the middle half")
    axes.plot([0, horizon], [0, horizon], color="grey", linewidth=1, label="as foretold")
    axes.legend()
    earlier = float((days < foretold).mean())
    return Reading(figure, f"{earlier:.0%} of the customers came earlier than foretold; an honest median is 50%.")


def errors_spread_reading(days: Floats, foretold: Floats) -> Reading:
    """How far the days foretold lie from those that it took."""
    error = foretold - days
    figure, axes = canvas("By how many days it errs", "days foretold less days that it took", "customers")
    axes.hist(error, bins=np.arange(np.floor(error.min()), np.ceil(error.max()) + 2, 2).tolist(), color="tab:blue")
    axes.axvline(0, color="grey", linewidth=1)
    near = float((np.abs(error) <= 3).mean())
    return Reading(figure, f"{near:.0%} of the answers are within three days; the mean error is {np.abs(error).mean():.1f} days.")


def spread_reading(values: Floats, what: str) -> Reading:
    """How a measure of the lists is spread over the customers: is its mean carried by a few?"""
    figure, axes = canvas(f"{what} by customer", what, "customers")
    axes.hist(values, bins=25, color="tab:blue")
    axes.axvline(values.mean(), color="tab:orange", linewidth=1, label="mean")
    axes.legend()
    return Reading(
        figure,
        f"{(values == 0).mean():.0%} of the lists hold nothing that was bought; the mean of the others is {_mean(values[values > 0]):.2f}.",
    )


def tradeoff_reading(tables: Mapping[str, pd.DataFrame]) -> Reading:
    """Coverage against novelty of each way to make a list: who shows the same bestsellers to all?"""
    figure, axes = canvas(
        "What the lists show", "coverage: share of the catalogue shown to anybody", "novelty: bits of surprise of an item shown"
    )
    sentences = []
    for listing, table in tables.items():
        axes.scatter(table["coverage"], table["novelty"], label=listing)
        for row in table.itertuples():
            axes.annotate(f" {row.model}", (row.coverage, row.novelty), fontsize=8)
        served = table[table["served"]].iloc[0]
        plain = table.sort_values("coverage").iloc[0]
        sentences.append(
            f"{listing} shows {served['coverage']:.1%} of the catalogue, where {plain['model']} shows {plain['coverage']:.1%} (novelty "
            f"{served['novelty']:.1f} beside {plain['novelty']:.1f} bits)"
        )
    axes.legend()
    return Reading(figure, "; ".join(sentences) + ".")


def ladder_reading(tables: Mapping[str, Mapping[str, Estimate]], measure: str) -> Reading:
    """A measure of every way to make a list, with its interval: what does the ranker bring over its sources?"""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(tables)))
    sentences = []
    for (listing, found), panel in zip(tables.items(), panels, strict=True):
        _bars(panel, list(found), list(found.values()))
        panel.set(title=listing, xlabel="ordered by", ylabel=f"{measure} (95% interval)")
        panel.tick_params(axis="x", rotation=30)
        best = max(found, key=lambda name: found[name].value)
        sentences.append(f"{listing} is ordered best by “{best}” ({found[best]})")
    return Reading(figure, "; ".join(sentences) + ".")


def _bars(axes: Axes, names: Sequence[str], values: Sequence[Estimate]) -> None:
    middle = np.array([each.value for each in values])
    below = np.array([each.value - each.low for each in values])
    above = np.array([each.high - each.value for each in values])
    axes.bar(list(names), middle, yerr=np.maximum([below, above], 0) if len(values) else None, capsize=3, color="tab:blue")


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0
