"""Feature rows of one customer for the request path: one read, and what has happened since the rows were written."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from features.definitions.feature import Moment
from features.definitions.folds.registered import NAMES, CustomerState, OutdatedStateError, Touch, nothing
from features.people.identity import Former
from features.state.clock import AHEAD, microseconds
from features.store.keyed_state import KeyedState
from models.registry import ModelSettings

STATE = "customer_state"
STATE_AT = f"{STATE}_at"
AT_HAND = ("session", "cart", "last_touch", "daily_activity")
"""The folds that tell what a customer is at."""


class Recent(Protocol):
    """What the intake knows that online rows may not know yet."""

    def fresh(self, customer_id: str) -> Sequence[tuple[datetime, Touch]]:
        """What happened lately to a customer, with when it was received, oldest first."""

    def formers(self, customer_id: str) -> Sequence[Former]:
        """Who lately proved to be the same customer."""

    def make_anew(self, customer_id: str) -> None:
        """Have the customer's rows made anew soon."""


class Nothing:
    """Where no intake runs: rows are all there is."""

    def fresh(self, customer_id: str) -> Sequence[tuple[datetime, Touch]]:
        """Nothing."""
        return ()

    def formers(self, customer_id: str) -> Sequence[Former]:
        """Nobody."""
        return ()

    def make_anew(self, customer_id: str) -> None:
        """Leave it."""


class OnlineReader:
    """Reads what a model asks of one customer."""

    def __init__(self, store: KeyedState, timezone: str, recent: Recent | None = None) -> None:
        self._store, self._timezone = store, timezone
        self._recent: Recent = recent or Nothing()
        self._lock = threading.Lock()

    def row(self, model: ModelSettings, customer_id: str | None, as_of: datetime, more: Sequence[str] = ()) -> Mapping[str, Any]:
        """The customer's features for that model, and what *more* folds tell; empty for nobody, and for a row from a time to come, which
        is made anew.
        """
        return self.features(model.feature_service, model.kind.views, (*model.kind.folds, *more), customer_id, as_of)

    def everything(self, customer_id: str | None, as_of: datetime) -> Mapping[str, Any]:
        """All that is known of a customer: every view, and what every fold tells."""
        return self.features("customer_v1", self._store.customer_views(), NAMES, customer_id, as_of)

    def present(self, customer_id: str | None, as_of: datetime) -> Mapping[str, Any]:
        """What the customer is at: the visit, the cart, the last touch, the last days."""
        told = self.features("state_v1", (STATE,), AT_HAND, customer_id, as_of)
        return {name: value for name, value in told.items() if name not in ("customer_id", STATE_AT)}

    def features(
        self, service: str, views: Sequence[str], folds: Sequence[str], customer_id: str | None, as_of: datetime
    ) -> Mapping[str, Any]:
        """What the *views* of a service tell of a customer, and of their state what the *folds* of those names tell."""
        if customer_id is None:
            return {}
        # before the rows: what is taken from here has reached them by then
        formers = self._recent.formers(customer_id)
        ids = [customer_id, *(former.customer_id for former in formers)]
        fresh = {each: self._recent.fresh(each) if STATE in views else () for each in ids}
        with self._lock:
            rows = self._store.online(service, ids)
        if any((row.get(f"{view}_at") or 0) > microseconds(as_of + AHEAD) for view in views for row in rows):
            self._recent.make_anew(customer_id)
            return {}
        row, *others = rows
        same = [
            (former.customer_id, other)
            for former, other in zip(formers, others, strict=True)
            if microseconds(former.learnt_at) >= (row.get(STATE_AT) or 0)
        ]
        for _, other in same:
            # the windowed features cannot be added up: those of whoever has some stand until they are made anew
            for view in views:
                if view != STATE and row.get(f"{view}_at") is None:
                    columns = (f"{view}_at", *self._store.views[view].columns)
                    row = {**row, **{name: other.get(name) for name in columns}}
        if STATE not in views:
            return row
        try:
            return self._with_state(row, [(customer_id, row), *same], fresh, folds, as_of)
        except OutdatedStateError:
            self._recent.make_anew(customer_id)
            known = {**_without_states(row), **nothing(folds), STATE_AT: None}
            # that nothing is known is not that nothing was sent
            return {name: value for name, value in known.items() if not name.startswith("contacted_")}

    def _with_state(
        self,
        row: Mapping[str, Any],
        parts: Sequence[tuple[str, Mapping[str, Any]]],
        fresh: Mapping[str, Sequence[tuple[datetime, Touch]]],
        folds: Sequence[str],
        as_of: datetime,
    ) -> Mapping[str, Any]:
        """The row with what the states of all *parts* of the customer tell, brought up to date."""
        state: CustomerState | None = None
        known_at: list[int] = []
        for customer_id, part in parts:
            at = part.get(STATE_AT)
            unknown = [(received, touch) for received, touch in fresh[customer_id] if microseconds(received) >= (at or 0)]
            if at is None and not unknown:
                continue
            own = CustomerState.from_row(part)
            for _, touch in unknown:
                own.step(touch)
            state = own if state is None else state.joined(own)
            known_at.append(microseconds(unknown[-1][0]) + 1 if unknown else int(at or 0))
        told = nothing(folds) if state is None else state.features(Moment(as_of, self._timezone), folds)
        return {**_without_states(row), **told, STATE_AT: max(known_at, default=None)}


def _without_states(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in NAMES}
