"""The next-best-offer job: which campaigns will a customer answer, and with which coupon?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd

from features.catalogue.offers import offers_in_force
from features.catalogue.tables import Catalogue
from features.state.home import Home
from models.inputs import Input
from models.next_best_offer import KIND, PAIR_INPUTS, TREES, NextBestOffer, pair_rows
from models.offers import Offer, OfferBook, Worth
from models.probability import Boosted, shifted
from models.reports import ModelReport
from training.bootstrap import open_store
from training.coupons import coupon_ndcg
from training.dataset import (
    HORIZON_DAYS,
    Advance,
    Cuts,
    EmptyWindowError,
    NothingToLearnError,
    Plan,
    Truth,
    days_before,
    inputs_of,
    moments,
    open_experiment,
)
from training.decided import Decided, read_decided
from training.drift import asked_at
from training.evaluation import BINARY_COLUMNS
from training.metrics import (
    BINARY_MEASURES,
    calibration,
    compare_binary,
    difference,
    estimates,
    mean_average_precision,
)
from training.plots import bar_plot, calibration_plot, gain_plot
from training.report import Outcome, Report
from training.run import TrackedRun
from training.shift import lasting_shift, miss
from training.tuning import Settings, of_probabilities, tuned, tuning_note

TEST_DAYS = 165
"""Campaigns that start within so many days of the end of the data are judged."""
TUNING_DAYS = 75
"""Campaigns that start within so many days before those are for choosing between models."""
MIN_OPEN_DAYS = 20
"""A campaign counts once it has run so long, even if it has not ended."""
NO_CAMPAIGNS = (
    "{shop} has sent no campaign that its catalogue knows, so there is nothing to learn offers from: import message_sent and "
    "offer_redeem events, and load the offers (python -m features catalogue offers FILE)"
)
PAST = "redemptions_total"
"""The feature that the baseline is."""
MODELS = ("past redemptions", "logistic", "lightgbm")


Rows = Mapping[tuple[str, pd.Timestamp], Mapping[str, Any]]
"""The feature row of each customer at each moment."""


class NoCampaignsError(NothingToLearnError):
    """The shop has never sent a campaign: next best offer cannot be learnt, everything else can."""


def main(home: Home, model: str, plan: Plan, advance: Advance = lambda step: None) -> ModelReport:
    """Train, judge and register; returns the report. Inputs already trained on are not trained on again.

    The label looks as far ahead as its campaign runs; the plan's horizon does not apply.
    """
    # the cuts only bound the data: a label looks as far ahead as its campaign runs
    truth, cuts = open_experiment(home, model, replace(plan, horizon_days=HORIZON_DAYS))
    if not has_campaigns(home, truth):
        raise NoCampaignsError(NO_CAMPAIGNS.format(shop=truth.shop.name))
    if not {PAST} <= {feature.name for feature in truth.domain.inputs_of(KIND.name)}:
        raise NoCampaignsError(f"the domain {truth.domain.name} declares no feature {PAST} as an input of {KIND.name}: it has no offers")
    run = TrackedRun(home, model, cuts, plan)
    if (standing := run.standing_report()) is not None:
        return standing
    tests_from = days_before(cuts.final, TEST_DAYS, cuts.timezone)
    # what items sold for and how well is known to the judged policy only up to the first test
    book, worth = offer_book(home, truth, tests_from)
    customer = inputs_of(truth.domain, run.settings.kind.name)
    decided = read_decided(home, book, customer, cuts.final)
    trainer = OfferTrainer(customer, worth, truth.shop.currency, truth.shop.broad_campaign_types, plan.seed, decided)
    names = [each.name for each in trainer.inputs]
    params = {"test_days": TEST_DAYS, "features": len(names), "margin_rate": truth.shop.margin_rate}
    with run.started({**params, "decided_offers": len(decided.labels), "decided_redeemed": int(decided.labels.sum())}):
        advance("checking the log")
        run.check_log(truth)
        frame, rows, by_key = dataset(home, truth, cuts, book, trainer.customer, run.settings.feature_service, advance)
        reference, rate = run.champion_reference()
        table = pd.concat([frame.drop(columns="broad"), pd.DataFrame(rows, columns=names)], axis=1)
        judged = frame["event_timestamp"] >= tests_from
        run.gate.look_at_rows(table, ["customer_id", "campaign_id"], trainer.inputs)
        run.gate.look_at_labels(frame.loc[judged, "label"].to_numpy(dtype=bool), rate)
        run.gate.look_at_drift(table.loc[judged, names], reference, trainer.inputs)
        run.check_data()
        run.trained_on(table, "campaigns sent", "label")
        if plan.trials:
            advance(f"tuning, {plan.trials} trials")
            trainer = replace(trainer, settings=tune(frame, rows, tests_from, trainer, run, plan.trials))
        advance("choosing")
        kind = choose(frame, rows, tests_from, trainer, run)
        advance("evaluating")
        scored = evaluate(frame, rows, tests_from, cuts.final, trainer)
        looks = run.look(sorted(set(scored["unit"])))
        report, figures = judge(scored, kind, run, coupon_ndcg(home, truth, book, scored), looks)
        tuning = [tuning_note("lightgbm", trainer.settings, plan.trials)] if plan.trials else []
        report = replace(report, notes=[*report.notes, decided.told(), *tuning])
        advance("fitting the final model")
        over = (frame["valid_until"] <= cuts.final).to_numpy()
        _, latest_worth = offer_book(home, truth, cuts.final)
        moved = shifts(frame, foretold(frame, rows, kind, cuts.final, trainer), cuts.final)
        labels = frame["label"].to_numpy(dtype=bool)[over]
        fitted = replace(trainer, worth=latest_worth).fit(kind, rows[over], labels, cuts.final, moved)
        example = pd.DataFrame([{name: float(k) for k, name in enumerate(names)}])
        starts = frame.drop_duplicates("campaign_id").set_index("campaign_id")["event_timestamp"]
        outcome = Outcome(
            model=fitted,
            report=report,
            evaluation=scored.rename(columns={kind: "score"})[list(BINARY_COLUMNS)],
            units={unit: starts[unit].to_pydatetime() for unit in sorted(set(scored["unit"]))},
            rescore=lambda rival, wanted: rescored(frame, rows, (book, by_key), trainer, rival, wanted),
            example=example,
            output=fitted.predict(example.to_numpy(dtype=float)),
            plots=figures,
            reference=table.loc[judged, names],
            asked=asked_at(home, truth.timeline.before(cuts.final), cuts.final)[[each.name for each in trainer.customer]],
            settings=trainer.settings,
        )
        return run.finish(outcome)


@dataclass(frozen=True)
class OfferTrainer:
    """Fits the candidates, all alike but for their kind."""

    customer: tuple[Input, ...]
    worth: Worth
    currency: str
    broad_types: tuple[str, ...]
    seed: int
    decided: Decided
    settings: Settings = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs of the model: the customer's, then the pair's."""
        return (*self.customer, *PAIR_INPUTS)

    def column(self, rows: np.ndarray, name: str) -> np.ndarray:
        """One input of all rows."""
        return np.asarray(rows[:, [each.name for each in self.inputs].index(name)])

    def fit(
        self, kind: str, rows: np.ndarray, labels: np.ndarray, moment: datetime, moved: tuple[float, float] = (0.0, 0.0)
    ) -> NextBestOffer:
        """A model of that kind, of campaigns and of what was decided and had shown what came of it by *moment*, whose answers for targeted
        and for broad campaigns are *moved* by so much.
        """
        rows, labels = self.decided.joined_to(rows, labels, moment)
        return NextBestOffer.fit(
            kind, rows, labels, self.customer, self.worth, self.currency, self.broad_types, self.seed, moved, self.settings
        )  # fmt: skip


