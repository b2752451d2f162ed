"""The pictures that a run logs: how honest the probabilities are, and whom a campaign of a given size would reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.reasons import money, money_units
from training.evaluation import Lead
from training.metrics import Estimate, Floats


def calibration_plot(labels: NDArray[np.bool_], probabilities: Floats, bands: int = 10, title: str = "Calibration") -> Figure:
    """Observed against predicted rate in equally large bands, with two standard errors."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(probabilities, kind="stable")
    for part in np.array_split(order, bands):
        if len(part):
            rate = labels[part].mean()
            error = 2 * np.sqrt(max(rate * (1 - rate), 1e-9) / len(part))
            axes.errorbar(probabilities[part].mean(), rate, yerr=error, fmt="o", color="tab:blue")
    limit = float(max(probabilities.max(), 0.1))
    axes.plot([0, limit], [0, limit], color="grey", linewidth=1)
    axes.set(xlabel="predicted probability", ylabel="observed rate (2 standard errors)", title=title)
    return figure


def gain_plot(labels: NDArray[np.bool_], scores: Mapping[str, Floats]) -> Figure:
    """The share of all positives found when a given share of the customers is addressed, a line a model."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    share = np.arange(1, len(labels) + 1) / len(labels)
    for name, values in scores.items():
        order = np.argsort(-values, kind="stable")
        axes.plot(share, np.cumsum(labels[order]) / max(labels.sum(), 1), label=name)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.set(xlabel="share of customers addressed", ylabel="share of positives reached", title="Cumulative gain")
    axes.legend()
    return figure


def bar_plot(title: str, values: Mapping[str, Estimate]) -> Figure:
    """One bar a model with its interval."""
    figure = Figure(figsize=(6, 0.5 * len(values) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = list(values)[::-1]
    middle = np.array([values[n].value for n in names])
    errors = np.array([[values[n].value - values[n].low for n in names], [values[n].high - values[n].value for n in names]])
    axes.barh(names, middle, xerr=np.maximum(errors, 0), color="tab:blue", capsize=3)
    axes.set(title=title)
    return figure


def lead_plot(leads: Mapping[str, Lead]) -> Figure:
    """A challenger's paired lead with its interval, a row a metric or segment; right of the line is better."""
    figure = Figure(figsize=(7, 0.5 * max(len(leads), 1) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = list(leads)[::-1]
    middle = np.array([leads[n].lead.value for n in names])
    errors = np.array([[m - leads[n].lead.low for n, m in zip(names, middle, strict=True)],
                       [leads[n].lead.high - m for n, m in zip(names, middle, strict=True)]])  # fmt: skip
    axes.errorbar(middle, names, xerr=np.maximum(errors, 0), fmt="o", color="tab:blue", capsize=3)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set(title="Lead of the challenger (95% interval; right is better)")
    return figure


def change_plot(before: Sequence[float], after: Sequence[float], what: str) -> Figure:
    """Each customer's value under the champion against that under the challenger: whose answer changes, and by how much."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(before, after, s=6, alpha=0.3)
    limit = float(np.concatenate([np.asarray(before), np.asarray(after), [0.1]]).max())
    axes.plot([0, limit], [0, limit], color="grey", linewidth=1)
    axes.set(xlabel="champion", ylabel="challenger", title=f"What changes: {what}")
    return figure


def threshold_plot(labels: NDArray[np.bool_], probabilities: Floats, value_minor: float, cost_minor: float, currency: str) -> Figure:
    """What addressing everyone above a threshold would bring, were each positive reached worth *value_minor* at *cost_minor* a contact."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    thresholds = np.linspace(0, float(probabilities.max(initial=0.1)), 60)
    gains = [(value_minor * labels[probabilities >= t].sum() - cost_minor * (probabilities >= t).sum()) for t in thresholds]
    axes.plot(thresholds, [money_units(g, currency) for g in gains])
    best = int(np.argmax(gains))
    axes.axvline(thresholds[best], color="tab:orange", linewidth=1)
    axes.axhline(0, color="grey", linewidth=1)
    addressed = int((probabilities >= thresholds[best]).sum())
    title = f"Best above {thresholds[best]:.2f}: {addressed} of {len(labels)} addressed, {money(gains[best], currency)}"
    axes.set(xlabel="threshold", ylabel=f"net value ({currency})", title=title)
    return figure


def line_plot(series: Mapping[str, tuple[Sequence[Any], Sequence[float]]], title: str, label: str, along: str = "week") -> Figure:
    """One line a name over what it runs *along*."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, (at, values) in series.items():
        axes.plot(at, values, label=name)
    axes.set(title=title, xlabel=along, ylabel=label)
    axes.tick_params(axis="x", rotation=30)
    axes.legend()
    return figure
