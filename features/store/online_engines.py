"""Feast's online stores: how rows are read at once, and how they leave.

Feast offers no call by which a row leaves, so there each store is spoken to in the form in which Feast writes it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import sqlalchemy as sa

from features.definitions.view import ONLINE, View
from features.state.ports import Database, State, UnreachableError

if TYPE_CHECKING:
    from features.state.lean_feast import feast

logger = logging.getLogger("ubiquo")
PROJECT, KEY_VERSION = "ubiquo", 3
"""Feast's name of us, and of the form in which it writes keys."""


READ_ROWS = 10_000
_NOTE = f"{PROJECT}:rows-tell-until"
_NOTE_LATER = """
local noted = tonumber(redis.call('GET', KEYS[1]) or '0')
if noted >= tonumber(ARGV[2]) and noted < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
"""
FEW_ROWS = 20
READ_SECONDS = 0.25
"""How long an answer of Redis is waited for."""
DOWN_SECONDS = 1.0
"""For how long it is not asked again once it has not answered."""


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

    def note(self, moment: int, since: int = 0) -> None:
        """Note, after all that was written before, that the rows tell of everything received before a moment (Unix microseconds).

        Unless the moment that is noted lies before *since*: some was lost meanwhile.
        """

    def noted(self) -> int | None:
        """The latest moment that was noted and not lost; None where nothing ever is."""


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

    def note(self, moment: int, since: int = 0) -> None:
        """Nothing to do: what was written stays."""

    def noted(self) -> int | None:
        """None: the file loses nothing."""
        return None

    def scrub(self) -> None:
        """Bring the file to hold no more than its rows."""
        with contextlib.closing(self._database.connect()) as session:
            session.scrub()


class RedisRows:
    """Rows in Redis: one hash holds all of an entity, and goes with its last field."""

    def __init__(self, store: feast.FeatureStore) -> None:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        online, config = store._get_provider().online_store, store.config.online_store
        self._writer = online._get_client(config)
        place = config.connection_string
        self._place = ",".join(part for part in place.split(",") if "=" not in part)
        # a client of its own: an answer does not wait as long as a write may, and asks once more where Redis was started anew
        waits = f"{place},socket_timeout={READ_SECONDS},socket_connect_timeout={READ_SECONDS}"
        self._client = type(online)()._get_client(config.model_copy(update={"connection_string": waits}))
        self._client.set_retry(Retry(NoBackoff(), 1))
        self._down_until = 0.0
        self._named: dict[str, tuple[bytes, bytes]] = {}

    def keep_only(self, views: Collection[str]) -> None:
        """Nothing to do: hashes are not listed by view."""

    def read(self, views: Sequence[View], keys: Sequence[str]) -> list[list[PackedRow]]:
        """For each of *views* what is held of each of *keys*, in one round trip: as Feast reads it, without the answer that it makes of it.

        Raises:
            UnreachableError: Redis does not answer; for a moment it is not asked again.
        """
        if not keys:
            return [[] for _ in views]
        if time.monotonic() < self._down_until:
            raise UnreachableError(f"Redis at {self._place} has just not answered")
        fields = [field for view in views for field in self._fields(view)]
        found: list[list[PackedRow]] = [[] for _ in views]
        for start in range(0, len(keys), READ_ROWS):
            # many rows are for work in the background
            client = self._client if len(keys) <= FEW_ROWS else self._writer
            with self._told(), client.pipeline(transaction=False) as asked:
                for key in self._keys(entities_of(views[0].key, keys[start : start + READ_ROWS])):
                    asked.hmget(key, fields)
                answers = asked.execute()
            for values in answers:
                for k, rows in enumerate(found):
                    rows.append(_unpacked(*values[2 * k : 2 * k + 2]))
        return found

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        from redis.exceptions import RedisError

        try:
            yield
        except RedisError as error:
            self._down_until = time.monotonic() + DOWN_SECONDS
            raise UnreachableError(f"Redis at {self._place} does not answer ({type(error).__name__}: {error})") from None

    def _fields(self, view: View) -> tuple[bytes, bytes]:
        """What Feast calls the two values of a view in an entity's hash."""
        from feast.infra.online_stores.helpers import _mmh3

        if view.name not in self._named:
            at, packed = (_mmh3(f"{view.name}{ONLINE}:{column}") for column in (view.at_column, view.packed_column))
            self._named[view.name] = at, packed
        return self._named[view.name]

    def delete(self, view: View, entities: Sequence[Any]) -> int:
        """Let go of the fields of *view* in each entity's hash; returns how many hashes had any."""
        fields = f"_ts:{view.name}{ONLINE}", *self._fields(view)
        return sum(bool(self._writer.hdel(key, *fields)) for key in self._keys(entities))

    def delete_all(self, entities: Sequence[Any]) -> None:
        """Let go of the hashes, what another version of this code wrote too."""
        self._writer.delete(*self._keys(entities))

    def scrub(self) -> None:
        """Nothing to do: Redis keeps nothing of what is gone."""

    def note(self, moment: int, since: int = 0) -> None:
        """Note a moment that is later than the one noted, if that is no earlier than *since*.

        Redis keeps commands in their order, so that what it loses is what came last.
        """
        self._writer.eval(_NOTE_LATER, 1, _NOTE, moment, since)

    def noted(self) -> int | None:
        """The latest moment that was noted; 0 in a Redis that has lost everything."""
        return int(self._writer.get(_NOTE) or 0)

    @staticmethod
    def _keys(entities: Sequence[Any]) -> list[bytes]:
        from feast.infra.online_stores.helpers import _redis_key

        return [_redis_key(PROJECT, entity, entity_key_serialization_version=KEY_VERSION) for entity in entities]


def _unpacked(at: bytes | None, packed: bytes | None) -> PackedRow:
    from feast.protos.feast.types.Value_pb2 import Value

    if not at or not packed:
        return NOTHING
    return PackedRow(Value.FromString(at).int64_val, Value.FromString(packed).bytes_val)


def entities_of(key: str, values: Sequence[str]) -> list[Any]:
    """Feast's names of entities."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return [EntityKey(join_keys=[key], entity_values=[Value(string_val=value)]) for value in values]


def _table(view: str) -> str:
    return f"{PROJECT}_{view}{ONLINE}"
