"""The recommender: sources retrieve some hundred candidates by key, a ranker puts them in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from models.artifact import DamagedArtifactError, read_arrays, read_ids, seal, verify, write_arrays, write_ids
from models.attributes import Attributes
from models.decision import NO_PERMISSION, Pipeline, Positions, Query, Scores, may_reach_her
from models.inputs import Input
from models.recommender.arrange import Arranger
from models.recommender.config import JOINED, RANKED, Mode, RecommenderConfig
from models.recommender.content import Contents, words_of
from models.recommender.ease import fit_ease
from models.recommender.kernels import Bench, Floats, Places, affinities
from models.recommender.neighbours import Neighbours, bought_together
from models.recommender.owned import Histories, just_bought, owned_of, viewed_of
from models.recommender.ranker import ITEM_INPUTS, PAIR_INPUTS, Objective, Ranker, affinity_input
from models.recommender.reasons import Told, tell
from models.recommender.recipes import RECIPES
from models.recommender.shelf import DETAILS, KIND, STATISTICS, Shelf, groups_of
from models.recommender.sources import Known, Profile, retrieved
from models.recommender.stock import Baskets, Stock, alike_by_buyers_and_words

NAME = "recommendations"
"""The kind that its artifacts are sealed as."""
SESSION_SHARE = 0.9
"""What an item just looked at adds to its score, beside 1 for the best by the ranker. The demo's data has no views: set, not tuned."""
KNOWN_WELL = 8
"""Of how many items a customer holds at least for the ranker alone to order their list: below, what sells has a part in it."""
FAMILY_SHARE = 0.5
"""What each further item of one kind keeps of what a look at that kind adds: three looks at bacon are no list of bacon."""
UP_SELL = (1.05, 2.0)
"""How much more an up-sell costs: from, to, beside the item asked about."""


