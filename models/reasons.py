"""Why: a model's contributions in a marketer's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from iso4217 import Currency
from numpy.typing import NDArray

PHRASES: dict[str, str] = {
    "recency_days": "last visit {:.0f} days ago",
    "tenure_days": "known for {:.0f} days",
    "visit_days_7": "{:.0f} visit days in the last week",
    "visit_days_14": "{:.0f} visit days in the last 2 weeks",
    "visit_days_28": "{:.0f} visit days in the last 4 weeks",
    "visit_days_56": "{:.0f} visit days in the last 8 weeks",
    "visit_days_91": "{:.0f} visit days in the last 13 weeks",
    "visit_days_182": "{:.0f} visit days in the last half year",
    "baskets_28": "{:.0f} purchases in the last 4 weeks",
    "baskets_91": "{:.0f} purchases in the last 13 weeks",
    "baskets_182": "{:.0f} purchases in the last half year",
    "spend_minor_28": "spent {:m} in the last 4 weeks",
    "spend_minor_91": "spent {:m} in the last 13 weeks",
    "spend_minor_182": "spent {:m} in the last half year",
    "lines_28": "{:.0f} lines bought in the last 4 weeks",
    "lines_91": "{:.0f} lines bought in the last 13 weeks",
    "lines_182": "{:.0f} lines bought in the last half year",
    "gap_mean_days": "usually comes every {:.1f} days",
    "gap_sd_days": "intervals between visits vary by {:.1f} days",
    "gap_p90_days": "nine of ten visits follow within {:.0f} days",
    "gap_max_days": "has stayed away for {:.0f} days before",
    "gap_last_days": "the last two visits were {:.0f} days apart",
    "recency_over_gap_mean": "away for {:.1f} times the usual interval",
    "recency_over_gap_p90": "away for {:.1f} times the longest usual interval",
    "visit_trend": "visits at {:.0%} of the 13-week pace",
    "spend_trend": "spending at {:.0%} of the 13-week pace",
    "basket_minor_91": "an average basket of {:m}",
    "discount_minor_91": "saved {:m} in the last 13 weeks",
    "discount_share_91": "{:.0%} of the shelf price saved by discounts",
    "coupon_minor_182": "used coupons worth {:m} in half a year",
    "private_share_91": "{:.0%} own-brand lines",
    "private_lines_91": "{:.0f} own-brand lines in the last 13 weeks",
    "weekend_share_91": "{:.0%} of purchases at weekends",
    "weekend_baskets_91": "{:.0f} weekend purchases in the last 13 weeks",
    "evening_share_91": "{:.0%} of purchases in the evening",
    "evening_baskets_91": "{:.0f} evening purchases in the last 13 weeks",
    "stores_91": "{:.0f} stores visited in the last 13 weeks",
    "departments_91": "{:.0f} departments shopped in the last 13 weeks",
    "categories_91": "{:.0f} categories bought in the last 13 weeks",
    "items_91": "{:.0f} different items in the last 13 weeks",
    "messages_total": "{:.0f} campaigns received so far",
    "messages_91": "{:.0f} campaigns received in the last 13 weeks",
    "redemptions_total": "{:.0f} coupons redeemed so far",
    "redemptions_182": "{:.0f} coupons redeemed in the last half year",
    "campaigns_redeemed_broad": "used {:.0f} of the broad campaigns",
    "campaigns_redeemed_targeted": "used {:.0f} of the targeted campaigns",
    "campaigns_sent_broad": "received {:.0f} broad campaigns",
    "campaigns_sent_targeted": "received {:.0f} targeted campaigns",
    "days_since_redemption": "last coupon redeemed {:.0f} days ago",
    "affinity": "buys the promoted items (weight {:.1f})",
    "affinity_share": "{:.0%} of recent purchases are promoted items",
    "best_affinity": "buys the items of the best coupon (weight {:.1f})",
    "items_bought": "has bought {:.0f} of the promoted items",
    "purchases_of_items": "bought promoted items {:.0f} times",
    "items_offered": "{:.0f} items promoted",
    "coupons": "{:.0f} coupons in the campaign",
    "duration_days": "the campaign runs {:.0f} days",
}
YES_OR_NO: dict[str, tuple[str, str]] = {"broad": ("a targeted campaign", "a broad campaign")}
UNKNOWN: dict[str, str] = {"days_since_redemption": "never redeemed a coupon"}


def say(feature: str, value: float, currency: str) -> str:
    """One feature's value as a phrase; money is given in minor units and shown in major ones."""
    if np.isnan(value):
        return UNKNOWN.get(feature, f"{feature.replace('_', ' ')} unknown")
    if feature in YES_OR_NO:
        return YES_OR_NO[feature][value > 0]
    phrase = PHRASES.get(feature)
    if phrase is None:
        return f"{feature.replace('_', ' ')}: {value:g}"
    if "{:m}" in phrase:
        return phrase.replace("{:m}", money(value, currency))
    return phrase.format(value)


def money(minor: float, currency: str) -> str:
    """An amount of minor units as people write it, e.g. 12.50 GBP or 1250 JPY."""
    return f"{money_units(minor, currency):.{Currency(currency).exponent or 0}f} {currency}"


def money_units(minor: float, currency: str) -> float:
    """Minor units as major ones: pence as pounds."""
    return float(minor / 10 ** (Currency(currency).exponent or 0))


def strongest(
    names: Sequence[str], values: NDArray[np.float64], contributions: NDArray[np.float64], currency: str, count: int = 3
) -> list[Mapping[str, str | float]]:
    """The *count* features that moved the log-odds most, each with its phrase and whether it raised or lowered them."""
    order = np.argsort(-np.abs(contributions), kind="stable")[:count]
    return [
        {
            "feature": names[k],
            "text": say(names[k], float(values[k]), currency),
            "effect": "raises" if contributions[k] > 0 else "lowers",
            "contribution": float(contributions[k]),
        }
        for k in order
        if contributions[k] != 0.0
    ]
