"""Settings of the recommender, and the ways in which a ranked list can be ordered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.recommender.ease import MEMORY_BYTES
from models.recommender.factors import FactorSettings
from models.recommender.listings import Learner
from models.recommender.ranker import Objective

Mode = str
"""What orders a ranked list: ``ranked``, or one source alone where that was better."""
SINGLES = ("popularity", "personal frequency", "EASE", "EASE, lately")
"""The sources that could serve a ranked list alone."""
JOINED = "joined"
"""Frequency and EASE added up: what serves where there was too little to learn a ranker from."""
RANKED = "ranked"


@dataclass(frozen=True)
class RecommenderConfig:
    """Settings of a fit; chosen on an earlier cut than any that is reported."""

    min_buyers: int = 5
    """The model knows an item once so many customers bought it."""
    ease_penalty: float = 1000.0
    ease_neighbours: int = 100
    similar_neighbours: int = 50
    memory_bytes: int = MEMORY_BYTES
    learner: Learner = "EASE"
    als: FactorSettings = field(default_factory=FactorSettings)
    """Of ALS, where that is the learner."""
    groups: tuple[str, ...] = ()
    """The text attributes by which customers and items are compared: the same for the sources of every moment and their ranker."""
    seed: int = 1
    modes: Mapping[Objective, Mode] = field(default_factory=lambda: {"any": JOINED, "new": JOINED})
