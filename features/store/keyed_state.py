"""What is known of each customer now, by key: the port through which a request reads it and an event changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from features.definitions.view import View

Row = dict[str, Any]


class RowsTell(NamedTuple):
    """What the store says of itself."""

    until: datetime
    """Its rows tell of everything received before."""
    server: str
    """Who says so: another server, or the same one started anew, may lack what was written last."""


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

    def delete(self, view: str, keys: Sequence[str], until: datetime | None = None, is_now: bool = True) -> int:
        """Let go of rows of *view*, newer ones than of *until* not; returns how many there were.

        Where that *is_now*, those of a time to come go too.
        """

    def delete_all(self, keys: Sequence[str], key: str = "customer_id") -> int:
        """Let go of everything of some entities for good; returns how many rows there were."""

    def told(self) -> RowsTell | None:
        """Until when the rows tell of everything, as noted last; None where what was written is never lost."""

    def tell(self, until: datetime, before: RowsTell | None) -> bool:
        """Note that the rows tell of everything received before a moment, written since the store said *before*.

        Returns False, and notes nothing, where some of that may be lost: another server has taken over, or it has lost the note.
        """

    def scrub(self) -> None:
        """Leave no trace of what was replaced or deleted."""
