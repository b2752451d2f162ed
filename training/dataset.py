"""Spines and labels: who is asked about, as of when, and what then happened. Everything comes from the log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import ibis
import ibis.expr.types as ir
import pandas as pd

from features.catalogue.shop import Shop
from features.definitions.domain import Domain, domain_named
from features.definitions.timeline import Timeline
from features.people.consent import LEARNING
from features.state.clock import local_midnight
from features.state.home import Home
from features.store.compute import compute_of
from features.store.timeline import open_timeline
from models.eligibility import Eligibility
from models.inputs import Input
from training.bootstrap import model_settings, open_store

HORIZON_DAYS = 28
CUTOFF_STEP_DAYS = 14
MIN_HISTORY_DAYS = 84
Advance = Callable[[str], None]
"""Told the name of each step as a job takes it."""


class EmptyWindowError(ValueError):
    """There is nothing to learn from or to judge on; the message names the window and the mend."""


class NothingToLearnError(EmptyWindowError):
    """The shop does not do what the model is about, so it is left out where all models are trained."""


@dataclass(frozen=True)
class Plan:
    """What a training run is asked for.

    Attributes:
        as_of: learn only from before this moment; None is where the data ends.
        horizon_days: how far ahead a label looks; None is as far as the model's entry in mlflow.yaml says, or else the shop or its domain.
        window_days: how far back from a cut training examples reach; None is to the start of the data.
        seed: the same seed, log and code give the same model.
        trials: how many settings of boosted trees Optuna tries on the tuning cut; 0 takes those that they come with.
    """

    as_of: datetime | None = None
    horizon_days: int | None = None
    window_days: int | None = None
    seed: int = 0
    trials: int = 0


@dataclass(frozen=True)
class Cuts:
    """The moments of one experiment: everything before a cut may be learnt from, the horizon after it is judged.

    Attributes:
        tuning: the cut on which choices are made.
        tests: the cuts that are reported.
        final: where the data ends; the registered model learns from everything before it.
        start: the first moment of the data.
    """

    start: datetime
    tuning: datetime
    tests: tuple[datetime, ...]
    final: datetime
    timezone: str
    horizon_days: int = HORIZON_DAYS
    window_days: int | None = None

    @classmethod
    def before(
        cls, final: datetime, start: datetime, timezone: str, horizon_days: int = HORIZON_DAYS, window_days: int | None = None
    ) -> Cuts:
        """Three horizons before *final*: the first to tune on, the last two to report.

        Raises:
            EmptyWindowError: the data is too short for a history and three horizons.
        """
        cuts = [days_before(final, horizon_days * k, timezone) for k in (3, 2, 1)]
        if days_before(cuts[0], horizon_days + MIN_HISTORY_DAYS, timezone) < start:
            need = horizon_days * 4 + MIN_HISTORY_DAYS
            raise EmptyWindowError(
                f"the data from {start:%Y-%m-%d} to {final:%Y-%m-%d} is too short: {need} days are needed before the as-of date"
            )
        return cls(start, cuts[0], (cuts[1], cuts[2]), final, timezone, horizon_days, window_days)

    def end(self, cut: datetime) -> datetime:
        """Where the label window of *cut* closes."""
        return days_before(cut, -self.horizon_days, self.timezone)

    def unit(self, cut: datetime) -> str:
        """What an evaluation calls a cut: equal names ask the same question."""
        return self.day(cut) if self.horizon_days == HORIZON_DAYS else f"{self.day(cut)} ({self.horizon_days} days)"

    def day(self, cut: datetime) -> str:
        """The shop's own day that begins at *cut*."""
        return f"{cut.astimezone(ZoneInfo(self.timezone)):%Y-%m-%d}"

    def training(self) -> list[datetime]:
        """Cutoffs every two weeks whose label window had closed by the final cut, oldest first."""
        return training_cutoffs(self.final, self.start, self.timezone, self.horizon_days)

    def closed_before(self, frame: pd.DataFrame, cut: datetime) -> pd.DataFrame:
        """The rows of *frame* that a model fitted at *cut* may learn from: labels closed, and not older than the window."""
        oldest = self.start if self.window_days is None else days_before(cut, self.window_days, self.timezone)
        usable = {m: self.end(m.to_pydatetime()) <= cut and m >= oldest for m in frame["event_timestamp"].unique()}
        return frame[frame["event_timestamp"].map(usable)]


def open_experiment(home: Home, model: str, plan: Plan) -> tuple[Truth, Cuts]:
    """The log's truth and the cuts before the plan's as-of, for a model that ``mlflow.yaml`` names."""
    shop = Shop.load(home)
    final = plan.as_of or shop.data_end.astimezone(UTC)
    truth = Truth(home, final)
    settings = model_settings(home).models[model]
    # what a shop says of leaving is about churn; the other models look as far as its domain does
    said = shop.churn_horizon_days if settings.kind.name == "churn" else None
    horizon_days = plan.horizon_days or settings.horizon_days or said or truth.domain.leaving.horizon_days
    return truth, Cuts.before(final, truth.start, shop.timezone, horizon_days, plan.window_days)


