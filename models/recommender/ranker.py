"""The ranker: LightGBM on what the sources say of a candidate, what is known of the item, and what the customer did with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from models.inputs import Input

Objective = Literal["any", "new"]
"""Of all that is bought next, or of that part which is new to the customer."""
LOSS: dict[Objective, str] = {"any": "binary", "new": "lambdarank"}
ITEM_INPUTS = (
    Input("popularity", "how much it is bought now"),
    Input("trend", "whether more of it is bought than a month ago"),
    Input("buyers", "how many customers bought it"),
    Input("repeat_rate", "how often its buyers buy it again"),
    Input("on_sale_days", "how long it has been sold", is_age=True),
)
PAIR_INPUTS = (
    Input("liked", "how much what the customer bought speaks for it", low=None),
    Input("liked_share", "the same beside the strongest candidate", low=None),
    Input("liked_lately", "how much what the customer bought lately speaks for it", low=None),
    Input("liked_lately_share", "the same beside the strongest candidate", low=None),
    Input("weight", "how often and how lately the customer bought it"),
    Input("weight_share", "the same beside what the customer buys most"),
    Input("purchases", "how often the customer bought it"),
    Input("recency_days", "how long ago the customer bought it"),
    Input("interval_days", "at what intervals the customer buys it"),
    Input("due", "how much of that interval has passed"),
)
DEFAULTS: Mapping[str, float] = {
    "trees": 60, "num_leaves": 15, "learning_rate": 0.1, "lambda_l2": 0.0, "feature_fraction": 0.7, "bagging_fraction": 0.7,
}  # fmt: skip
"""The settings that hold where nobody says otherwise."""
FITS: dict[Objective, int] = {"any": 1, "new": 3}
"""Of how many fits the mean is taken: where little is bought, one alone moves by more than most inputs bring."""
Matrix = NDArray[np.float32]


class Ranker:
    """A score a candidate: the chance that it is bought where the loss is binary, an order alone where it is LambdaRank."""

    def __init__(self, boosters: Sequence[lgb.Booster], inputs: Sequence[Input], objective: Objective) -> None:
        self.boosters, self.inputs, self.objective = tuple(boosters), tuple(inputs), objective

    @classmethod
    def fit(
        cls,
        rows: Matrix,
        labels: NDArray[np.bool_],
        groups: NDArray[np.int64],
        inputs: Sequence[Input],
        objective: Objective,
        seed: int,
        settings: Mapping[str, float] | None = None,
    ) -> Ranker:
        """Learn from candidates of customers at past moments.

        Args:
            rows: ``(candidates, inputs)``.
            labels: whether the customer then bought it.
            groups: how many candidates each customer has, in order.
            settings: what differs from ``DEFAULTS``.
        """
        chosen: dict[str, Any] = {**DEFAULTS, **(settings or {})}
        trees, leaves = int(chosen.pop("trees")), int(chosen.pop("num_leaves"))
        parameters = chosen | {
            "objective": LOSS[objective],
            "num_leaves": leaves,
            "min_data_in_leaf": int(np.clip(len(rows) // 400, 5, 500)),
            "bagging_freq": 1,
            "lambdarank_truncation_level": 15,
            "num_threads": 2,
            "deterministic": True,
            "force_row_wise": True,
            "verbose": -1,
        }
        names, truth = [each.name for each in inputs], labels.astype(np.float32)
        boosters = []
        for number in range(FITS[objective]):
            data = lgb.Dataset(rows, truth, group=groups if objective == "new" else None, feature_name=names)
            boosters.append(lgb.train({**parameters, "seed": 10 * seed + number}, data, trees))
        return cls(boosters, inputs, objective)

    def predict(self, rows: Matrix) -> NDArray[np.float64]:
        """One number a row, between 0 and 1 beside the best: 1 is the best."""
        if not len(rows):
            return np.empty(0)
        raw = sum(booster.predict(rows, num_threads=1, raw_score=True) for booster in self.boosters) / len(self.boosters)
        scores = 1.0 / (1.0 + np.exp(-raw)) if self.objective == "any" else np.exp(raw - raw.max())
        relative: NDArray[np.float64] = scores / scores.max()
        return relative

    def contributions(self, rows: Matrix) -> NDArray[np.float64]:
        """What each input adds to each row's raw score: ``(rows, inputs)``."""
        told = sum(booster.predict(rows, num_threads=1, pred_contrib=True)[:, :-1] for booster in self.boosters)
        mean: NDArray[np.float64] = told / len(self.boosters)
        return mean

    def save(self, folder: Path) -> None:
        """Write the trees as LightGBM's text."""
        for number, booster in enumerate(self.boosters):
            (folder / f"ranker_{self.objective}_{number}.txt").write_text(booster.model_to_string())

    @classmethod
    def load(cls, folder: Path, inputs: Sequence[Input], objective: Objective) -> Ranker | None:
        """Read what ``save`` wrote; None where there was nothing to save."""
        paths = sorted(folder.glob(f"ranker_{objective}_*.txt"))
        return cls([lgb.Booster(model_str=path.read_text()) for path in paths], inputs, objective) if paths else None


def affinity_input(attribute: str) -> Input:
    """The input that tells how much of what a customer holds has the candidate's value of an attribute."""
    return Input(f"affinity_{attribute}", f"how much the customer buys of its {attribute.replace('_', ' ')}")


def thinned(labels: NDArray[np.bool_], groups: NDArray[np.int64], share: float, rng: Any) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which candidates to learn from: every one that was bought, and a *share* of the others; and the groups that remain."""
    kept = labels | (rng.random(len(labels)) < share)
    starts = np.concatenate([[0], np.cumsum(groups)[:-1]])
    return kept, np.add.reduceat(kept.astype(np.int64), starts) if len(groups) else groups
