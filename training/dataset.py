"""Spines and labels: who is asked about, as of when, and what then happened. Everything comes from the log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
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
MOMENTS = "datetime64[us, UTC]"
"""How pandas keeps moments, whichever engine gives them."""
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
    """What customers did, for labels; reads the log once. Rows come in the order of ``customers_in_order``.

    The engine works labels out. What comes here is a row for each customer, or for each answer that is asked for.
    """

    def __init__(self, home: Home, until: datetime) -> None:
        self.shop = Shop.load(home)
        self.domain = domain_named(self.shop.domain)
        self.timeline: Timeline = open_timeline(home, identified_by=until, purposes=LEARNING, compute=compute_of(home))
        self._past = past = self.timeline.before(until)
        self._place = {customer: place for place, customer in enumerate(customers_in_order(past))}
        known = past.baskets.filter(past.baskets.customer_id.notnull())
        self._visits = known.select("customer_id", "occurred_at", "event_id")
        lines = past.lines
        self._sold = lines.filter(lines.quantity > 0, lines.recommendable.fill_null(False))
        first = _frame(self._visits.aggregate(occurred_at=self._visits.occurred_at.min()))["occurred_at"].iloc[0]
        if pd.isna(first):
            raise EmptyWindowError(f"no purchase is known before {until:%Y-%m-%d}: choose a later --as-of or import purchases")
        self._first = first.to_pydatetime()

    def _rows(self, table: ir.Table, *columns: str) -> pd.DataFrame:
        """What the customers did, customer by customer in their order, each one's in the order of time."""
        frame = _frame(table.filter(table.customer_id.notnull()).select("customer_id", "occurred_at", "event_id", *columns))
        return self._in_order(frame, ["place", "occurred_at", "event_id"]).drop(columns="event_id")

    def _in_order(self, frame: pd.DataFrame, order: list[str]) -> pd.DataFrame:
        """The rows of *frame* by the columns of *order*, of which ``place`` is that of the customer."""
        placed = frame.assign(place=frame["customer_id"].map(self._place)).sort_values(order)
        return placed.drop(columns="place").reset_index(drop=True)

    @cached_property
    def visits(self) -> pd.DataFrame:
        """Every purchase of a known customer: ``customer_id, occurred_at``, customer by customer, each one's in the order of time."""
        return self._rows(self._visits)

    @property
    def start(self) -> datetime:
        """The first moment of purchase data, as a local midnight."""
        return local_midnight(self._first.astimezone(ZoneInfo(self.shop.timezone)).date(), self.shop.timezone)

    def churn_spine(self, cutoffs: Sequence[datetime], horizon_days: int = HORIZON_DAYS) -> pd.DataFrame:
        """Each customer with a purchase before each cutoff, and whether none followed within the horizon (``label``)."""
        spine = self._next_visits(cutoffs, horizon_days)
        return spine.drop(columns="next_visit").assign(label=spine["next_visit"].isna())

    def next_order_spine(self, cutoffs: Sequence[datetime], horizon_days: int) -> pd.DataFrame:
        """Each customer with a purchase before each cutoff, and after how many days, parts of days too, the next one came (``days``).

        Where none came within the horizon it is the horizon.
        """
        spine = self._next_visits(cutoffs, horizon_days)
        days = (spine["next_visit"] - spine["event_timestamp"]) / pd.Timedelta(days=1)
        return spine.drop(columns="next_visit").assign(days=days.clip(upper=float(horizon_days)).fillna(float(horizon_days)))

    def _next_visits(self, cutoffs: Sequence[datetime], horizon_days: int) -> pd.DataFrame:
        """Each customer with a purchase before each cutoff, and when the first one within the horizon was (``next_visit``), if any."""
        at = self._visits.occurred_at
        following = {f"{k}": at.min(where=at >= self.timeline.compute.moment(cutoff)) for k, cutoff in enumerate(cutoffs)}
        found = _frame(self._visits.group_by("customer_id").aggregate(occurred_at=at.min(), **following))
        found = self._in_order(found, ["place"])
        parts = []
        for k, cutoff in enumerate(cutoffs):
            before = found[found["occurred_at"] < cutoff]
            then = before[f"{k}"].astype(MOMENTS)
            within = then.where(then < days_before(cutoff, -horizon_days, self.shop.timezone))
            parts.append(pd.DataFrame({"customer_id": before["customer_id"], "event_timestamp": cutoff, "next_visit": within}))
        return pd.concat(parts, ignore_index=True)

    def bought(self, start: datetime, end: datetime) -> dict[str, set[str]]:
        """The merchandise that each customer bought in ``[start, end)``."""
        sold = self._between(self._sold.filter(self._sold.customer_id.notnull()), start, end)
        rows: pd.DataFrame = sold.select("customer_id", "item_id").distinct().to_pandas()
        return {customer: set(items) for customer, items in rows.groupby("customer_id")["item_id"]}

    def lines(self, start: datetime, end: datetime) -> pd.DataFrame:
        """What was sold in ``[start, end)``, also to nobody known, in the order of time: ``event_id, item_id, store_id, occurred_at``."""
        sold = self._between(self._sold, start, end).select("event_id", "item_id", "store_id", "occurred_at")
        return _frame(sold.order_by("occurred_at", "event_id", "item_id"))

    def _between(self, table: ir.Table, start: datetime, end: datetime) -> ir.Table:
        moment = self.timeline.compute.moment
        return table.filter(table.occurred_at >= moment(start), table.occurred_at < moment(end))

    def campaign_spine(self, campaigns: pd.DataFrame) -> pd.DataFrame:
        """Each customer that each campaign was sent to, at its start, and whether they redeemed one of its coupons in time.

        Args:
            campaigns: ``campaign_id, campaign_type, valid_from, valid_until``.
        """
        sent = self._named("message_sent")
        pairs: pd.DataFrame = sent.filter(sent.customer_id.notnull()).select("customer_id", "campaign_id").distinct().to_pandas()
        redeemed = self.redemptions().merge(campaigns, on="campaign_id")
        in_time = redeemed["occurred_at"].between(redeemed["valid_from"], redeemed["valid_until"], inclusive="left")
        answered = redeemed.loc[in_time, ["customer_id", "campaign_id"]].drop_duplicates().assign(label=True)
        spine = pairs.merge(campaigns, on="campaign_id").merge(answered, on=["customer_id", "campaign_id"], how="left")
        spine["label"] = spine["label"].notna()
        spine = spine.rename(columns={"valid_from": "event_timestamp"})
        return self._in_order(spine, ["event_timestamp", "campaign_id", "place"])

    def sent_campaigns(self) -> set[str]:
        """The campaigns that anyone was sent."""
        sent = self._named("message_sent")
        return set(sent.filter(sent.customer_id.notnull()).select("campaign_id").distinct().to_pandas()["campaign_id"].dropna())

    def redemptions(self) -> pd.DataFrame:
        """Every redemption: ``customer_id, campaign_id, offer_id, occurred_at``."""
        rows = self._rows(self._named("offer_redeem"), "campaign_id", "offer_id")
        return rows[["customer_id", "campaign_id", "offer_id", "occurred_at"]]

    def _named(self, name: str) -> ir.Table:
        events = self._past.events
        return events.filter(events.name == name)


def _frame(table: ir.Table) -> pd.DataFrame:
    """Rows with their times in microseconds, whichever engine gives them."""
    frame: pd.DataFrame = table.to_pandas()
    return frame.astype({"occurred_at": MOMENTS})


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
