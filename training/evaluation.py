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
    RANKING_MEASURES,
    Estimate,
    Floats,
    MeansOverUnits,
    bootstrap,
    compare_binary,
    estimates,
)

LOWER_IS_BETTER = {"brier"}
BINARY_COLUMNS = ("customer_id", "unit", "group", "segment", "label", "score")
"""A row a customer and cut (or campaign): what happened, and the probability that was given."""
RANKING_COLUMNS = ("customer_id", "unit", "listing", "segment", *RANKING_MEASURES)
"""A row a customer, cut and list: how good the list was for her."""
T = TypeVar("T")


@dataclass(frozen=True)
class Lead:
    """One metric of two models on the same rows; a positive lead is better, whichever way the metric runs."""

    ours: float
    theirs: float
    lead: Estimate


def is_binary(evaluation: pd.DataFrame) -> bool:
    """Whether the rows are probabilities with labels; else they are lists with measures."""
    return "label" in evaluation


def same_rows(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame | None:
    """Both evaluations side by side (theirs with ``_champion``) on the cuts that both judged, or None.

    Within such a cut the customers and what they did must be the very same, or the two were asked different questions.
    """
    keys = ["customer_id", "unit"] if is_binary(ours) else ["customer_id", "unit", "listing"]
    if is_binary(ours) != is_binary(theirs):
        return None
    units = set(ours["unit"]) & set(theirs["unit"])
    ours, theirs = ours[ours["unit"].isin(units)], theirs[theirs["unit"].isin(units)]
    both = ours.merge(theirs, on=keys, suffixes=("", "_champion"), validate="one_to_one")
    if not len(ours) == len(theirs) == len(both) or both.empty:
        return None
    if is_binary(ours) and (both["label"] != both["label_champion"]).any():
        return None
    return both


def leads(both: pd.DataFrame, metrics: Sequence[str], draws: int, level: float) -> dict[str, Lead]:
    """Each metric's paired lead, resampling customers; *both* is from ``same_rows``."""
    names, values, drawn = _measured(both, metrics, draws)
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
        names, values, drawn = _measured(both, [metric], draws)
        return estimates(values, drawn, names)[f"ours/{metric}"]

    return _by_segment(evaluation, measured)


def _by_segment(rows: pd.DataFrame, measure: Callable[[pd.DataFrame], T], least: int = 50) -> dict[str, tuple[int, T]]:
    found = {}
    # as people count: "4 to 7" before "16 or more"
    in_order = sorted(rows.groupby("segment"), key=lambda each: (int(re.sub(r"\D.*", "", str(each[0])) or -1), str(each[0])))
    for segment, part in in_order:
        if len(part) >= least and (not is_binary(part) or part["label"].nunique() == 2):
            found[str(segment)] = (len(part), measure(part))
    return found


def _measured(both: pd.DataFrame, metrics: Sequence[str], draws: int) -> tuple[list[str], Floats, Floats]:
    customers = both["customer_id"].tolist()
    if is_binary(both):
        groups, labels = both["group"].to_numpy(dtype=str), both["label"].to_numpy(dtype=bool)
        scores = {"ours": (both["score"].to_numpy(dtype=float), True), "theirs": (both["score_champion"].to_numpy(dtype=float), True)}
        return compare_binary(customers, groups, labels, scores, draws)
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

    values, drawn = bootstrap(customers, statistic, draws)
    return [name for columns in by_listing.values() for name, _ in columns], values, drawn


def split_metric(metric: str) -> tuple[str, str]:
    """``ndcg_at_10_for_you`` is the measure ``ndcg_at_10`` of the list ``for_you``."""
    measure = next(m for m in RANKING_MEASURES if metric.startswith(m))
    return measure, metric.removeprefix(f"{measure}_")


def metrics_of(kind_is_binary: bool) -> tuple[str, ...]:
    """What a comparison shows, the ranking metrics for both lists."""
    if kind_is_binary:
        return BINARY_MEASURES
    return tuple(f"{m}_{listing}" for listing in ("for_you", "also_like") for m in RANKING_MEASURES)


def banded(values: Sequence[float] | pd.Series, bands: Mapping[str, tuple[float, float]], unknown: str = "unknown") -> list[str]:
    """The name of the band ``[low, high)`` that each value falls in."""
    return [next((name for name, (low, high) in bands.items() if low <= v < high), unknown) for v in values]