def inputs_of(domain: Domain, kind: str) -> tuple[Input, ...]:
    """The customer features that a kind of model takes, as it will carry them."""
    return tuple(
        Input(f.name, f.phrase, f.unknown, direction=f.direction, low=f.low, high=f.high, is_age=f.is_age) for f in domain.inputs_of(kind)
    )


def eligibility_of(domain: Domain) -> Eligibility:
    """Of whom it makes sense to ask when they come again."""
    return Eligibility(domain.leaving.min_visit_days, domain.leaving.max_recency_days)


def days_before(moment: datetime, days: int, timezone: str) -> datetime:
    """The same time of day in the shop's zone, *days* earlier; across a change of the clocks that is not 24 hours each."""
    local = moment.astimezone(ZoneInfo(timezone)) - timedelta(days=days)
    return local_midnight(local.date(), timezone)


def training_cutoffs(until: datetime, start: datetime, timezone: str, horizon_days: int = HORIZON_DAYS) -> list[datetime]:
    """Cutoffs every two weeks whose label window had closed by *until*, oldest first."""
    cutoffs: list[datetime] = []
    days = horizon_days
    while (cutoff := days_before(until, days, timezone)) >= days_before(start, -MIN_HISTORY_DAYS, timezone):
        cutoffs.append(cutoff)
        days += CUTOFF_STEP_DAYS
    return cutoffs[::-1]


def customers_in_order(past: Timeline) -> list[str]:
    """Every customer known in *past*, in the order in which their first events became known, and of those by event id.

    Whatever comes out differently for other orders of the rows (boosted trees, resamples, the matrix of customers and items,
    sums of fractions) takes the customers in this order. It is that of the log, and so the same in any home; customer ids
    are digests under the secret of the home.
    """
    events = past.events.filter(past.events.customer_id.notnull()).select("customer_id", "known_at", "event_id")
    nth = ibis.row_number().over(ibis.window(group_by="customer_id", order_by=["known_at", "event_id"]))
    numbered = events.mutate(nth=nth)
    first = numbered.filter(numbered.nth == 0).order_by("known_at", "event_id")
    customers: list[str] = first.select("customer_id").to_pyarrow()["customer_id"].to_pylist()
    return customers