def has_campaigns(home: Home, truth: Truth) -> bool:
    """Whether the shop has ever sent one that its catalogue knows."""
    return len(Catalogue(home).read("offers")) > 0 and bool(truth.sent_campaigns())


def offer_book(home: Home, truth: Truth, as_of: datetime) -> tuple[OfferBook, Worth]:
    """The catalogue's offers, worth what their items had brought in before *as_of*."""
    store = open_store(home)
    store.backfill("item_stats", moments([as_of]))
    ids = Catalogue(home).read("items")["item_id"].to_pylist()
    stats = store.historical(pd.DataFrame({"item_id": ids, "event_timestamp": as_of}), "items_v1").dropna(subset=["price_minor"])
    worth = Worth(
        stats["item_id"].tolist(),
        stats["price_minor"].to_numpy(dtype=float),
        stats["purchases"].to_numpy(dtype=float),
        truth.shop.margin_rate,
    )
    offers = [Offer.from_row(row) for row in offers_in_force(home)]
    return OfferBook(offers, worth, truth.shop.broad_campaign_types), worth


def dataset(
    home: Home, truth: Truth, cuts: Cuts, book: OfferBook, customer: Sequence[Input], service: str, advance: Advance
) -> tuple[pd.DataFrame, np.ndarray, Rows]:
    """One row a customer and campaign, as of its start: what happened, the model's input, and the customers' features by moment."""
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
    store = open_store(home)
    wanted = {m.to_pydatetime(): sorted(set(part["customer_id"])) for m, part in frame.groupby("event_timestamp")}
    store.backfill("customer_activity", dict.fromkeys(wanted), lambda n: advance("backfilling features"))
    store.backfill("customer_state", wanted, lambda n: advance("backfilling features"))
    advance("joining features")
    spine = frame[["customer_id", "event_timestamp"]].drop_duplicates()
    joined = store.historical(spine, service).to_dict("records")
    by_key = {(row["customer_id"], row["event_timestamp"]): row for row in joined}
    rows = [
        pair_rows(book, customer, PAIR_INPUTS, by_key[who, moment], moment.to_pydatetime(), [book.campaign_position(campaign)])
        for who, moment, campaign in zip(frame["customer_id"], frame["event_timestamp"], frame["campaign_id"], strict=True)
    ]
    frame["broad"] = frame["campaign_type"].isin(truth.shop.broad_campaign_types)
    return frame, np.concatenate(rows), by_key


