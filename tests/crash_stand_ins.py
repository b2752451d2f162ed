"""What stands in for the machine in the code that is simulated: its threads, times and files, and the query engine under the rows."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import crash_ports
import crash_world
from crash_world import Promise

from features.definitions.folds.registered import CustomerState, Touch
from features.people import consent, contacts, hidden, identity, tombstones
from features.people.identity_graph import IdentityGraph
from features.people.identity_state import keys_of
from features.state import table_index
from features.state.ports import IDENTIFIERS
from features.store import customer_rows, event_log
from features.store.event_index import EventIndex
from serving.intake import backlog, draining, elsewhere, inbox, intake, recent
from serving.intake.inbox import Inbox


def stand_in() -> None:
    """Put the simulation's threads, times and files in the place of the machine's, in the modules that are simulated."""
    for module in (inbox, draining, backlog, elsewhere, recent, identity, hidden, tombstones, contacts, consent, table_index):
        module.threading = crash_world.threading  # type: ignore[attr-defined]
    hidden.time = tombstones.time = elsewhere.time = inbox.queue = crash_world.threading  # type: ignore[attr-defined]
    inbox.Future = intake.Future = elsewhere.Future = Promise  # type: ignore[misc]
    identity.pq = table_index.pq = types.SimpleNamespace(ParquetFile=crash_ports.ParquetFile)  # type: ignore[attr-defined]
    consent._spoken = spoken  # type: ignore[assignment]
    intake.CustomerRows = Rows  # type: ignore[misc,assignment]
    event_log.EventLog.keys_since = keys_since  # type: ignore[method-assign]
    event_log.COMPACT_ABOVE_FILES = crash_ports.COMPACT_ABOVE


def spoken(names: Sequence[str]) -> list[tuple[list[str], consent.Statement]]:
    """The statements in files of the log, as ``consent`` reads them from Parquet."""
    found = []
    for row in (row for name in names for row in crash_ports.files[name].to_pylist()):
        event = EventIndex._from_row(row).event
        if event.identifiers and consent.is_statement(event):
            told = consent._statement(event.name, event.channel, event.consent, event.occurred_at, row["known_at"], event.event_id)
            found.append((keys_of(event.identifiers), told))
    return found


def keys_since(log: event_log.EventLog, moment: datetime) -> set[str]:
    """As the log tells from Parquet."""
    rows = [row for name in log.files() for row in crash_ports.files[name].to_pylist()]
    late = [EventIndex._from_row(row) for row in rows if row["known_at"] >= moment or row["received_at"] >= moment]
    return {key for row in late for key in keys_of(row.event.identifiers)}


class Rows(customer_rows.CustomerRows):
    """The customers' rows; what is made anew is made from the index of the log without a query engine, which would take most of the time."""

    def _replayed(self, customers: Sequence[str], at: datetime) -> dict[str, CustomerState]:
        found: dict[str, CustomerState] = {}
        for customer, events in self._past(customers, at).items():
            state = CustomerState()
            for each in events:
                state.step(Touch.of(each, self._zone))
            found[customer] = state
        return found

    def compute(self, customers: Sequence[str], at: datetime, is_now: bool = True) -> None:
        """Stands in for the windowed features: how many events were known."""
        counted = {customer: len(events) for customer, events in self._past(customers, at).items()}
        self._store.push("customer_activity", [{"customer_id": who, "events": n} for who, n in counted.items()], at, is_now)
        self._store.delete("customer_activity", [customer for customer in customers if customer not in counted], at, is_now)

    def _past(self, customers: Sequence[str], at: datetime) -> dict[str, list[Any]]:
        self._log.catch_up()
        rows = self._log.index.of({key for customer in customers for key in self._identities.members(customer)})
        owners = self._identities.owners_before({key for row in rows for key in keys_of(row.event.identifiers)}, at)
        if owners is None:
            graph = IdentityGraph()
            for step in identity._steps(self._home.tables[IDENTIFIERS].read().sort_by("seq")):  # type: ignore[union-attr]
                if step.known_at < at:
                    graph.apply(step)
            owners = graph.owners()
        found: dict[str, list[Any]] = {}
        for row in sorted(rows, key=lambda row: (row.known_at, row.event.event_id)):
            owner = next((whose for key in keys_of(row.event.identifiers) if (whose := owners.get(key)) is not None), None)
            if owner in customers and row.known_at < at:
                members = self._identities.members(owner)
                if self._consents.usable(members, "personalization", row.event.occurred_at):
                    found.setdefault(owner, []).append(row.event)
        return found


class Watched(Inbox):
    """The inbox, and in which order its process has followed what was stored."""

    def __init__(self, state: Any, clock: Callable[[], datetime], seen: Callable[[int, str], None]) -> None:
        self._seen = seen
        super().__init__(state, clock)

    def followed_by(self, follow: Any, moved: Any) -> None:
        def watching(letters: Sequence[Any]) -> None:
            follow(letters)
            for each in letters:
                self._seen(each.seq, each.event_id)

        super().followed_by(watching, moved)

    def submit(self, entry: Any, done: Any) -> None:
        told = entry.stored

        def stored() -> None:
            told()
            for letter, _, _ in getattr(entry, "_letters", ()):
                self._seen(letter.seq, letter.event_id)

        with contextlib.suppress(AttributeError):
            entry.stored = stored
        super().submit(entry, done)
