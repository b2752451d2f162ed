"""Every windowed feature, once: Ibis expressions ``f(timeline, as_of) -> table``, one row an entity.

Windows are half-open ``[as_of - w days, as_of)``. Money is in minor units, durations in days of the shop's own calendar.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

import ibis
import ibis.expr.types as ir

from features.definitions.timeline import Timeline

WINDOWS = (7, 14, 28, 56, 91, 182)
POPULARITY_HALF_LIFE_DAYS = 7.0
POPULARITY_UNITS = 2.0**32
"""Into how many parts a purchase's weight is divided; what is left of one after 32 half-lives is nothing."""
Definition = Callable[[Timeline, datetime], ir.Table]


def customer_activity(timeline: Timeline, as_of: datetime) -> ir.Table:
    """How often, how much, how broadly and how regularly each customer has bought, up to *as_of*."""
    past = timeline.before(as_of)
    today = as_of.astimezone(ZoneInfo(timeline.shop.timezone)).date()
    customers = past.events.filter(past.events.customer_id.notnull()).select("customer_id").distinct()
    table = customers
    for part in (_volume(past, as_of, today), _rhythm(past, today), _breadth(past, as_of), _messages(past, as_of, today)):
        table = table.left_join(part, "customer_id").drop("customer_id_right")
    counts = {c: table[c].fill_null(0) for c in table.columns if c.startswith(_COUNTS)}
    table = table.mutate(**counts)
    return table.mutate(
        visit_trend=_ratio(table.visit_days_28 * 91, table.visit_days_91 * 28),
        spend_trend=_ratio(table.spend_minor_28 * 91, table.spend_minor_91 * 28),
        basket_minor_91=_ratio(table.spend_minor_91, table.baskets_91),
        recency_over_gap_mean=_ratio(table.recency_days, table.gap_mean_days),
        recency_over_gap_p90=_ratio(table.recency_days, table.gap_p90_days),
        discount_share_91=_ratio(table.discount_minor_91, table.spend_minor_91 + table.discount_minor_91),
        private_share_91=_ratio(table.private_lines_91, table.lines_91),
        weekend_share_91=_ratio(table.weekend_baskets_91, table.baskets_91),
        evening_share_91=_ratio(table.evening_baskets_91, table.baskets_91),
    )


_COUNTS = (
    "visit_days_", "baskets_", "spend_minor_", "lines_", "discount_minor_", "coupon_minor_", "weekend_baskets_",
    "evening_baskets_", "stores_", "departments_", "categories_", "items_", "private_lines_", "messages_", "redemptions_",
    "campaigns_",
)  # fmt: skip


def _since(table: ir.Table, as_of: datetime, days: int) -> ir.BooleanValue:
    return table.occurred_at >= ibis.timestamp(as_of - timedelta(days=days))


def _ratio(numerator: ir.NumericValue, denominator: ir.NumericValue) -> ir.NumericValue:
    """Null where the denominator is zero: an unknown share is not a share of nothing."""
    return numerator.cast("float64") / denominator.cast("float64").nullif(0.0)


def _volume(past: Timeline, as_of: datetime, today: date) -> ir.Table:
    baskets = past.baskets
    in_91 = _since(baskets, as_of, 91)
    measures: dict[str, ir.Value] = {
        "tenure_days": ibis.literal(today).delta(baskets.local_date.min(), unit="day").cast("int64"),
        "recency_days": ibis.literal(today).delta(baskets.local_date.max(), unit="day").cast("int64"),
        "visit_days_total": baskets.local_date.nunique(),
        "discount_minor_91": baskets.discount_minor.sum(where=in_91),
        "coupon_minor_182": baskets.coupon_minor.sum(where=_since(baskets, as_of, 182)),
        "weekend_baskets_91": baskets.count(where=in_91 & (baskets.local_date.day_of_week.index() >= 5)),
        "evening_baskets_91": baskets.count(where=in_91 & (baskets.local_hour >= 18)),
    }
    for days in WINDOWS:
        within = _since(baskets, as_of, days)
        measures[f"visit_days_{days}"] = baskets.local_date.nunique(where=within)
        if days in (28, 91, 182):
            measures[f"baskets_{days}"] = baskets.count(where=within)
            measures[f"spend_minor_{days}"] = baskets.amount_minor.sum(where=within).cast("int64")
            measures[f"lines_{days}"] = baskets["lines"].sum(where=within).cast("int64")
    table = baskets.group_by("customer_id").aggregate(**measures)
    return table.mutate(discount_minor_91=table.discount_minor_91.cast("int64"), coupon_minor_182=table.coupon_minor_182.cast("int64"))


