"""The pictures that a run logs: how honest the probabilities are, and whom a campaign of a given size would reach."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.metrics import Estimate, Floats


def calibration_plot(labels: NDArray[np.bool_], probabilities: Floats, bands: int = 10) -> Figure:
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
    axes.set(xlabel="predicted probability", ylabel="observed rate (2 standard errors)", title="Calibration")
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
