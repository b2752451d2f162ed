"""Two ways to a probability from a row of numbers: a regularised logistic model and boosted trees.

Both take ``(rows, features)`` float arrays in which NaN means unknown, and both say which feature moved an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from models.artifact import seal, verify
from models.inputs import Input, read_inputs

if TYPE_CHECKING:
    import lightgbm as lgb

Floats = NDArray[np.float64]


class ProbabilityModel(Protocol):
    """What churn and next best offer ask of the model beneath them."""

    kind: str

    def predict(self, rows: Floats) -> Floats:
        """One probability a row."""
        ...

    def contributions(self, rows: Floats) -> Floats:
        """What each feature adds to the log-odds of each row, against the average training row; shape as *rows*."""
        ...

    def save(self, folder: Path) -> None:
        """Write plain files (JSON, LightGBM text) into *folder*."""
        ...


class Logistic:
    """L2-regularised logistic regression on standardised signed logarithms; unknown values count as the median.

    Args:
        medians, means, scales, weights: one number a feature.
        intercept: the log-odds of the average row.
    """

    kind = "logistic"

    def __init__(self, medians: Floats, means: Floats, scales: Floats, weights: Floats, intercept: float) -> None:
        self.medians, self.means, self.scales, self.weights, self.intercept = medians, means, scales, weights, intercept

    @classmethod
    def fit(cls, rows: Floats, labels: NDArray[Any], strength: float = 0.05) -> Logistic:
        """Fit with scikit-learn; *strength* is its C, the inverse of the penalty."""
        from sklearn.linear_model import LogisticRegression

        logs = _signed_log(rows)
        # a feature that nobody has counts as zero, and so does not count
        medians = np.nanmedian(np.where(np.isnan(logs).all(axis=0), 0.0, logs), axis=0)
        filled = np.where(np.isnan(logs), medians, logs)
        means, scales = filled.mean(axis=0), filled.std(axis=0)
        scales[scales < 1e-12] = 1.0
        # its products are small: a second thread of BLAS waits ten times longer than it works; the numbers are the same
        with threadpool_limits(1, "blas"):
            model = LogisticRegression(C=strength, max_iter=2000).fit((filled - means) / scales, labels)
        return cls(medians, means, scales, model.coef_[0].astype(np.float64), float(model.intercept_[0]))

    def predict(self, rows: Floats) -> Floats:
        """One probability a row."""
        logit = self.contributions(rows).sum(axis=1) + self.intercept
        return np.asarray(1.0 / (1.0 + np.exp(-logit)))

    def contributions(self, rows: Floats) -> Floats:
        """Weight times standardised value."""
        logs = _signed_log(rows)
        standard = (np.where(np.isnan(logs), self.medians, logs) - self.means) / self.scales
        return np.asarray(standard * self.weights)

    def save(self, folder: Path) -> None:
        """Write ``logistic.json``."""
        state = {name: getattr(self, name).tolist() for name in ("medians", "means", "scales", "weights")}
        (folder / "logistic.json").write_bytes(msgspec.json.encode({**state, "intercept": self.intercept}))

    @classmethod
    def load(cls, folder: Path) -> Logistic:
        """Read what ``save`` wrote."""
        state = msgspec.json.decode((folder / "logistic.json").read_bytes())
        arrays = [np.asarray(state[name]) for name in ("medians", "means", "scales", "weights")]
        medians, means, scales, weights = arrays
        return cls(medians, means, scales, weights, state["intercept"])


class Boosted:
    """The mean of LightGBM models that differ only in their seed."""

    kind = "lightgbm"
    DEFAULTS: Mapping[str, float] = {
        "trees": 250, "num_leaves": 8, "learning_rate": 0.03, "min_data_in_leaf": 50, "lambda_l2": 10.0, "feature_fraction": 0.5,
        "bagging_fraction": 0.7,
    }  # fmt: skip
    """The settings that hold where nobody says otherwise: small, strongly regularised trees."""

    def __init__(self, boosters: Sequence[lgb.Booster]) -> None:
        self.boosters = list(boosters)

    @classmethod
    def fit(
        cls,
        rows: Floats,
        labels: NDArray[Any],
        seed: int = 0,
        seeds: int = 5,
        monotone: Sequence[int] | None = None,
        settings: Mapping[str, float] | None = None,
    ) -> Boosted:
        """Fit *seeds* forests.

        Args:
            monotone: forces the direction (-1, 0, 1) of a feature.
            settings: what differs from ``DEFAULTS``.
        """
        import lightgbm as lgb

        parameters: dict[str, Any] = {**cls.DEFAULTS, **(settings or {})}
        trees = int(parameters.pop("trees"))
        whole = {name: int(parameters[name]) for name in ("num_leaves", "min_data_in_leaf")}
        parameters |= whole | {
            "objective": "binary", "bagging_freq": 1, "verbosity": -1, "num_threads": 2, "deterministic": True, "force_row_wise": True,
            "monotone_constraints": list(monotone) if monotone else None,
        }  # fmt: skip
        data = lgb.Dataset(rows, labels, params={"verbosity": -1}, free_raw_data=False)
        return cls([lgb.train({**parameters, "seed": seed + k}, data, trees) for k in range(seeds)])

    def predict(self, rows: Floats) -> Floats:
        """One probability a row; on one thread, as a request has only one row."""
        return np.asarray(np.mean([b.predict(rows, num_threads=1) for b in self.boosters], axis=0))

    def contributions(self, rows: Floats) -> Floats:
        """Mean SHAP values of the trees, without the constant."""
        parts = [b.predict(rows, pred_contrib=True, num_threads=1) for b in self.boosters]
        return np.asarray(np.mean(parts, axis=0)[:, :-1])

    def save(self, folder: Path) -> None:
        """Write one LightGBM text file a seed."""
        for k, booster in enumerate(self.boosters):
            booster.save_model(folder / f"lightgbm-{k}.txt")

    @classmethod
    def load(cls, folder: Path) -> Boosted:
        """Read what ``save`` wrote."""
        import lightgbm as lgb

        return cls([lgb.Booster(model_file=path) for path in sorted(folder.glob("lightgbm-*.txt"))])


def log_odds(probabilities: Floats) -> Floats:
    """The logarithm of the odds; certainty counts as a millionth less."""
    clipped = np.clip(probabilities, 1e-6, 1.0 - 1e-6)
    return np.asarray(np.log(clipped / (1.0 - clipped)))


def shifted(probabilities: Floats, by: Floats) -> Floats:
    """Probabilities with *by* added to their log-odds."""
    return np.asarray(1.0 / (1.0 + np.exp(-(log_odds(probabilities) + by))))


def save_sealed(folder: Path, kind: str, model: ProbabilityModel, inputs: Sequence[Input], **about: Any) -> None:
    """Write *model*, its *inputs* and what its reader must know beside whatever *folder* holds already, and seal it as a *kind* model."""
    model.save(folder)
    told = {"model": model.kind, "features": [each.name for each in inputs], "inputs": inputs, **about}
    _about_path(folder, kind).write_bytes(msgspec.json.encode(told))
    seal(folder, kind)


def load_sealed(folder: Path, kind: str) -> tuple[ProbabilityModel, tuple[Input, ...], dict[str, Any]]:
    """The model that ``save_sealed`` wrote, its inputs, and what was said about it.

    Raises:
        DamagedArtifactError: a file is missing or altered.
    """
    verify(folder, kind)
    about: dict[str, Any] = msgspec.json.decode(_about_path(folder, kind).read_bytes())
    model = Logistic.load(folder) if about["model"] == "logistic" else Boosted.load(folder)
    return model, read_inputs(about), about


def _about_path(folder: Path, kind: str) -> Path:
    return folder / f"{kind.replace('-', '_')}.json"


def _signed_log(rows: Floats) -> Floats:
    return np.asarray(np.sign(rows) * np.log1p(np.abs(rows)))
