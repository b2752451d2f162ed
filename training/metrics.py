"""Measures of ranking and calibration, and bootstrap intervals paired over customers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

Floats = NDArray[np.float64]
DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(customers: Sequence[str], statistic: Callable[[Floats], Floats], draws: int = DRAWS, seed: int = 0) -> tuple[Floats, Floats]:
    """The statistic on all rows, and on *draws* resamples of customers.

    A customer is drawn with all their rows, so that rows of several cuts stay together and models stay paired. Customers are
    numbered as they come, not by their ids: the same rows in the same order give the same intervals, whatever the ids.

    Args:
        customers: whose each row is.
        statistic: row weights to a vector of measures.

    Returns:
        ``(measures,)`` and ``(draws, measures)``.
    """
    codes, _ = pd.factorize(np.asarray(customers, dtype=object))
    count = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = np.stack([statistic(np.bincount(rng.integers(count, size=count), minlength=count)[codes].astype(float)) for _ in range(draws)])
    return statistic(np.ones(len(codes))), drawn


def estimates(values: Floats, drawn: Floats, names: Sequence[str], level: float = LEVEL) -> dict[str, Estimate]:
    """Percentile intervals of a bootstrap's measures, by name."""
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: Estimate(float(v), float(lo), float(hi)) for name, v, lo, hi in zip(names, values, low, high, strict=True)}


def difference(values: Floats, drawn: Floats, names: Sequence[str], ours: str, theirs: str) -> Estimate:
    """How far one measure lies above another, paired draw by draw."""
    a, b = names.index(ours), names.index(theirs)
    return estimates(values[[a]] - values[[b]], drawn[:, [a]] - drawn[:, [b]], ["difference"])["difference"]


class BinaryScores:
    """One model's scores of labelled rows, sorted once so that each re-weighting is cheap. Ties share their credit."""

    def __init__(self, labels: NDArray[np.bool_], scores: Floats, is_probability: bool) -> None:
        distinct, self._level = np.unique(-scores, return_inverse=True)
        self._levels = len(distinct)
        self._labels = labels.astype(float)
        self._scores = scores
        self.is_probability = is_probability

    def measures(self, weights: Floats) -> dict[str, float]:
        """Weighted AUC, average precision, lift in the top tenth, and Brier score (NaN if not a probability)."""
        positive = np.bincount(self._level, weights * self._labels, self._levels)
        total = np.bincount(self._level, weights, self._levels)
        found, seen = np.cumsum(positive), np.cumsum(total)
        positives, everyone = found[-1], seen[-1]
        negatives = everyone - positives
        auc = float(((found - positive / 2) * (total - positive)).sum() / max(positives * negatives, 1e-12))
        precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
        share = np.interp(everyone / 10, np.concatenate([[0.0], seen]), np.concatenate([[0.0], found])) / (everyone / 10)
        brier = np.average((self._scores - self._labels) ** 2, weights=weights) if self.is_probability else np.nan
        return {
            "auc": auc,
            "average_precision": float((positive * precision).sum() / max(positives, 1e-12)),
            "lift_at_10pct": float(share / max(positives / everyone, 1e-12)),
            "brier": float(brier),
        }


def mean_average_precision(labels: NDArray[np.bool_], scores: Floats, groups: NDArray[np.str_]) -> float:
    """Average precision, the mean over those *groups* that hold both labels."""
    parts = [groups == g for g in np.unique(groups) if 0 < labels[groups == g].sum() < (groups == g).sum()]
    found = [BinaryScores(labels[p], scores[p], False).measures(np.ones(int(p.sum()))) for p in parts]
    return float(np.mean([each["average_precision"] for each in found])) if found else 0.0


BINARY_MEASURES = ("auc", "average_precision", "lift_at_10pct", "brier")


def compare_binary(
    customers: Sequence[str],
    groups: NDArray[np.str_],
    labels: NDArray[np.bool_],
    scores: Mapping[str, tuple[Floats, bool]],
    draws: int = DRAWS,
) -> tuple[list[str], Floats, Floats]:
    """Every measure of every model, as the mean over *groups* and for each group; see ``bootstrap``.

    Names are ``model/measure`` for the mean and ``model/measure/group``.
    """
    kinds = sorted(set(groups))
    rows = {g: np.flatnonzero(groups == g) for g in kinds}
    sorted_scores = {
        (model, g): BinaryScores(labels[rows[g]], values[rows[g]], probable) for model, (values, probable) in scores.items() for g in kinds
    }
    names = [f"{m}/{k}" for m in scores for k in BINARY_MEASURES]
    names += [f"{m}/{k}/{g}" for m in scores for k in BINARY_MEASURES for g in kinds]

    def statistic(weights: Floats) -> Floats:
        found = {key: each.measures(weights[rows[key[1]]]) for key, each in sorted_scores.items()}
        means = [float(np.mean([found[m, g][k] for g in kinds])) for m in scores for k in BINARY_MEASURES]
        return np.array(means + [found[m, g][k] for m in scores for k in BINARY_MEASURES for g in kinds])

    values, drawn = bootstrap(customers, statistic, draws)
    return names, values, drawn


