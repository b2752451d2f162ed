"""What the recommender learns from at each moment: histories, items, baskets, and what was bought next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from features.catalogue.tables import LINKS, Catalogue
from features.state.home import Home
from features.store.compute import is_spark
from features.store.feature_store import FeatureStore
from models.attributes import Attributes
from models.decision import Query
from models.recommender.config import RecommenderConfig
from models.recommender.factors import learn_factors, spoken_by
from models.recommender.neighbours import Neighbours
from models.recommender.owned import Histories
from models.recommender.ranker import Objective, Ranker, thinned
from models.recommender.recommender import Recommender
from models.recommender.shelf import STATISTICS, groups_of
from models.recommender.sources import retrieved
from models.recommender.stock import Baskets, Stock, local_favourites
from training.bootstrap import open_store
from training.dataset import MIN_HISTORY_DAYS, Advance, Cuts, Truth, days_before, moments

CHUNK = 20_000
"""How many customers' histories are read at once."""
BASKET_DAYS = 91
LOCAL_DAYS = 14
BASKETS_AT_MOST = 500_000
LESSON_STEP_DAYS = 28
LESSONS = 4
"""From how many earlier moments a ranker learns."""
LEARNERS = 3_000
"""How many customers teach at each."""
OTHERS_KEPT = 0.5
"""Which share of the candidates that were not bought is learnt from."""
FEWEST_BOUGHT = 200
"""With fewer candidates that were bought there is no ranker."""
LISTING_OF: Mapping[Objective, str] = {"any": "for_you", "new": "also_like"}


@dataclass(frozen=True)
class AtCut:
    """What is known at one moment, and what was bought in the horizon after it (empty for the final one).

    Attributes:
        stock: the items that a model of that moment knows.
        histories: of the customers, places of these items.
        breadth: what of the histories can drift.
        bought: by customer, the places of what they then bought.
    """

    cut: datetime
    stock: Stock
    histories: Histories
    breadth: pd.DataFrame
    bought: Mapping[str, NDArray[np.int32]]

    @property
    def item_ids(self) -> Sequence[str]:
        """The items that a model of that moment knows."""
        return self.stock.ids

    def query(self, customer: int, listing: str, limit: int = 10) -> Query:
        """The question that serving would have asked then."""
        row = self.histories.row(customer, self.stock.ids)
        return Query.from_row(self.histories.customers[customer], self.cut, row, limit=limit, listing=listing)


