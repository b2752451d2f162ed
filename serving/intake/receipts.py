"""What became of the events of one request."""

from __future__ import annotations

from typing import Literal

import msgspec


class EventReceipt(msgspec.Struct):
    """What became of one event."""

    status: Literal["accepted", "duplicate", "rejected", "erased"]
    event_id: str | None
    customer_id: str | None = None
    field: str | None = None
    reason: str | None = None


class EventsAnswer(msgspec.Struct):
    """What became of each event, in the order in which they were sent."""

    accepted: int
    duplicates: int
    rejected: int
    erased: int
    """Of people who were erased: nothing was kept."""
    events: list[EventReceipt]