@dataclass(frozen=True)
class Calibration:
    """How honest probabilities are: recalibrated slope and intercept with their tests, and the calibration error."""

    slope: float
    intercept: float
    p_value: float
    """Of the joint hypothesis slope 1, intercept 0 (Wald test)."""
    ece: float
    ece_floor: float
    """The error that a perfect model of as many customers shows in the median: noise alone."""


def calibration(labels: NDArray[np.bool_], probabilities: Floats, bands: int = 10, seed: int = 0) -> Calibration:
    """Judge probabilities by logistic recalibration (Cox 1958) and by the error over equally large bands."""
    from scipy.stats import chi2

    logit = np.log(np.clip(probabilities, 1e-6, 1 - 1e-6) / (1 - np.clip(probabilities, 1e-6, 1 - 1e-6)))
    model = LogisticRegression(C=1e12, max_iter=1000).fit(logit[:, None], labels)
    intercept, slope = float(model.intercept_[0]), float(model.coef_[0, 0])
    fitted = model.predict_proba(logit[:, None])[:, 1]
    design = np.column_stack([np.ones(len(logit)), logit])
    information = design.T @ (design * (fitted * (1 - fitted))[:, None])
    gap = np.array([intercept, slope - 1.0])
    rng = np.random.default_rng(seed)
    perfect = [_ece(rng.random(len(labels)) < probabilities, probabilities, bands) for _ in range(200)]
    return Calibration(
        slope, intercept, float(chi2.sf(gap @ information @ gap, 2)), _ece(labels, probabilities, bands), float(np.median(perfect))
    )


def _ece(labels: NDArray[np.bool_], probabilities: Floats, bands: int) -> float:
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, bands) if len(part)]
    return float(sum(abs(labels[p].mean() - probabilities[p].mean()) * len(p) for p in parts) / len(labels))


class MeansOverUnits:
    """The mean over cuts of the weighted mean of each column within each cut; a cut that a resample left out does not count.

    Args:
        units: the cut of each row.
        table: ``(rows, measures)``.
    """

    def __init__(self, units: NDArray[np.str_], table: Floats) -> None:
        self._columns = table.shape[1]
        self._parts = [(np.flatnonzero(units == unit), table[units == unit]) for unit in np.unique(units)]

    def __call__(self, weights: Floats) -> Floats:
        """One mean a column, by row weights."""
        means = [weights[rows] @ values / weights[rows].sum() for rows, values in self._parts if weights[rows].sum() > 0]
        return np.mean(means, axis=0) if means else np.full(self._columns, np.nan)


RANKING_MEASURES = ("recall_at_10", "ndcg_at_10", "mrr")
_DISCOUNTS = 1.0 / np.log2(np.arange(2, 12))


def ranking_measures(scores: Floats, picks: NDArray[np.intp], truth: NDArray[np.intp]) -> tuple[float, float, float]:
    """Recall@10, NDCG@10 and reciprocal rank of the first hit, over the full catalogue.

    Args:
        scores: one a catalogue item; minus infinity for items that the list may not show.
        picks: the ten items shown, best first.
        truth: the items bought; recall and the ideal DCG count at most ten of them.
    """
    hits = np.isin(picks, truth)
    ideal = min(10, len(truth))
    best = scores[truth].max()
    # of equal scores any may come first: take the middle rank
    first = float((scores > best).sum() + ((scores == best).sum() + 1) / 2)
    return hits.sum() / ideal, dcg(hits) / dcg(np.ones(ideal, bool)), 1.0 / first


def dcg(hits: NDArray[np.bool_]) -> float:
    """Discounted cumulative gain of at most ten places."""
    return float(hits @ _DISCOUNTS[: len(hits)])


DURATION_MEASURES = ("mae_days", "within_3_days")
NEAR_DAYS = 3.0


def compare_durations(
    customers: Sequence[str], units: NDArray[np.str_], days: Floats, foretold: Mapping[str, Floats], draws: int = DRAWS
) -> tuple[list[str], Floats, Floats]:
    """The mean absolute error in days, and the share foretold to within three days, of every model; see ``bootstrap``.

    Each is the mean of the units; names are ``model/measure``.
    """
    errors = {model: np.abs(told - days) for model, told in foretold.items()}
    table = np.column_stack([column for error in errors.values() for column in (error, (error <= NEAR_DAYS).astype(float))])
    values, drawn = bootstrap(customers, MeansOverUnits(units, table), draws)
    return [f"{model}/{measure}" for model in foretold for measure in DURATION_MEASURES], values, drawn
