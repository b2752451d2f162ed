"""The open cart, one across all devices: what lies in it, and when it was last touched."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from features.definitions.feature import Moment
from features.definitions.folds.fold import Fold, Output, Touch, take_newest

MOVE_LIMIT = 300
ITEMS_OF_EVENT = 100
EVERYTHING = ""
"""In place of an item: the whole cart."""
OFFLINE = ("store", "mail", "call_centre")
"""What is bought in these channels did not lie in the cart; an order in any other empties it."""


class Move(NamedTuple):
    """One change: when (Unix milliseconds), by which event, of which item, by how many, and the money of the line."""

    at_ms: int
    key: str
    item_id: str
    units: int
    amount_minor: int


class Cart(msgspec.Struct):
    """The newest changes of a customer's cart, oldest first."""

    moves: list[Move] = []


class CartFold(Fold[Cart]):
    """What was put in and taken out since the last order."""

    name = "cart"
    scope = "customer"
    state = Cart
    reads = frozenset({"add_to_cart", "remove_from_cart", "purchase"})
    outputs = (
        Output("cart_item_ids", "texts", "the items in the open cart"),
        Output("cart_quantities", "integers", "how many of each"),
        Output("cart_minor", "integer", "what they come to, as far as the shop told (minor units)"),
        Output("cart_touched_at", "integer", "when something was put in or taken out last (Unix seconds)"),
    )

    def step(self, state: Cart, touch: Touch) -> None:
        """Take in what was put in, taken out or ordered."""
        if touch.name == "purchase":
            if touch.channel not in OFFLINE:
                take_newest(state.moves, Move(touch.at_ms, touch.key, EVERYTHING, 0, 0), MOVE_LIMIT)
            return
        at, key, sign = touch.at_ms, touch.key, 1 if touch.name == "add_to_cart" else -1
        moved: dict[str, tuple[int, int]] = {}
        for line in touch.bought():
            # an item may stand on several lines
            units, amount = moved.get(line.item_id, (0, 0))
            moved[line.item_id] = units + line.quantity, amount + line.amount_minor
        for item_id, (units, amount) in list(moved.items())[:ITEMS_OF_EVENT]:
            take_newest(state.moves, Move(at, key, item_id, sign * units, sign * amount), MOVE_LIMIT)

    def joined(self, one: Cart, other: Cart) -> Cart:
        """What was done in either cart was done in the one."""
        both = Cart(list(one.moves))
        for move in other.moves:
            take_newest(both.moves, move, MOVE_LIMIT)
        return both

    def features(self, state: Cart, moment: Moment) -> dict[str, Any]:
        """What lies in it."""
        held: dict[str, tuple[int, int]] = {}
        touched: int | None = None
        for move in state.moves:
            if move.item_id == EVERYTHING:
                held, touched = {}, None
                continue
            units, amount = held.get(move.item_id, (0, 0))
            # what is taken out of what is not there was put in before what is remembered
            left = units + move.units
            held[move.item_id] = (left, max(amount + move.amount_minor, 0)) if left > 0 else (0, 0)
            touched = move.at_ms // 1000
        there = {item: entry for item, entry in sorted(held.items()) if entry[0] > 0}
        return {
            "cart_item_ids": list(there),
            "cart_quantities": [units for units, _ in there.values()],
            "cart_minor": sum(amount for _, amount in there.values()),
            "cart_touched_at": touched if there else None,
        }
