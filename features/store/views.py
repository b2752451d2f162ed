"""The Feast objects: entities, feature views and the FeatureService of each model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import pyarrow as pa

from features.events.event import Purpose
from features.people.consent import FEATURES, STATISTICS
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

_ACTIVITY_FLOATS = (
    "gap_mean_days", "gap_sd_days", "gap_p90_days", "visit_trend", "spend_trend", "basket_minor_91", "recency_over_gap_mean",
    "recency_over_gap_p90", "discount_share_91", "private_share_91", "weekend_share_91", "evening_share_91",
)  # fmt: skip
_ACTIVITY_INTEGERS = (
    "tenure_days", "recency_days", "discount_minor_91", "coupon_minor_182", "weekend_baskets_91", "evening_baskets_91",
    "visit_days_total", "visit_days_7", "visit_days_14", "visit_days_28", "visit_days_56", "visit_days_91", "visit_days_182",
    "baskets_28", "baskets_91", "baskets_182", "spend_minor_28", "spend_minor_91", "spend_minor_182", "lines_28", "lines_91", "lines_182",
    "gap_max_days", "gap_last_days", "stores_91", "departments_91", "categories_91", "items_91", "private_lines_91",
    "messages_total", "messages_91", "redemptions_total", "redemptions_182", "campaigns_redeemed_broad",
    "campaigns_redeemed_targeted", "campaigns_sent_broad", "campaigns_sent_targeted", "days_since_redemption",
)  # fmt: skip
CUSTOMER_ACTIVITY: dict[str, FeastType] = {**dict.fromkeys(_ACTIVITY_INTEGERS, Int64), **dict.fromkeys(_ACTIVITY_FLOATS, Float64)}
CUSTOMER_HISTORY: dict[str, FeastType] = {
    "bought_item_ids": Array(String),
    "bought_counts": Array(Int64),
    "bought_last_at": Array(Int64),
    "bought_weights": Array(Float64),
    "recent_item_ids": Array(String),
    "recent_at": Array(Int64),
    "recent_weights": Array(Float64),
    "last_event_at": Int64,
    "last_channel": String,
}
ITEM_STATS: dict[str, FeastType] = {
    "recommendable": Bool,
    "households": Int64,
    "purchases_28": Int64,
    "popularity": Float64,
    "purchases": Int64,
    "mailer_stores": Int64,
    "display_stores": Int64,
    "price_minor": Float64,
}
_ARROW = {
    Int64: pa.int64(), Float64: pa.float64(), String: pa.string(), Bool: pa.bool_(), Array(String): pa.list_(pa.string()),
    Array(Int64): pa.list_(pa.int64()), Array(Float64): pa.list_(pa.float64()),
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """One feature view: its name, its entity's key, its columns, and the column that tells which snapshot a row is of.

    Feast joins the last row at or before the spine's time, however old; ``at_column`` (Unix microseconds, a feature like
    any other) lets the door notice when that is not the row that was asked for.
    """

    name: str
    key: str
    columns: dict[str, FeastType]
    purposes: tuple[Purpose, ...] = FEATURES
    """What an event must be allowed for to count in it."""

    @property
    def at_column(self) -> str:
        """The name of the snapshot's time among the features."""
        return f"{self.name}_at"

    def arrow_schema(self) -> pa.Schema:
        """The Parquet schema of a snapshot; times in microseconds, for DuckDB's sake."""
        return pa.schema(
            [
                (self.key, pa.string()),
                ("event_timestamp", pa.timestamp("us", tz="UTC")),
                (self.at_column, pa.int64()),
                *((name, _ARROW[kind]) for name, kind in self.columns.items()),
            ]
        )


VIEWS = {
    view.name: view
    for view in (
        View("customer_activity", "customer_id", CUSTOMER_ACTIVITY),
        View("customer_history", "customer_id", CUSTOMER_HISTORY),
        View("item_stats", "item_id", ITEM_STATS, STATISTICS),
    )
}
SERVICES: dict[str, tuple[str, ...]] = {
    "churn_v1": ("customer_activity",),
    "recommendations_v1": ("customer_history",),
    "next_best_offer_v1": ("customer_activity", "customer_history"),
    "items_v1": ("item_stats",),
}
"""FeatureService name to the views that it reads; a model version carries the name of its service."""


def feast_objects(home: Home) -> list[Entity | FeatureView | FeatureService]:
    """Everything to apply to the registry, in dependency order."""
    entities = {
        key: Entity(name=key.removesuffix("_id"), join_keys=[key], value_type=ValueType.STRING) for key in ("customer_id", "item_id")
    }
    views = {
        view.name: FeatureView(
            name=view.name,
            entities=[entities[view.key]],
            ttl=timedelta(0),
            schema=[
                Field(name=view.key, dtype=String),
                Field(name=view.at_column, dtype=Int64),
                *(Field(name=name, dtype=kind) for name, kind in view.columns.items()),
            ],
            source=FileSource(
                name=f"{view.name}_snapshots",
                path=str(home.snapshots / view.name / "*.parquet"),
                file_format=ParquetFormat(),
                timestamp_field="event_timestamp",
            ),
        )
        for view in VIEWS.values()
    }
    services = [FeatureService(name=name, features=[views[v] for v in used]) for name, used in SERVICES.items()]
    return [*entities.values(), *views.values(), *services]
