"""Feast's online stores: how rows are read at once, how the newest stays, and how they leave.

Feast offers no call by which a row leaves, nor one that writes a row unless a newer one is there, whoever writes at the same time. So
each store is spoken to in the form in which Feast writes it, and Feast reads what was written so.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import sqlalchemy as sa

from features.definitions.view import ONLINE, View
from features.state.clock import moment_of
from features.state.ports import Database, State, UnreachableError

if TYPE_CHECKING:
    from features.state.lean_feast import feast

logger = logging.getLogger("ubiquo")
PROJECT, KEY_VERSION = "ubiquo", 3
"""Feast's name of us, and of the form in which it writes keys."""


ONLINE_LEASE = "online"
"""Of whoever looks at rows in the file and then writes them."""
READ_ROWS = 10_000
_NOTE = f"{PROJECT}:rows-tell-until"
_MOMENT = """
local function moment(value)
  if not value then return -1 end
  local found, unit = 0, 1
  for k = 2, #value do
    found = found + string.byte(value, k) % 128 * unit
    unit = unit * 128
  end
  return found
end
local function is_due(key, field, at, believed)
  local held = moment(redis.call('HGET', key, field))
  return held <= tonumber(at) or held > tonumber(believed)
end
"""
"""The moment in a value as Feast writes it: a tag, then the number in groups of seven bits, the lowest first."""
_WRITE = (
    _MOMENT
    + """
local written = 0
for n, key in ipairs(KEYS) do
  local at, time, moment, packed = unpack(ARGV, 4 * n + 1, 4 * n + 4)
  if is_due(key, ARGV[3], at, ARGV[1]) then
    redis.call('HSET', key, ARGV[2], time, ARGV[3], moment, ARGV[4], packed)
    written = written + 1
  end
end
return written
"""
)
_DELETE = (
    _MOMENT
    + """
local gone = 0
for _, key in ipairs(KEYS) do
  if is_due(key, ARGV[4], ARGV[1], ARGV[2]) and redis.call('HDEL', key, ARGV[3], ARGV[4], ARGV[5]) > 0 then gone = gone + 1 end
end
return gone
"""
)
SCRIPTED_ROWS = 100
"""How many rows a script writes: nobody else is answered meanwhile."""
NO_BOUND = 1 << 53
"""Later than any moment: the largest whole number that a script knows exactly."""
_NOTED = """
local server = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') or ''
local noted = tonumber(redis.call('GET', KEYS[1]) or '0')
"""
_SAY = _NOTED + "return {noted, server}"
_NOTE_LATER = (
    _NOTED
    + """
if noted < tonumber(ARGV[2]) or server ~= ARGV[3] then return 0 end
if noted < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
"""
)
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


class OnlineRow(NamedTuple):
    """A row to be written: of what entity, of what moment (Unix microseconds), and its values, packed."""

    entity: Any
    at: int
    packed: bytes


class Noted(NamedTuple):
    """Until when rows tell (Unix microseconds), and the server that says so."""

    until: int
    server: str


class OnlineEngine(Protocol):
    """The rows of one online store of Feast."""

    def keep_only(self, views: Collection[str]) -> None:
        """Let go of rows that lie as another version of this code wrote them: nothing reads them, nor would an erasure."""

    def read(self, views: Sequence[View], keys: Sequence[str]) -> list[list[PackedRow]]:
        """For each of *views* what is held of each of *keys*."""

    def write(self, view: View, rows: Sequence[OnlineRow], believed_until: int = NO_BOUND) -> int:
        """Write rows of *view*; returns how many it wrote.

        A newer row stays, whoever writes at the same time, unless it is of a moment after *believed_until*.
        """

    def delete(self, view: View, entities: Sequence[Any], until: int = NO_BOUND, believed_until: int = NO_BOUND) -> int:
        """Let go of rows of *view* of moments up to *until*, and of those after *believed_until*; returns how many there were."""

    def delete_all(self, entities: Sequence[Any]) -> None:
        """Let go of whatever is left of some entities, whoever wrote it."""

    def scrub(self) -> None:
        """Leave no trace of what was replaced or deleted."""

    def note(self, moment: int, before: Noted) -> bool:
        """Note, after all that was written since *before*, that the rows tell of everything received before a moment (Unix microseconds).

        Returns False, and notes nothing, where another server says so now, or of an earlier moment than before.
        """

    def noted(self) -> Noted | None:
        """The latest moment that was noted and not lost; None where nothing ever is."""


