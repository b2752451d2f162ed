"""What a data scientist asks of a home in a notebook: frames and figures, each answering one question."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import ibis
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.timeline import Timeline
from features.people.consent import LEARNING
from features.state.home import Home
from features.store.timeline import open_timeline
from training.bootstrap import open_registry, open_store
from training.comparison import Comparison, compare, evaluation_of
from training.dataset import customers_in_order
from training.evaluation import by_segment
from training.gate import Gate
from training.metrics import Estimate
from training.plots import bar_plot, calibration_plot, histogram, line_plot, segment_plot, threshold_plot
from training.promotion import NotPromotedError
from training.run import artifact_frame


class Model:
    """The champion of one model with all that its run kept.

    Args:
        home: the installation.
        name: as mlflow.yaml names it: churn, recommendations or next-best-offer.
    """

    def __init__(self, home: Home, name: str) -> None:
        self.home, self.name = home, name
        self.registry = open_registry(home)
        self.loaded = self.registry.load(f"{name}@{self.registry.settings.champion}")
        self.evaluation = evaluation_of(self.registry, name, self.loaded.version)
        self.reference = artifact_frame(self.registry.run_of(name, self.loaded.version), "reference.parquet")
        self.currency = Shop.load(home).currency

    def fails_where(self, metric: str) -> Figure:
        """The metric by segment: for whom is the model weak?"""
        return segment_plot(f"{self.loaded.label}: {metric} by segment", by_segment(self.evaluation, metric))

    def _probabilities(self) -> tuple[Any, Any]:
        if "label" not in self.evaluation:
            raise ValueError(f"{self.name} gives no probabilities to ask this of")
        return self.evaluation["label"].to_numpy(dtype=bool), self.evaluation["score"].to_numpy(dtype=float)

    def honest(self) -> Figure:
        """Predicted against observed rates."""
        return calibration_plot(*self._probabilities())

    def honest_by(self, column: str) -> pd.DataFrame:
        """Mean predicted and observed rate by ``segment``, ``group`` or ``unit``: where do the probabilities mislead?"""
        self._probabilities()
        grouped = self.evaluation.groupby(column)
        return pd.DataFrame({"rows": grouped.size(), "predicted": grouped["score"].mean(), "observed": grouped["label"].mean()}).round(3)

    def costs(self, value_minor: float, cost_minor: float) -> Figure:
        """What addressing everyone above a threshold would bring, were each one reached worth so much and each contact cost so much."""
        labels, scores = self._probabilities()
        return threshold_plot(labels, scores, value_minor, cost_minor, self.currency)

    def moved_by(self, count: int = 15) -> Figure:
        """The features that move the answers most: mean absolute contribution to the log-odds over the reference rows."""
        assert self.reference is not None
        shares = np.abs(self.loaded.model.contributions(self.reference.to_numpy(dtype=float))).mean(axis=0)
        top = np.argsort(-shares)[:count]
        exact = {self.reference.columns[k]: Estimate(float(shares[k]), float(shares[k]), float(shares[k])) for k in top}
        return bar_plot("Mean absolute contribution to the log-odds", exact)

    def challenged(self) -> Comparison | str:
        """The challenger beside the champion, or why there is nothing to compare."""
        try:
            return compare(self.registry, self.name)
        except NotPromotedError as error:
            return str(error)

    def drifted(self, customers: Customers) -> pd.DataFrame:
        """How far each feature of the customers asked about has moved from those that the champion learnt from, alerts first."""
        gate = Gate(self.name, self.registry.settings.gate)
        activity = customers.activity
        model = self.loaded.model
        if hasattr(model, "why_not"):
            activity = activity[[model.why_not(row) is None for row in activity.to_dict("records")]]
        gate.look_at_drift(activity, self.reference, getattr(model, "inputs", ()))
        rows = [(c.name.removeprefix("drift of "), c.found, c.severity) for c in gate.checks]
        return pd.DataFrame(rows, columns=["feature", "moved by", "verdict"]).sort_values("verdict", ascending=False, ignore_index=True)

    def spread(self, column: str) -> Figure:
        """How a measure of the lists, or the probability, is spread over the customers."""
        return histogram(self.evaluation[column], f"{self.loaded.label}: {column}", column)


class Customers:
    """The customer base as it stood at a moment (by default, where the data ends)."""

    def __init__(self, home: Home, as_of: datetime | None = None) -> None:
        self.shop = Shop.load(home)
        self.as_of = as_of or self.shop.data_end.astimezone(UTC)
        self.timeline: Timeline = open_timeline(home, identified_by=self.as_of, purposes=LEARNING).before(self.as_of)
        store = open_store(home)
        store.backfill("customer_activity", {self.as_of: None})
        spine = pd.DataFrame({"customer_id": customers_in_order(self.timeline), "event_timestamp": self.as_of})
        self.activity: pd.DataFrame = store.historical(spine, "activity_v1")

    def events_by_week(self) -> Figure:
        """What came in, week by week, by name."""
        events = self.timeline.events
        weekly = events.mutate(week=events.local_date.truncate("W")).group_by("week", "name").aggregate(n=ibis._.count()).order_by("week")
        frame = weekly.to_pandas()
        series = {str(name): (part["week"].tolist(), part["n"].tolist()) for name, part in frame.groupby("name")}
        return line_plot(series, "Events by week", "events")

    def active_by_week(self) -> Figure:
        """How many customers bought in each week, and how many of them for the first time: is the base growing?"""
        visits = self.timeline.baskets.filter(self.timeline.baskets.customer_id.notnull()).select("customer_id", "local_date")
        frame = visits.mutate(week=visits.local_date.truncate("W")).select("customer_id", "week").distinct().to_pandas()
        first = frame.groupby("customer_id")["week"].min()
        active, new = frame.groupby("week").size(), first.value_counts().sort_index()
        series: dict[str, tuple[Any, Any]] = {
            "customers who bought": (active.index.tolist(), active.tolist()),
            "of them for the first time": (new.index.tolist(), new.tolist()),
        }
        return line_plot(series, "Customers by week", "customers")

    def histogram(self, feature: str) -> Figure:
        """How one feature is spread over the customers."""
        return histogram(self.activity[feature], f"{feature} of {len(self.activity)} customers", feature)

    def concentration(self) -> pd.DataFrame:
        """What share of the revenue the best customers bring, of as long a time as the domain looks back for the money of RFM."""
        spend = np.sort(self.activity[domain_named(self.shop.domain).leaving.rfm[2]].fillna(0).to_numpy(dtype=float))[::-1]
        shares = np.cumsum(spend) / max(spend.sum(), 1.0)
        tops = (0.01, 0.05, 0.1, 0.2, 0.5)
        return pd.DataFrame(
            {
                "customers": [f"best {t:.0%}" for t in tops],
                "share of revenue": [round(float(shares[max(int(len(spend) * t) - 1, 0)]), 3) for t in tops],
            }
        )

    def unknown(self) -> pd.DataFrame:
        """The share of customers of whom each feature is not known."""
        missing = self.activity.drop(columns=["customer_id", "event_timestamp"]).isna().mean().sort_values(ascending=False)
        return missing[missing > 0].round(3).rename("share unknown").rename_axis("feature").reset_index()

    def retention(self, weeks: int = 26) -> Figure:
        """Of the customers first seen in each of the first months, the share that bought again, week after week."""
        visits = (
            self.timeline.baskets.filter(self.timeline.baskets.customer_id.notnull())
            .select("customer_id", "local_date")
            .distinct()
            .to_pandas()
        )
        visits["local_date"] = pd.to_datetime(visits["local_date"])
        visits["first"] = visits.groupby("customer_id")["local_date"].transform("min")
        visits["week"] = (visits["local_date"] - visits["first"]).dt.days // 7
        visits["cohort"] = visits["first"].dt.to_period("M").astype(str)
        sizes = visits.groupby("cohort")["customer_id"].nunique()
        series = {}
        for cohort in sizes[sizes >= 30].index[:6]:
            part = visits[visits["cohort"] == cohort].groupby("week")["customer_id"].nunique().reindex(range(1, weeks), fill_value=0)
            series[f"{cohort} ({sizes[cohort]})"] = (part.index.tolist(), (part / sizes[cohort]).tolist())
        return line_plot(series, "Share of a month's new customers who bought in the weeks after", "share")
