"""How well the coupons of a campaign are put in order: beside their popularity, among those who redeemed one."""

from __future__ import annotations

import numpy as np
import pandas as pd

from features.state.home import Home
from models.next_best_offer import coupon_affinity
from models.offers import OfferBook
from training.bootstrap import open_store
from training.dataset import Truth
from training.metrics import bootstrap, estimates


def coupon_ndcg(home: Home, truth: Truth, book: OfferBook, scored: pd.DataFrame) -> str:
    """NDCG@5 of the coupon order among those who redeemed one of a targeted campaign's; popularity beside affinity."""
    store = open_store(home)
    redeemed = truth.redemptions().merge(scored[~scored["broad"]], left_on=["customer_id", "campaign_id"], right_on=["customer_id", "unit"])
    gains: dict[str, list[float]] = {"popularity": [], "affinity": []}
    customers: list[str] = []
    discounts = 1 / np.log2(np.arange(2, 7))
    for moment, part in redeemed.groupby("event_timestamp"):
        spine = part[["customer_id", "event_timestamp"]].drop_duplicates()
        histories = store.historical(spine, "state_v1").set_index("customer_id")
        for (customer, campaign), rows in part.groupby(["customer_id", "campaign_id"], sort=False):
            offers = np.flatnonzero(book.campaign_of == book.campaign_position(campaign))
            history = histories.loc[customer].to_dict()
            hit = np.isin([book.offer_ids[o] for o in offers], rows["offer_id"].unique())
            customers.append(str(customer))
            for name, scores in (("popularity", book.popularity), ("affinity", coupon_affinity(book, history, moment.to_pydatetime()))):
                order = np.argsort(-scores[offers], kind="stable")[:5]
                gains[name].append(float(hit[order] @ discounts[: len(order)] / discounts[: min(5, int(hit.sum()))].sum()))
    if not customers:
        return "No redeemed coupon of a targeted campaign to judge the coupon order on."
    table_of = np.array([gains["popularity"], gains["affinity"]])
    values, drawn = bootstrap(customers, lambda w: np.asarray(np.average(table_of, axis=1, weights=w)))
    told = estimates(values, drawn, ["popularity", "affinity"])
    better = f"affinity {told['affinity']}, popularity {told['popularity']}"
    return f"Coupon order among {len(customers)} redeemers of targeted campaigns, NDCG@5: {better}."
