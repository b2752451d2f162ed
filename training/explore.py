"""What a data scientist asks of a home in a notebook: figures, each answering one question, with the sentence that reads it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.timeline import Timeline
from features.people.consent import LEARNING
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.timeline import open_timeline
from models.recommender.listings import LISTINGS
from models.reports import Measured, ModelReport, read_version
from training import readings
from training.bootstrap import open_registry, open_store
from training.comparison import compare, evaluation_of
from training.dataset import customers_in_order
from training.documents import drift_document
from training.drift import drift
from training.metrics import Estimate
from training.plots import line_plot, threshold_plot
from training.promotion import NotPromotedError
from training.readings import MarkdownText, Reading
from training.rendering import markdown
from training.run import artifact_frame


class Model:
    """The champion of one model with all that its run kept.

    Args:
        home: the installation.
        name: as mlflow.yaml names it: churn, recommendations, next-best-offer or days-to-next-order.
    """

    def __init__(self, home: Home, name: str) -> None:
        self.home, self.name = home, name
        self.registry = open_registry(home)
        self.loaded = self.registry.load(f"{name}@{self.registry.settings.champion}")
        self.evaluation = evaluation_of(self.registry, name, self.loaded.version)
        self.reference = artifact_frame(self.registry.run_of(name, self.loaded.version), "reference.parquet")
        self.currency = Shop.load(home).currency

    @property
    def report(self) -> ModelReport:
        """What its run found.

        Raises:
            MissingStateError: it was trained before reports were kept as data.
        """
        found = read_version(self.home.root, self.name, self.loaded.version)
        if found is None:
            raise MissingStateError(f"{self.loaded.label} kept no report as data: train it again (python -m training {self.name})")
        return found

    def _probabilities(self) -> tuple[Any, Any]:
        if "label" not in self.evaluation:
            raise ValueError(f"{self.name} gives no probabilities to ask this of")
        return self.evaluation["label"].to_numpy(dtype=bool), self.evaluation["score"].to_numpy(dtype=float)

    def calibration(self) -> Reading:
        """Are the probabilities honest?"""
        return readings.calibration_reading(*self._probabilities())

    def lift(self) -> Reading:
        """Whom does it find first?"""
        return readings.lift_reading(self.evaluation["customer_id"].tolist(), *self._probabilities())

    def effects(self, unit: str = "log-odds") -> Reading:
        """Which inputs move the answers, and which way?"""
        assert self.reference is not None
        return readings.effects_reading(self.reference, self.loaded.model.contributions(self.reference.to_numpy(dtype=float)), unit)

    def segments(self, metric: str, less_is_better: bool = False) -> Reading:
        """For whom is it weak?"""
        return readings.segments_reading(self.evaluation, metric, less_is_better)

    def costs(self, value_minor: float, cost_minor: float) -> Reading:
        """What addressing everyone above a threshold would bring, were each one reached worth so much and each contact cost so much."""
        labels, scores = self._probabilities()
        figure = threshold_plot(labels, scores, value_minor, cost_minor, self.currency)
        break_even = cost_minor / value_minor
        addressed = scores >= break_even
        hit = labels[addressed].mean() if addressed.any() else 0.0
        return Reading(
            figure,
            f"A contact pays from a probability of {break_even:.1%} on: {int(addressed.sum())} of {len(labels)} lie above it, and of them "
            f"{hit:.1%} came true.",
        )

    def errors(self) -> Reading:
        """Do as many come earlier as later than foretold?"""
        return readings.errors_reading(*self._days(), float(self.loaded.model.horizon_days))

    def errors_spread(self) -> Reading:
        """By how many days does it err?"""
        return readings.errors_spread_reading(*self._days())

    def _days(self) -> tuple[Any, Any]:
        return self.evaluation["days"].to_numpy(dtype=float), self.evaluation["score"].to_numpy(dtype=float)

    def spread(self, measure: str, listing: str) -> Reading:
        """Is the mean of a list's measure carried by a few customers?"""
        values = self.evaluation.loc[self.evaluation["listing"] == listing, measure].to_numpy(dtype=float)
        return readings.spread_reading(values, f"{measure} of {listing}")

    def ladder(self, measure: str = "ndcg_at_10") -> Reading:
        """What does the order that is served bring over its sources alone?"""
        quality = self.report.quality
        found = {
            listing: {row: _estimate(of[f"{measure}_{listing}"]) for row, of in quality.items() if f"{measure}_{listing}" in of}
            for listing in LISTINGS
        }
        return readings.ladder_reading(found, measure)

    def variety(self) -> Reading:
        """Who shows the same bestsellers to all?"""
        report, found = self.report, {}
        for listing in LISTINGS:
            rows = [
                (row, of[f"coverage_{listing}"].value, of[f"novelty_{listing}"].value, row == report.served)
                for row, of in report.quality.items()
                if f"coverage_{listing}" in of
            ]
            found[listing] = pd.DataFrame(rows, columns=["model", "coverage", "novelty", "served"])
        return readings.tradeoff_reading(found)

    def challenged(self) -> MarkdownText:
        """The challenger beside the champion, or why there is nothing to compare."""
        try:
            return MarkdownText(markdown(compare(self.registry, self.name).document()))
        except NotPromotedError as error:
            return MarkdownText(str(error))

    def drifted(self) -> MarkdownText:
        """How far the inputs have moved from those that the champion learnt from."""
        return MarkdownText(markdown(drift_document(drift(self.home, self.registry, self.name))))


