"""The only door to the MLflow registry: save a version, load an alias, point an alias elsewhere."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import yaml

from models.kind import ModelKind, UnknownKindError, kind_named
from models.recommender.listings import Learner
from models.relocation import follow

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature


class NoChampionError(LookupError):
    """The registry has no model under the alias; the message names the mend."""


@dataclass(frozen=True)
class Promotion:
    """By which metric a model is judged, against which baseline, and by which rule."""

    metric: str
    baseline: str
    rule: str
    level: float = 0.95
    draws: int = 1000
    guards: dict[str, float] = field(default_factory=dict)
    """Other metrics, with how far each may seem to fall before it stands in the way."""


class GateLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the data must show before a model is trained on it; ``mlflow.yaml`` says what each means."""

    max_age_days: float = 7
    min_volume: float = 0.4
    max_unknown_items: float = 0.2
    base_rate: tuple[float, float] = (0.005, 0.995)
    max_psi: float = 0.25
    max_ks: float = 0.2


@dataclass(frozen=True)
class ModelSettings:
    """What ``mlflow.yaml`` says of one model.

    Attributes:
        kind: what it is; by default the kind of the model's own name.
        horizon_days: how far ahead it looks; None is what the shop's domain says.
        learner: of a model that recommends items, what learns which speak for which: EASE or ALS.
    """

    experiment: str
    registered_name: str
    feature_service: str
    promotion: Promotion
    kind: ModelKind
    horizon_days: int | None = None
    learner: Learner = "EASE"


@dataclass(frozen=True)
class RegistrySettings:
    """The whole of ``mlflow.yaml``."""

    tracking_uri: str
    artifact_location: str | None
    """None where a tracking server is named: it knows where its artifacts go."""
    champion: str
    challenger: str
    source: Path
    """The file that says so."""
    models: dict[str, ModelSettings]
    gate: GateLimits = field(default_factory=GateLimits)

    def services(self) -> dict[str, tuple[str, ...]]:
        """The FeatureService of each model, with the views that it reads."""
        return {model.feature_service: model.kind.views for model in self.models.values()}


SHIPPED = Path(__file__).resolve().parent.parent / "mlflow.yaml"
"""The settings that come with the code."""
DESCRIPTION_LENGTH = 4_900
"""MLflow's databases hold 5,000 characters."""
OURS = "ubiquo/"
"""How the names of ubiquo's experiments begin."""
RESERVED = frozenset(
    {
        "all",
        "compare",
        "promote",
        "rollback",
        "history",
        "report",
        "evaluate",
        "drift",
        "decisions",
        "sending",
        "judge",
        "experiment",
        "simulate",
    }
)
"""What ``python -m training`` calls its other commands."""
RULE = "paired_bootstrap"
MAX_HORIZON_DAYS = 365
_MODEL_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")


def load_settings(home: Path, path: Path | None = None, tracking_uri: str = "") -> RegistrySettings:
    """Read ``mlflow.yaml``.

    Args:
        home: the folder that it calls ``${UBIQUO_HOME}``.
        path: the file; by default the one beside the packages.
        tracking_uri: what holds instead of the one that it names.

    Raises:
        ValueError: a key is missing or unknown; the message names file and key.
    """
    source = path or SHIPPED
    try:
        raw = yaml.safe_load(Template(source.read_text()).safe_substitute(UBIQUO_HOME=str(home.resolve())))
        models = {name: _model(f"{source}: models.{name}", name, entry) for name, entry in raw["models"].items()}
        _check_apart(source, models)
        gate = msgspec.convert(raw.get("gate", {}), GateLimits)
        uri = tracking_uri or raw["tracking_uri"]
        location = None if uri.startswith(("http:", "https:", "databricks")) else raw["artifact_location"]
        return RegistrySettings(uri, location, raw["aliases"]["champion"], raw["aliases"]["challenger"], source, models, gate)
    except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
        raise ValueError(f"{source}: {error}: compare it with the mlflow.yaml that ubiquo ships") from error


