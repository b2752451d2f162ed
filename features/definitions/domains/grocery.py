"""Grocery: the weekly shop, own brands, coupons of campaigns, evenings and weekends."""

from __future__ import annotations

import ibis.expr.types as ir

from features.definitions.domain import Domain, Leaving
from features.definitions.feature import Derived, Feature, Measure, Moment, counted, ratio
from features.definitions.shopping import (
    FADED_UNITS,
    FAVOURITE_CATEGORY,
    ITEM_STATISTICS,
    LEAVING,
    LEAVING_AND_OFFERS,
    RECENCY,
    RHYTHM,
    TENURE,
    VISIT_DAYS_TOTAL,
    baskets,
    campaigns,
    faded_units,
    lines_bought,
    paid,
    purchases,
    recent_lines,
    spend,
    visit_days,
)
from features.definitions.timeline import Timeline

OFFERS = ("next-best-offer",)
REDEMPTION_HALF_LIFE_DAYS = 120.0


def own_brand_lines(past: Timeline, moment: Moment) -> ir.Table:
    """What was bought of the shop's own brands in the last 91 days."""
    lines = recent_lines(past, moment)
    return lines.filter(lines.brand.isin(past.shop.private_brands))


def coupon_lines(past: Timeline, moment: Moment) -> ir.Table:
    """What was bought with a coupon, one row an item of a purchase."""
    return past.lines.filter(past.lines.coupon_minor > 0)


def planned(past: Timeline, moment: Moment) -> ir.Table:
    """Where each item is promoted at the moment."""
    context, now = past.item_context, moment.at
    return context.filter(context.valid_from <= now, context.valid_until > now)


