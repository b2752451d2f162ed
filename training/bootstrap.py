"""What stands behind each port of the jobs: the one place that chooses engines and hands them in."""

from __future__ import annotations

from features.state.home import Home
from features.store.feature_store import FeatureStore
from models.registry import Registry, RegistrySettings, load_settings


def model_settings(home: Home) -> RegistrySettings:
    """The ``mlflow.yaml`` of an installation."""
    return load_settings(home.root, home.settings.models_file, home.settings.tracking_uri)


def open_registry(home: Home) -> Registry:
    """The models of an installation."""
    return Registry(model_settings(home))


def open_store(home: Home) -> FeatureStore:
    """The feature store with the services of the models that ``mlflow.yaml`` names."""
    store = FeatureStore(home, model_settings(home).services())
    store.apply()
    return store