class Lessons:
    """Moments of one experiment, each read once, with the sources fitted as they would have been then."""

    def __init__(self, home: Home, truth: Truth, cuts: Cuts, service: str, config: RecommenderConfig, advance: Advance) -> None:
        self._home, self._truth, self._cuts, self._service, self._advance = home, truth, cuts, service, advance
        self._store = open_store(home)
        # what is only shown teaches nothing, and a price of today was not that of the past
        items = Catalogue(home).read("items")
        items = items.drop_columns([name for name in (*LINKS, "price_minor") if name in items.column_names])
        self._items = items.to_pandas().astype(object).where(lambda f: f.notna(), None)
        columns = self._items.drop(columns=["item_id", "recommendable"])
        everything = Attributes.of({name: columns[name].tolist() for name in columns.columns})
        # one choice for all moments: a ranker learns from several, and serves at another
        self._config = replace(config, groups=tuple(groups_of(everything, len(columns))))
        self._at: dict[datetime, AtCut] = {}
        self._rows: dict[tuple[datetime, Objective], tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]] = {}
        self._fitted: dict[datetime, Recommender] = {}
        self._spoken: dict[datetime, Neighbours] = {}
        self.settings: dict[Objective, Mapping[str, float]] = {}
        """What a tuning chose for the trees of each ranker."""

    def prepare(self, cuts: Sequence[datetime]) -> None:
        """Make the snapshots of these cuts and of all that is learnt from at each, in one pass over the log rather than one a moment."""
        wanted = {moment for cut in cuts for moment in (cut, *self.before(cut))}
        for view in ("customer_state", "item_stats"):
            self._store.backfill(view, moments(wanted), lambda n: self._advance("backfilling features"))

    def before(self, cut: datetime) -> list[datetime]:
        """The moments whose horizon had closed by *cut*, latest first."""
        oldest = days_before(self._cuts.start, -MIN_HISTORY_DAYS, self._cuts.timezone)
        if self._cuts.window_days is not None:
            oldest = max(oldest, days_before(cut, self._cuts.window_days, self._cuts.timezone))
        found: list[datetime] = []
        days = self._cuts.horizon_days
        while len(found) < LESSONS and (moment := days_before(cut, days, self._cuts.timezone)) >= oldest:
            found.append(moment)
            days += min(LESSON_STEP_DAYS, self._cuts.horizon_days)
        return found

    def at(self, cut: datetime) -> AtCut:
        """What was known at a moment, through the feature store."""
        if cut not in self._at:
            self._at[cut] = self._read(cut)
        return self._at[cut]

    def sources(self, cut: datetime) -> Recommender:
        """The sources as they would have been fitted at a moment, without a ranker."""
        if cut not in self._fitted:
            moment = self.at(cut)
            self._advance("fitting the sources")
            self._fitted[cut] = Recommender.fit(moment.histories, moment.stock, self._config, liked=self._liked(cut))
        return self._fitted[cut]

    def rankers(self, cut: datetime) -> dict[Objective, Ranker]:
        """The rankers as they would have been learnt at a moment, from moments whose horizon had closed by then; none from too little."""
        told = {objective: self.ranker(cut, objective, self.settings.get(objective, {})) for objective in LISTING_OF}
        return {objective: ranker for objective, ranker in told.items() if ranker is not None}

    def ranker(self, cut: datetime, objective: Objective, settings: Mapping[str, float]) -> Ranker | None:
        """One of them, its trees with these settings."""
        when = self.before(cut)
        parts = [self.lesson(moment, objective) for moment in when]
        if not parts or sum(int(labels.sum()) for _, labels, _ in parts) < FEWEST_BOUGHT:
            return None
        self._advance("learning to rank")
        rows, labels, groups = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Ranker.fit(rows, labels, groups, self.sources(when[0]).ranker_inputs, objective, self._config.seed, settings)

    def judged(self, cut: datetime) -> Recommender:
        """The sources to judge lists by: with all that looks lead to, where customers looked at anything."""
        return self.whole(cut) if self.at(cut).histories.recent else self.sources(cut)

    def whole(self, cut: datetime) -> Recommender:
        """The sources of a moment with everything that the other lists need."""
        moment = self.at(cut)
        lines = self._truth.lines(days_before(cut, BASKET_DAYS, self._cuts.timezone), cut)
        return Recommender.fit(moment.histories, moment.stock, self._config, baskets_of(lines, moment.stock.ids, cut), self._liked(cut))

    def _liked(self, cut: datetime) -> Neighbours | None:
        """Which items speak for which at a moment, where EASE is not what learns it."""
        if self._config.learner == "EASE":
            return None
        if cut not in self._spoken:
            moment, oldest = self.at(cut), None
            if self._cuts.window_days is not None:
                oldest = days_before(cut, self._cuts.window_days, self._cuts.timezone)
            self._advance("learning factors")
            factors = item_factors(self._home, self._store.snapshot("customer_state", cut), moment, self._config, oldest)
            self._spoken[cut] = spoken_by(factors, self._config.als.ridge, self._config.ease_neighbours)
        return self._spoken[cut]

    def lesson(self, cut: datetime, objective: Objective) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
        """What the customers of a moment teach; see ``lesson``."""
        key = (cut, objective)
        if key not in self._rows:
            moment, model = self.at(cut), self.sources(cut)
            self._advance("gathering what to learn from")
            self._rows[key] = lesson(model, moment, objective, np.random.default_rng(self._config.seed))
        return self._rows[key]

    def _read(self, cut: datetime) -> AtCut:
        self._advance("joining features")
        store, cuts = self._store, self._cuts
        for view in ("customer_state", "item_stats"):
            store.backfill(view, moments([cut]), lambda n: self._advance("backfilling features"))
        spine = pd.DataFrame({"item_id": self._items["item_id"], "event_timestamp": cut})
        stats = store.historical(spine, "items_v1").dropna(subset=["buyers"])
        stats = stats.loc[stats["recommendable"].astype(bool), ["item_id", *STATISTICS]]
        told = self._items.set_index("item_id").loc[stats["item_id"]]
        stock = Stock(
            stats["item_id"].tolist(),
            {name: stats[name].to_numpy(np.float64) for name in STATISTICS},
            {name: told[name].tolist() for name in told.columns if name != "recommendable"},
            frozenset(self._items["item_id"]),
        ).known_by(self._config.min_buyers)
        positions = {item: k for k, item in enumerate(stock.ids)}
        customers = self._truth.churn_spine([cut])[["customer_id", "event_timestamp"]]
        histories, breadth = histories_at(store, customers, self._service, positions, cuts, cut)
        after = self._truth.bought(cut, cuts.end(cut)) if cut < cuts.final else {}
        bought = {
            customer: np.array(sorted(positions[item] for item in items if item in positions), np.int32)
            for customer, items in after.items()
        }
        return AtCut(cut, stock, histories, breadth, {customer: places for customer, places in bought.items() if len(places)})


