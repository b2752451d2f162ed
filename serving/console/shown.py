"""What pages show of items, events and offers: names in place of ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.attributes import TextAttribute
from models.recommender.shelf import Shelf
from serving.console.words import Words
from serving.decide.champions import Loaded
from serving.decide.engine import Engine

NAMED_ITEMS = 6
"""How many items of one event are named."""


class ShownItems:
    """The items as the model that recommends them knows them; ids alone where there is none."""

    def __init__(self, engine: Engine) -> None:
        name = model_that(engine, "items")
        self._loaded: Loaded | None = None if name is None or name in engine.missing() else engine.champion(name)

    @property
    def shelf(self) -> Shelf | None:
        """The items with what is known of each; None where no model recommends items."""
        return None if self._loaded is None else self._loaded.goods

    def label(self, item_id: str) -> str:
        """What to call an item."""
        return item_id if self._loaded is None or item_id not in self._loaded.positions else self._loaded.label(item_id)

    def value(self, item_id: str, attribute: str) -> str | None:
        """A text that the catalogue tells of an item."""
        if self._loaded is None or (place := self._loaded.positions.get(item_id)) is None:
            return None
        column = self._loaded.attributes.columns.get(attribute)
        return None if column is None or column.kind != "text" else self._loaded.attributes.text(attribute, place)

    def commonest(self, attribute: str, most: int) -> list[str]:
        """The texts of an attribute that most items have, in alphabetical order."""
        column = None if self._loaded is None else self._loaded.attributes.columns.get(attribute)
        if not isinstance(column, TextAttribute):
            return []
        counts = np.bincount(column.codes[column.codes >= 0], minlength=len(column.words))
        return sorted(column.words[k] for k in np.argsort(-counts, kind="stable")[:most])

    @property
    def texts(self) -> list[str]:
        """The attributes that hold one text an item."""
        return [] if self._loaded is None else [n for n, column in self._loaded.attributes.columns.items() if column.kind == "text"]

    def knows(self, item_id: str) -> bool:
        """Whether the catalogue has it."""
        return self._loaded is not None and item_id in self._loaded.positions

    def favourites(self, row: Mapping[str, Any], most: int = 5) -> list[tuple[str, float]]:
        """The categories of what a customer buys, with their shares, the largest first."""
        attribute = next((a for a in ("category", "department", "type") if a in self.texts), None)
        if attribute is None:
            return []
        shares: Counter[str] = Counter()
        for item_id, weight in zip(_list(row, "bought_item_ids"), _list(row, "bought_weights"), strict=False):
            if (name := self.value(item_id, attribute)) is not None:
                shares[name] += weight
        total = sum(shares.values())
        return [(name, weight / total) for name, weight in shares.most_common(most)] if total else []


def model_that(engine: Engine, answers: str) -> str | None:
    """The first model that answers with *answers*: ``score``, ``items`` or ``offers``."""
    return next((name for name, model in engine.models.items() if model.kind.answers == answers), None)


def event_lines(events: Sequence[Mapping[str, Any]], items: ShownItems, words: Words) -> list[dict[str, Any]]:
    """Events as a timeline tells them."""
    bare = {"channel": None, "store_id": None}
    return [{**bare, **event, "said": _said(event, items, words), "what": event["name"].replace("_", " ")} for event in events]


def _said(event: Mapping[str, Any], items: ShownItems, words: Words) -> str:
    lines = event.get("items", [])
    named = [items.label(line["item_id"]) + (f" × {line['quantity']}" if line["quantity"] > 1 else "") for line in lines[:NAMED_ITEMS]]
    if len(lines) > NAMED_ITEMS:
        named.append(words.say("and %(n)s more") % {"n": len(lines) - NAMED_ITEMS})
    said = [", ".join(named)] if named else []
    if paid := sum(line["amount_minor"] for line in lines):
        said.append(words.money(paid))
    said += [f"“{event['query']}”"] if event.get("query") else []
    said += [f"{words.say(label)} {event[name]}" for name, label in (("offer_id", "offer"), ("campaign_id", "campaign")) if event.get(name)]
    said += [f"{name}: {value}" for name, value in event.get("traits", {}).items() if value]
    return " · ".join(said)


def _list(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = row.get(name)
    return () if value is None else value
