"""The gate before training: is the data fresh, whole, in range and like that which the champion learnt from?"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import ibis
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from features.definitions.timeline import Timeline
from models.inputs import Input
from models.registry import GateLimits
from models.reports import Document, Sheet

Severity = Literal["ok", "warning", "severe"]
SPAN = timedelta(days=28)
REFERENCE_ROWS = 5_000


class DataQualityError(ValueError):
    """The data failed a severe check, so nothing was trained; the message names each with its mend."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, what is allowed, and what to do if it is not."""

    name: str
    found: str
    allowed: str
    severity: Severity = "ok"
    mend: str = ""


@dataclass
class Gate:
    """All checks of one run."""

    kind: str
    limits: GateLimits
    checks: list[Check] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """One row a check, the worst first."""
        order = {"severe": 0, "warning": 1, "ok": 2}
        rows = sorted(self.checks, key=lambda c: order[c.severity])
        return pd.DataFrame(
            [(c.name, c.severity, c.found, c.allowed, c.mend) for c in rows], columns=["check", "", "found", "allowed", "what to do"]
        )

    def document(self) -> Document:
        """The table as it is printed, drift that is in order summed up in one row."""
        calm = [c for c in self.checks if c.severity == "ok" and c.name.startswith("drift of ")]
        told = self.table()
        rows = told[~told["check"].isin([c.name for c in calm])].to_numpy().tolist()
        if calm:
            rows.append([f"drift of {len(calm)} features", "ok", "within", f"PSI {self.limits.max_psi}, KS {self.limits.max_ks}", ""])
        return Document(f"Data quality before training {self.kind}", [Sheet(columns=list(told.columns), rows=rows)])

    def stop_if_severe(self) -> None:
        """Let the run go on only if no check is severe.

        Raises:
            DataQualityError: one is.
        """
        severe = [c for c in self.checks if c.severity == "severe"]
        if severe:
            told = "\n".join(f"  {c.name}: {c.found} (allowed: {c.allowed}): {c.mend}" for c in severe)
            raise DataQualityError(f"the data is not fit to train {self.kind} on:\n{told}\nThe limits are under gate in mlflow.yaml.")

    def look_at_log(self, timeline: Timeline, as_of: datetime, stores: Collection[str] = ()) -> None:
        """Freshness, volume, event ids, items and (if the catalogue has any) stores of the events known before *as_of*."""
        past = timeline.before(as_of)
        purchases = past.baskets.select("occurred_at", "customer_id").to_pandas()
        newest = purchases["occurred_at"].max()
        age = (as_of - newest.to_pydatetime()) / timedelta(days=1)
        self._add(
            "age of the last purchase",
            f"{age:.1f} days",
            f"at most {self.limits.max_age_days:g}",
            age <= self.limits.max_age_days,
            "severe",
            f"import the events up to {as_of:%Y-%m-%d}, or train with --as-of {newest:%Y-%m-%d}",
        )
        self._look_at_volume(purchases["occurred_at"], as_of)
        events = past.events
        repeated = events.group_by("event_id").aggregate(n=events.count()).filter(ibis._.n > 1).count().to_pandas()
        self._add(
            "event ids stored twice", f"{repeated}", "none", not repeated, "severe", "the log is damaged: rebuild it from the sources"
        )
        lines = past.lines
        counts = lines.aggregate(all=lines.count(), unknown=lines.count(where=lines.recommendable.isnull())).to_pandas().iloc[0]
        share = counts["unknown"] / max(counts["all"], 1)
        self._add(
            "lines of items that the catalogue does not know",
            f"{share:.1%}",
            f"at most {self.limits.max_unknown_items:.0%}",
            share <= self.limits.max_unknown_items,
            "severe",
            "load the items: python -m features catalogue items FILE",
        )
        if stores:
            here = events.filter(events.store_id.notnull())
            strange = here.filter(~here.store_id.isin(sorted(stores))).store_id.nunique().to_pandas()
            self._add(
                "stores that the catalogue does not know",
                f"{strange}",
                "none",
                not strange,
                "warning",
                "load them: features catalogue stores",
            )
        anonymous = purchases["customer_id"].isna().mean()
        self._add("purchases without a customer", f"{anonymous:.1%}", "any: they teach what sells, not who buys", True)

    def _look_at_volume(self, occurred_at: pd.Series, as_of: datetime) -> None:
        age_in_spans = ((as_of - occurred_at) // SPAN).to_numpy()
        volumes = np.bincount(age_in_spans.astype(int))
        # the oldest span is not whole
        earlier = float(np.median(volumes[1:-1])) if len(volumes) > 2 else float("nan")
        ratio = volumes[0] / earlier if earlier else float("nan")
        self._add(
            "purchases of the last 28 days",
            f"{volumes[0]} ({ratio:.0%} of the usual {earlier:.0f})",
            f"at least {self.limits.min_volume:.0%}",
            not ratio < self.limits.min_volume,
            "severe",
            "a shop or a day is missing from the import: compare with the tills",
        )

    def look_at_rows(self, frame: pd.DataFrame, key: list[str], inputs: Sequence[Input]) -> None:
        """Keys that repeat, values that cannot be, and features that nobody has, in the rows to train on."""
        repeated = int(frame.duplicated(key).sum())
        self._add("training rows with the same key", f"{repeated}", "none", not repeated, "severe", f"{', '.join(key)} must be unique")
        pa = _pandera()
        features = [each.name for each in inputs]
        schema = pa.DataFrameSchema({each.name: pa.Column(float, _checks(pa, each), nullable=True, coerce=True) for each in inputs})
        try:
            schema.validate(frame[features], lazy=True)
            wrong: dict[str, int] = {}
        except pa.errors.SchemaErrors as errors:
            wrong = errors.failure_cases["column"].value_counts().to_dict()
        told = ", ".join(f"{name}: {count} rows" for name, count in wrong.items())
        self._add("values out of range", told or "none", "none", not wrong, "severe", "a definition or an import is wrong: see these rows")
        empty = [name for name in features if frame[name].isna().all()]
        self._add("features without any value", ", ".join(empty) or "none", "none", not empty, "warning", "the source does not tell them")

    def look_at_labels(self, labels: NDArray[np.bool_], champion_rate: float | None) -> None:
        """Whether there is something to tell apart, and about as often as when the champion was trained."""
        low, high = self.limits.base_rate
        rate = float(labels.mean())
        self._add(
            "base rate of the label",
            f"{rate:.1%}",
            f"{low:.1%} to {high:.1%}",
            low <= rate <= high,
            "severe",
            "almost all rows say the same: choose another --horizon",
        )
        if champion_rate is not None:
            ratio = rate / max(champion_rate, 1e-9)
            self._add(
                "base rate against the champion's",
                f"{rate:.1%} against {champion_rate:.1%}",
                "half to twice",
                0.5 <= ratio <= 2,
                "warning",
                "customers, or the data, changed: look before promoting",
            )

    def look_at_drift(self, now: pd.DataFrame, reference: pd.DataFrame | None, inputs: Sequence[Input] = ()) -> None:
        """How far each feature has moved from the champion's reference; those that grow with the calendar would alert for ever."""
        if reference is None:
            self._add("drift", "no champion to compare with", "", True)
            return
        ages = {each.name for each in inputs if each.is_age}
        for name in [c for c in now.columns if c in reference.columns and c not in ages]:
            new, old = now[name].to_numpy(dtype=float), reference[name].to_numpy(dtype=float)
            index, distance = psi(old, new), ks(old, new)
            calm = index <= self.limits.max_psi and distance <= self.limits.max_ks
            allowed = f"PSI {self.limits.max_psi}, KS {self.limits.max_ks}"
            self._add(
                f"drift of {name}", f"PSI {index:.2f}, KS {distance:.2f}", allowed, calm, "warning", "see what changed; retraining is due"
            )

    def _add(self, name: str, found: str, allowed: str, fine: bool, severity: Severity = "warning", mend: str = "") -> None:
        self.checks.append(Check(name, found, allowed, "ok" if fine else severity, "" if fine else mend))


def psi(reference: NDArray[np.float64], now: NDArray[np.float64], bands: int = 10) -> float:
    """The population stability index over the reference's deciles, unknown values a band of their own.

    Sum of (p - q) ln(p / q), shares no smaller than 1e-4 (Siddiqi, Credit Risk Scorecards, 2006). 0 for the same distribution.
    """
    edges = edges_of(reference, bands)
    return stability_index(shares_of(reference, edges), shares_of(now, edges))


def edges_of(reference: NDArray[np.float64], bands: int = 10) -> NDArray[np.float64]:
    """The inner limits of bands that each hold the same share of the known values; fewer where values repeat."""
    known = reference[~np.isnan(reference)]
    return np.unique(np.quantile(known, np.linspace(0, 1, bands + 1)[1:-1])) if len(known) else np.array([])


def shares_of(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of the values in each band, then the share that is unknown."""
    there = values[~np.isnan(values)]
    counts = np.bincount(np.searchsorted(edges, there, side="right"), minlength=len(edges) + 1)
    found: NDArray[np.float64] = np.append(counts, len(values) - len(there)) / max(len(values), 1)
    return found


def stability_index(before: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    """The population stability index of two samples' shares of the same bands; see ``psi``."""
    p, q = np.maximum(now, 1e-4), np.maximum(before, 1e-4)
    return float(((p - q) * np.log(p / q)).sum())


def ks(reference: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    """The Kolmogorov-Smirnov distance of the known values."""
    old, new = reference[~np.isnan(reference)], now[~np.isnan(now)]
    return float(ks_2samp(old, new).statistic) if len(old) and len(new) else 0.0


def reference_rows(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The sample of rows that later runs compare themselves with, as the floats that a model takes."""
    return frame.sample(min(len(frame), REFERENCE_ROWS), random_state=seed).reset_index(drop=True).astype(float)


def _pandera() -> Any:
    """pandera, without what its import leaves in the environment.

    For Spark's sake it sets PYARROW_IGNORE_TIMEZONE, after which pyarrow takes the wall clock of every aware time for UTC.
    """
    before = dict(os.environ)
    import pandera.pandas

    for name in set(os.environ) - set(before):
        del os.environ[name]
    return pandera.pandas


def _checks(pa: Any, feature: Input) -> list[Any]:
    def finite(values: pd.Series) -> pd.Series:
        return ~np.isinf(values)

    found = [pa.Check(finite, name="finite")]
    if feature.low is not None:
        found.append(pa.Check.ge(feature.low))
    if feature.high is not None:
        found.append(pa.Check.le(feature.high))
    return found