def item_factors(home: Home, states: Path, moment: AtCut, config: RecommenderConfig, oldest: datetime | None) -> NDArray[np.float32]:
    """The factors of a moment's items: by Spark from the snapshot of *states* where Spark works for the home, else in this process.

    Args:
        oldest: who did not buy since teaches nothing; None: everybody does.
    """
    if not is_spark(home):
        matrix = moment.histories.owned(len(moment.item_ids))
        matrix.data = moment.histories.strengths(moment.cut.timestamp()).astype(np.float32)
        return learn_factors(matrix, config.als, config.seed)
    from training.spark_factors import learn_spread, purchases_of

    held = purchases_of(home, states, {item: place for place, item in enumerate(moment.item_ids)}, moment.cut, oldest)
    return learn_spread(home, held, len(moment.item_ids), config.als, config.seed)


def histories_at(
    store: FeatureStore, customers: pd.DataFrame, service: str, positions: Mapping[str, int], cuts: Cuts, cut: datetime
) -> tuple[Histories, pd.DataFrame]:
    """The customers' histories at a cut, and what of them can drift; read in portions, kept as flat arrays."""
    parts, breadths = [], []
    for start in range(0, max(len(customers), 1), CHUNK):
        frame = store.historical(customers.iloc[start : start + CHUNK], service, ("history",))
        if cuts.window_days is not None:
            frame = within(frame, days_before(cut, cuts.window_days, cuts.timezone))
        parts.append(Histories.of(frame.to_dict("records"), positions))
        breadths.append(pd.concat([frame[["customer_id"]], measured_histories(frame, cut)], axis=1))
    return Histories.joined(parts), pd.concat(breadths, ignore_index=True)


def measured_histories(histories: pd.DataFrame, as_of: datetime) -> pd.DataFrame:
    """What of the histories can drift: how much each customer has bought, how broadly, and how long ago."""
    last = histories["bought_last_at"].map(lambda at: max(at, default=np.nan) if at is not None else np.nan)
    return pd.DataFrame(
        {
            "items_bought": histories["bought_item_ids"].map(len).astype(float),
            "purchases_of_items": histories["bought_counts"].map(sum).astype(float),
            "last_purchase_days": (as_of.timestamp() - last.astype(float)) / 86_400.0,
        }
    )


def within(histories: pd.DataFrame, oldest: datetime) -> pd.DataFrame:
    """The customers who bought within the window; whoever did not, teaches nothing."""
    recent = histories["bought_last_at"].map(lambda at: at is not None and max(at, default=0) >= oldest.timestamp())
    return histories[recent.to_numpy(dtype=bool)].reset_index(drop=True)


def lesson(
    model: Recommender, moment: AtCut, objective: Objective, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    """Candidates of customers at a moment, as serving would have retrieved and described them, and whether each was bought next.

    Returns:
        ``(candidates, inputs)``, ``(candidates,)`` and how many candidates each customer has.
    """
    asked = [number for number, customer in enumerate(moment.histories.customers) if customer in moment.bought]
    if len(asked) > LEARNERS:
        asked = sorted(rng.choice(asked, LEARNERS, replace=False).tolist())
    rows, labels, groups = [], [], []
    for number in asked:
        profile = model.profile(moment.query(number, LISTING_OF[objective]))
        if not profile.held.size:
            continue
        places = retrieved(profile).astype(np.int32)
        if objective == "new":
            places = places[~np.isin(places, profile.held.places)]
        hits = np.isin(places, moment.bought[moment.histories.customers[number]])
        if hits.any():
            rows.append(model.rows(profile, places))
            labels.append(hits)
            groups.append(len(places))
    if not rows:
        return np.empty((0, len(model.ranker_inputs)), np.float32), np.empty(0, bool), np.empty(0, np.int64)
    everything, hit, sizes = np.concatenate(rows), np.concatenate(labels), np.array(groups, np.int64)
    kept, sizes = thinned(hit, sizes, OTHERS_KEPT, rng)
    return everything[kept], hit[kept], sizes


def baskets_of(lines: pd.DataFrame, item_ids: Sequence[str], cut: datetime) -> Baskets:
    """The baskets of some lines, and what sold in each store in the last two weeks."""
    places = lines["item_id"].map({item: k for k, item in enumerate(item_ids)})
    lines = lines.assign(place=places)[places.notna().to_numpy()]
    lines = lines.assign(place=lines["place"].astype(np.int32))
    numbers, names = pd.factorize(lines["event_id"])
    # the latest, as many as fit
    first = max(len(names) - BASKETS_AT_MOST, 0)
    kept = numbers >= first
    shape = (len(names) - first, len(item_ids))
    together = sp.csr_matrix((np.ones(int(kept.sum()), np.float32), (numbers[kept] - first, lines["place"].to_numpy()[kept])), shape=shape)
    together.data[:] = 1.0
    lately = lines[lines["occurred_at"] >= pd.Timestamp(cut) - pd.Timedelta(days=LOCAL_DAYS)]
    there = lately[lately["store_id"].notna()]
    local = local_favourites(there["store_id"].tolist(), there["place"].to_numpy(np.int32), np.ones(len(there), np.float32))
    return Baskets(together, local)
