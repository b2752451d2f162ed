"""ubiquo's models as an MLflow pyfunc, logged as code: MLflow runs this file to load one, and nothing is pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import msgspec
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from models.kind import kind_named


class UbiquoModel(PythonModel):
    """Loads the model that lies in the artifact ``model`` and answers frames of its feature rows."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the native model."""
        folder = Path(context.artifacts["model"])
        self.model: Any = kind_named(msgspec.json.decode((folder / "manifest.json").read_bytes())["kind"]).load(folder)

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """A number a row; for recommendations ten item ids a row.

        ``params["as_of"]`` (Unix seconds) tells recommendations when; by default the last purchase of each row.
        """
        return self.model.predict_frame(model_input, params or {})


mlflow.models.set_model(UbiquoModel())
