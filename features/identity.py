"""Identifiers to customers, as known at a time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import get_args

import pyarrow as pa
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
        self._ids: set[str] = set()
        self._pending: list[tuple[str, str, datetime, str]] = []
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read the table again: another process may have added to it."""
        if not DeltaTable.is_deltatable(str(self._home.identifiers)):
            return
        table = DeltaTable(str(self._home.identifiers)).to_pyarrow_table(columns=["identity_key", "customer_id"])
        self._customers.update(zip(table["identity_key"].to_pylist(), table["customer_id"].to_pylist(), strict=True))
        self._ids = set(self._customers.values())

    def resolve(self, identifiers: Mapping[IdentifierKind, str]) -> str | None:
        """The customer that the strongest known one of *identifiers* (kind to value) belongs to, or None."""
        keys = (f"{kind}:{identifiers[kind]}" for kind in get_args(IdentifierKind) if kind in identifiers)
        return next((self._customers[key] for key in keys if key in self._customers), None)

    def is_customer(self, customer_id: str) -> bool:
        """Whether the table names this customer."""
        return customer_id in self._ids

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
            if each not in self._customers:
                self._customers[each] = customer
                self._ids.add(customer)
                self._pending.append((each, customer, known_at, event.event_id))
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
