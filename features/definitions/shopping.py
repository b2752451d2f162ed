"""What customers of any shop do: the tables that features are measured on, and the features that every domain shares."""

from __future__ import annotations

from functools import cache

import ibis
import ibis.expr.types as ir

from features.definitions.feature import Base, Derived, Feature, Measure, Moment, counted, ratio
from features.definitions.timeline import Timeline

POPULARITY_HALF_LIFE_DAYS = 7.0
FADED_UNITS = 2.0**32
"""Into how many parts the weight of what fades is divided; what is left of it after 32 half-lives is nothing."""
LEAVING = ("churn", "days-to-next-order")
"""The kinds of models that tell when a customer comes again."""
LEAVING_AND_OFFERS = (*LEAVING, "next-best-offer")


# --- what is measured


def customers(past: Timeline) -> ir.Table:
    """Every customer of whom anything is known."""
    return past.events.filter(past.events.customer_id.notnull()).select("customer_id").distinct()


def baskets(past: Timeline, moment: Moment) -> ir.Table:
    """One row a purchase."""
    return past.baskets


def spending(past: Timeline, moment: Moment) -> ir.Table:
    """What was paid, and what was paid back as a negative amount: one row a purchase or refund."""
    paid = past.baskets.select("customer_id", "occurred_at", "amount_minor")
    back = past.refunds.select("customer_id", "occurred_at", amount_minor=-past.refunds.amount_minor)
    return paid.union(back)


def refunds(past: Timeline, moment: Moment) -> ir.Table:
    """One row a refund."""
    return past.refunds


@cache
def happened(name: str) -> Base:
    """One row an event of that name, such as one that only a domain counts."""

    def events(past: Timeline, moment: Moment) -> ir.Table:
        return past.events.filter(past.events.name == name)

    return events


def gaps(past: Timeline, moment: Moment) -> ir.Table:
    """The days between a customer's visit days, one row a gap; its square is a whole number, so that sums are exact."""
    days = past.baskets.select("customer_id", "local_date").distinct()
    previous = days.local_date.lag().over(ibis.window(group_by="customer_id", order_by="local_date"))
    both = days.mutate(previous=previous)
    both = both.filter(both.previous.notnull())
    return both.mutate(gap=both.local_date.delta(both.previous, unit="day").cast("int64"))


def recent_lines(past: Timeline, moment: Moment) -> ir.Table:
    """What was bought in the last 91 days, one row an item of a purchase, with the item's attributes."""
    return past.lines.filter(moment.within(past.lines, 91))


def most_spent_on(past: Timeline, moment: Moment) -> ir.Table:
    """The category on which a customer spent the most in the last year; of two alike the first by alphabet."""
    lines = past.lines.filter(past.lines.category.notnull(), past.lines.recommendable.fill_null(False), moment.within(past.lines, 365))
    spent = lines.group_by("customer_id", "category").aggregate(spent=lines.amount_minor.sum())
    order = ibis.window(group_by="customer_id", order_by=[ibis.desc("spent"), "category"])
    ordered = spent.mutate(nth=ibis.row_number().over(order))
    return ordered.filter(ordered.nth == 0)


def campaigns(past: Timeline, moment: Moment) -> ir.Table:
    """What the customer was sent and redeemed, one row an event, with the type of its campaign."""
    types = past.offers.select("campaign_id", "campaign_type").distinct()
    events = past.events.filter(past.events.name.isin(["message_sent", "offer_redeem"]))
    events = events.select("customer_id", "name", "occurred_at", "local_date", "campaign_id").left_join(types, "campaign_id")
    return events.mutate(
        sent=events.name == "message_sent",
        redeemed=events.name == "offer_redeem",
        broad=events.campaign_type.isin(past.shop.broad_campaign_types),
    )


def faded_units(rows: ir.Table, moment: Moment, half_life_days: float) -> ir.IntegerValue:
    """What each row still weighs at the moment, in parts of which ``FADED_UNITS`` are one.

    They are whole numbers of a fine unit, so that their sum is the same whichever thread adds first.
    """
    # of whole seconds: of parts of one some engines would round, and others cut them off
    age_seconds = moment.at.truncate("s").epoch_seconds() - rows.occurred_at.truncate("s").epoch_seconds()
    weight = ibis.literal(2.0) ** (age_seconds.cast("float64") / (-86_400.0 * half_life_days))
    return (weight * FADED_UNITS).round().cast("int64")


def sold(past: Timeline, moment: Moment) -> ir.Table:
    """Every line that was sold, with what it weighs in the item's popularity at the moment."""
    lines = past.lines.filter(past.lines.quantity > 0)
    return lines.mutate(units=faded_units(lines, moment, POPULARITY_HALF_LIFE_DAYS))


def sold_items(past: Timeline) -> ir.Table:
    """Every item that was ever sold."""
    return past.lines.filter(past.lines.quantity > 0).select("item_id").distinct()


# --- families that differ only in their window


def visit_days(days: int, phrase: str, direction: int = 0, inputs_of: tuple[str, ...] = LEAVING) -> Feature:
    """On how many of the shop's own days the customer bought within *days*."""
    definition = counted(baskets, lambda rows, at: rows.local_date.nunique(where=at.within(rows, days)))
    name = f"visit_days_{days}"
    return Feature(name, "integer", definition, phrase, direction=direction, inputs_of=inputs_of)  # type: ignore[arg-type]


