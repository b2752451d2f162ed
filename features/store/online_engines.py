"""Feast's online stores: how rows are read at once, and how they leave.

Feast offers no call by which a row leaves, so there each store is spoken to in the form in which Feast writes it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import sqlalchemy as sa

from features.definitions.view import ONLINE, View
from features.state.ports import Database, State

if TYPE_CHECKING:
    from features.state.lean_feast import feast

logger = logging.getLogger("ubiquo")
PROJECT, KEY_VERSION = "ubiquo", 3
"""Feast's name of us, and of the form in which it writes keys."""


READ_ROWS = 10_000


class PackedRow(NamedTuple):
    """What is online of one entity in one view: the moment (Unix microseconds) that it is of, and the row, packed."""

    at: int | None
    packed: bytes | None


NOTHING = PackedRow(None, None)


class OnlineEngine(Protocol):
    """The rows of one online store of Feast."""

    def keep_only(self, views: Collection[str]) -> None:
        """Let go of rows that lie as another version of this code wrote them: nothing reads them, nor would an erasure."""

    def read(self, views: Sequence[View], keys: Sequence[str]) -> list[list[PackedRow]]:
        """For each of *views* what is held of each of *keys*."""

    def delete(self, view: View, entities: Sequence[Any]) -> int:
        """Let go of rows of *view*; returns how many there were."""

    def delete_all(self, entities: Sequence[Any]) -> None:
        """Let go of whatever is left of some entities, whoever wrote it."""

    def scrub(self) -> None:
        """Leave no trace of what was replaced or deleted."""


class SQLiteRows:
    """Rows in Feast's SQLite file: a table a view."""

    def __init__(self, state: State, store: feast.FeatureStore) -> None:
        self._store = store
        self._database: Database = state.database("online")
        self._views: dict[str, Any] = {}
        # readers go on while a writer commits
        self._database.connect().close()

    def keep_only(self, views: Collection[str]) -> None:
        """Let go of the tables of other views."""
        kept = {_table(view) for view in views}
        with self._database.begin() as connection:
            names = sa.inspect(connection).get_table_names()
            old = [name for name in names if name.startswith(f"{PROJECT}_") and name not in kept]
            for name in old:
                sa.Table(name, sa.MetaData()).drop(connection)
        if old:
            logger.warning("online rows of before lay another way and are let go: python -m features materialize brings all back")
            self.scrub()

    def read(self, views: Sequence[View], keys: Sequence[str]) -> list[list[PackedRow]]:
        """For each of *views* what is held of each of *keys*: Feast's own read, without the answer that it makes of it.

        That answer takes four times as long as the read.
        """
        online, config = self._store._get_provider().online_store, self._store.config
        found = []
        for view in views:
            if view.name not in self._views:
                self._views[view.name] = self._store.get_feature_view(f"{view.name}{ONLINE}")
            held: list[PackedRow] = []
            for start in range(0, len(keys), READ_ROWS):
                entities = entities_of(view.key, keys[start : start + READ_ROWS])
                for _, values in online.online_read(config, self._views[view.name], entities):
                    row = NOTHING
                    if values is not None:
                        row = PackedRow(values[view.at_column].int64_val, values[view.packed_column].bytes_val)
                    held.append(row)
            found.append(held)
        return found

    def delete(self, view: View, entities: Sequence[Any]) -> int:
        """Let go of rows of *view*; returns how many there were."""
        from feast.infra.key_encoding_utils import serialize_entity_key

        table = sa.table(_table(view.name), sa.column("entity_key", sa.LargeBinary))
        with self._database.begin() as connection:
            if not sa.inspect(connection).has_table(table.name):
                return 0
            raw = [serialize_entity_key(each, entity_key_serialization_version=KEY_VERSION) for each in entities]
            return sum(connection.execute(sa.delete(table).where(table.c.entity_key == key)).rowcount > 0 for key in raw)

    def delete_all(self, entities: Sequence[Any]) -> None:
        """Nothing is left: tables of other views are gone since ``keep_only``."""

    def scrub(self) -> None:
        """Bring the file to hold no more than its rows."""
        with contextlib.closing(self._database.connect()) as session:
            session.scrub()


class RedisRows:
    """Rows in Redis: one hash holds all of an entity, and goes with its last field."""

    def __init__(self, store: feast.FeatureStore) -> None:
        self._store = store
        self._client = store._get_provider().online_store._get_client(store.config.online_store)

    def keep_only(self, views: Collection[str]) -> None:
        """Nothing to do: hashes are not listed by view."""

    def read(self, views: Sequence[View], keys: Sequence[str]) -> list[list[PackedRow]]:
        """For each of *views* what is held of each of *keys*: Feast asks Redis once for all of them."""
        if not keys:
            return [[] for _ in views]
        features = [f"{view.name}{ONLINE}:{column}" for view in views for column in (view.at_column, view.packed_column)]
        answer = self._store.get_online_features(features=features, entity_rows=[{views[0].key: key} for key in keys]).to_dict()
        return [[PackedRow(*each) for each in zip(answer[v.at_column], answer[v.packed_column], strict=True)] for v in views]

    def delete(self, view: View, entities: Sequence[Any]) -> int:
        """Let go of the fields of *view* in each entity's hash; returns how many hashes had any."""
        from feast.infra.online_stores.helpers import _mmh3

        name = f"{view.name}{ONLINE}"
        hashed = [_mmh3(f"{name}:{field}") for field in (view.at_column, view.packed_column)]
        return sum(bool(self._client.hdel(key, f"_ts:{name}", *hashed)) for key in self._keys(entities))

    def delete_all(self, entities: Sequence[Any]) -> None:
        """Let go of the hashes, what another version of this code wrote too."""
        self._client.delete(*self._keys(entities))

    def scrub(self) -> None:
        """Nothing to do: Redis keeps nothing of what is gone."""

    @staticmethod
    def _keys(entities: Sequence[Any]) -> list[bytes]:
        from feast.infra.online_stores.helpers import _redis_key

        return [_redis_key(PROJECT, entity, entity_key_serialization_version=KEY_VERSION) for entity in entities]


def entities_of(key: str, values: Sequence[str]) -> list[Any]:
    """Feast's names of entities."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return [EntityKey(join_keys=[key], entity_values=[Value(string_val=value)]) for value in values]


def _table(view: str) -> str:
    return f"{PROJECT}_{view}{ONLINE}"
