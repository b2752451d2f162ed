"""What is known of each customer now, by key: the port through which a request reads it and an event changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from features.definitions.view import View

Row = dict[str, Any]


class KeyedState(Protocol):
    """The newest row of each view of each customer or item. Safe to call from several threads and processes."""

    @property
    def views(self) -> Mapping[str, View]:
        """The feature views of the shop's domain, by name."""

    def customer_views(self) -> list[str]:
        """The views of customers."""

    def push(self, view: str, rows: Sequence[Row], as_of: datetime, is_now: bool = True) -> int:
        """Write rows of *view*, true as of *as_of*; newer rows stay. Where that *is_now*, those of a time to come do not."""

    def online(self, service: str, keys: Sequence[str]) -> list[Row]:
        """The newest rows of *service* for *keys*, in their order; an unknown key's values are all None.

        Each row holds, beside the features, ``<view>_at``: the moment (Unix microseconds) that the view's values are of.
        """

    def online_times(self, view: str, keys: Sequence[str]) -> Mapping[str, int]:
        """The moment (Unix microseconds) of the row of *view* that each of *keys* has."""

    def delete(self, view: str, keys: Sequence[str]) -> int:
        """Let go of rows of *view* for good; returns how many there were."""

    def delete_all(self, keys: Sequence[str], key: str = "customer_id") -> int:
        """Let go of everything of some entities for good; returns how many rows there were."""

    def note_told(self, until: datetime, since: datetime | None = None) -> None:
        """Note that the rows tell of everything received before a moment, unless some was lost that told of all before *since*."""

    def lost_since(self, until: datetime) -> datetime | None:
        """Since when rows may be lost that told of everything received before *until*; None where none are."""

    def scrub(self) -> None:
        """Leave no trace of what was replaced or deleted."""