CUSTOMER = (
    RECENCY,
    TENURE,
    FAVOURITE_CATEGORY,
    visit_days(7, "{:.0f} visit days in the last week"),
    visit_days(14, "{:.0f} visit days in the last 2 weeks"),
    visit_days(28, "{:.0f} visit days in the last 4 weeks", -1, LEAVING_AND_OFFERS),
    visit_days(56, "{:.0f} visit days in the last 8 weeks", -1),
    visit_days(91, "{:.0f} visit days in the last 13 weeks", -1, LEAVING_AND_OFFERS),
    visit_days(182, "{:.0f} visit days in the last half year", -1, LEAVING_AND_OFFERS),
    VISIT_DAYS_TOTAL,
    purchases(28, "{:.0f} purchases in the last 4 weeks"),
    purchases(91, "{:.0f} purchases in the last 13 weeks", LEAVING_AND_OFFERS),
    purchases(182, "{:.0f} purchases in the last half year", ()),
    spend(28, "spent {:m} in the last 4 weeks"),
    spend(91, "spent {:m} in the last 13 weeks"),
    spend(182, "spent {:m} in the last half year"),
    paid(28),
    paid(91),
    lines_bought(28, "{:.0f} lines bought in the last 4 weeks"),
    lines_bought(91, "{:.0f} lines bought in the last 13 weeks", LEAVING_AND_OFFERS),
    lines_bought(182, "{:.0f} lines bought in the last half year", ()),
    *RHYTHM,
    Feature(
        "visit_trend", "float", Derived(lambda row: ratio(row.visit_days_28 * 91, row.visit_days_91 * 28)),
        "visits at {:.0%} of the 13-week pace", inputs_of=LEAVING,
    ),
    Feature(
        "spend_trend", "float", Derived(lambda row: ratio(row.paid_minor_28 * 91, row.paid_minor_91 * 28)),
        "spending at {:.0%} of the 13-week pace", inputs_of=LEAVING,
    ),
    Feature(
        "basket_minor_91", "float", Derived(lambda row: ratio(row.paid_minor_91, row.baskets_91)), "an average basket of {:m}",
        inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "discount_minor_91", "integer", counted(baskets, lambda rows, at: rows.discount_minor.sum(where=at.within(rows, 91)).cast("int64")),
        "saved {:m} in the last 13 weeks",
    ),
    Feature(
        "discount_share_91", "float",
        Derived(lambda row: ratio(row.discount_minor_91, row.paid_minor_91 + row.discount_minor_91)),
        "{:.0%} of the shelf price saved by discounts", high=1.0, inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "coupon_minor_182", "integer", counted(baskets, lambda rows, at: rows.coupon_minor.sum(where=at.within(rows, 182)).cast("int64")),
        "used coupons worth {:m} in half a year", inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "coupon_lines_182", "integer", counted(coupon_lines, lambda rows, at: rows.count(where=at.within(rows, 182))),
        "{:.0f} lines bought with a coupon in half a year", inputs_of=OFFERS,
    ),
    Feature(
        "coupon_baskets_182", "integer",
        counted(baskets, lambda rows, at: rows.count(where=at.within(rows, 182) & (rows.coupon_minor > 0))),
        "{:.0f} purchases with a coupon in half a year",
    ),
    Feature(
        "coupon_share_182", "float", Derived(lambda row: ratio(row.coupon_baskets_182, row.baskets_182)),
        "a coupon in {:.0%} of purchases", high=1.0, inputs_of=OFFERS,
    ),
    Feature(
        "private_lines_91", "integer", counted(own_brand_lines, lambda rows, at: rows.count()),
        "{:.0f} own-brand lines in the last 13 weeks",
    ),
    Feature(
        "private_share_91", "float", Derived(lambda row: ratio(row.private_lines_91, row.lines_91)), "{:.0%} own-brand lines", high=1.0,
        inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "weekend_baskets_91", "integer",
        counted(baskets, lambda rows, at: rows.count(where=at.within(rows, 91) & (rows.local_date.day_of_week.index() >= 5))),
        "{:.0f} weekend purchases in the last 13 weeks",
    ),
    Feature(
        "weekend_share_91", "float", Derived(lambda row: ratio(row.weekend_baskets_91, row.baskets_91)), "{:.0%} of purchases at weekends",
        high=1.0, inputs_of=LEAVING,
    ),
    Feature(
        "evening_baskets_91", "integer", counted(baskets, lambda rows, at: rows.count(where=at.within(rows, 91) & (rows.local_hour >= 18))),
        "{:.0f} evening purchases in the last 13 weeks",
    ),
    Feature(
        "evening_share_91", "float", Derived(lambda row: ratio(row.evening_baskets_91, row.baskets_91)),
        "{:.0%} of purchases in the evening", high=1.0, inputs_of=LEAVING,
    ),
    Feature(
        "stores_91", "integer", counted(recent_lines, lambda rows, at: rows.store_id.nunique()),
        "{:.0f} stores visited in the last 13 weeks", inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "departments_91", "integer", counted(recent_lines, lambda rows, at: rows.department.nunique()),
        "{:.0f} departments shopped in the last 13 weeks", inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "categories_91", "integer", counted(recent_lines, lambda rows, at: rows.category.nunique()),
        "{:.0f} categories bought in the last 13 weeks", inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "items_91", "integer", counted(recent_lines, lambda rows, at: rows.item_id.nunique()),
        "{:.0f} different items in the last 13 weeks", inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "messages_total", "integer", counted(campaigns, lambda rows, at: rows.count(where=rows.sent)), "{:.0f} campaigns received so far",
    ),
    Feature(
        "messages_91", "integer", counted(campaigns, lambda rows, at: rows.count(where=rows.sent & at.within(rows, 91))),
        "{:.0f} campaigns received in the last 13 weeks", inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "redemptions_total", "integer", counted(campaigns, lambda rows, at: rows.count(where=rows.redeemed)),
        "{:.0f} coupons redeemed so far", inputs_of=OFFERS,
    ),
    Feature(
        "redemptions_182", "integer", counted(campaigns, lambda rows, at: rows.count(where=rows.redeemed & at.within(rows, 182))),
        "{:.0f} coupons redeemed in the last half year", inputs_of=LEAVING_AND_OFFERS,
    ),
    Feature(
        "redemptions_faded", "float",
        counted(
            campaigns,
            lambda rows, at: (
                faded_units(rows, at, REDEMPTION_HALF_LIFE_DAYS).sum(where=rows.redeemed).fill_null(0).cast("float64") / FADED_UNITS
            ),
        ),
        "{:.1f} coupons redeemed, one of 120 days ago counting half", inputs_of=OFFERS,
    ),
    Feature(
        "campaigns_redeemed_broad", "integer",
        counted(campaigns, lambda rows, at: rows.campaign_id.nunique(where=rows.redeemed & rows.broad)),
        "used {:.0f} of the broad campaigns",
    ),
    Feature(
        "campaigns_redeemed_targeted", "integer",
        counted(campaigns, lambda rows, at: rows.campaign_id.nunique(where=rows.redeemed & ~rows.broad)),
        "used {:.0f} of the targeted campaigns",
    ),
    Feature(
        "campaigns_sent_broad", "integer", counted(campaigns, lambda rows, at: rows.campaign_id.nunique(where=rows.sent & rows.broad)),
        "received {:.0f} broad campaigns",
    ),
    Feature(
        "campaigns_sent_targeted", "integer", counted(campaigns, lambda rows, at: rows.campaign_id.nunique(where=rows.sent & ~rows.broad)),
        "received {:.0f} targeted campaigns",
    ),
    Feature(
        "days_since_redemption", "integer", Measure(campaigns, lambda rows, at: at.days_since(rows.local_date.max(where=rows.redeemed))),
        "last coupon redeemed {:.0f} days ago", unknown="never redeemed a coupon", inputs_of=OFFERS,
    ),
)  # fmt: skip

ITEM = (
    *ITEM_STATISTICS,
    Feature("mailer_stores", "integer", counted(planned, lambda rows, at: rows.mailer_stores.max())),
    Feature("display_stores", "integer", counted(planned, lambda rows, at: rows.display_stores.max())),
)

DOMAIN = Domain(
    name="grocery",
    about="Shops that most customers visit every week: own brands, coupons of campaigns, many small baskets.",
    customer=CUSTOMER,
    item=ITEM,
    attributes=dict.fromkeys(("department", "category", "type", "brand", "manufacturer", "size"), "text"),
    leaving=Leaving(
        horizon_days=28,
        min_visit_days=3,
        max_recency_days=91,
        segmented_by="visit_days_91",
        segments={
            "1 to 3 visit days in 13 weeks": (0, 4),
            "4 to 7 visit days in 13 weeks": (4, 8),
            "8 to 15 visit days in 13 weeks": (8, 16),
            "16 visit days or more in 13 weeks": (16, float("inf")),
        },
        rfm=("recency_days", "baskets_182", "spend_minor_182"),
    ),
)
