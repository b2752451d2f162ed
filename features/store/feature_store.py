"""The only door to Feast: apply, materialize, push, historical, online. It owns Feast's traps, named where they are met."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pandas as pd
import pyarrow.parquet as pq

from features.catalogue.shop import Shop
from features.definitions.feature import Moment
from features.definitions.folds.registered import NAMES, CustomerState, nothing
from features.definitions.view import View, views_of
from features.state.clock import AHEAD, microseconds, moment_of
from features.state.disk import make_folder
from features.state.home import Home, configure_process
from features.state.ports import MissingStateError
from features.store.keyed_state import Row, RowsTell
from features.store.online_engines import KEY_VERSION, NO_BOUND, PROJECT, Noted, OnlineEngine, OnlineRow, RedisRows, SQLiteRows, entities_of
from features.store.snapshots import Wanted, backfill, drop_unread, snapshot_path

if TYPE_CHECKING:
    from features.state.lean_feast import feast

logger = logging.getLogger("ubiquo")
SERVICES: dict[str, tuple[str, ...]] = {
    "customer_v1": ("customer_activity", "customer_state"), "activity_v1": ("customer_activity",), "state_v1": ("customer_state",),
    "items_v1": ("item_stats",),
}  # fmt: skip
"""FeatureService name to the views that it reads; those of models come from their settings."""
WRITE_ROWS = 1_000
_pack, _unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(dict[str, Any]).decode


class StaleFeaturesError(MissingStateError):
    """A training row would have been joined to a snapshot other than its own; the message names view and time."""


class FeatureStore:
    """Feast over DuckDB (offline) and SQLite or Redis (online), for one home.

    Set ``UBIQUO_REDIS`` to a connection string such as ``localhost:6379`` to keep the online rows in Redis.
    """

    def __init__(self, home: Home, services: Mapping[str, tuple[str, ...]] | None = None) -> None:
        """Open the store; *services* maps the name of each FeatureService beside ``SERVICES`` to the views that it reads."""
        configure_process()
        from features.state.lean_feast import RegistryConfig, RepoConfig, feast

        # feast's import turns these on again: ibis and DuckDB warn each other of nothing a user could mend
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        self._home = home
        shop = Shop.load(home)
        self._timezone = shop.timezone
        self.views: Mapping[str, View] = views_of(shop.domain)
        """The feature views of the shop's domain, by name."""
        self._services = {**SERVICES, **(services or {})}
        redis = home.settings.redis
        make_folder(home.feast)
        self._drop_damaged_registry(home.feast / "registry.db")
        self._feast: feast.FeatureStore = feast.FeatureStore(
            config=RepoConfig(
                project=PROJECT,
                provider="local",
                # cache_mode thread: an expiring registry must not stall a request
                registry=RegistryConfig(path=str(home.feast / "registry.db"), cache_mode="thread", cache_ttl_seconds=3600),
                offline_store={"type": "duckdb"},
                online_store={"type": "redis", "connection_string": redis}
                if redis
                else {"type": "sqlite", "path": str(home.feast / "online.db")},
                entity_key_serialization_version=KEY_VERSION,
            )
        )
        self._feature_services: dict[str, feast.FeatureService] = {}
        # before Feast makes the file itself, readable to others
        self._sqlite = None if redis else SQLiteRows(home, self._feast)

    @cached_property
    def _rows(self) -> OnlineEngine:
        return self._sqlite or RedisRows(self._feast)

    @staticmethod
    def _drop_damaged_registry(path: Path) -> None:
        """Feast's registry says nothing that ``apply`` does not say again; cut short by a power cut it would stop every start."""
        from feast.protos.feast.core.Registry_pb2 import Registry
        from google.protobuf.message import DecodeError

        try:
            if path.exists():
                Registry().ParseFromString(path.read_bytes())
        except DecodeError:
            logger.warning("%s is damaged: it is made anew", path)
            path.unlink()

    def apply(self) -> None:
        """Register entities, views and services; what Feast's own ``apply`` would find by importing every file."""
        from features.store.views import feast_objects

        self._feast.apply(feast_objects(self._home, self.views, self._services))
        self._rows.keep_only(self.views)

    def customer_views(self) -> list[str]:
        """The views of customers."""
        return [view.name for view in self.views.values() if view.key == "customer_id"]

    def backfill(self, view: str, wanted: Wanted, advance: Any = lambda n: None) -> int:
        """Make the missing snapshots of *view*; see ``features.store.snapshots.backfill``."""
        drop_unread(self._home, self.views)
        return backfill(self._home, self.views[view], wanted, advance)

    def snapshot(self, view: str, as_of: datetime) -> Path:
        """Where the snapshot of *view* at *as_of* lies."""
        return snapshot_path(self._home, self.views[view], as_of)

    def expanded(self, row: Mapping[str, Any], as_of: datetime, folds: Sequence[str] = NAMES) -> Row:
        """A row with what its states tell at *as_of* in place of the states themselves.

        Raises:
            OutdatedStateError: one was made by another definition of its fold.
        """
        return expanded(row, Moment(as_of, self._timezone), folds)

    def historical(self, spine: pd.DataFrame, service: str, folds: Sequence[str] = NAMES) -> pd.DataFrame:
        """The spine with the features of *service* as they stood at each row's ``event_timestamp``.

        Args:
            spine: the entity's key, ``event_timestamp`` (UTC) and any columns to carry along; a unique key per row.
            service: the name of a FeatureService.
            folds: of states, which folds to read.

        Returns:
            One row a spine row, in the spine's order. An entity unknown at the time has nulls.

        Raises:
            StaleFeaturesError: a snapshot for one of the spine's times is missing, so Feast joined an older one.
            ValueError: the spine repeats a key.
        """
        key = self.views[self._services[service][0]].key
        if spine.duplicated([key, "event_timestamp"]).any():
            raise ValueError(f"the spine repeats ({key}, event_timestamp): Feast would silently drop such rows")
        for view in self._services[service]:
            for moment in spine["event_timestamp"].unique():
                if not self.snapshot(view, pd.Timestamp(moment).to_pydatetime()).exists():
                    raise StaleFeaturesError(f"no snapshot of {view} at {moment}: backfill it first")
        entities = spine[[key, "event_timestamp"]]
        joined = self._feast.get_historical_features(entities, features=self._service(service)).to_df()
        # Feast drops spine rows that lie before an entity's first feature row: join the spine again, in its order
        joined["event_timestamp"] = pd.to_datetime(joined["event_timestamp"], utc=True).astype("datetime64[us, UTC]")
        left = spine.assign(event_timestamp=spine["event_timestamp"].astype("datetime64[us, UTC]"))
        full = left.merge(joined, on=[key, "event_timestamp"], how="left", validate="one_to_one")
        if len(full) != len(spine):
            raise StaleFeaturesError(f"the join of {service} gave {len(full)} rows for a spine of {len(spine)}")
        for view in self._services[service]:
            at = full.pop(self.views[view].at_column)
            wanted = full["event_timestamp"].astype("int64")
            wrong = at.notna() & (at.fillna(0).astype("int64") != wanted)
            if wrong.any():
                late = full.loc[wrong, "event_timestamp"].iloc[0]
                raise StaleFeaturesError(f"{view}: {int(wrong.sum())} rows joined to an older snapshot than {late}: backfill it")
        return self._read_states(full, folds)

    def _read_states(self, frame: pd.DataFrame, folds: Sequence[str]) -> pd.DataFrame:
        """The frame with what its rows' states tell at each row's moment in place of the states."""
        held = [name for name in NAMES if name in frame]
        if not held:
            return frame
        rows = frame[held].astype(object).where(frame[held].notna(), None).to_dict("records")
        told = [self.expanded(row, at.to_pydatetime(), folds) for row, at in zip(rows, frame["event_timestamp"], strict=True)]
        read = pd.DataFrame(told, index=frame.index, columns=list(nothing(folds)), dtype=object)
        return pd.concat([frame.drop(columns=held), read], axis=1)

    def materialize(self, view: str, as_of: datetime) -> int:
        """Bring the snapshot of *view* at *as_of* online; returns the number of rows written.

        Rows that are already newer online stay: on SQLite Feast lets the last writer win, whatever its timestamp.
        """
        path = self.snapshot(view, as_of)
        if not path.exists():
            raise MissingStateError(f"no snapshot of {view} at {as_of.isoformat()}: backfill it first")
        return sum(self._write(view, batch.to_pylist()) for batch in pq.ParquetFile(path).iter_batches(WRITE_ROWS))

    def push(self, view: str, rows: Sequence[Row], as_of: datetime, is_now: bool = True) -> int:
        """Write rows of *view*, true as of *as_of*, online; newer rows stay. Where that *is_now*, those of a time to come do not."""
        at = microseconds(as_of)
        stamped = [{**row, self.views[view].at_column: at} for row in rows]
        return self._write(view, stamped, _believed_until(as_of, is_now))

    def delete_all(self, keys: Sequence[str], key: str = "customer_id") -> int:
        """Take everything that is online of some entities offline for good, whoever wrote it; returns how many rows there were."""
        if not keys:
            return 0
        gone = sum(self.delete(view.name, keys) for view in self.views.values() if view.key == key)
        self._rows.delete_all(entities_of(key, keys))
        return gone

    def delete(self, view: str, keys: Sequence[str], until: datetime | None = None, is_now: bool = True) -> int:
        """Take rows of *view* offline, newer ones than of *until* not; returns how many there were.

        Where that *is_now*, those of a time to come go too.
        """
        if not keys:
            return 0
        entities = entities_of(self.views[view].key, keys)
        if until is None:
            return self._rows.delete(self.views[view], entities)
        return self._rows.delete(self.views[view], entities, microseconds(until), _believed_until(until, is_now))

    def told(self) -> RowsTell | None:
        """Until when the rows tell of everything, as noted last; None where what was written is never lost."""
        return None if (noted := self._rows.noted()) is None else RowsTell(moment_of(noted.until), noted.server)

    def tell(self, until: datetime, before: RowsTell | None) -> bool:
        """Note that the rows tell of everything received before a moment, written since the store said *before*.

        Returns False, and notes nothing, where some of that may be lost: another server has taken over, or it has lost the note.
        """
        return before is None or self._rows.note(microseconds(until), Noted(microseconds(before.until), before.server))

    def scrub(self) -> None:
        """Leave no trace online of what was replaced or deleted."""
        self._rows.scrub()

    def online(self, service: str, keys: Sequence[str]) -> list[Row]:
        """The newest rows of *service* for *keys* as they are stored, in their order; an unknown key's values are all None.

        Each row holds, beside the features, ``<view>_at``: the moment (Unix microseconds) that the view's values are of. States are
        texts: ``expanded`` reads them.
        """
        views = [self.views[name] for name in self._services[service]]
        key = views[0].key
        rows: list[Row] = [{key: value} for value in keys]
        for view, held in zip(views, self._rows.read(views, keys), strict=True):
            for row, (at, packed) in zip(rows, held, strict=True):
                row[view.at_column] = at
                values = {} if packed is None else _unpack(packed)
                row.update((name, values.get(name)) for name in view.columns)
        return rows

    def _service(self, name: str) -> feast.FeatureService:
        # a look-up in Feast's registry costs more than the read itself
        if name not in self._feature_services:
            self._feature_services[name] = self._feast.get_feature_service(name)
        return self._feature_services[name]

    def _write(self, name: str, rows: Sequence[Row], believed_until: int = NO_BOUND) -> int:
        view = self.views[name]
        # in chunks, so that nobody waits for long
        chunks = (_packed(view, rows[start : start + WRITE_ROWS]) for start in range(0, len(rows), WRITE_ROWS))
        return sum(self._rows.write(view, chunk, believed_until) for chunk in chunks)


def _believed_until(moment: datetime, is_now: bool) -> int:
    """Up to which moment (Unix microseconds) what is online is believed: where *is_now* the time, none that is to come."""
    return microseconds(moment + AHEAD) if is_now else NO_BOUND


def _packed(view: View, rows: Sequence[Row]) -> list[OnlineRow]:
    """Rows as they lie online: the entity, its moment, and all the rest as one value."""
    entities = entities_of(view.key, [row[view.key] for row in rows])
    return [
        OnlineRow(entity, row[view.at_column], _pack({name: row.get(name) for name in view.columns}))
        for entity, row in zip(entities, rows, strict=True)
    ]


def expanded(row: Mapping[str, Any], moment: Moment, folds: Sequence[str] = NAMES) -> Row:
    """A row with what its states tell at *moment* in place of the states themselves.

    Raises:
        OutdatedStateError: one was made by another definition of its fold.
    """
    plain = {name: value for name, value in row.items() if name not in NAMES}
    if all(row.get(name) is None for name in NAMES):
        return plain | (nothing(folds) if any(name in row for name in NAMES) else {})
    return plain | CustomerState.from_row(row).features(moment, folds)
