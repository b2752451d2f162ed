"""The names of what a recommender is asked for, and of how it may learn."""

from __future__ import annotations

from typing import Literal

Listing = Literal[
    "for_you", "also_like", "similar", "bought_together", "buy_again", "up_sell", "trending", "basket", "session", "email"
]  # fmt: skip
"""Every list that can be asked for; ``models.recommender.recipes`` tells what each holds."""
LISTINGS = ("for_you", "also_like")
"""The lists that are judged by what customers buy next."""
Learner = Literal["EASE", "ALS"]
"""What learns which items speak for which; it stands in reports and modes under EASE, whichever it is."""