class SQLiteRows:
    """Rows in Feast's SQLite file: a table a view."""

    def __init__(self, state: State, store: feast.FeatureStore) -> None:
        self._store, self._lease = store, state.lease
        self._database: Database = state.database("online")
        self._views: dict[str, Any] = {}
        # readers go on while a writer commits
        self._database.connect().close()

    def keep_only(self, views: Collection[str]) -> None:
        """Let go of the tables of other views."""
        kept = {_table(view) for view in views}
        with self._lease.hold(ONLINE_LEASE), self._database.begin() as connection:
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
        return [
            [row for k in range(0, len(keys), READ_ROWS) for row in self._held(view, entities_of(view.key, keys[k : k + READ_ROWS]))]
            for view in views
        ]

    def _held(self, view: View, entities: Sequence[Any]) -> list[PackedRow]:
        online, config = self._store._get_provider().online_store, self._store.config
        return [
            NOTHING if values is None else PackedRow(values[view.at_column].int64_val, values[view.packed_column].bytes_val)
            for _, values in online.online_read(config, self._view(view), entities)
        ]

    def _view(self, view: View) -> Any:
        if view.name not in self._views:
            self._views[view.name] = self._store.get_feature_view(f"{view.name}{ONLINE}")
        return self._views[view.name]

    def write(self, view: View, rows: Sequence[OnlineRow], believed_until: int = NO_BOUND) -> int:
        """Write rows of *view*, with Feast, unless a newer one is there; returns how many it wrote."""
        from feast.protos.feast.types.Value_pb2 import Value

        # Feast lets the last writer win: another process must not write between the look and the write
        with self._lease.hold(ONLINE_LEASE):
            due = self._due(view, [row.entity for row in rows], [row.at for row in rows], believed_until)
            batch = []
            for row in (row for row, is_due in zip(rows, due, strict=True) if is_due):
                values = {view.at_column: Value(int64_val=row.at), view.packed_column: Value(bytes_val=row.packed)}
                batch.append((row.entity, values, moment_of(row.at), None))
            if batch:
                self._store._get_provider().online_write_batch(self._store.config, self._view(view), batch, None)
        return len(batch)

    def _due(self, view: View, entities: Sequence[Any], until: Sequence[int], believed_until: int) -> list[bool]:
        """Of each entity whether its row is of no later moment than *until*, or of one that is not believed."""
        held = [-1 if row.at is None else row.at for row in self._held(view, entities)]
        return [its <= at or its > believed_until for its, at in zip(held, until, strict=True)]

    def delete(self, view: View, entities: Sequence[Any], until: int = NO_BOUND, believed_until: int = NO_BOUND) -> int:
        """Let go of rows of *view* up to a moment; returns how many there were."""

        table = sa.table(_table(view.name), sa.column("entity_key", sa.LargeBinary))
        with self._lease.hold(ONLINE_LEASE):
            if until < NO_BOUND:
                due = self._due(view, entities, [until] * len(entities), believed_until)
                entities = [entity for entity, is_due in zip(entities, due, strict=True) if is_due]
            return self._deleted(table, entities)

    def _deleted(self, table: sa.TableClause, entities: Sequence[Any]) -> int:
        from feast.infra.key_encoding_utils import serialize_entity_key

        with self._database.begin() as connection:
            if not sa.inspect(connection).has_table(table.name):
                return 0
            raw = [serialize_entity_key(each, entity_key_serialization_version=KEY_VERSION) for each in entities]
            return sum(connection.execute(sa.delete(table).where(table.c.entity_key == key)).rowcount > 0 for key in raw)

    def delete_all(self, entities: Sequence[Any]) -> None:
        """Nothing is left: tables of other views are gone since ``keep_only``."""

    def note(self, moment: int, before: Noted) -> bool:
        """Nothing to do: what was written stays."""
        return True

    def noted(self) -> Noted | None:
        """None: the file loses nothing."""
        return None

    def scrub(self) -> None:
        """Bring the file to hold no more than its rows."""
        with self._lease.hold(ONLINE_LEASE), contextlib.closing(self._database.connect()) as session:
            session.scrub()