def _estimate(told: Measured) -> Estimate:
    return Estimate(told.value, told.value if told.low is None else told.low, told.value if told.high is None else told.high)


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
        baskets = self.timeline.baskets.select("customer_id", "local_date").to_pandas()
        self._visits = baskets.assign(week=pd.to_datetime(baskets["local_date"]).dt.to_period("W").dt.start_time)

    def identified(self) -> Reading:
        """How much of what is sold can be told to be somebody's, week by week?"""
        known = self._visits.assign(known=self._visits["customer_id"].notna()).groupby("week")["known"].mean()
        first = self._visits.dropna(subset="customer_id").groupby("customer_id")["week"].min().value_counts().sort_index().cumsum()
        first = first / max(int(first.iloc[-1]), 1)
        series: dict[str, tuple[Any, Any]] = {
            "share of purchases whose customer is known": (known.index.tolist(), known.tolist()),
            "share of today's customers known by then": (first.index.tolist(), first.tolist()),
        }
        half = first.index[int((first >= 0.5).to_numpy().argmax())]
        return Reading(
            line_plot(series, "Who is known, by week", "share"),
            f"The customer of {self._visits['customer_id'].notna().mean():.0%} of all purchases is known; half of today's customers were "
            f"known by the week of {half:%Y-%m-%d}.",
        )

    def active(self) -> Reading:
        """Is the base growing, or only turning over?"""
        frame = self._visits.dropna(subset="customer_id")[["customer_id", "week"]].drop_duplicates()
        first = frame.groupby("customer_id")["week"].min()
        active, new = frame.groupby("week").size(), first.value_counts().sort_index()
        series: dict[str, tuple[Any, Any]] = {
            "customers who bought": (active.index.tolist(), active.tolist()),
            "of them for the first time": (new.index.tolist(), new.tolist()),
        }
        early, late = active.iloc[-26:-13].mean(), active.iloc[-13:].mean()
        return Reading(
            line_plot(series, "Customers by week", "customers"),
            f"In the last thirteen weeks {late:.0f} customers bought in a week, {late / early - 1:+.0%} beside the thirteen before."
            if early == early
            else f"In the last weeks {late:.0f} customers bought in a week.",
        )

    def concentration(self) -> Reading:
        """Who brings the revenue, of as long a time as the domain looks back for the money of RFM?"""
        feature = domain_named(self.shop.domain).leaving.rfm[2]
        spend = np.sort(self.activity[feature].fillna(0).to_numpy(dtype=float))[::-1]
        share = np.cumsum(spend) / max(spend.sum(), 1.0)
        figure, axes = readings.canvas("Who brings the revenue", "share of customers, the best first", f"share of {feature}")
        axes.plot(np.arange(1, len(spend) + 1) / len(spend), share)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1, label="all alike")
        axes.legend()
        tenth, half = share[max(len(spend) // 10 - 1, 0)], int((share >= 0.5).argmax() + 1) / len(spend)
        return Reading(
            figure, f"The best tenth of the customers bring {tenth:.0%} of the revenue; half of it comes from {half:.0%} of them."
        )

    def retention(self, weeks: int = 26) -> Reading:
        """Of the customers first seen in each of the first months, which share bought again, week after week?"""
        visits = self._visits.dropna(subset="customer_id").drop_duplicates(["customer_id", "local_date"])
        day = pd.to_datetime(visits["local_date"])
        start = day.groupby(visits["customer_id"]).transform("min")
        visits = visits.assign(after=(day - start).dt.days // 7, cohort=start.dt.to_period("M").astype(str))
        sizes = visits.groupby("cohort")["customer_id"].nunique()
        series, means = {}, []
        for cohort in sizes[sizes >= 30].index[:6]:
            part = visits[visits["cohort"] == cohort].groupby("after")["customer_id"].nunique().reindex(range(1, weeks), fill_value=0)
            series[f"{cohort} ({sizes[cohort]})"] = (part.index.tolist(), (part / sizes[cohort]).tolist())
            means.append(float((part / sizes[cohort]).iloc[-4:].mean()))
        figure = line_plot(
            series, "Share of a month's new customers who bought in the weeks after", "share", "weeks after the first purchase"
        )
        if not means:
            return Reading(figure, "No month has thirty new customers, so there is nothing to follow.")
        return Reading(
            figure,
            f"After half a year {min(means):.0%} to {max(means):.0%} of a month's new customers buy in any one week "
            f"({len(means)} months of at least thirty).",
        )
