"""Identifiers to customers, as known at a time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake

from features.events import Event, IdentifierKind, identity_key
from features.home import Home

SCHEMA = pa.schema(
    [
        ("identity_key", pa.string()),
        ("customer_id", pa.string()),
        ("known_at", pa.timestamp("us", tz="UTC")),
        ("event_id", pa.string()),
    ]
)


def mint_customer_id(key: str) -> str:
    """The id of the customer first seen under *key*: opaque, and the same in every rebuild of the table."""
    return "c_" + hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


class Identities:
    """The identifiers table: append-only rows of ``identity_key -> customer_id``, each known from a time on.

    An event that carries several identifiers joins those not yet known to the customer of the strongest known one.
    Safe to call from several threads.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._customers: dict[str, str] = {}
        self._since: dict[str, datetime] = {}
        self._pending: list[tuple[str, str, datetime, str]] = []
        self._lock = threading.Lock()
        self._read: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read the table again: another process may have added to it."""
        if not DeltaTable.is_deltatable(str(self._home.identifiers)):
            return
        # the table only grows, so what was read once need not be read again
        files = [f for f in DeltaTable(str(self._home.identifiers)).file_uris() if f not in self._read]
        for file in files:
            rows = pq.ParquetFile(file.removeprefix("file://")).read(columns=["identity_key", "customer_id", "known_at"])
            with self._lock:
                for key, customer, known_at in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                    self._customers[key] = customer
                    self._since[key] = min(known_at, self._since.get(key, known_at))
        self._read.update(files)

    def resolve(self, identifiers: Mapping[IdentifierKind, str]) -> str | None:
        """The customer that the strongest known one of *identifiers* (kind to value) belongs to, or None."""
        keys = (f"{kind}:{identifiers[kind]}" for kind in get_args(IdentifierKind) if kind in identifiers)
        return next((self._customers[key] for key in keys if key in self._customers), None)

    def strongest(self) -> dict[str, str]:
        """Each customer's strongest identifier as ``kind:value``, the first of them by alphabet: what other systems know her by."""
        rank = {kind: k for k, kind in enumerate(get_args(IdentifierKind))}
        best: dict[str, tuple[int, str]] = {}
        for key, customer in self._customers.items():
            mine = (rank[key.split(":", 1)[0]], key)
            if customer not in best or mine < best[customer]:
                best[customer] = mine
        return {customer: key for customer, (_, key) in best.items()}

    def learn(self, event: Event, known_at: datetime) -> str | None:
        """The event's customer, minted if need be; new identifiers wait for ``flush``. None for an anonymous event."""
        key = identity_key(event)
        if key is None:
            return None
        with self._lock:
            return self._learn(key, event, known_at)

    def _learn(self, key: str, event: Event, known_at: datetime) -> str:
        keys = [key, *(f"{kind}:{value}" for kind, value in event.identifiers.items() if f"{kind}:{value}" != key)]
        customer = next((self._customers[k] for k in keys if k in self._customers), None) or mint_customer_id(key)
        for each in keys:
            owner = self._customers.setdefault(each, customer)
            # an import may tell of a time before the first live event: then she was known already
            if each not in self._since or known_at < self._since[each]:
                self._since[each] = known_at
                self._pending.append((each, owner, known_at, event.event_id))
        return customer

    def learn_all(self, events: Iterable[tuple[Event, datetime]]) -> None:
        """Learn from each event in turn."""
        for event, known_at in events:
            self.learn(event, known_at)

    def flush(self) -> None:
        """Append what was learnt to the table; without news it writes nothing."""
        with self._lock:
            if not self._pending:
                return
            columns = [list(column) for column in zip(*self._pending, strict=True)]
            table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
            write_deltalake(str(self._home.identifiers), table, mode="append")
            self._pending = []
