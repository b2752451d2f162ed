"""ubiquo's models as an MLflow pyfunc, logged as code: MLflow runs this file to load one, and nothing is pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import msgspec
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from models.churn import Churn
from models.churn import matrix as churn_matrix
from models.decision import Query
from models.next_best_offer import FEATURES as PAIR_COLUMNS
from models.next_best_offer import NextBestOffer
from models.recommender.recommender import Recommender

LOADERS = {"churn": Churn.load, "next-best-offer": NextBestOffer.load, "recommendations": Recommender.load}


class UbiquoModel(PythonModel):
    """Loads the model that lies in the artifact ``model`` and answers frames of its feature rows."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the native model."""
        folder = Path(context.artifacts["model"])
        self.kind = msgspec.json.decode((folder / "manifest.json").read_bytes())["kind"]
        self.model: Any = LOADERS[self.kind](folder)

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Probabilities for churn and next best offer; for recommendations ten item ids a row.

        ``params["as_of"]`` (Unix seconds) tells recommendations when; by default the last purchase of each row.
        """
        records = model_input.to_dict("records")
        if self.kind == "churn":
            return self.model.predict(churn_matrix(records))
        if self.kind == "next-best-offer":
            return self.model.predict(model_input[list(PAIR_COLUMNS)].to_numpy(dtype=np.float64))
        return [self._recommend(row, (params or {}).get("as_of", 0)) for row in records]

    def _recommend(self, row: dict[str, Any], as_of: float) -> list[str]:
        moment = pd.Timestamp(as_of or max(row["bought_last_at"], default=0), unit="s", tz="UTC").to_pydatetime()
        decision = self.model.pipeline.decide(Query(None, moment, row), np.random.default_rng(0))
        return [choice.id for choice in decision.choices]


mlflow.models.set_model(UbiquoModel())