class Recommender:
    """Everything needed to recommend from a catalogue, and its id map.

    Attributes:
        item_ids: catalogue position to item id, of the items that the model knows.
        shelf: what may be shown.
        rankers: by what they put in order.
        catalogue: the items that the catalogue had when the model was fitted.
    """

    def __init__(
        self,
        config: RecommenderConfig,
        shelf: Shelf,
        known: Known,
        contents: Contents,
        catalogue: frozenset[str],
        rankers: Mapping[Objective, Ranker] | None = None,
    ) -> None:
        self.config, self.shelf, self.known, self.contents, self.catalogue = config, shelf, known, contents, catalogue
        self.rankers = dict(rankers or {})
        self.item_ids = shelf.ids[: shelf.known]
        self.positions, self.attributes = shelf.positions, shelf.attributes
        self.bench = Bench(len(shelf.ids))
        self.alike, self.label_at = lru_cache(4096)(self._alike), lru_cache(65_536)(self._label_at)
        self.pipeline: Pipeline[Profile] = Pipeline(
            ids=shelf.ids,
            prepare=self.profile,
            source=retrieved,
            filters=[
                ("no longer sold", lambda profile, candidates: self.shelf.on_sale[candidates]),
                ("attribute", self._has_attributes),
                ("excluded", self._not_excluded),
                (NO_PERMISSION, lambda profile, candidates: may_reach_her(profile.query, candidates)),
                ("already seen", self._not_seen),
                ("not dearer", self._dearer),
            ],
            scorers=[("ranked", self._ordered), ("session", self._session)],
            selector=Arranger(),
            explain=self._explain,
            fallback=lambda profile: profile.fallback,
            widen=self._widen,
        )

    @classmethod
    def fit(
        cls,
        histories: Histories,
        stock: Stock,
        config: RecommenderConfig,
        baskets: Baskets | None = None,
        liked: Neighbours | None = None,
    ) -> Recommender:
        """Fit every source; the ranker is learnt later, from several such fits at earlier moments (``ranked_by``).

        Args:
            histories: of the customers, places of the items that ``stock.known_by(config.min_buyers)`` has.
            stock: the items.
            baskets: what lay together; without them the lists that need them are left empty, which spares time where only the ranked
                lists are judged.
            liked: which items speak for which, where something else than EASE has learnt it.
        """
        stock = stock.known_by(config.min_buyers)
        attributes = Attributes.of(stock.attributes)
        shelf = Shelf(stock.ids, attributes, stock.statistics, groups=config.groups or groups_of(attributes, len(stock.ids)))
        config = replace(config, groups=tuple(shelf.groups))
        count = len(stock.ids)
        owned = histories.owned(count)
        nothing = sp.csr_matrix((count, count), dtype=np.float32)
        together = similar = nothing
        contents = Contents.of([])
        if baskets is not None:
            contents = Contents.of([words_of({name: values[k] for name, values in stock.attributes.items()}) for k in range(count)])
            together = bought_together(baskets.together, config.similar_neighbours)
            similar = alike_by_buyers_and_words(owned, contents, config.similar_neighbours)
        if liked is None:
            liked = fit_ease(owned, config.ease_penalty, config.ease_neighbours, config.memory_bytes)
        known = Known(
            liked,
            Neighbours(together),
            Neighbours(similar),
            dict(baskets.local) if baskets else {},
        )
        return cls(config, shelf, known, contents, stock.catalogue)

    def ranked_by(self, rankers: Mapping[Objective, Ranker], modes: Mapping[Objective, Mode]) -> Recommender:
        """The same sources with these rankers.

        Raises:
            ValueError: a ranker reads other inputs than these sources give.
        """
        for objective, ranker in rankers.items():
            if [each.name for each in ranker.inputs] != [each.name for each in self.ranker_inputs]:
                raise ValueError(f"the ranker of {objective!r} was learnt from other inputs than these sources give")
        return Recommender(replace(self.config, modes=dict(modes)), self.shelf, self.known, self.contents, self.catalogue, rankers)

    def stocked(self, items: Mapping[str, Sequence[Any]]) -> Recommender:
        """The same model over the catalogue as it stands now; see ``Shelf.stocked``."""
        shelf = self.shelf.stocked(items, self.contents, self.catalogue)
        # what would otherwise be made by the first who asks
        self.known.liked.turned()
        _ = shelf.is_alone
        self.known.together.turned()
        return Recommender(self.config, shelf, self.known, self.contents, self.catalogue, self.rankers)

    @property
    def ranker_inputs(self) -> tuple[Input, ...]:
        """What the ranker reads, in order."""
        return (*ITEM_INPUTS, *PAIR_INPUTS, *(affinity_input(name) for name in self.shelf.groups))

    def profile(self, query: Query) -> Profile:
        """What one question knows."""
        recipe, now = RECIPES[query.listing], query.as_of.timestamp()  # type: ignore[index]
        held, viewed = owned_of(query.row, self.positions, now), viewed_of(query.row, self.positions, now)
        about, fallback = [], None
        if recipe.asks_about != "nothing":
            asked: Iterable[str] = query.item_ids
            if not asked and recipe.asks_about == "cart":
                cart = query.row.get("cart_item_ids")
                asked = () if cart is None else cart
            elif not asked and recipe.asks_about == "looks":
                asked = [self.shelf.ids[place] for place in viewed]
            about = [place for item in dict.fromkeys(asked) if (place := self.positions.get(item, -1)) >= 0]
            if not about:
                unknown = ", ".join(repr(item) for item in query.item_ids[:3])
                fallback = f"item {unknown} is not in the catalogue" if unknown else "no item to go by"
        elif recipe.order == "ranked" and not held.size and not viewed:
            fallback = "nothing is known of this customer yet"
        if fallback is not None and recipe.widens:
            fallback += ": popular items"
        return Profile(query, recipe, held, viewed, just_bought(held), about, self.known, self.shelf, self.bench, self.alike, fallback)

    def rows(self, profile: Profile, places: Places) -> Floats:
        """What the ranker reads of the items at *places* for this customer: ``(places, inputs)``."""
        shelf, mine, bench = self.shelf, profile.learnt, self.bench
        groups = len(shelf.groups)
        rows = np.empty((len(places), len(ITEM_INPUTS) + len(PAIR_INPUTS) + groups), np.float32)
        items, pairs = len(ITEM_INPUTS), len(ITEM_INPUTS) + len(PAIR_INPUTS)
        rows[:, :items] = shelf.features[places]
        reached, sums = profile.reached
        liked = bench.look_up(reached, sums, places)
        best = np.maximum((profile.reached_new if profile.recipe.objective == "new" else sums).max(axis=1, initial=1e-9), 1e-9)
        rows[:, items], rows[:, items + 2] = liked
        rows[:, items + 1], rows[:, items + 3] = liked / best[:, None]
        slot = bench.look_up(mine.places, np.arange(1, mine.size + 1, dtype=np.float32)[None, :], places)[0].astype(np.intp)
        # in row 0 what is not held
        told = np.empty((mine.size + 1, 5), np.float32)
        told[0] = 0.0, 0.0, 0.0, np.nan, np.nan
        told[1:, 0], told[1:, 1] = mine.weights, mine.weights / max(float(mine.weights.max(initial=0.0)), 1e-9)
        told[1:, 2], told[1:, 3], told[1:, 4] = mine.counts, mine.recency_days, mine.interval_days
        rows[:, items + 4 : items + 9] = told[slot]
        rows[:, items + 9] = rows[:, items + 7] / np.maximum(rows[:, items + 8], 0.5)
        rows[:, pairs:] = affinities(shelf.codes, shelf.shares, shelf.widths, mine.places, mine.weights, places)
        return rows

    def relative(self, profile: Profile, places: Places, mode: Mode) -> NDArray[np.float64]:
        """A score for each of *places* by one way of ordering, 1 the best possible."""
        if mode == RANKED:
            ranked = self.rankers[profile.recipe.objective].predict(self.rows(profile, places))
            share = min(profile.learnt.size / KNOWN_WELL, 1.0)
            if share == 1.0:
                return ranked
            # the ranker has learnt from customers of whom more is known
            sold = np.expm1(self.shelf.features[places, 0].astype(np.float64))
            mixed: NDArray[np.float64] = share * ranked + (1.0 - share) * sold / max(float(sold.max(initial=0.0)), 1e-9)
            return mixed
        popular = self.shelf.popularity_share[places].astype(np.float64)
        if mode == "popularity" or not profile.learnt.size:
            return popular
        # popularity always weighs a little, so that no place goes to whoever comes first among equals
        score = 1e-4 * popular
        reached, sums = profile.reached
        if mode in (JOINED, "personal frequency"):
            mine = profile.learnt
            weights = self.bench.look_up(mine.places, mine.weights[None, :], places)[0]
            score += weights / max(float(mine.weights.max()), 1e-9)
        if mode in (JOINED, "EASE", "EASE, lately"):
            kind = int(mode == "EASE, lately")
            liked = self.bench.look_up(reached, sums, places)[kind]
            score += np.maximum(liked, 0.0) / max(float(sums[kind].max(initial=0.0)), 1e-9) * (0.1 if mode == JOINED else 1.0)
        return score

    def predict_frame(self, frame: pd.DataFrame, params: Mapping[str, Any]) -> list[list[str]]:
        """Ten item ids a row of a frame of histories, as of ``params["as_of"]`` (Unix seconds) or each row's last purchase."""
        return [self._ten(row, params.get("as_of", 0)) for row in frame.to_dict("records")]

    def _ten(self, row: Mapping[str, Any], as_of: float) -> list[str]:
        moment = datetime.fromtimestamp(as_of or max(row["bought_last_at"], default=0), UTC)
        decision = self.pipeline.decide(Query(None, moment, row), np.random.default_rng(0))
        return [choice.id for choice in decision.choices]

    def label(self, item_id: str) -> str:
        """What to call an item in a reason."""
        place = self.positions.get(item_id)
        return item_id if place is None else self.label_at(place)

    def _label_at(self, place: int) -> str:
        name = self.attributes.text("name", place)
        if name is not None:
            return name
        kind = [text.title() for name in KIND if (text := self.attributes.text(name, place)) is not None]
        details = [text for name in DETAILS if (text := self.attributes.text(name, place)) is not None]
        if not kind:
            return self.shelf.ids[place]
        if not self.shelf.is_alone[place]:
            details.append(f"no. {self.shelf.ids[place]}")
        return ": ".join(dict.fromkeys(kind)) + (f" ({', '.join(details)})" if details else "")

    def shown(self, item_id: str) -> dict[str, Any]:
        """What an answer shows of an item beside its name: ``price_minor``, ``image_url`` and ``url``, as far as they are known."""
        place = self.positions.get(item_id)
        if place is None:
            return {}
        told = {"price_minor": self.shelf.price_of(place), **{name: column[place] for name, column in self.shelf.links.items()}}
        return {name: value for name, value in told.items() if value is not None}

    def save(self, folder: Path) -> None:
        """Write a sealed folder of JSON, npz and text files."""
        folder.mkdir(parents=True, exist_ok=True)
        write_ids(folder / "item_ids.json", self.item_ids)
        write_ids(folder / "catalogue.json", sorted(self.catalogue))
        (folder / "config.json").write_bytes(msgspec.json.encode(asdict(self.config)))
        attributes = self.attributes.first(self.shelf.known)
        (folder / "vocabularies.json").write_bytes(msgspec.json.encode(attributes.about()))
        (folder / "stores.json").write_bytes(msgspec.json.encode({store: len(places) for store, (places, _) in self.known.local.items()}))
        local = list(self.known.local.values())
        write_arrays(
            folder / "arrays.npz",
            **self.known.liked.arrays("liked"),
            **self.known.together.arrays("together"),
            **self.known.similar.arrays("similar"),
            **self.contents.arrays(),
            **{f"statistic_{name}": np.asarray(values) for name, values in self.shelf.statistics.items()},
            local_places=np.concatenate([places for places, _ in local] or [np.empty(0, np.int32)]),
            local_amounts=np.concatenate([amounts for _, amounts in local] or [np.empty(0, np.float32)]),
            **attributes.arrays(),
        )
        for ranker in self.rankers.values():
            ranker.save(folder)
        seal(folder, NAME)

    @classmethod
    def load(cls, folder: Path) -> Recommender:
        """Read what ``save`` wrote.

        Raises:
            DamagedArtifactError: a file is missing or altered.
        """
        verify(folder, NAME)
        if not (folder / "catalogue.json").exists():
            raise DamagedArtifactError(f"{folder} was made by an earlier version: train again (python -m training {NAME})")
        arrays = read_arrays(folder / "arrays.npz")
        about = msgspec.json.decode((folder / "vocabularies.json").read_bytes())
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=RecommenderConfig)
        shelf = Shelf(
            read_ids(folder / "item_ids.json"),
            Attributes.read(about, arrays),
            {name: arrays[f"statistic_{name}"] for name in STATISTICS},
            groups=config.groups,
        )
        local, start = {}, 0
        for store, size in msgspec.json.decode((folder / "stores.json").read_bytes(), type=dict[str, int]).items():
            local[store] = (arrays["local_places"][start : start + size], arrays["local_amounts"][start : start + size])
            start += size
        liked, together, similar = (Neighbours.read(arrays, name) for name in ("liked", "together", "similar"))
        known = Known(liked, together, similar, local)
        model = cls(config, shelf, known, Contents.read(arrays), frozenset(read_ids(folder / "catalogue.json")))
        objectives: tuple[Objective, ...] = ("any", "new")
        found = {objective: Ranker.load(folder, model.ranker_inputs, objective) for objective in objectives}
        model.rankers = {objective: ranker for objective, ranker in found.items() if ranker is not None}
        return model

    def _alike(self, place: int) -> tuple[Places, Floats]:
        """The items most like one: as its buyers and words tell, or by its words alone where the model does not know it."""
        if place < self.shelf.known:
            places, likeness = self.known.similar.of(place)
        else:
            places, likeness = self.contents.nearest(words_of(self.shelf.text_of(place)), self.config.similar_neighbours)
        newcomers = self.shelf.newcomers
        if newcomers is not None and place < self.shelf.known:
            new, how = newcomers.of(place)
            places, likeness = np.concatenate([places, new]), np.concatenate([likeness, how])
        return places, likeness

    def _has_attributes(self, profile: Profile, candidates: Positions) -> NDArray[np.bool_]:
        return self.attributes.keep(profile.query.include, profile.query.exclude, candidates)

    def _not_excluded(self, profile: Profile, candidates: Positions) -> NDArray[np.bool_]:
        banned = [place for item in profile.query.exclude_ids if (place := self.positions.get(item, -1)) >= 0]
        if profile.recipe.order == "near":
            banned += profile.about
        return ~np.isin(candidates, banned) if banned else np.ones(len(candidates), bool)

    def _not_seen(self, profile: Profile, candidates: Positions) -> NDArray[np.bool_]:
        """What is new to a customer is neither what they bought nor what they have just looked at; nor what was bought too lately."""
        gone: list[Any] = []
        if profile.recipe.hides_held:
            gone += [profile.held.places, np.array(list(profile.viewed), np.int32)]
        if profile.query.bought_within_days is not None:
            gone.append(profile.held.places[profile.held.recency_days < profile.query.bought_within_days])
        return ~np.isin(candidates, np.concatenate(gone)) if gone else np.ones(len(candidates), bool)

    def _dearer(self, profile: Profile, candidates: Positions) -> NDArray[np.bool_]:
        """An up-sell costs more than the item asked about, and not too much more."""
        if profile.query.listing != "up_sell" or not profile.about:
            return np.ones(len(candidates), bool)
        price, (least, most) = self.shelf.price, UP_SELL
        asked = float(np.nanmin(price[profile.about])) if np.isfinite(price[profile.about]).any() else np.nan
        kept: NDArray[np.bool_] = (price[candidates] >= least * asked) & (price[candidates] <= most * asked)
        return kept

    def _ordered(self, profile: Profile, candidates: Positions) -> NDArray[np.float64]:
        """What puts the list in order."""
        return self._by_order(profile, candidates.astype(np.int32)) * self._kept(profile, candidates)

    def _kept(self, profile: Profile, candidates: Positions) -> NDArray[np.float64]:
        """Which share of its score each candidate keeps: the less, the more popular it is and the more novelty is asked for; times what the
        caller multiplies it by.
        """
        novelty = profile.recipe.novelty if profile.query.novelty is None else profile.query.novelty
        kept: NDArray[np.float64] = 1.0 - novelty * self.shelf.popularity_share[candidates].astype(np.float64)
        for factor in profile.query.factors.values():
            kept = kept * factor[candidates]
        return kept

    def _by_order(self, profile: Profile, places: Places) -> NDArray[np.float64]:
        if profile.recipe.order == "trend":
            return self._trending(profile, places)
        popular: NDArray[np.float64] = 1e-3 * self.shelf.popularity_share[places].astype(np.float64)
        if profile.recipe.order == "near":
            near: NDArray[np.float64] = popular + self.bench.look_up(profile.near[0], profile.near[1][None, :], places)[0]
            return near
        if profile.fallback is not None:
            return self.shelf.popularity_share[places].astype(np.float64)
        stand_in = self.shelf.stand_in[places]
        scores = np.zeros(len(places))
        known = stand_in >= 0
        mode = self.config.modes[profile.recipe.objective]
        scores[known] = self.relative(profile, stand_in[known], mode) * self.shelf.stand_in_likeness[places[known]]
        if profile.bought_now:
            # what was bought a minute ago is not needed now
            for place, fresh in profile.bought_now.items():
                scores[places == place] *= 1.0 - fresh
        return scores + 1e-6 * popular

    def _trending(self, profile: Profile, places: Places) -> NDArray[np.float64]:
        trend = self.shelf.trend[places].astype(np.float64)
        local = self.known.local.get(profile.query.store_id or "")
        if local is None:
            return trend
        there = self.bench.look_up(local[0], local[1][None, :], places)[0]
        # what sells in the store comes before what sells elsewhere
        return np.where(there > 0, 1.0 + there, trend)

    def _session(self, profile: Profile, candidates: Positions) -> NDArray[np.float64]:
        if profile.recipe.order == "trend" or not (profile.viewed or profile.bought_now) or "viewed" not in profile.recipe.sources:
            return np.zeros(len(candidates))
        looked, fresh = profile.looked
        likeness: NDArray[np.float64] = self.bench.look_up(looked, fresh[None, :], candidates.astype(np.int32))[0].astype(np.float64)
        # of each kind the best counts in full, the next half, and so on
        family, order = self.shelf.family[candidates], np.lexsort((candidates, -likeness))
        seen: dict[int, int] = {}
        for at in order[: int(np.count_nonzero(likeness))].tolist():
            kind = int(family[at])
            if kind >= 0:
                likeness[at] *= FAMILY_SHARE ** seen.get(kind, 0)
                seen[kind] = seen.get(kind, 0) + 1
        return SESSION_SHARE * likeness * self._kept(profile, candidates)

    def _widen(self, profile: Profile, considered: Positions) -> Iterator[Positions]:
        if not profile.recipe.widens or profile.query.channel in profile.query.forbidden_channels:
            return
        trend = profile.recipe.order == "trend"
        order = self.shelf.with_values(profile.query.include, trend)
        if order is None:
            order = self.shelf.by_trend if trend else self.shelf.by_popularity
        for start in range(0, len(order), 4096):
            portion = order[start : start + 4096]
            yield portion[~np.isin(portion, considered)].astype(np.intp)

    def _explain(self, profile: Profile, chosen: Positions, shares: Scores) -> list[Told]:
        places = self.shelf.stand_in[chosen]
        known = places >= 0
        strength = np.zeros(len(chosen))
        mode = self.config.modes[profile.recipe.objective]
        ranked = profile.recipe.order == "ranked" and profile.fallback is None
        if ranked and profile.learnt.size and mode not in ("popularity", "personal frequency"):
            reached, sums = profile.reached
            best = max(float(profile.reached_new[0].max(initial=0.0)), 1e-9)
            strength[known] = self.bench.look_up(reached, sums, places[known])[0] / best
        totals = np.maximum(shares.sum(axis=0), 1e-12)
        told = tell(profile, chosen, shares[1] / totals, strength, self.label_at)
        if profile.query.listing == "buy_again":
            told = [
                (source, reason, {**details, **self._expected(profile, int(place))})
                for place, (source, reason, details) in zip(chosen, told, strict=True)
            ]
        if profile.query.explain and ranked and mode == RANKED and known.any():
            parts = iter(self.rankers[profile.recipe.objective].contributions(self.rows(profile, places[known])))
            names = [each.name for each in self.ranker_inputs]
            # an item that borrows no other's scores was not ranked
            named = [{name: round(float(v), 4) for name, v in zip(names, next(parts), strict=True)} if one else {} for one in known]
            told = [
                (source, reason, {**details, "contributions": {name: v for name, v in what.items() if v}} if what else details)
                for (source, reason, details), what in zip(told, named, strict=True)
            ]
        return told

    @staticmethod
    def _expected(profile: Profile, place: int) -> dict[str, Any]:
        """When the customer will need an item again, by the mean interval so far."""
        found = np.flatnonzero(profile.held.places == place)
        if not len(found) or not np.isfinite(interval := float(profile.held.interval_days[found[0]])):
            return {}
        slot = found[0]
        return {"expected_at": profile.query.as_of + timedelta(days=interval - float(profile.held.recency_days[slot]))}