def choose(frame: pd.DataFrame, rows: np.ndarray, tests_from: datetime, trainer: OfferTrainer, run: TrackedRun) -> str:
    """The kind of model with the better average precision on campaigns before the tests, which no report shows.

    There are two: a search would bring nothing.
    """
    found = precisions_before(frame, rows, tests_from, trainer, MODELS[1:])

    def tried(kind: str) -> float:
        return run.trial(kind, {"model": kind, "before": f"{tests_from:%Y-%m-%d}"}, "average_precision", found[kind])

    return max(found, key=tried)


def tune(frame: pd.DataFrame, rows: np.ndarray, tests_from: datetime, trainer: OfferTrainer, run: TrackedRun, trials: int) -> Settings:
    """The settings of the trees with the best average precision on campaigns before the tests."""

    def score(settings: Settings) -> float:
        return precisions_before(frame, rows, tests_from, replace(trainer, settings=settings), ["lightgbm"])["lightgbm"]

    return tuned(run, "lightgbm", of_probabilities, {**Boosted.DEFAULTS, **TREES}, "average_precision", score, trials, trainer.seed)


def precisions_before(
    frame: pd.DataFrame, rows: np.ndarray, tests_from: datetime, trainer: OfferTrainer, kinds: Sequence[str]
) -> dict[str, float]:
    """The average precision of each kind of model on the campaigns before the tests."""
    closed = (frame["valid_until"] <= tests_from).to_numpy()
    before = frame[closed].reset_index(drop=True)
    scored = evaluate(before, rows[closed], tests_from - timedelta(days=TUNING_DAYS), tests_from, trainer, kinds)
    labels, groups = scored["label"].to_numpy(dtype=bool), scored["group"].to_numpy(dtype=str)
    return {kind: mean_average_precision(labels, scored[kind].to_numpy(dtype=float), groups) for kind in kinds}