def _model(place: str, name: str, entry: Mapping[str, Any]) -> ModelSettings:
    """One entry under ``models``.

    Raises:
        ValueError: it says what cannot be done.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise ValueError(f"{place}: a model's name stands in its address: small letters, digits and hyphens")
    if name in RESERVED:
        raise ValueError(f"{place}: 'python -m training {name}' is something else: give the model another name")
    horizon = entry.get("horizon_days")
    if horizon is not None and (type(horizon) is not int or not 1 <= horizon <= MAX_HORIZON_DAYS):
        raise ValueError(f"{place}.horizon_days: {horizon!r} is no whole number between 1 and {MAX_HORIZON_DAYS}")
    learner = entry.get("learner", "EASE")
    if learner not in get_args(Learner):
        raise ValueError(f"{place}.learner: {learner!r}: use one of {', '.join(get_args(Learner))}")
    experiment = entry.get("experiment")
    if not isinstance(experiment, str) or not experiment.startswith(OURS):
        raise ValueError(f"{place}.experiment: {experiment!r} must begin with {OURS}, by which an erasure finds what its runs hold")
    try:
        kind = kind_named(entry.get("kind", name))
    except UnknownKindError as error:
        raise ValueError(f"{place}.kind: {error}") from None
    model = ModelSettings(**{**entry, "promotion": Promotion(**entry["promotion"]), "kind": kind})
    promotion = model.promotion
    if promotion.rule != RULE or promotion.baseline != kind.baseline:
        raise ValueError(f"{place}.promotion: rule must be {RULE} and baseline {kind.baseline!r}; nothing else is built")
    if promotion.metric in kind.unranked:
        raise ValueError(f"{place}.promotion: metric may not be {promotion.metric}: the baseline cannot be measured by it")
    for metric in (promotion.metric, *promotion.guards):
        if metric not in kind.metrics:
            raise ValueError(f"{place}.promotion: {metric!r} is not measured: use one of {', '.join(kind.metrics)}")
    if not 0.5 < promotion.level < 1 or promotion.draws < 100 or any(margin < 0 for margin in promotion.guards.values()):
        raise ValueError(f"{place}.promotion: level must lie between 0.5 and 1, draws be at least 100, and guards' margins not be negative")
    return model


def _check_apart(source: Path, models: Mapping[str, ModelSettings]) -> None:
    """See that no two models would be taken for each other.

    Raises:
        ValueError: they would; the message names both and the field.
    """
    for field_name in ("registered_name", "experiment"):
        seen: dict[str, str] = {}
        for name, model in models.items():
            value = getattr(model, field_name)
            if (other := seen.setdefault(value, name)) != name:
                raise ValueError(f"{source}: models.{name}.{field_name}: {value!r} is that of {other}: give each its own")
    views: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, model in models.items():
        other, read = views.setdefault(model.feature_service, (name, model.kind.views))
        if read != model.kind.views:
            told = f"{model.feature_service!r} reads {', '.join(read)} for {other}, and {', '.join(model.kind.views)} are needed"
            raise ValueError(f"{source}: models.{name}.feature_service: {told}: give it one of its own")


def model_names(path: Path | None = None) -> list[str]:
    """The models that ``mlflow.yaml`` names, in its order, told without importing any.

    Raises:
        ValueError: the file names none.
    """
    source = path or SHIPPED
    try:
        raw = yaml.safe_load(source.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{source} cannot be read ({error}): compare it with the mlflow.yaml that ubiquo ships") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), dict):
        raise ValueError(f"{source}: it names no models: compare it with the mlflow.yaml that ubiquo ships")
    return list(raw["models"])


@dataclass(frozen=True)
class VersionInfo:
    """What the registry holds of one version."""

    version: int
    aliases: list[str]
    tags: dict[str, str]
    run_id: str


_CROWNED = "crowned."
"""Before the time, the key of the tag that tells of a promotion."""


@dataclass(frozen=True)
class Crowning:
    """One time a version became the champion."""

    at: datetime
    version: int
    how: Literal["rule", "forced", "rollback"]
    reason: str


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

    def __init__(self, settings: RegistrySettings) -> None:
        import mlflow

        # importing it turned these on again, and nobody could mend them
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        self.settings = settings
        if self.settings.tracking_uri.startswith("sqlite:///"):
            Path(self.settings.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        names = [model.experiment for model in self.settings.models.values()]
        follow(self.settings.tracking_uri, self.settings.artifact_location, names)
        mlflow.set_tracking_uri(self.settings.tracking_uri)
        mlflow.set_registry_uri(self.settings.tracking_uri)
        self._client: MlflowClient = mlflow.MlflowClient()

    def frames(self) -> Iterator[tuple[str, str, pd.DataFrame]]:
        """Every table that a run has logged as a Parquet file: the run, the file's name, and the table.

        A run that was deleted counts: MLflow only hides it, and keeps its files.
        """
        import pandas as pd
        from mlflow.entities import ViewType

        # also of models that the file no longer names
        named = {model.experiment for model in self.settings.models.values()}
        found = self._client.search_experiments(view_type=ViewType.ALL)
        experiments = [each.experiment_id for each in found if each.name in named or each.name.startswith(OURS)]
        token: str | None = None
        while experiments:
            page = self._client.search_runs(experiments, run_view_type=ViewType.ALL, page_token=token)
            for run in page:
                for artifact in self._client.list_artifacts(run.info.run_id):
                    if artifact.path.endswith(".parquet"):
                        with tempfile.TemporaryDirectory() as scratch:
                            path = self._client.download_artifacts(run.info.run_id, artifact.path, scratch)
                            yield run.info.run_id, artifact.path, pd.read_parquet(path)
            token = page.token
            if not token:
                return

    def replace_frame(self, run_id: str, name: str, frame: pd.DataFrame) -> None:
        """Log a run's table anew, in place of the one of that name."""
        with tempfile.TemporaryDirectory() as scratch:
            frame.to_parquet(Path(scratch) / name)
            self._client.log_artifact(run_id, str(Path(scratch) / name))

    def save(self, model: str, folder: Path, signature: ModelSignature, example: pd.DataFrame, tags: dict[str, str]) -> int:
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
            pip_requirements=[
                "numpy",
                "pandas",
                "scipy",
                "scikit-learn",
                "lightgbm",
                "implicit",
                "msgspec",
                "threadpoolctl",
                "pyyaml",
                "iso4217",
            ],
        )
        name = self.settings.models[model].registered_name
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self._client.create_model_version(name, info.model_uri, run_id=info.run_id, tags=tags, model_id=info.model_id)
        self._client.set_registered_model_alias(name, self.settings.challenger, version.version)
        return int(version.version)

    def load(self, reference: str) -> LoadedModel:
        """The native model under ``model@alias``, e.g. ``churn@champion``.

        Raises:
            NoChampionError: no version carries the alias.
            DamagedArtifactError: its files are not those that were saved.
        """
        import mlflow

        model, _, alias = reference.partition("@")
        name = self.settings.models[model].registered_name
        version = self.version_of(model, alias)
        if version is None:
            raise NoChampionError(f"no model {name!r} has the alias {alias!r}: train and promote one (python -m training {model})")
        found = self._client.get_model_version(name, str(version))
        local = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{version}")
        folder = Path(local) / "artifacts"
        inner = next(p.parent for p in sorted(folder.rglob("manifest.json")))
        native = self.settings.models[model].kind.load(inner)
        return LoadedModel(native, name, version, dict(found.tags))

    def version_of(self, model: str, alias: str) -> int | None:
        """The version that carries *alias*, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return int(self._client.get_model_version_by_alias(self.settings.models[model].registered_name, alias).version)
        except MlflowException as error:
            # only a missing model or alias means "none"; a registry that cannot be asked must not look empty
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def tags_of(self, model: str, version: int) -> dict[str, str]:
        """The tags of one version."""
        return dict(self._client.get_model_version(self.settings.models[model].registered_name, str(version)).tags)

    def run_of(self, model: str, version: int) -> str:
        """The id of the run that made one version."""
        return str(self._client.get_model_version(self.settings.models[model].registered_name, str(version)).run_id)

    def versions(self, model: str) -> list[VersionInfo]:
        """Every version of a model, oldest first."""
        from mlflow.exceptions import MlflowException

        name = self.settings.models[model].registered_name
        try:
            aliases = self._client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            raise
        found = self._client.search_model_versions(f"name = '{name}'")
        told = [
            VersionInfo(int(v.version), [a for a, of in aliases.items() if str(of) == str(v.version)], dict(v.tags), str(v.run_id))
            for v in found
        ]
        return sorted(told, key=lambda v: v.version)

    def promote(self, model: str, version: int, at: datetime, how: Literal["rule", "forced", "rollback"], reason: str) -> None:
        """Point the champion alias at *version* and note when, how and why; the note is never overwritten."""
        name = self.settings.models[model].registered_name
        note = json.dumps({"how": how, "reason": reason})
        # the note first: a champion that nobody can account for would be worse than a note without effect
        self._client.set_model_version_tag(name, str(version), f"{_CROWNED}{at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}", note)
        self._client.set_model_version_tag(name, str(version), "promotion", reason)
        self._client.set_registered_model_alias(name, self.settings.champion, str(version))

    def crownings(self, model: str, versions: Sequence[VersionInfo] | None = None) -> list[Crowning]:
        """Every time that a version became the champion, oldest first; *versions* as ``versions`` has just told, if it has."""
        found = []
        for version in self.versions(model) if versions is None else versions:
            for key, value in version.tags.items():
                if key.startswith(_CROWNED):
                    at = datetime.fromisoformat(key.removeprefix(_CROWNED))
                    found.append(Crowning(at, version.version, **json.loads(value)))
        return sorted(found, key=lambda c: c.at)

    def tag(self, model: str, version: int, tags: dict[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self._client.set_model_version_tag(self.settings.models[model].registered_name, str(version), key, value)

    def describe(self, model: str, version: int, text: str) -> None:
        """Set the description of a version: its model card, cut to what every backend of MLflow can hold."""
        if len(text) > DESCRIPTION_LENGTH:
            text = text[:DESCRIPTION_LENGTH] + "\n\n(cut: the whole card is the run's model_card.md)"
        self._client.update_model_version(self.settings.models[model].registered_name, str(version), description=text)
