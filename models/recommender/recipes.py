"""The lists that a shop shows: from which sources each takes its candidates, how it orders them, what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.recommender.listings import Listing
from models.recommender.ranker import Objective

Source = Literal["held", "liked", "viewed", "popular", "local", "trending", "newcomers", "similar", "together"]
"""What retrieves candidates, each by key; ``models.recommender.sources`` has them."""
Order = Literal["ranked", "near", "trend"]
"""By the ranker; by how near the item is to those asked about; by how much more it sells than before."""


@dataclass(frozen=True)
class Recipe:
    """One list.

    Attributes:
        about: what it is for, in one sentence.
        sources: where its candidates come from.
        order: what puts them in order.
        objective: which ranker, where the ranker does.
        depth: how many candidates are taken of what speaks for the customer.
        hides_held: whether what the customer bought or just looked at is left out.
        asks_about: whether it is about items that the question names, and what it is about where none is named: the customer's open
            cart, what they looked at, or (*needed*) nothing.
        widens: whether it is filled from the rest of the catalogue where its sources give too little.
        rotates: whether it changes from week to week.
        novelty: how much of its score an item loses for being popular, where the question does not say.
    """

    about: str
    sources: tuple[Source, ...]
    order: Order = "ranked"
    objective: Objective = "any"
    depth: int = 50
    hides_held: bool = False
    asks_about: Literal["nothing", "cart", "looks", "needed"] = "nothing"
    widens: bool = True
    rotates: bool = False
    novelty: float = 0.0


NOVELTY_OF_NEW = 0.3
"""Of what is new to the customer 0.2 and 0.3 showed 8 and 12 percent more of the catalogue on the demo's tuning cut, for
+.0001 [-.0002, .0004] and -.0001 [-.0005, .0003] of NDCG@10. Of what they buy anyway 0.2 cost .0026 [.0012, .0040]; holding kinds
apart cost both lists."""


RECIPES: dict[Listing, Recipe] = {
    "for_you": Recipe("what the customer will buy next, repeats among it", ("held", "liked", "viewed", "popular", "newcomers")),
    "also_like": Recipe(
        "what is new to the customer",
        ("liked", "viewed", "popular", "newcomers"), objective="new", depth=150, hides_held=True, novelty=NOVELTY_OF_NEW,
    ),
    "similar": Recipe("what could take the place of an item", ("similar",), order="near", asks_about="needed"),
    "bought_together": Recipe("what lies in the same baskets as the items", ("together",), order="near", asks_about="needed", widens=False),
    "buy_again": Recipe("what the customer bought and may need again, with the expected date", ("held",), widens=False),
    "up_sell": Recipe("what is like an item and costs more", ("similar",), order="near", asks_about="needed", widens=False),
    "trending": Recipe("what sells more than before, in a store or everywhere", ("local", "trending"), order="trend"),
    "basket": Recipe(
        "what goes with what lies in the basket", ("together", "similar", "popular"), order="near", asks_about="cart"
    ),
    "session": Recipe(
        "what is like what is looked at in this visit", ("similar", "together", "popular"), order="near", asks_about="looks"
    ),
    "email": Recipe(
        "what the customer may like, another selection each week",
        ("held", "liked", "viewed", "popular", "newcomers"), depth=150, rotates=True,
    ),
}  # fmt: skip
