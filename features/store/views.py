"""The Feast objects: entities, feature views and feature services, made from the declarations."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from features.definitions.feature import Dtype
from features.definitions.view import ONLINE, View
from features.state.home import Home
from features.state.lean_feast import (
    Array,
    Bool,
    Bytes,
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

    def made(view: View, name: str, columns: Mapping[str, FeastType], online: bool) -> FeatureView:
        fields = [Field(name=view.key, dtype=String), Field(name=view.at_column, dtype=Int64)]
        fields += [Field(name=column, dtype=kind) for column, kind in columns.items()]
        source = FileSource(
            name=f"{name}_snapshots",
            path=str(snapshot_folder(home, view) / "*.parquet"),
            file_format=ParquetFormat(),
            timestamp_field="event_timestamp",
        )
        return FeatureView(name=name, entities=[entities[view.key]], ttl=timedelta(0), schema=fields, source=source, online=online)

    offline = {v.name: made(v, v.name, {column: FEAST[kind] for column, kind in v.columns.items()}, online=False) for v in views.values()}
    online = {v.name: made(v, f"{v.name}{ONLINE}", {v.packed_column: Bytes}, online=True) for v in views.values()}
    wanted = [FeatureService(name=name, features=[offline[v] for v in used]) for name, used in services.items()]
    return [*entities.values(), *offline.values(), *online.values(), *wanted]
