"""The next-best-offer job: which campaigns will a customer answer, and with which coupon?"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

import numpy as np
import pandas as pd

from features.catalogue import Catalogue
from features.home import Home
from features.snapshots import snapshot_path
from features.store import FeatureStore
from models.next_best_offer import FEATURES, NextBestOffer, coupon_affinity, pair_rows
from models.offers import Offer, OfferBook, Worth
from training.dataset import Advance, Cuts, EmptyWindowError, Truth, days_before, moments, open_experiment
from training.metrics import (
    BINARY_MEASURES,
    bootstrap,
    calibration,
    compare_binary,
    difference,
    estimates,
    mean_average_precision,
)
from training.plots import bar_plot, calibration_plot, gain_plot
from training.run import Report, TrackedRun

TEST_DAYS = 165
"""Campaigns that start within so many days of the end of the data are judged."""
TUNING_DAYS = 75
"""Campaigns that start within so many days before those are for choosing between models."""
MIN_OPEN_DAYS = 20
"""A campaign counts once it has run so long, even if it has not ended."""
MODELS = ("past redemptions", "logistic", "lightgbm")


def main(home: Home, as_of: datetime | None = None, seed: int = 0, advance: Advance = lambda step: None) -> str:
    """Train, judge and register; returns the report. Inputs already trained on are not trained on again."""
    truth, cuts = open_experiment(home, as_of)
    run = TrackedRun(home, "next-best-offer", cuts.final, seed)
    if (standing := run.standing_report()) is not None:
        return standing
    tests_from = days_before(cuts.final, TEST_DAYS, cuts.timezone)
    # what items sold for and how well is known to the judged policy only up to the first test
    book, worth = offer_book(home, truth, tests_from)
    frame, rows = dataset(home, truth, cuts, book, advance)
    currency = truth.shop.currency
    with run.started({"test_days": TEST_DAYS, "features": len(FEATURES), "margin_rate": truth.shop.margin_rate}):
        advance("choosing")
        kind = choose(frame, rows, tests_from, worth, currency, seed)
        advance("evaluating")
        scored = evaluate(frame, rows, tests_from, cuts.final, worth, currency, seed)
        looks = run.look(sorted(set(scored["unit"])))
        report, figures = judge(scored, kind, coupon_ndcg(home, truth, book, scored), looks)
        advance("fitting the final model")
        over = (frame["valid_until"] <= cuts.final).to_numpy()
        _, latest_worth = offer_book(home, truth, cuts.final)
        model = NextBestOffer.fit(kind, rows[over], frame["label"].to_numpy(dtype=bool)[over], latest_worth, currency, seed)
        example = pd.DataFrame([{name: float(k) for k, name in enumerate(FEATURES)}])
        unit = scored.rename(columns={kind: "score"})[["customer_id", "unit", "group", "label", "score"]]
        run.finish(model, report, unit, example, model.predict(example.to_numpy(dtype=float)), figures)
    return report.text()


def offer_book(home: Home, truth: Truth, as_of: datetime) -> tuple[OfferBook, Worth]:
    """The catalogue's offers, worth what their items had brought in before *as_of*."""
    store = FeatureStore(home)
    store.apply()
    store.backfill("item_stats", moments([as_of]))
    ids = Catalogue(home).read("items")["item_id"].to_pylist()
    stats = store.historical(pd.DataFrame({"item_id": ids, "event_timestamp": as_of}), "items_v1").dropna(subset=["price_minor"])
    worth = Worth(
        stats["item_id"].tolist(),
        stats["price_minor"].to_numpy(dtype=float),
        stats["purchases"].to_numpy(dtype=float),
        truth.shop.margin_rate,
    )
    return OfferBook([Offer.from_row(row) for row in Catalogue(home).read("offers").to_pylist()], worth), worth


def dataset(home: Home, truth: Truth, cuts: Cuts, book: OfferBook, advance: Advance) -> tuple[pd.DataFrame, np.ndarray]:
    """One row a customer and campaign, as of its start; the frame says what happened, the array is the model's input."""
    campaigns = pd.DataFrame(
        {
            "campaign_id": book.campaign_ids,
            "campaign_type": book.types,
            "valid_from": pd.to_datetime(book.starts, utc=True),
            "valid_until": pd.to_datetime(
                [s + timedelta(days=float(d)) for s, d in zip(book.starts, book.duration_days, strict=True)], utc=True
            ),
        }
    )
    campaigns = campaigns[(campaigns["valid_from"] > cuts.start) & (campaigns["valid_from"] <= cuts.final - timedelta(days=MIN_OPEN_DAYS))]
    frame = truth.campaign_spine(campaigns).reset_index(drop=True)
    if frame.empty or frame["label"].nunique() < 2:
        raise EmptyWindowError(f"no campaign with both answers and silence before {cuts.final:%Y-%m-%d}: import campaigns first")
    store = FeatureStore(home)
    wanted = {m.to_pydatetime(): sorted(set(part["customer_id"])) for m, part in frame.groupby("event_timestamp")}
    store.backfill("customer_activity", dict.fromkeys(wanted), lambda n: advance("backfilling features"))
    store.backfill("customer_history", wanted, lambda n: advance("backfilling features"))
    advance("joining features")
    spine = frame[["customer_id", "event_timestamp"]].drop_duplicates()
    joined = store.historical(spine, "next_best_offer_v1").to_dict("records")
    by_key = {(row["customer_id"], row["event_timestamp"]): row for row in joined}
    rows = [
        pair_rows(book, by_key[customer, moment], moment.to_pydatetime(), [book.campaign_position(campaign)])
        for customer, moment, campaign in zip(frame["customer_id"], frame["event_timestamp"], frame["campaign_id"], strict=True)
    ]
    return frame, np.concatenate(rows)


