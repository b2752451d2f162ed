"""One model's answers, row by row, as they are kept with its run; and how far one lies above another on the same customers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd

from training.metrics import (
    BINARY_MEASURES,
    DURATION_MEASURES,
    RANKING_MEASURES,
    Estimate,
    Floats,
    MeansOverUnits,
    bootstrap,
    compare_binary,
    compare_durations,
    estimates,
)

LOWER_IS_BETTER = {"brier", "mae_days"}
BINARY_COLUMNS = ("customer_id", "unit", "group", "segment", "label", "score")
"""A row a customer and cut (or campaign): what happened, and the probability that was given."""
DURATION_COLUMNS = ("customer_id", "unit", "segment", "days", "score")
"""A row a customer and cut: how many days it took, and how many were foretold."""
RANKING_COLUMNS = ("customer_id", "unit", "listing", "segment", *RANKING_MEASURES)
"""A row a customer, cut and list: how good the list was for them."""
T = TypeVar("T")


@dataclass(frozen=True)
class Lead:
    """One metric of two models on the same rows; a positive lead is better, whichever way the metric runs."""

    ours: float
    theirs: float
    lead: Estimate


@dataclass(frozen=True)
class Form:
    """One form of evaluations: what a row is, and how two models on the same rows are measured.

    Attributes:
        marks: the column by which an evaluation of this form is known.
        keys: what names a row.
        truth: what happened; it must be the same for both models, or they were asked different questions.
        metrics: what a comparison shows.
        by_segment: by which metric segments are told apart: one that does not move with the base rate.
        measure: the metrics of both sides, on all rows and on resamples of customers.
    """

    marks: str
    keys: tuple[str, ...]
    truth: str | None
    metrics: tuple[str, ...]
    by_segment: str
    measure: Callable[[pd.DataFrame, Sequence[str], int], tuple[list[str], Floats, Floats]]


def form_of(evaluation: pd.DataFrame) -> Form:
    """The form of an evaluation.

    Raises:
        ValueError: it has none that is known.
    """
    for form in (BINARY, DURATION, RANKING):
        if form.marks in evaluation:
            return form
    raise ValueError(f"an evaluation of no known form: {', '.join(map(str, evaluation.columns))}")


def same_rows(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame | None:
    """Both evaluations side by side (theirs with ``_champion``) on the cuts that both judged, or None.

    Within such a cut the customers and what they did must be the very same, or the two were asked different questions.
    """
    form = form_of(ours)
    if form is not form_of(theirs):
        return None
    units = set(ours["unit"]) & set(theirs["unit"])
    ours, theirs = ours[ours["unit"].isin(units)], theirs[theirs["unit"].isin(units)]
    both = ours.merge(theirs, on=list(form.keys), suffixes=("", "_champion"), validate="one_to_one")
    if not len(ours) == len(theirs) == len(both) or both.empty:
        return None
    if form.truth is not None and (both[form.truth] != both[f"{form.truth}_champion"]).any():
        return None
    return both


def leads(both: pd.DataFrame, metrics: Sequence[str], draws: int, level: float) -> dict[str, Lead]:
    """Each metric's paired lead, resampling customers; *both* is from ``same_rows``."""
    names, values, drawn = form_of(both).measure(both, metrics, draws)
    found = {}
    for metric in metrics:
        a, b = names.index(f"ours/{metric}"), names.index(f"theirs/{metric}")
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        gap = estimates(sign * (values[[a]] - values[[b]]), sign * (drawn[:, [a]] - drawn[:, [b]]), ["lead"], level)["lead"]
        found[metric] = Lead(float(values[a]), float(values[b]), gap)
    return found


def leads_by_segment(both: pd.DataFrame, metric: str, draws: int, level: float) -> dict[str, tuple[int, Lead]]:
    """The lead within each segment that is large enough to tell, with its number of rows."""
    return _by_segment(both, lambda part: leads(part, [metric], draws, level)[metric])


