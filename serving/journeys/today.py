"""What is true of a day: whose birthday it is, which items have become cheaper or are back, and what a customer needs again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.catalogue.tables import Catalogue
from features.definitions.conditions import Names
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.state.disk import move_into_place
from features.state.home import Home

OF_THE_DAY: Names = {"birthday": "truth", "cheaper_items": "list", "restocked_items": "list", "due_items": "list"}
"""What the condition of a journey that is looked at every day may name beside: ``cheaper_items`` and ``restocked_items`` are those of the
items that the customer looked at, or has in the cart; ``due_items`` those that they buy again and again and have not for as long as usual.
"""
BIRTHDAYS = ("birthday", "birth_date", "date_of_birth", "dob")
"""The traits of a person that tell it: a date like 1990-02-28."""
PRICE, STOCK = ("price_minor", "price"), ("stock", "in_stock")
"""The attributes of items, of a shop's own, that tell what one costs, and how many there are or whether there is any."""
LEAST_PURCHASES = 3
DAY = 86_400
_SEEN = pa.schema([("item_id", pa.string()), ("price", pa.float64()), ("stock", pa.float64())])
Prices = dict[str, tuple[float | None, float | None]]


class Today:
    """The facts of one day of one shop. Made once a day: it reads the items, and the birthdays of all."""

    def __init__(self, home: Home, identities: Identities, contacts: Contacts, day: date) -> None:
        self._born = {owner for key in _born_on(contacts, day) if (owner := identities.owner_of([key])) is not None}
        before, now = since_yesterday(home, day)
        self._cheaper = {item for item, (price, _) in now.items() if _is_less(price, before.get(item, (None, None))[0])}
        self._restocked = {item for item, (_, stock) in now.items() if stock and before.get(item, (None, None))[1] == 0}

    def of(self, customer_id: str, row: Mapping[str, Any], at: datetime) -> dict[str, Any]:
        """The facts about one customer, whose features are *row*."""
        looked = list(dict.fromkeys([*(row.get("cart_item_ids") or ()), *(row.get("recent_item_ids") or ())]))
        return {
            "birthday": customer_id in self._born,
            "cheaper_items": [item for item in looked if item in self._cheaper],
            "restocked_items": [item for item in looked if item in self._restocked],
            "due_items": due_items(row, at),
        }


def due_items(row: Mapping[str, Any], at: datetime) -> list[str]:
    """The items bought at least three times whose usual gap has passed since the last time, and not yet twice."""
    names = ("bought_item_ids", "bought_counts", "bought_first_at", "bought_last_at")
    columns: list[Sequence[Any]] = [row.get(name) if row.get(name) is not None else () for name in names]  # type: ignore[misc]
    now, due = at.astimezone(UTC).timestamp(), []
    for item, count, first, last in zip(*columns, strict=True):
        if count >= LEAST_PURCHASES and last - first >= DAY:
            gap = (last - first) / (count - 1)
            if gap <= now - last < 2 * gap:
                due.append(str(item))
    return due


def since_yesterday(home: Home, day: date) -> tuple[Prices, Prices]:
    """The prices of the day that was looked at before this one, and those of now; the same day looked at again has the same before.

    Each day that is looked at leaves a file beside the catalogue; the last two stay.
    """
    folder = home.catalogue
    today = folder / f"seen-{day.isoformat()}.parquet"
    earlier = [path for path in sorted(folder.glob("seen-*.parquet")) if path.name < today.name]
    now = _prices(home)
    if not today.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".seen.{os.getpid()}.part"
        rows = [{"item_id": item, "price": price, "stock": stock} for item, (price, stock) in now.items()]
        pq.write_table(pa.Table.from_pylist(rows, _SEEN), part)
        move_into_place(part, today)
    for path in earlier[:-1]:
        path.unlink(missing_ok=True)
    return _read(earlier[-1]) if earlier else {}, now


def _read(path: Path) -> Prices:
    with contextlib.suppress(pa.ArrowInvalid, OSError):
        return {row["item_id"]: (row["price"], row["stock"]) for row in pq.read_table(path).to_pylist()}
    # a damaged memory: nothing is known to have changed
    return {}


def _prices(home: Home) -> Prices:
    items = Catalogue(home).read("items")
    price, stock = (next((name for name in names if name in items.column_names), None) for names in (PRICE, STOCK))
    if price is None and stock is None:
        return {}
    columns = [items[name].to_pylist() if name is not None else [None] * len(items) for name in (price, stock)]
    return {item: (_number(p), _number(s)) for item, p, s in zip(items["item_id"].to_pylist(), *columns, strict=True)}


def _number(value: Any) -> float | None:
    truths = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
    if isinstance(value, str) and value.lower() in truths:
        return truths[value.lower()]
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _is_less(now: float | None, before: float | None) -> bool:
    return now is not None and before is not None and now < before


def _born_on(contacts: Contacts, day: date) -> list[str]:
    """The identity keys of whoever's birthday it is; who was born on a leap day has it on the 28th where there is none."""
    wanted = {(day.month, day.day)}
    if (day.month, day.day) == (2, 28) and not _is_leap(day.year):
        wanted.add((2, 29))
    found = []
    for contact in contacts.told(BIRTHDAYS):
        with contextlib.suppress(ValueError):
            born = date.fromisoformat(contact.value.strip()[:10])
            if (born.month, born.day) in wanted:
                found.append(contact.identity_key)
    return found


def _is_leap(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
