"""The recommender: personal frequency, EASE, ALS and popularity, scored over the whole catalogue and added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import scipy.sparse as sp
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from models.artifact import read_arrays, read_ids, seal, verify, write_arrays, write_ids
from models.attributes import Attributes
from models.decision import NO_PERMISSION, LastSlotExplorer, Pipeline, Positions, Query, Scores, may_reach_her
from models.recommender.ease import Neighbours, fit_ease

NAME = "recommendations"
"""The kind that its artifacts are sealed as."""
DAY = 86_400.0
Floats = NDArray[np.float32]
PARTS = ("frequency", "ease", "als", "popularity", "session")
STATISTICS = ("item_id", "popularity", "buyers", "purchases")
"""The columns of items that are no attributes."""
SESSION_ITEMS = 5
"""How many of the items looked at last speak for their like."""


@dataclass(frozen=True)
class Blend:
    """What each part adds to the score of one list; parts are scaled to a customer's own strongest signal."""

    frequency: float
    ease: float
    als: float
    popularity: float
    session: float = 1.0
    """Likeness to what she looked at lately. The demo's data has no views, so this is set, not tuned."""
    repeat_exponent: float = 0.25
    """How much an item's own repeat rate (purchases a buyer) bends personal frequency: 0 not at all."""


@dataclass(frozen=True)
class RecommenderConfig:
    """Settings of a fit; the blends are tuned on an earlier cut than any that is reported."""

    history_half_life_days: float = 90.0
    interest_half_life_days: float = 2.0
    min_buyers: int = 5
    """An item belongs to the catalogue once so many customers bought it."""
    ease_penalty: float = 30.0
    ease_neighbours: int = 100
    als_factors: int = 64
    als_regularization: float = 10.0
    als_iterations: int = 15
    seed: int = 1
    blends: Mapping[str, Blend] = field(
        default_factory=lambda: {
            "for_you": Blend(frequency=1.0, ease=0.1, als=0.1, popularity=0.05),
            "also_like": Blend(frequency=0.0, ease=1.0, als=0.3, popularity=0.0),
        }
    )


@dataclass(frozen=True)
class Profile:
    """A query's context: the customer's weights by catalogue position, and each part's scores over the catalogue."""

    query: Query
    liked: Floats
    """By catalogue position: how strongly each item speaks for the customer, 1 at most."""
    history: Positions
    """Where each item of her history stands in the catalogue, -1 for those outside it."""
    viewed: Mapping[int, float]
    """By catalogue position: how fresh her interest in an item is, the latest first."""
    parts: Mapping[str, Floats]
    blend: Blend
    fallback: str | None = None


