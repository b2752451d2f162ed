"""How every answer is chosen: sources, filters, scorers and a selector, run by one pure pipeline.

Stages work on arrays of candidate positions at once, for speed; a position is an index into the pipeline's ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.attributes import Wish

Positions = NDArray[np.intp]
Scores = NDArray[np.float64]
C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)


NO_PERMISSION = "no permission for the channel"


class BrokenStageError(RuntimeError):
    """A stage gave an answer of the wrong length or a score that is not finite; the message names the stage."""


@dataclass(frozen=True)
class Query:
    """What is asked: for whom, as of when, how many, and within which limits."""

    customer_id: str | None
    as_of: datetime
    row: Mapping[str, Any]
    """The customer's feature row; empty for an unknown customer."""
    limit: int = 10
    listing: str = "for_you"
    """Which list of a model that has several: ``for_you`` or ``also_like``."""
    include: Mapping[str, Wish] = field(default_factory=dict)
    """Attribute to the values of which an item must have one."""
    exclude: Mapping[str, Wish] = field(default_factory=dict)
    """Attribute to the values of which an item must have none."""
    exclude_ids: frozenset[str] = frozenset()
    explore: bool = False
    channel: str | None = None
    """Through which channel the answer will reach her, where that is known."""
    forbidden_channels: frozenset[str] = frozenset()
    """The channels by which she may not be contacted."""

    @classmethod
    def from_row(cls, customer_id: str | None, as_of: datetime, row: Mapping[str, Any], **wishes: Any) -> Query:
        """The query of one feature row, as the online store or a batch gives it."""
        return cls(customer_id, as_of, row, **wishes)


@dataclass(frozen=True)
class Choice:
    """One thing chosen, with everything needed to show it, explain it and learn from it."""

    id: str
    score: float
    source: str
    """The scorer that spoke loudest for it."""
    reason: str
    propensity: float
    """The chance with which the selector puts this choice here, given the query."""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What was chosen, from how many, and how many were removed for which reason."""

    choices: Sequence[Choice]
    candidates: int
    removed: Mapping[str, int]
    fallback: str | None = None
    """Why the answer is not the model's own, if it is not."""


class CandidateSource(Protocol[C_contra]):
    """Gives candidates."""

    def __call__(self, context: C_contra, /) -> Positions:
        """The positions of the candidates."""
        ...


class Filter(Protocol[C_contra]):
    """Tells which candidates to keep."""

    def __call__(self, context: C_contra, candidates: Positions, /) -> NDArray[np.bool_]:
        """True where a candidate stays."""
        ...


class Scorer(Protocol[C_contra]):
    """Gives one finite number a candidate; the pipeline adds up the scorers."""

    def __call__(self, context: C_contra, candidates: Positions, /) -> NDArray[Any]:
        """One number a candidate."""
        ...


class Selector(Protocol):
    """Picks from scored candidates: indices into them, best first, and the propensity of each pick."""

    def __call__(self, query: Query, scores: Scores, rng: np.random.Generator, /) -> tuple[Positions, Scores]:
        """Indices into the candidates, and propensities."""
        ...


@dataclass(frozen=True)
class Pipeline(Generic[C]):
    """One way to decide. It has no side effects, and only its selector draws random numbers.

    Attributes:
        ids: what a position stands for.
        prepare: turns a query into the context that the other stages read, once.
        source, filters, scorers, selector: the stages; filters are named by the reason they remove for.
        explain: source name, reason in words and details of one chosen candidate, given each scorer's share.
        fallback: why this context can only be answered in a general way, or None.
    """

    ids: Sequence[str]
    prepare: Callable[[Query], C]
    source: CandidateSource[C]
    filters: Sequence[tuple[str, Filter[C]]]
    scorers: Sequence[tuple[str, Scorer[C]]]
    selector: Selector
    explain: Callable[[C, Positions, Scores], Sequence[tuple[str, str, Mapping[str, Any]]]]
    fallback: Callable[[C], str | None] = lambda context: None

    def decide(self, query: Query, rng: np.random.Generator) -> Decision:
        """Answer *query*.

        Raises:
            BrokenStageError: a stage misbehaved; nothing is papered over.
        """
        context = self.prepare(query)
        found = candidates = self.source(context)
        removed: dict[str, int] = {}
        for reason, keep_of in self.filters:
            keep = keep_of(context, candidates)
            _check(reason, keep, len(candidates))
            if not keep.all():
                removed[reason] = int(len(keep) - np.count_nonzero(keep))
                candidates = candidates[keep]
        shares = np.zeros((len(self.scorers), len(candidates)))
        for k, (name, score) in enumerate(self.scorers):
            values = score(context, candidates)
            _check(name, values, len(candidates))
            shares[k] = values
        scores = shares.sum(axis=0)
        picks, propensities = self.selector(query, scores, rng)
        told = self.explain(context, candidates[picks], shares[:, picks])
        choices = [
            Choice(self.ids[candidates[p]], float(scores[p]), source, reason, float(chance), details)
            for p, chance, (source, reason, details) in zip(picks, propensities, told, strict=True)
        ]
        return Decision(choices, len(found), removed, self.fallback(context))


def _check(stage: str, values: NDArray[Any], length: int) -> None:
    if values.shape != (length,):
        raise BrokenStageError(f"stage {stage!r} gave shape {values.shape} for {length} candidates")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BrokenStageError(f"stage {stage!r} gave a score that is not finite")


def may_reach_her(query: Query, candidates: Positions) -> NDArray[np.bool_]:
    """Nothing stays where the answer would reach the customer through a channel that she has not permitted."""
    return np.full(len(candidates), query.channel is None or query.channel not in query.forbidden_channels)


def top(scores: NDArray[Any], limit: int) -> Positions:
    """The indices of the *limit* highest scores, best first; of equals the earlier position goes first."""
    if limit < 1:
        return np.empty(0, np.intp)
    if limit < len(scores):
        # every score at the threshold competes, so that ties fall the same way whatever the partition did
        threshold = np.partition(scores, len(scores) - limit)[len(scores) - limit]
        candidates = np.flatnonzero(scores >= threshold)
    else:
        candidates = np.arange(len(scores))
    return candidates[np.lexsort((candidates, -scores[candidates]))][:limit]


@dataclass(frozen=True)
class LastSlotExplorer:
    """Shows the best; when asked to explore, sometimes gives the last place to one of the runners-up.

    With probability ``epsilon`` the last place goes to a uniform draw from the item that earned it and the ``pool`` that
    follow, so each of these has a known chance: ``1 - epsilon + epsilon / n`` for the first and ``epsilon / n`` for the
    others, n being their number. With one place this is the epsilon-greedy policy.
    """

    epsilon: float = 0.1
    pool: int = 20

    def __call__(self, query: Query, scores: Scores, rng: np.random.Generator) -> tuple[Positions, Scores]:
        """The picks and the chance that each had of its place."""
        if not query.explore or len(scores) <= query.limit or query.limit < 1:
            best = top(scores, query.limit)
            return best, np.ones(len(best))
        ranked = top(scores, query.limit + self.pool)
        contenders = ranked[query.limit - 1 :]
        winner = int(rng.integers(len(contenders))) if rng.random() < self.epsilon else 0
        picks = np.append(ranked[: query.limit - 1], contenders[winner])
        chances = np.ones(len(picks))
        chances[-1] = self.epsilon / len(contenders) + (1.0 - self.epsilon if winner == 0 else 0.0)
        return picks, chances
