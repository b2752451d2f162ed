"""The Feast objects: entities, feature views and feature services, made from the declarations."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from features.definitions.feature import Dtype
from features.definitions.view import View
from features.state.home import Home
from features.state.lean_feast import (
    Array,
    Bool,
    Entity,
    FeastType,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    Float64,
    Int64,
    ParquetFormat,
    String,
    ValueType,
)
from features.store.snapshots import snapshot_folder

FEAST: dict[Dtype, FeastType] = {
    "integer": Int64, "float": Float64, "text": String, "truth": Bool, "integers": Array(Int64), "floats": Array(Float64),
    "texts": Array(String),
}  # fmt: skip


def feast_objects(
    home: Home, views: Mapping[str, View], services: Mapping[str, tuple[str, ...]]
) -> list[Entity | FeatureView | FeatureService]:
    """Everything to apply to the registry, in dependency order."""
    keys = sorted({view.key for view in views.values()})
    entities = {key: Entity(name=key.removesuffix("_id"), join_keys=[key], value_type=ValueType.STRING) for key in keys}
    made = {
        view.name: FeatureView(
            name=view.name,
            entities=[entities[view.key]],
            ttl=timedelta(0),
            schema=[
                Field(name=view.key, dtype=String),
                Field(name=view.at_column, dtype=Int64),
                *(Field(name=name, dtype=FEAST[kind]) for name, kind in view.columns.items()),
            ],
            source=FileSource(
                name=f"{view.name}_snapshots",
                path=str(snapshot_folder(home, view) / "*.parquet"),
                file_format=ParquetFormat(),
                timestamp_field="event_timestamp",
            ),
        )
        for view in views.values()
    }
    wanted = [FeatureService(name=name, features=[made[v] for v in used]) for name, used in services.items()]
    return [*entities.values(), *made.values(), *wanted]