class Recommender:
    """Everything needed to recommend from a catalogue, and its id map.

    Attributes:
        item_ids: catalogue position to item id.
        attributes: what is known of each item beside its id.
    """

    def __init__(
        self,
        config: RecommenderConfig,
        item_ids: Sequence[str],
        neighbours: Neighbours,
        als: AlternatingLeastSquares,
        popularity: Floats,
        repeat_rate: Floats,
        attributes: Attributes,
    ) -> None:
        self.config = config
        self.item_ids = list(item_ids)
        self.neighbours = neighbours
        self.popularity = popularity
        self.repeat_rate = repeat_rate
        self.attributes = attributes
        self._als = als
        self.positions = {item_id: k for k, item_id in enumerate(self.item_ids)}
        self._all = np.arange(len(self.item_ids), dtype=np.intp)
        norms = np.linalg.norm(als.item_factors, axis=1, keepdims=True)
        self._directions: Floats = als.item_factors / np.maximum(norms, 1e-9)
        self.pipeline: Pipeline[Profile] = self._pipeline(self._profile, PARTS)
        self.similar: Pipeline[Profile] = self._pipeline(self._similar_to, ("session", "popularity"))

    @classmethod
    def fit(
        cls,
        histories: Iterable[Mapping[str, Any]],
        items: Mapping[str, Sequence[Any]],
        as_of: datetime,
        config: RecommenderConfig,
    ) -> Recommender:
        """Fit every part on the customers' histories at *as_of*.

        Args:
            histories: a row a customer of what the fold ``history`` tells.
            items: columns of equal length: ``item_id``, ``popularity``, ``buyers``, ``purchases``, and beside them the
                attributes to filter by; only items that may be recommended.
            as_of: the moment to which purchases decay.

        Raises:
            ValueError: no item has enough buyers.
        """
        buyers = np.asarray(items["buyers"])
        keep = np.flatnonzero(buyers >= config.min_buyers).tolist()
        if not keep:
            raise ValueError(f"no item was bought by {config.min_buyers} customers before {as_of}: the window is too short")
        ids = [items["item_id"][k] for k in keep]
        matrix = interactions(histories, {item: k for k, item in enumerate(ids)}, as_of, config.history_half_life_days)
        als = AlternatingLeastSquares(
            factors=min(config.als_factors, max(2, min(matrix.shape) - 1)),
            regularization=config.als_regularization,
            iterations=config.als_iterations,
            random_state=config.seed,
            num_threads=2,
        )
        with threadpool_limits(1, "blas"):
            als.fit(matrix, show_progress=False)
        popularity = np.log1p(np.asarray(items["popularity"], dtype=np.float64)[keep])
        repeat_rate = np.asarray(items["purchases"], dtype=np.float64)[keep] / np.maximum(buyers[keep], 1)
        return cls(
            config=config,
            item_ids=ids,
            neighbours=fit_ease(matrix, config.ease_penalty, config.ease_neighbours),
            als=als,
            popularity=(popularity / max(popularity.max(), 1e-9)).astype(np.float32),
            repeat_rate=repeat_rate.astype(np.float32),
            attributes=Attributes.of({name: [values[k] for k in keep] for name, values in items.items() if name not in STATISTICS}),
        )

    def predict_frame(self, frame: pd.DataFrame, params: Mapping[str, Any]) -> list[list[str]]:
        """Ten item ids a row of a frame of histories, as of ``params["as_of"]`` (Unix seconds) or each row's last purchase."""
        return [self._ten(row, params.get("as_of", 0)) for row in frame.to_dict("records")]

    def _ten(self, row: Mapping[str, Any], as_of: float) -> list[str]:
        moment = datetime.fromtimestamp(as_of or max(row["bought_last_at"], default=0), UTC)
        decision = self.pipeline.decide(Query(None, moment, row), np.random.default_rng(0))
        return [choice.id for choice in decision.choices]

    def label(self, item_id: str) -> str:
        """What to call an item in a reason."""
        position = self.positions.get(item_id)
        if position is None:
            return item_id
        told = [text.title() for name in ("category", "type") if (text := self.attributes.text(name, position)) is not None]
        return ": ".join(dict.fromkeys(told)) or item_id

    def profile(self, query: Query) -> Profile:
        """All parts' scores over the whole catalogue before blending, for tuning and for judging parts alone."""
        return self._profile(query, everything=True)

    def frequency(self, liked: Floats, repeat_exponent: float) -> Floats:
        """What the customer likes, bent by how often the buyers of each item buy it again; at most 1."""
        bought = np.flatnonzero(liked)
        bent = np.zeros_like(liked)
        bent[bought] = liked[bought] * self.repeat_rate[bought] ** np.float32(repeat_exponent)
        return bent / max(float(bent.max(initial=0.0)), 1e-9)

    def save(self, folder: Path) -> None:
        """Write a sealed folder of JSON and npz files."""
        folder.mkdir(parents=True, exist_ok=True)
        write_ids(folder / "item_ids.json", self.item_ids)
        (folder / "config.json").write_bytes(msgspec.json.encode(asdict(self.config)))
        (folder / "vocabularies.json").write_bytes(msgspec.json.encode(self.attributes.about()))
        write_arrays(
            folder / "arrays.npz",
            offsets=self.neighbours.by_source.indptr,
            targets=self.neighbours.by_source.indices,
            weights=self.neighbours.by_source.data,
            popularity=self.popularity,
            repeat_rate=self.repeat_rate,
            **self.attributes.arrays(),
        )
        self._als.save(str(folder / "als.npz"))
        seal(folder, NAME)

    @classmethod
    def load(cls, folder: Path) -> Recommender:
        """Read what ``save`` wrote.

        Raises:
            DamagedArtifactError: a file is missing or altered.
        """
        verify(folder, NAME)
        arrays = read_arrays(folder / "arrays.npz")
        about = msgspec.json.decode((folder / "vocabularies.json").read_bytes())
        als = AlternatingLeastSquares.load(str(folder / "als.npz"))
        als.num_threads = 1
        item_ids = read_ids(folder / "item_ids.json")
        shape = (len(item_ids), len(item_ids))
        return cls(
            config=msgspec.json.decode((folder / "config.json").read_bytes(), type=RecommenderConfig),
            item_ids=item_ids,
            neighbours=Neighbours(sp.csr_matrix((arrays["weights"], arrays["targets"], arrays["offsets"]), shape=shape)),
            als=als,
            popularity=arrays["popularity"],
            repeat_rate=arrays["repeat_rate"],
            attributes=Attributes.read(about, arrays),
        )

    def _pipeline(self, prepare: Any, parts: Sequence[str]) -> Pipeline[Profile]:
        return Pipeline(
            ids=self.item_ids,
            prepare=prepare,
            source=lambda profile: self._all,
            filters=[
                ("attribute", self._has_attributes),
                ("excluded", self._not_excluded),
                (NO_PERMISSION, lambda profile, candidates: may_reach_her(profile.query, candidates)),
                ("already seen", self._not_seen),
            ],
            scorers=[(part, _part_scorer(part)) for part in parts],
            selector=LastSlotExplorer(),
            explain=lambda profile, chosen, shares: self._explain(profile, chosen, shares, parts),
            fallback=lambda profile: profile.fallback,
        )

    def _profile(self, query: Query, everything: bool = False) -> Profile:
        """The context of a customer's query; parts that her list does not use are left out unless *everything* is asked."""
        row, now = query.row, query.as_of.timestamp()
        liked = np.zeros(len(self.item_ids), np.float32)
        history = np.empty(0, np.intp)
        if row.get("bought_item_ids") is not None:
            history = self._positions_of(row["bought_item_ids"])
            decayed = _decayed(row["bought_weights"], row["bought_last_at"], now, self.config.history_half_life_days)
            liked[history[history >= 0]] = np.sqrt(decayed[history >= 0])
        viewed = self._viewed(row, now)
        blend = self.config.blends[query.listing]
        used = PARTS if everything else tuple(part for part in PARTS if getattr(blend, part))
        parts = dict.fromkeys(PARTS, np.zeros(len(self.item_ids), np.float32))
        parts["popularity"] = self.popularity
        positions = np.flatnonzero(liked)
        if not len(positions) and not viewed:
            blend = Blend(frequency=0, ease=0, als=0, popularity=1)
            return Profile(query, liked, history, viewed, parts, blend, "nothing is known of this customer yet: popular items")
        if viewed and "session" in used:
            parts["session"] = np.max([self.likeness(k) * np.float32(fresh) for k, fresh in viewed.items()], axis=0)
        if len(positions) and "als" in used:
            one = sp.csr_matrix((liked[positions], positions.astype(np.int32), np.array([0, len(positions)])), shape=(1, len(liked)))
            likes = self._als.item_factors @ self._als.recalculate_user(0, one)
            parts["als"] = likes / max(float(likes.max()), 1e-9)
        liked /= max(float(liked.max(initial=0.0)), 1e-9)
        if "frequency" in used:
            parts["frequency"] = self.frequency(liked, blend.repeat_exponent)
        if "ease" in used:
            parts["ease"] = self.neighbours.scores(positions, liked[positions])
        return Profile(query, liked, history, viewed, parts, blend)

    def likeness(self, position: int) -> Floats:
        """How like each item is to the one at *position*: the direction of its ALS factors, and whether it goes with it."""
        near = self.neighbours.scores(np.array([position]), np.ones(1, np.float32))
        near /= max(float(near.max(initial=0.0)), 1e-9)
        together: Floats = (self._directions @ self._directions[position] + near / 2) / np.float32(1.5)
        return together

    def _viewed(self, row: Mapping[str, Any], now: float) -> dict[int, float]:
        if row.get("recent_item_ids") is None or not len(row["recent_item_ids"]):
            return {}
        where = self._positions_of(row["recent_item_ids"])
        interest = _decayed(row["recent_weights"], row["recent_at"], now, self.config.interest_half_life_days)
        latest: dict[int, float] = {}
        for position, fresh in zip(where[::-1].tolist(), interest[::-1].tolist(), strict=True):
            if position >= 0:
                latest[position] = max(min(fresh, 1.0), latest.get(position, 0.0))
        return dict(list(latest.items())[:SESSION_ITEMS])

    def _similar_to(self, query: Query) -> Profile:
        """The context of "similar to this item": the item is the one thing looked at."""
        item_id = str(query.row.get("item_id", ""))
        nothing, nowhere = np.zeros(len(self.item_ids), np.float32), np.empty(0, np.intp)
        parts = {"popularity": self.popularity, "session": nothing}
        position = self.positions.get(item_id)
        if position is None:
            fallback = f"item {item_id!r} is not in the model's catalogue: popular items"
            return Profile(query, nothing, nowhere, {}, parts, Blend(0, 0, 0, popularity=1, session=0), fallback)
        parts["session"] = self.likeness(position)
        return Profile(query, nothing, nowhere, {position: 1.0}, parts, Blend(0, 0, 0, popularity=0, session=1))

    def _positions_of(self, item_ids: Iterable[str]) -> Positions:
        lookup = self.positions.get
        return np.array([lookup(item, -1) for item in item_ids], dtype=np.intp)

    def _has_attributes(self, profile: Profile, candidates: Positions) -> NDArray[np.bool_]:
        return self.attributes.keep(profile.query.include, profile.query.exclude, candidates)

    def _not_excluded(self, profile: Profile, candidates: Positions) -> NDArray[np.bool_]:
        excluded = self._positions_of(profile.query.exclude_ids)
        return ~np.isin(candidates, excluded) if len(excluded) else np.ones(len(candidates), bool)

    def _not_seen(self, profile: Profile, candidates: Positions) -> NDArray[np.bool_]:
        """What she may also like is neither what she bought nor what she has just looked at."""
        keep = np.ones(len(self.item_ids), bool)
        if profile.query.listing == "also_like":
            keep[profile.history[profile.history >= 0]] = False
            keep[list(profile.viewed)] = False
        return keep[candidates]

    def _explain(
        self, profile: Profile, chosen: Positions, shares: Scores, parts: Sequence[str]
    ) -> list[tuple[str, str, Mapping[str, Any]]]:
        # where no part speaks for an item it only fills a place: that is popularity's business
        loudest = [parts[k] if shares[k, n] > 0 else "popularity" for n, k in enumerate(shares.argmax(axis=0))] if len(chosen) else []
        return [(part, self._reason(profile, int(where), part), {}) for where, part in zip(chosen, loudest, strict=True)]

    def _reason(self, profile: Profile, where: int, part: str) -> str:
        row = profile.query.row
        if part == "frequency":
            mine = int(np.flatnonzero(profile.history == where)[0])
            count, last_at = row["bought_counts"][mine], row["bought_last_at"][mine]
            days = int((profile.query.as_of.timestamp() - last_at) // DAY)
            return f"bought {count} {'time' if count == 1 else 'times'}, last {days} days ago"
        if part == "session":
            if where in profile.viewed:
                return "looked at recently"
            closest = max(profile.viewed, key=lambda k: float(self._directions[k] @ self._directions[where]))
            looked = "" if "item_id" in row else ", looked at recently"
            return f"like {self.label(self.item_ids[closest])} ({self.item_ids[closest]}{looked})"
        if part == "ease":
            source = self.neighbours.loudest_source(where, profile.liked)
            if source is not None:
                return f"often bought with {self.label(self.item_ids[source])} ({self.item_ids[source]}), as she does"
        return "popular now" if part == "popularity" else "bought by customers with similar baskets"


def interactions(
    histories: Iterable[Mapping[str, Any]], position: Mapping[str, int], as_of: datetime, half_life_days: float
) -> sp.csr_matrix:
    """Customers by items: the square root of the decayed number of purchases at *as_of*."""
    now = as_of.timestamp()
    indptr, indices, data = [0], [], []
    for row in histories:
        items = row["bought_item_ids"] if row["bought_item_ids"] is not None else []
        where = np.array([position.get(item, -1) for item in items], dtype=np.int64)
        known = where >= 0
        if len(where):
            decayed = _decayed(row["bought_weights"], row["bought_last_at"], now, half_life_days)
            data.append(np.sqrt(decayed[known]))
            indices.append(where[known])
        indptr.append(indptr[-1] + int(known.sum()))
    flat = np.concatenate(data) if data else np.empty(0)
    columns = np.concatenate(indices) if indices else np.empty(0, np.int64)
    matrix = sp.csr_matrix((flat.astype(np.float32), columns, indptr), shape=(len(indptr) - 1, len(position)))
    matrix.sort_indices()
    return matrix


def _decayed(weights: Sequence[float], last_at: Sequence[int], now: float, half_life_days: float) -> NDArray[np.float64]:
    """Weights as they stand now, given each one's value at its own last moment (Unix seconds)."""
    ages = now - np.asarray(last_at, dtype=np.float64)
    return np.asarray(weights, dtype=np.float64) * np.exp2(-ages / (DAY * half_life_days))


def _part_scorer(part: str) -> Any:
    def score(profile: Profile, candidates: Positions) -> Floats:
        weight = np.float32(getattr(profile.blend, part))
        return profile.parts[part][candidates] * weight

    return score
