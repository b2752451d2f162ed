"""The only door to the MLflow registry: save a version, load an alias, point an alias elsewhere."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

Kind = Literal["churn", "recommendations", "next-best-offer"]
KINDS: tuple[Kind, ...] = ("churn", "recommendations", "next-best-offer")
_CLASSES = {
    "churn": ("models.churn", "Churn"),
    "recommendations": ("models.recommender.recommender", "Recommender"),
    "next-best-offer": ("models.next_best_offer", "NextBestOffer"),
}


class NoChampionError(LookupError):
    """The registry has no model under the alias; the message names the mend."""


@dataclass(frozen=True)
class Promotion:
    """By which metric a model is judged, against which baseline, and by which rule."""

    metric: str
    baseline: str
    rule: str


@dataclass(frozen=True)
class ModelSettings:
    """What ``mlflow.yaml`` says of one model."""

    experiment: str
    registered_name: str
    feature_service: str
    promotion: Promotion


@dataclass(frozen=True)
class Settings:
    """The whole of ``mlflow.yaml``."""

    tracking_uri: str
    artifact_location: str
    champion: str
    challenger: str
    models: dict[str, ModelSettings]


SUPPORTED = {
    "churn": Promotion("average_precision", "recency", "paired_lower_bound_above_zero"),
    "recommendations": Promotion("ndcg_at_10_for_you", "popularity", "paired_lower_bound_above_zero"),
    "next-best-offer": Promotion("average_precision", "past_redemptions", "paired_lower_bound_above_zero"),
}
"""What the jobs can judge by; anything else in the file is refused rather than quietly not done."""


def settings_path() -> Path:
    """The file that ``UBIQUO_MLFLOW`` names, or the ``mlflow.yaml`` beside the packages."""
    return Path(os.environ.get("UBIQUO_MLFLOW", Path(__file__).parent.parent / "mlflow.yaml"))


def load_settings(path: Path | None = None) -> Settings:
    """Read ``mlflow.yaml``: *path*, or ``UBIQUO_MLFLOW``, or the file beside the packages.

    Raises:
        ValueError: a key is missing or unknown; the message names file and key.
    """
    source = path or settings_path()
    home = str(Path(os.environ.get("UBIQUO_HOME", "var")).resolve())
    try:
        raw = yaml.safe_load(Template(source.read_text()).safe_substitute(UBIQUO_HOME=home))
        models = {name: ModelSettings(**{**entry, "promotion": Promotion(**entry["promotion"])}) for name, entry in raw["models"].items()}
        for name, model in models.items():
            if model.promotion != SUPPORTED[name]:
                raise ValueError(f"{source}: models.{name}.promotion: only {SUPPORTED[name]} can be judged by, not {model.promotion}")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or raw["tracking_uri"]
        return Settings(uri, raw["artifact_location"], raw["aliases"]["champion"], raw["aliases"]["challenger"], models)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: {error}: compare it with the mlflow.yaml that ubiquo ships") from error


@dataclass(frozen=True)
class LoadedModel:
    """A native model with the name and version it was registered under."""

    model: Any
    name: str
    version: int
    tags: dict[str, str]

    @property
    def label(self) -> str:
        """``name/version``, as answers print it."""
        return f"{self.name}/{self.version}"


class Registry:
    """The registry that ``mlflow.yaml`` describes."""

    def __init__(self, settings: Settings | None = None) -> None:
        import mlflow

        # importing it turned these on again, and nobody could mend them
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        self.settings = settings or load_settings()
        if self.settings.tracking_uri.startswith("sqlite:///"):
            Path(self.settings.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(self.settings.tracking_uri)
        mlflow.set_registry_uri(self.settings.tracking_uri)
        self._client: MlflowClient = mlflow.MlflowClient()

    def save(self, kind: Kind, folder: Path, signature: ModelSignature, example: pd.DataFrame, tags: dict[str, str]) -> int:
        """Log the sealed *folder* to the active run as a pyfunc and register it as the challenger; returns its version."""
        import mlflow
        from mlflow.exceptions import MlflowException

        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).parent / "flavor.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(Path(__file__).parent)],
            signature=signature,
            input_example=example,
            pip_requirements=["numpy", "pandas", "scipy", "scikit-learn", "lightgbm", "implicit", "msgspec", "threadpoolctl", "pyyaml"],
        )
        name = self.settings.models[kind].registered_name
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._client.create_model_version(name, info.model_uri, run_id=info.run_id, tags=tags, model_id=info.model_id)
        self._client.set_registered_model_alias(name, self.settings.challenger, version.version)
        return int(version.version)

    def load(self, reference: str) -> LoadedModel:
        """The native model under ``kind@alias``, e.g. ``churn@champion``.

        Raises:
            NoChampionError: no version carries the alias.
            DamagedArtifactError: its files are not those that were saved.
        """
        import mlflow

        kind, _, alias = reference.partition("@")
        name = self.settings.models[kind].registered_name
        version = self.version_of(kind, alias)
        if version is None:
            raise NoChampionError(f"no model {name!r} has the alias {alias!r}: train and promote one (python -m training {kind})")
        found = self._client.get_model_version(name, str(version))
        local = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{version}")
        folder = Path(local) / "artifacts"
        inner = next(p.parent for p in sorted(folder.rglob("manifest.json")))
        module, model = _CLASSES[kind]
        # imported only now: to ask which version is the champion must not cost a second's import of LightGBM
        native = getattr(importlib.import_module(module), model).load(inner)
        return LoadedModel(native, name, version, dict(found.tags))

    def version_of(self, kind: str, alias: str) -> int | None:
        """The version that carries *alias*, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return int(self._client.get_model_version_by_alias(self.settings.models[kind].registered_name, alias).version)
        except MlflowException as error:
            # only a missing model or alias means "none"; a registry that cannot be asked must not look empty
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def tags_of(self, kind: str, version: int) -> dict[str, str]:
        """The tags of one version."""
        return dict(self._client.get_model_version(self.settings.models[kind].registered_name, str(version)).tags)

    def run_of(self, kind: str, version: int) -> str:
        """The id of the run that made one version."""
        return str(self._client.get_model_version(self.settings.models[kind].registered_name, str(version)).run_id)

    def promote(self, kind: str, version: int, reason: str) -> None:
        """Point the champion alias at *version* and note why."""
        name = self.settings.models[kind].registered_name
        self._client.set_registered_model_alias(name, self.settings.champion, str(version))
        self._client.set_model_version_tag(name, str(version), "promotion", reason)