def choose(frame: pd.DataFrame, rows: np.ndarray, tests_from: datetime, worth: Worth, currency: str, seed: int) -> str:
    """The kind of model with the better average precision on campaigns before the tests, which no report shows."""
    closed = (frame["valid_until"] <= tests_from).to_numpy()
    tuned = evaluate(
        frame[closed].reset_index(drop=True), rows[closed], tests_from - timedelta(days=TUNING_DAYS), tests_from, worth, currency, seed
    )
    labels, groups = tuned["label"].to_numpy(dtype=bool), tuned["group"].to_numpy(dtype=str)
    return max(MODELS[1:], key=lambda kind: mean_average_precision(labels, tuned[kind].to_numpy(dtype=float), groups))


def evaluate(frame: pd.DataFrame, rows: np.ndarray, start: datetime, end: datetime, worth: Worth, currency: str, seed: int) -> pd.DataFrame:
    """Every model's answers on the campaigns that start in ``[start, end)``, each fitted on those that had ended by then."""
    parts = []
    labels = frame["label"].to_numpy(dtype=bool)
    judged = frame[(frame["event_timestamp"] >= start) & (frame["event_timestamp"] < end)]
    for moment, test in judged.groupby("event_timestamp"):
        past = (frame["valid_until"] <= moment).to_numpy()
        if len(set(labels[past])) < 2:
            continue
        here = rows[test.index.to_numpy()]
        fitted = {k: NextBestOffer.fit(k, rows[past], labels[past], worth, currency, seed).predict(here) for k in MODELS[1:]}
        parts.append(
            pd.DataFrame(
                {
                    "customer_id": test["customer_id"], "unit": test["campaign_id"], "label": test["label"],
                    "group": np.where(test["campaign_type"] == "A", "A", "B and C"), "event_timestamp": moment,
                    "past redemptions": here[:, FEATURES.index("redemptions_total")], **fitted,
                }
            )
        )  # fmt: skip
    if not parts:
        raise EmptyWindowError(f"no campaign that starts from {start:%Y-%m-%d} on can be judged: none had ended before it")
    return pd.concat(parts, ignore_index=True)


def coupon_ndcg(home: Home, truth: Truth, book: OfferBook, scored: pd.DataFrame) -> str:
    """NDCG@5 of the coupon order among those who redeemed one of a B or C campaign's; popularity beside affinity."""
    redeemed = truth.redemptions().merge(
        scored[scored["group"] == "B and C"], left_on=["customer_id", "campaign_id"], right_on=["customer_id", "unit"]
    )
    gains: dict[str, list[float]] = {"popularity": [], "affinity": []}
    customers: list[str] = []
    discounts = 1 / np.log2(np.arange(2, 7))
    for moment, part in redeemed.groupby("event_timestamp"):
        table = pd.read_parquet(snapshot_path(home, "customer_history", moment.to_pydatetime())).set_index("customer_id")
        for (customer, campaign), rows in part.groupby(["customer_id", "campaign_id"]):
            offers = np.flatnonzero(book.campaign_of == book.campaign_position(campaign))
            history = table.loc[customer].to_dict() if customer in table.index else {}
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
    return (
        f"Coupon order among {len(customers)} redeemers of B and C, NDCG@5: affinity {told['affinity']}, popularity {told['popularity']}."
    )


def judge(scored: pd.DataFrame, served: str, coupons: str, looks: int) -> tuple[Report, Mapping[str, object]]:
    """The table beside its baseline, by campaign type, the lead and the pictures."""
    models = {m: (scored[m].to_numpy(dtype=float), m != "past redemptions") for m in MODELS}
    labels, groups = scored["label"].to_numpy(dtype=bool), scored["group"].to_numpy(dtype=str)
    names, values, drawn = compare_binary(scored["customer_id"].tolist(), groups, labels, models)
    found = estimates(values, drawn, names)
    kinds = sorted(set(groups))
    table = {
        m: {f"{g} {short}": f"{found[f'{m}/{k}/{g}']}" for g in kinds for short, k in (("AUC", "auc"), ("AP", "average_precision"))}
        for m in MODELS
    }
    for m in MODELS[1:]:
        for g in kinds:
            honest = calibration(labels[groups == g], models[m][0][groups == g])
            table[m][f"{g} mean predicted / observed"] = f"{models[m][0][groups == g].mean():.3f} / {labels[groups == g].mean():.3f}"
            table[m][f"{g} calibration p"] = f"{honest.p_value:.3f}"
    lead = difference(values, drawn, names, f"{served}/average_precision", "past redemptions/average_precision")
    positives = {g: int(labels[groups == g].sum()) for g in kinds}
    columns = [f"{g} {c}" for g in kinds for c in ("AUC", "AP", "mean predicted / observed", "calibration p")]
    report = Report(
        kind="next-best-offer",
        title=f"Next best offer: {len(labels)} customer-campaign pairs of {scored['unit'].nunique()} campaigns, redeemed: "
        + ", ".join(f"{count} of type {group}" for group, count in positives.items()),
        served=served,
        baseline="past redemptions",
        columns=columns,
        table=table,
        lead=lead,
        notes=[coupons, f"These campaigns were looked at {looks} times."],
        metrics={f"{m}_{k}".replace(" ", "_"): found[f"{m}/{k}"].value for m in MODELS for k in BINARY_MEASURES},
    )
    figures = {
        "calibration": calibration_plot(labels, models[served][0]),
        "gain": gain_plot(labels, {m: v for m, (v, _) in models.items()}),
        "average_precision": bar_plot("Average precision, mean of A and B/C", {m: found[f"{m}/average_precision"] for m in MODELS}),
    }
    return report, figures
