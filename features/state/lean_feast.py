"""Feast, imported in a quarter of its time: the names that views and store need of it.

Feast decorates its classes with typeguard, which parses and rewrites their source at import: 1.7 of 2.2 seconds, in every command
and at every start of the service. What it would check are the arguments that this package passes, and its tests pass them all.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import typeguard


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Let typeguard's decorator leave what it decorates as it is."""
    checked = typeguard.typechecked

    def as_it_is(target: Any = None, **options: Any) -> Any:
        # with options it is called before it decorates
        return as_it_is if target is None else target

    typeguard.typechecked = as_it_is
    try:
        # it would turn on warnings that no user can mend
        with warnings.catch_warnings():
            yield
    finally:
        typeguard.typechecked = checked


with unchecked():
    import feast
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
    from feast.data_format import ParquetFormat
    from feast.repo_config import RegistryConfig, RepoConfig
    from feast.types import Array, Bool, Bytes, FeastType, Float64, Int64, String

__all__ = [
    "Array",
    "Bool",
    "Bytes",
    "Entity",
    "FeastType",
    "FeatureService",
    "FeatureView",
    "Field",
    "FileSource",
    "Float64",
    "Int64",
    "ParquetFormat",
    "RegistryConfig",
    "RepoConfig",
    "String",
    "ValueType",
    "feast",
]