def _rhythm(past: Timeline, today: date) -> ir.Table:
    """The days between a customer's visit days: mean, spread, ninth decile, and the last gap."""
    days = past.baskets.select("customer_id", "local_date").distinct()
    previous = days.local_date.lag().over(ibis.window(group_by="customer_id", order_by="local_date"))
    gaps = days.mutate(previous=previous)
    gaps = gaps.filter(gaps.previous.notnull())
    gaps = gaps.mutate(gap=gaps.local_date.delta(gaps.previous, unit="day").cast("int64"))
    measured = gaps.group_by("customer_id").aggregate(
        gaps=gaps.count(),
        # the squares stay integers, so the spread is the same whichever thread adds first
        total=gaps.gap.sum(),
        squares=(gaps.gap * gaps.gap).sum(),
        gap_p90_days=gaps.gap.quantile(0.9),
        gap_max_days=gaps.gap.max(),
        gap_last_days=gaps.gap.argmax(gaps.local_date),
    )
    mean = measured.total.cast("float64") / measured.gaps.cast("float64")
    variance = measured.squares.cast("float64") / measured.gaps.cast("float64") - mean * mean
    return measured.select(
        "customer_id",
        gap_mean_days=mean,
        gap_sd_days=ibis.greatest(variance, 0.0).sqrt(),
        gap_p90_days=measured.gap_p90_days.cast("float64"),
        gap_max_days=measured.gap_max_days,
        gap_last_days=measured.gap_last_days,
    )


def _breadth(past: Timeline, as_of: datetime) -> ir.Table:
    lines = past.lines
    recent = lines.filter(_since(lines, as_of, 91))
    return recent.group_by("customer_id").aggregate(
        stores_91=recent.store_id.nunique(),
        departments_91=recent.department.nunique(),
        categories_91=recent.category.nunique(),
        items_91=recent.item_id.nunique(),
        private_lines_91=recent.count(where=recent.brand.isin(past.shop.private_brands)),
    )


def _messages(past: Timeline, as_of: datetime, today: date) -> ir.Table:
    """What the customer was sent and redeemed, in all and by campaign type."""
    types = past.offers.select("campaign_id", "campaign_type").distinct()
    events = past.events.filter(past.events.name.isin(["message_sent", "offer_redeem"]))
    events = events.select("customer_id", "name", "occurred_at", "local_date", "campaign_id").left_join(types, "campaign_id")
    sent, redeemed = events.name == "message_sent", events.name == "offer_redeem"
    broad = events.campaign_type.isin(past.shop.broad_campaign_types)
    return events.group_by("customer_id").aggregate(
        messages_total=events.count(where=sent),
        messages_91=events.count(where=sent & _since(events, as_of, 91)),
        redemptions_total=events.count(where=redeemed),
        redemptions_182=events.count(where=redeemed & _since(events, as_of, 182)),
        campaigns_redeemed_broad=events.campaign_id.nunique(where=redeemed & broad),
        campaigns_redeemed_targeted=events.campaign_id.nunique(where=redeemed & ~broad),
        campaigns_sent_broad=events.campaign_id.nunique(where=sent & broad),
        campaigns_sent_targeted=events.campaign_id.nunique(where=sent & ~broad),
        days_since_redemption=ibis.literal(today).delta(events.local_date.max(where=redeemed), unit="day").cast("int64"),
    )


def item_stats(timeline: Timeline, as_of: datetime) -> ir.Table:
    """How popular each sold item is, what it costs, and in how many stores it is promoted at *as_of*."""
    past = timeline.before(as_of)
    lines = past.lines.filter(past.lines.quantity > 0)
    age_seconds = ibis.timestamp(as_of).epoch_seconds() - lines.occurred_at.epoch_seconds()
    weight = ibis.literal(2.0) ** (age_seconds.cast("float64") / (-86_400.0 * POPULARITY_HALF_LIFE_DAYS))
    # whole numbers of a fine unit, so that the sum is the same whichever thread adds first
    units = (weight * POPULARITY_UNITS).round().cast("int64")
    stats = lines.group_by("item_id").aggregate(
        recommendable=lines.recommendable.fill_null(False).max(),
        households=lines.customer_id.nunique(),
        purchases_28=lines.count(where=_since(lines, as_of, 28)),
        popularity=units.sum().cast("float64") / POPULARITY_UNITS,
        amount_minor=lines.amount_minor.sum().cast("int64"),
        purchases=lines.count(),
    )
    moment = ibis.timestamp(as_of)
    context = timeline.item_context.filter(timeline.item_context.valid_from <= moment, timeline.item_context.valid_until > moment).select(
        "item_id", "mailer_stores", "display_stores"
    )
    table = stats.left_join(context, "item_id").drop("item_id_right")
    return table.mutate(
        price_minor=_ratio(table.amount_minor, table.purchases),
        mailer_stores=table.mailer_stores.fill_null(0),
        display_stores=table.display_stores.fill_null(0),
    ).drop("amount_minor")


DEFINITIONS: dict[str, Definition] = {"customer_activity": customer_activity, "item_stats": item_stats}
"""Feature view name to the expression that computes it."""