def foretold(frame: pd.DataFrame, rows: np.ndarray, kind: str, end: datetime, trainer: OfferTrainer) -> np.ndarray:
    """What a model of that kind, fitted on the campaigns that had ended by then, says of each one that starts before *end*; else NaN."""
    labels, found = frame["label"].to_numpy(dtype=bool), np.full(len(frame), np.nan)
    for moment, asked in frame[frame["event_timestamp"] < end].groupby("event_timestamp"):
        past = (frame["valid_until"] <= moment).to_numpy()
        if len(set(labels[past])) == 2:
            here = asked.index.to_numpy()
            found[here] = trainer.fit(kind, rows[past], labels[past], moment.to_pydatetime()).predict(rows[here])
    return found


def shifts(frame: pd.DataFrame, told: np.ndarray, moment: datetime) -> tuple[float, float]:
    """By how much to move the log-odds of targeted and of broad campaigns, going by how far those that had ended were missed."""
    misses: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _, ended in frame[(frame["valid_until"] <= moment) & ~np.isnan(told)].groupby("campaign_id"):
        misses[bool(ended["broad"].iloc[0])].append(miss(ended["label"].to_numpy(dtype=bool), told[ended.index.to_numpy()]))
    return lasting_shift(misses[False]), lasting_shift(misses[True])


def evaluate(
    frame: pd.DataFrame, rows: np.ndarray, start: datetime, end: datetime, trainer: OfferTrainer, kinds: Sequence[str] = MODELS[1:]
) -> pd.DataFrame:
    """Every model's answers on the campaigns that start in ``[start, end)``, each fitted and moved by those that had ended by then."""
    parts = []
    told = {kind: foretold(frame, rows, kind, end, trainer) for kind in kinds}
    judged = frame[(frame["event_timestamp"] >= start) & (frame["event_timestamp"] < end)]
    for moment, test in judged.groupby("event_timestamp"):
        place = test.index.to_numpy()
        if np.isnan(told[kinds[0]][place]).any():
            continue
        here, broad = rows[place], test["broad"].to_numpy(dtype=bool)
        answers = {}
        for kind, of_all in told.items():
            targeted_by, broad_by = shifts(frame, of_all, moment)
            answers[kind] = shifted(of_all[place], np.where(broad, broad_by, targeted_by))
        over = (test["valid_until"] <= end).to_numpy()
        parts.append(_asked(test, here, frame, trainer).assign(over=over, **{"past redemptions": trainer.column(here, PAST)}, **answers))
    if not parts:
        raise EmptyWindowError(
            f"no campaign that starts from {start:%Y-%m-%d} on can be judged: none had ended before it, so choose a later --as-of"
        )
    return pd.concat(parts, ignore_index=True)


def rescored(
    frame: pd.DataFrame,
    rows: np.ndarray,
    known: tuple[OfferBook, Rows],
    trainer: OfferTrainer,
    rival: NextBestOffer,
    wanted: Mapping[str, datetime],
) -> pd.DataFrame:
    """The evaluation of a model as it stands, on campaigns after all that it learnt from; it may take other features."""
    book, by_key = known
    test = frame[frame["campaign_id"].isin(wanted)]
    theirs = [
        pair_rows(book, rival.customer, rival.pair, by_key[who, moment], moment.to_pydatetime(), [book.campaign_position(campaign)])
        for who, moment, campaign in zip(test["customer_id"], test["event_timestamp"], test["campaign_id"], strict=True)
    ]
    asked = _asked(test, rows[test.index.to_numpy()], frame, trainer)
    return asked.assign(score=rival.predict(np.concatenate(theirs)))[list(BINARY_COLUMNS)]


def _asked(test: pd.DataFrame, rows: np.ndarray, frame: pd.DataFrame, trainer: OfferTrainer) -> pd.DataFrame:
    """Whom a campaign was sent to, and who used it."""
    broad = trainer.column(rows, "broad") > 0
    names = {flag: " and ".join(sorted(set(frame.loc[frame["broad"] == flag, "campaign_type"]))) for flag in (True, False)}
    asked = {
        "customer_id": test["customer_id"],
        "unit": test["campaign_id"],
        "label": test["label"].astype(bool),
        "group": np.where(broad, names[True], names[False]),
        "segment": np.where(trainer.column(rows, PAST) > 0, "has redeemed before", "never redeemed before"),
        "event_timestamp": test["event_timestamp"],
        "broad": broad,
    }
    return pd.DataFrame(asked)


