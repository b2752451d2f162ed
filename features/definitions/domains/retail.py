"""Retail: few, larger orders, weeks or months apart; returns; no campaigns of coupons."""

from __future__ import annotations

from features.definitions.domain import Domain, Leaving
from features.definitions.feature import Derived, Feature, counted, ratio
from features.definitions.shopping import (
    FAVOURITE_CATEGORY,
    ITEM_STATISTICS,
    LEAVING,
    RECENCY,
    RHYTHM,
    TENURE,
    VISIT_DAYS_TOTAL,
    lines_bought,
    paid,
    purchases,
    recent_lines,
    refunds,
    spend,
    visit_days,
)

CUSTOMER = (
    RECENCY,
    TENURE,
    VISIT_DAYS_TOTAL,
    FAVOURITE_CATEGORY,
    visit_days(30, "ordered on {:.0f} days of the last month", -1),
    visit_days(91, "ordered on {:.0f} days of the last 3 months", -1),
    visit_days(182, "ordered on {:.0f} days of the last half year", -1),
    purchases(91, "{:.0f} orders in the last 3 months"),
    purchases(365, "{:.0f} orders in the last year"),
    spend(91, "spent {:m} in the last 3 months, less returns", LEAVING),
    spend(365, "spent {:m} in the last year, less returns", LEAVING),
    paid(365),
    lines_bought(91, "{:.0f} lines ordered in the last 3 months"),
    lines_bought(365, "{:.0f} lines ordered in the last year"),
    *RHYTHM,
    Feature(
        "order_minor_365", "float", Derived(lambda row: ratio(row.paid_minor_365, row.baskets_365)), "an average order of {:m}",
        inputs_of=LEAVING,
    ),
    Feature(
        "refunds_182", "integer", counted(refunds, lambda rows, at: rows.count(where=at.within(rows, 182))),
        "{:.0f} returns in the last half year", inputs_of=LEAVING,
    ),
    Feature(
        "items_91", "integer", counted(recent_lines, lambda rows, at: rows.item_id.nunique()),
        "{:.0f} different items in the last 3 months", inputs_of=LEAVING,
    ),
)  # fmt: skip

DOMAIN = Domain(
    name="retail",
    events={"add_to_wishlist": ("items",), "back_in_stock_request": ("items",)},
    about="Shops whose customers order now and then: weeks or months between orders, and returns.",
    customer=CUSTOMER,
    item=ITEM_STATISTICS,
    attributes=dict.fromkeys(("department", "category", "type", "brand"), "text"),
    leaving=Leaving(
        horizon_days=56,
        min_visit_days=2,
        max_recency_days=182,
        segmented_by="visit_days_182",
        segments={
            "1 order day in half a year": (0, 2),
            "2 or 3 order days in half a year": (2, 4),
            "4 order days or more in half a year": (4, float("inf")),
        },
        rfm=("recency_days", "baskets_365", "spend_minor_365"),
    ),
)