def purchases(days: int, phrase: str, inputs_of: tuple[str, ...] = LEAVING) -> Feature:
    """How many purchases within *days*."""
    return Feature(
        f"baskets_{days}",
        "integer",
        counted(baskets, lambda rows, at: rows.count(where=at.within(rows, days))),
        phrase,
        inputs_of=inputs_of,
    )


def spend(days: int, phrase: str, inputs_of: tuple[str, ...] = LEAVING_AND_OFFERS) -> Feature:
    """What was paid within *days*, less what was paid back; below zero where older purchases were returned."""
    definition = counted(spending, lambda rows, at: rows.amount_minor.sum(where=at.within(rows, days)).cast("int64"))
    return Feature(f"spend_minor_{days}", "integer", definition, phrase, low=None, inputs_of=inputs_of)


def paid(days: int) -> Feature:
    """What was paid within *days*, whatever was paid back since: what an average or a share of purchases is taken of."""
    definition = counted(baskets, lambda rows, at: rows.amount_minor.sum(where=at.within(rows, days)).cast("int64"))
    return Feature(f"paid_minor_{days}", "integer", definition)


def lines_bought(days: int, phrase: str, inputs_of: tuple[str, ...] = LEAVING) -> Feature:
    """How many lines within *days*."""
    definition = counted(baskets, lambda rows, at: rows["lines"].sum(where=at.within(rows, days)).cast("int64"))
    return Feature(f"lines_{days}", "integer", definition, phrase, inputs_of=inputs_of)


# --- what every domain has: eligibility, baselines and reports ask for these by name

RECENCY = Feature(
    "recency_days", "integer", Measure(baskets, lambda rows, at: at.days_since(rows.local_date.max())), "last visit {:.0f} days ago",
    direction=1, inputs_of=LEAVING_AND_OFFERS,
)  # fmt: skip
TENURE = Feature(
    "tenure_days", "integer", Measure(baskets, lambda rows, at: at.days_since(rows.local_date.min())), "known for {:.0f} days",
    inputs_of=LEAVING_AND_OFFERS, is_age=True,
)  # fmt: skip
FAVOURITE_CATEGORY = Feature(
    "favourite_category", "text", Measure(most_spent_on, lambda rows, at: rows.category.max()), low=None,
)  # fmt: skip
VISIT_DAYS_TOTAL = Feature("visit_days_total", "integer", counted(baskets, lambda rows, at: rows.local_date.nunique()))


def _gap_mean(rows: ir.Table) -> ir.NumericValue:
    return rows.gap.sum().cast("float64") / rows.count().cast("float64")


def _gap_spread(rows: ir.Table, at: Moment) -> ir.Value:
    variance = (rows.gap * rows.gap).sum().cast("float64") / rows.count().cast("float64") - _gap_mean(rows) * _gap_mean(rows)
    return ibis.greatest(variance, 0.0).sqrt()


RHYTHM = (
    Feature(
        "gap_mean_days", "float", Measure(gaps, lambda rows, at: _gap_mean(rows)), "usually comes every {:.1f} days", inputs_of=LEAVING
    ),
    Feature("gap_sd_days", "float", Measure(gaps, _gap_spread), "intervals between visits vary by {:.1f} days", inputs_of=LEAVING),
    Feature(
        "gap_p90_days", "float", Measure(gaps, lambda rows, at: rows.gap.quantile(0.9).cast("float64")),
        "nine of ten visits follow within {:.0f} days", inputs_of=LEAVING,
    ),
    Feature(
        "gap_max_days", "integer", Measure(gaps, lambda rows, at: rows.gap.max()), "has stayed away for {:.0f} days before",
        inputs_of=LEAVING,
    ),
    Feature(
        "gap_last_days", "integer", Measure(gaps, lambda rows, at: rows.gap.argmax(rows.local_date)),
        "the last two visits were {:.0f} days apart", inputs_of=LEAVING,
    ),
    Feature(
        "recency_over_gap_mean", "float", Derived(lambda row: ratio(row.recency_days, row.gap_mean_days)),
        "away for {:.1f} times the usual interval", inputs_of=LEAVING,
    ),
    Feature(
        "recency_over_gap_p90", "float", Derived(lambda row: ratio(row.recency_days, row.gap_p90_days)),
        "away for {:.1f} times the longest usual interval", inputs_of=LEAVING,
    ),
)  # fmt: skip
"""The days between visits: mean, spread, ninth decile, longest and last, and the present absence beside them."""

ITEM_STATISTICS = (
    Feature("recommendable", "truth", Measure(sold, lambda rows, at: rows.recommendable.fill_null(False).max())),
    Feature("buyers", "integer", Measure(sold, lambda rows, at: rows.customer_id.nunique())),
    Feature("purchases", "integer", Measure(sold, lambda rows, at: rows.count())),
    Feature("on_sale_days", "integer", Measure(sold, lambda rows, at: at.days_since(rows.local_date.min())), is_age=True),
    Feature("purchases_28", "integer", Measure(sold, lambda rows, at: rows.count(where=at.within(rows, 28)))),
    Feature("popularity", "float", Measure(sold, lambda rows, at: rows.units.sum().cast("float64") / FADED_UNITS)),
    Feature(
        "price_minor", "float",
        Measure(sold, lambda rows, at: ratio(rows.amount_minor.sum().cast("int64"), rows.count())),
    ),
)  # fmt: skip
"""How popular each sold item is, and what it costs."""