class Truth:
    """What customers did, for labels; reads the log once. Rows come in the order of ``customers_in_order``."""

    def __init__(self, home: Home, until: datetime) -> None:
        self.shop = Shop.load(home)
        self.domain = domain_named(self.shop.domain)
        self.timeline: Timeline = open_timeline(home, identified_by=until, purposes=LEARNING, compute=compute_of(home))
        past = self.timeline.before(until)
        self._place = {customer: place for place, customer in enumerate(customers_in_order(past))}
        self._visits = self._rows(past.baskets)
        if self._visits.empty:
            raise EmptyWindowError(f"no purchase is known before {until:%Y-%m-%d}: choose a later --as-of or import purchases")
        lines = self._lines = past.lines
        bought = lines.filter(lines.customer_id.notnull(), lines.quantity > 0, lines.recommendable.fill_null(False))
        self._bought = _frame(bought.select("customer_id", "item_id", "occurred_at"))
        events = past.events
        sent = events.filter(events.name.isin(["message_sent", "offer_redeem"]))
        self._messages = self._rows(sent, "name", "campaign_id", "offer_id")

    def _rows(self, table: ir.Table, *columns: str) -> pd.DataFrame:
        """What the customers did, customer by customer in their order, each one's in the order of time."""
        frame = _frame(table.filter(table.customer_id.notnull()).select("customer_id", "occurred_at", "event_id", *columns))
        placed = frame.assign(place=frame["customer_id"].map(self._place)).sort_values(["place", "occurred_at", "event_id"])
        return placed.drop(columns=["place", "event_id"]).reset_index(drop=True)

    @property
    def visits(self) -> pd.DataFrame:
        """Every purchase of a known customer: ``customer_id, occurred_at``, customer by customer, each one's in the order of time."""
        return self._visits

    @property
    def start(self) -> datetime:
        """The first moment of purchase data, as a local midnight."""
        first = self._visits["occurred_at"].min().to_pydatetime()
        return local_midnight(first.astimezone(ZoneInfo(self.shop.timezone)).date(), self.shop.timezone)

    def churn_spine(self, cutoffs: Sequence[datetime], horizon_days: int = HORIZON_DAYS) -> pd.DataFrame:
        """Each customer with a purchase before each cutoff, and whether none followed within the horizon (``label``)."""
        parts = []
        for cutoff in cutoffs:
            end = days_before(cutoff, -horizon_days, self.shop.timezone)
            before = self._visits.loc[self._visits["occurred_at"] < cutoff, "customer_id"].unique()
            window = self._visits["occurred_at"].between(cutoff, end, inclusive="left")
            came = set(self._visits.loc[window, "customer_id"])
            parts.append(pd.DataFrame({"customer_id": before, "event_timestamp": cutoff, "label": [c not in came for c in before]}))
        return pd.concat(parts, ignore_index=True)

    def next_order_spine(self, cutoffs: Sequence[datetime], horizon_days: int) -> pd.DataFrame:
        """Each customer with a purchase before each cutoff, and after how many days, parts of days too, the next one came (``days``).

        Where none came within the horizon it is the horizon.
        """
        parts = []
        for cutoff in cutoffs:
            end = days_before(cutoff, -horizon_days, self.shop.timezone)
            before = self._visits.loc[self._visits["occurred_at"] < cutoff, "customer_id"].unique()
            after = self._visits[self._visits["occurred_at"].between(cutoff, end, inclusive="left")]
            first = (after.groupby("customer_id")["occurred_at"].min() - pd.Timestamp(cutoff)) / pd.Timedelta(days=1)
            came = first.clip(upper=float(horizon_days)).to_dict()
            days = [came.get(customer, float(horizon_days)) for customer in before]
            parts.append(pd.DataFrame({"customer_id": before, "event_timestamp": cutoff, "days": days}))
        return pd.concat(parts, ignore_index=True)

    def bought(self, start: datetime, end: datetime) -> dict[str, set[str]]:
        """The merchandise that each customer bought in ``[start, end)``."""
        rows = self._bought[self._bought["occurred_at"].between(start, end, inclusive="left")]
        return {customer: set(items) for customer, items in rows.groupby("customer_id")["item_id"]}

    def lines(self, start: datetime, end: datetime) -> pd.DataFrame:
        """What was sold in ``[start, end)``, also to nobody known, in the order of time: ``event_id, item_id, store_id, occurred_at``."""
        lines = self._lines
        sold = lines.filter(lines.quantity > 0, lines.recommendable.fill_null(False), lines.occurred_at >= start, lines.occurred_at < end)
        return _frame(sold.select("event_id", "item_id", "store_id", "occurred_at").order_by("occurred_at", "event_id", "item_id"))

    def campaign_spine(self, campaigns: pd.DataFrame) -> pd.DataFrame:
        """Each customer that each campaign was sent to, at its start, and whether they redeemed one of its coupons in time.

        Args:
            campaigns: ``campaign_id, campaign_type, valid_from, valid_until``.
        """
        sent = self._messages[self._messages["name"] == "message_sent"].drop_duplicates(["customer_id", "campaign_id"])
        spine = sent[["customer_id", "campaign_id"]].merge(campaigns, on="campaign_id")
        redeemed = self.redemptions().merge(campaigns, on="campaign_id")
        redeemed = redeemed[redeemed["occurred_at"].between(redeemed["valid_from"], redeemed["valid_until"], inclusive="left")]
        pairs = set(zip(redeemed["customer_id"], redeemed["campaign_id"], strict=True))
        spine["label"] = [pair in pairs for pair in zip(spine["customer_id"], spine["campaign_id"], strict=True)]
        # stable: within a campaign the customers stay in their order
        return spine.rename(columns={"valid_from": "event_timestamp"}).sort_values(["event_timestamp", "campaign_id"], kind="stable")

    def sent_campaigns(self) -> set[str]:
        """The campaigns that anyone was sent."""
        return set(self._messages.loc[self._messages["name"] == "message_sent", "campaign_id"].dropna())

    def redemptions(self) -> pd.DataFrame:
        """Every redemption: ``customer_id, campaign_id, offer_id, occurred_at``."""
        rows = self._messages[self._messages["name"] == "offer_redeem"]
        return rows[["customer_id", "campaign_id", "offer_id", "occurred_at"]]


def _frame(table: ir.Table) -> pd.DataFrame:
    """Rows with their times in microseconds, whichever engine gives them."""
    frame: pd.DataFrame = table.to_pandas()
    return frame.astype({"occurred_at": "datetime64[us, UTC]"})


def eligible_frame(
    home: Home, spine: pd.DataFrame, when: Sequence[datetime], eligibility: Eligibility, service: str, advance: Advance
) -> pd.DataFrame:
    """The spine with the customers' windowed features, of those of whom it makes sense to ask when they come again.

    Raises:
        EmptyWindowError: there is nobody.
    """
    store = open_store(home)
    store.backfill("customer_activity", moments(when), lambda n: advance("backfilling features"))
    frame = store.historical(spine, service)
    keep = [eligibility.why_not(row) is None for row in frame[["recency_days", "visit_days_total"]].to_dict("records")]
    frame = frame[keep].reset_index(drop=True)
    if frame.empty:
        raise EmptyWindowError(f"no customer to learn from before {max(when):%Y-%m-%d}: choose a later --as-of")
    return frame


def moments(values: Iterable[datetime]) -> dict[datetime, None]:
    """The distinct moments, each wanted for every entity."""
    return dict.fromkeys(sorted(values))