class Fields(NamedTuple):
    """What Feast calls what it writes of a view into an entity's hash."""

    time: bytes
    at: bytes
    packed: bytes


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
        self._named: dict[str, Fields] = {}

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
        fields = [field for view in views for field in self._fields(view)[1:]]
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

    def _fields(self, view: View) -> Fields:
        from feast.infra.online_stores.helpers import _mmh3

        if view.name not in self._named:
            at, packed = (_mmh3(f"{view.name}{ONLINE}:{column}") for column in (view.at_column, view.packed_column))
            self._named[view.name] = Fields(f"_ts:{view.name}{ONLINE}".encode(), at, packed)
        return self._named[view.name]

    def write(self, view: View, rows: Sequence[OnlineRow], believed_until: int = NO_BOUND) -> int:
        """Write rows of *view* unless a newer one is there, in one round trip; returns how many it wrote.

        Feast reads before it writes, and another process may write in between.
        """
        from feast.protos.feast.types.Value_pb2 import Value
        from google.protobuf.timestamp_pb2 import Timestamp

        with self._writer.pipeline(transaction=False) as asked:
            for start in range(0, len(rows), SCRIPTED_ROWS):
                some = rows[start : start + SCRIPTED_ROWS]
                told: list[Any] = [believed_until, *self._fields(view)]
                for row in some:
                    time = Timestamp()
                    time.FromMicroseconds(row.at)
                    values = Value(int64_val=row.at), Value(bytes_val=row.packed)
                    told += [row.at, *(each.SerializeToString() for each in (time, *values))]
                asked.eval(_WRITE, len(some), *self._keys([row.entity for row in some]), *told)
            return sum(asked.execute())

    def delete(self, view: View, entities: Sequence[Any], until: int = NO_BOUND, believed_until: int = NO_BOUND) -> int:
        """Let go of the fields of *view* in each entity's hash up to a moment; returns how many hashes had any."""
        with self._writer.pipeline(transaction=False) as asked:
            for start in range(0, len(entities), SCRIPTED_ROWS):
                keys = self._keys(entities[start : start + SCRIPTED_ROWS])
                asked.eval(_DELETE, len(keys), *keys, until, believed_until, *self._fields(view))
            return sum(asked.execute())

    def delete_all(self, entities: Sequence[Any]) -> None:
        """Let go of the hashes, what another version of this code wrote too."""
        self._writer.delete(*self._keys(entities))

    def scrub(self) -> None:
        """Nothing to do: Redis keeps nothing of what is gone."""

    def note(self, moment: int, before: Noted) -> bool:
        """Note a moment that is later than the one noted, if the same run of the server answers and notes no less than *before*.

        Redis keeps commands in their order, so that what it loses is what came last, and loses it only where another run of a
        server takes over. Each run names itself (``run_id`` in what ``INFO`` says).
        """
        return bool(self._writer.eval(_NOTE_LATER, 1, _NOTE, moment, *before))

    def noted(self) -> Noted | None:
        """The latest moment that was noted; 0 in a Redis that has lost everything."""
        until, server = self._writer.eval(_SAY, 1, _NOTE)
        return Noted(int(until), server.decode())

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