def by_segment(evaluation: pd.DataFrame, metric: str, draws: int = 500) -> dict[str, tuple[int, Estimate]]:
    """One model's metric within each segment that is large enough to tell, with its number of rows."""

    def measured(part: pd.DataFrame) -> Estimate:
        both = same_rows(part, part)
        assert both is not None
        names, values, drawn = form_of(both).measure(both, [metric], draws)
        return estimates(values, drawn, names)[f"ours/{metric}"]

    return _by_segment(evaluation, measured)


def _by_segment(rows: pd.DataFrame, measure: Callable[[pd.DataFrame], T], least: int = 50) -> dict[str, tuple[int, T]]:
    found = {}
    # as people count: "4 to 7" before "16 or more"
    in_order = sorted(rows.groupby("segment"), key=lambda each: (int(re.sub(r"\D.*", "", str(each[0])) or -1), str(each[0])))
    for segment, part in in_order:
        if len(part) >= least and ("label" not in part or part["label"].nunique() == 2):
            found[str(segment)] = (len(part), measure(part))
    return found


def _measure_binary(both: pd.DataFrame, metrics: Sequence[str], draws: int) -> tuple[list[str], Floats, Floats]:
    groups, labels = both["group"].to_numpy(dtype=str), both["label"].to_numpy(dtype=bool)
    scores = {"ours": (both["score"].to_numpy(dtype=float), True), "theirs": (both["score_champion"].to_numpy(dtype=float), True)}
    return compare_binary(both["customer_id"].tolist(), groups, labels, scores, draws)


def _measure_durations(both: pd.DataFrame, metrics: Sequence[str], draws: int) -> tuple[list[str], Floats, Floats]:
    days = both["days"].to_numpy(dtype=float)
    sides = {"ours": both["score"].to_numpy(dtype=float), "theirs": both["score_champion"].to_numpy(dtype=float)}
    return compare_durations(both["customer_id"].tolist(), both["unit"].to_numpy(dtype=str), days, sides, draws)


def _measure_lists(both: pd.DataFrame, metrics: Sequence[str], draws: int) -> tuple[list[str], Floats, Floats]:
    by_listing: dict[str, list[tuple[str, str]]] = {}
    for side, suffix in (("ours", ""), ("theirs", "_champion")):
        for metric in metrics:
            measure, listing = split_metric(metric)
            by_listing.setdefault(listing, []).append((f"{side}/{metric}", f"{measure}{suffix}"))
    parts = []
    for listing, columns in by_listing.items():
        rows = np.flatnonzero(both["listing"] == listing)
        table = both.iloc[rows][[column for _, column in columns]].to_numpy(dtype=float)
        parts.append((rows, MeansOverUnits(both["unit"].to_numpy(dtype=str)[rows], table)))

    def statistic(weights: Floats) -> Floats:
        return np.concatenate([means(weights[rows]) for rows, means in parts])

    values, drawn = bootstrap(both["customer_id"].tolist(), statistic, draws)
    return [name for columns in by_listing.values() for name, _ in columns], values, drawn


def split_metric(metric: str) -> tuple[str, str]:
    """``ndcg_at_10_for_you`` is the measure ``ndcg_at_10`` of the list ``for_you``."""
    measure = next(m for m in RANKING_MEASURES if metric.startswith(m))
    return measure, metric.removeprefix(f"{measure}_")


def banded(values: Sequence[float] | pd.Series, bands: Mapping[str, tuple[float, float]], unknown: str = "unknown") -> list[str]:
    """The name of the band ``[low, high)`` that each value falls in."""
    return [next((name for name, (low, high) in bands.items() if low <= v < high), unknown) for v in values]


BINARY = Form("label", ("customer_id", "unit"), "label", BINARY_MEASURES, "auc", _measure_binary)
DURATION = Form("days", ("customer_id", "unit"), "days", DURATION_MEASURES, "mae_days", _measure_durations)
RANKING = Form(
    "listing",
    ("customer_id", "unit", "listing"),
    None,
    tuple(f"{m}_{listing}" for listing in ("for_you", "also_like") for m in RANKING_MEASURES),
    "ndcg_at_10_for_you",
    _measure_lists,
)
