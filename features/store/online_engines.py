"""How rows leave Feast's online stores: Feast offers no such call, so each is spoken to in the form in which Feast writes it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import sqlalchemy as sa

from features.definitions.view import ONLINE
from features.state.ports import Database, State

logger = logging.getLogger("ubiquo")
PROJECT, KEY_VERSION = "ubiquo", 3
"""Feast's name of us, and of the form in which it writes keys."""


class OnlineEngine(Protocol):
    """The rows of one online store of Feast."""

    def keep_only(self, views: Collection[str]) -> None:
        """Let go of rows that lie as another version of this code wrote them: nothing reads them, nor would an erasure."""

    def delete(self, view: str, fields: Sequence[str], entities: Sequence[Any]) -> int:
        """Let go of rows of *view*, which has *fields*; returns how many there were."""

    def delete_all(self, entities: Sequence[Any]) -> None:
        """Let go of whatever is left of some entities, whoever wrote it."""

    def scrub(self) -> None:
        """Leave no trace of what was replaced or deleted."""


class SQLiteRows:
    """Rows in Feast's SQLite file: a table a view."""

    def __init__(self, state: State) -> None:
        self._database: Database = state.database("online")
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

    def delete(self, view: str, fields: Sequence[str], entities: Sequence[Any]) -> int:
        """Let go of rows of *view*; returns how many there were."""
        from feast.infra.key_encoding_utils import serialize_entity_key

        table = sa.table(_table(view), sa.column("entity_key", sa.LargeBinary))
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

    def __init__(self, client: Any) -> None:
        self._client = client

    def keep_only(self, views: Collection[str]) -> None:
        """Nothing to do: hashes are not listed by view."""

    def delete(self, view: str, fields: Sequence[str], entities: Sequence[Any]) -> int:
        """Let go of the fields of *view* in each entity's hash; returns how many hashes had any."""
        from feast.infra.online_stores.helpers import _mmh3

        name = f"{view}{ONLINE}"
        hashed = [_mmh3(f"{name}:{field}") for field in fields]
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


def _table(view: str) -> str:
    return f"{PROJECT}_{view}{ONLINE}"