def _of_whole_runs(scored: pd.DataFrame, served: str) -> list[str]:
    """How honest the probabilities are where a campaign had ended: they are of a whole run, and what is cut off is redeemed later."""
    told = []
    for group, part in scored[scored["over"]].groupby("group"):
        labels, foretold_here = part["label"].to_numpy(dtype=bool), part[served].to_numpy(dtype=float)
        if len(set(labels)) == 2:
            p_value = calibration(labels, foretold_here).p_value
            told.append(f"{group} {foretold_here.mean():.3f} / {labels.mean():.3f} (calibration p {p_value:.3f})")
    if not told or scored["over"].all():
        return []
    return [f"Of the campaigns that had ended alone, mean predicted / observed: {'; '.join(told)}."]


def judge(scored: pd.DataFrame, served: str, run: TrackedRun, coupons: str, looks: int) -> tuple[Report, Mapping[str, object]]:
    """The table beside its baseline, by campaign type, the lead and the pictures."""
    metric = run.settings.promotion.metric
    models = {m: (scored[m].to_numpy(dtype=float), m != "past redemptions") for m in MODELS}
    labels, groups = scored["label"].to_numpy(dtype=bool), scored["group"].to_numpy(dtype=str)
    names, values, drawn = compare_binary(scored["customer_id"].tolist(), groups, labels, models)
    found = estimates(values, drawn, names)
    kinds = sorted(set(groups.tolist()))
    table = {
        m: {f"{g} {short}": f"{found[f'{m}/{k}/{g}']}" for g in kinds for short, k in (("AUC", "auc"), ("AP", "average_precision"))}
        for m in MODELS
    }
    for m in MODELS[1:]:
        for g in kinds:
            honest = calibration(labels[groups == g], models[m][0][groups == g])
            table[m][f"{g} mean predicted / observed"] = f"{models[m][0][groups == g].mean():.3f} / {labels[groups == g].mean():.3f}"
            table[m][f"{g} calibration p"] = f"{honest.p_value:.3f}"
    lead = difference(values, drawn, names, f"{served}/{metric}", f"past redemptions/{metric}")
    positives = {g: int(labels[groups == g].sum()) for g in kinds}
    columns = [f"{g} {c}" for g in kinds for c in ("AUC", "AP", "mean predicted / observed", "calibration p")]
    report = Report(
        kind=run.model,
        title=f"Next best offer: {len(labels)} customer-campaign pairs of {scored['unit'].nunique()} campaigns, redeemed: "
        + ", ".join(f"{count} of type {group}" for group, count in positives.items()),
        served=served,
        baseline="past redemptions",
        columns=columns,
        table=table,
        lead=lead,
        rivals={m: difference(values, drawn, names, f"{served}/{metric}", f"{m}/{metric}") for m in MODELS if m != served},
        notes=[coupons, *_of_whole_runs(scored, served), f"These campaigns were looked at {looks} times."],
        metrics={f"{m}_{k}".replace(" ", "_"): found[f"{m}/{k}"].value for m in MODELS for k in BINARY_MEASURES},
        quality={m: {name.removeprefix(f"{m}/"): each for name, each in found.items() if name.startswith(f"{m}/")} for m in MODELS},
        groups=kinds,
        limits=[
            "a probability is for a campaign as a whole; the coupon within it is chosen by affinity",
            "the recipients were chosen by the retailer: what a campaign causes cannot be read from it",
        ],
    )
    figures = {
        "calibration": calibration_plot(labels, models[served][0]),
        "gain": gain_plot(labels, {m: v for m, (v, _) in models.items()}),
        "average_precision": bar_plot(
            "Average precision, mean of the campaign groups", {m: found[f"{m}/average_precision"] for m in MODELS}
        ),
    }
    return report, figures
