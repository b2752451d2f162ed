"""How every answer is chosen: sources, filters, scorers and a selector, run by one pure pipeline.

Stages work on arrays of candidate positions at once, for speed; a position is an index into the pipeline's ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
TOO_LITTLE = "it would bring too little"
MOST_LEFT_OUT = 200
"""How many of those that a filter removed are named."""


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
    """Which list of a model that has several."""
    item_ids: tuple[str, ...] = ()
    """The items that the question is about: the one on the page, those in the basket, those looked at."""
    store_id: str | None = None
    bought_within_days: int | None = None
    """Leave out what the customer bought so lately."""
    diversity: float = 0.0
    """By how much of its score each further item of one kind falls behind: 0 not at all, 1 one of each kind."""
    novelty: float | None = None
    """How much of its score an item loses for being popular: 0 nothing, 1 all for the most popular; None as the list has it."""
    promoted: Mapping[int, str] = field(default_factory=dict)
    """By place in the list, counted from 1: the item that is to stand there, if the filters let it."""
    pinned: Sequence[tuple[int, str]] = ()
    """Places and items as ``promoted`` has them, the strongest first: they come before what is promoted."""
    proposed: Positions | None = None
    """Candidates beside those of the sources, in lists that may be filled from the rest of the catalogue."""
    watched: NDArray[np.bool_] | None = None
    """Which positions the decision is to tell of, if they were candidates."""
    explain: bool = False
    """Whether each choice tells what moved its score, and what was removed is named."""
    include: Mapping[str, Wish] = field(default_factory=dict)
    """Attribute to the values of which an item must have one."""
    exclude: Mapping[str, Wish] = field(default_factory=dict)
    """Attribute to the values of which an item must have none."""
    exclude_ids: frozenset[str] = frozenset()
    barred: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """By reason, which positions may not be chosen: what the caller knows and the pipeline does not."""
    factors: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """By name, what the caller multiplies the score of each position by."""
    without: frozenset[str] = frozenset()
    """The parts of a score that are left out."""
    costs: float = 0.0
    """What the answer costs whatever comes of it, in minor units."""
    least: float | None = None
    """What scores lower is not chosen."""
    owed: NDArray[np.bool_] | None = None
    """Which positions are chosen however little they score."""
    stopgap: bool = False
    """Whether what stands in where nothing else may be chosen is asked for, and that alone."""
    explore: bool = False
    temperature: float = 0.1
    """How freely is explored: shares of the best score, over which the chance falls by a factor of e."""
    uniform: float = 0.05
    """The share of explored places that is drawn evenly, so that each candidate has a known least chance."""
    channel: str | None = None
    """Through which channel the answer will reach them, where that is known."""
    forbidden_channels: frozenset[str] = frozenset()
    """The channels by which they may not be contacted."""

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
    left_out: Mapping[str, Sequence[str]] | None = None
    """By reason, which were removed, where the query asks to explain: at most ``MOST_LEFT_OUT`` a reason."""
    met: Sequence[int] = ()
    """The positions among those that the query watches which were candidates, removed or not."""


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


class Selector(Protocol[C_contra]):
    """Picks from scored candidates: indices into them, best first, and the propensity of each pick."""

    def __call__(
        self, context: C_contra, query: Query, candidates: Positions, scores: Scores, rng: np.random.Generator, /
    ) -> tuple[Positions, Scores]:
        """Indices into the candidates, and propensities."""
        ...


class Widening(Protocol[C_contra]):
    """Gives more candidates, in portions, where the sources gave too few that may be shown."""

    def __call__(self, context: C_contra, considered: Positions, /) -> Iterator[Positions]:
        """Portions of positions that are not among those *considered*."""
        ...


@dataclass(frozen=True)
class Scored(Generic[C]):
    """Candidates with their scores, before any is picked.

    Attributes:
        shares: ``(scorers, candidates)``.
        removed: how many were removed, by reason.
        considered: how many candidates there were.
        left_out: by reason, which were removed, where the query asks to explain.
        met: the candidates that the query watches, removed or not.
    """

    context: C
    candidates: Positions
    shares: Scores
    removed: Mapping[str, int]
    considered: int
    left_out: Mapping[str, Sequence[int]] | None = None
    met: Positions = field(default_factory=lambda: np.empty(0, np.intp))

    @property
    def scores(self) -> Scores:
        """The sums of the shares."""
        total: Scores = self.shares.sum(axis=0)
        return total


@dataclass(frozen=True)
class Pipeline(Generic[C]):
    """One way to decide. It has no side effects, and only its selector draws random numbers.

    Attributes:
        ids: what a position stands for.
        prepare: turns a query into the context that the other stages read, once.
        source, filters, scorers, selector: the stages; filters are named by the reason they remove for.
        widen: where more candidates are to be had until as many are left as were asked for; None where there are no more.
        explain: source name, reason in words and details of one chosen candidate, given each scorer's share.
        fallback: why this context can only be answered in a general way, or None.
    """

    ids: Sequence[str]
    prepare: Callable[[Query], C]
    source: CandidateSource[C]
    filters: Sequence[tuple[str, Filter[C]]]
    scorers: Sequence[tuple[str, Scorer[C]]]
    selector: Selector[C]
    explain: Callable[[C, Positions, Scores], Sequence[tuple[str, str, Mapping[str, Any]]]]
    fallback: Callable[[C], str | None] = lambda context: None
    widen: Widening[C] | None = None

    def decide(self, query: Query, rng: np.random.Generator) -> Decision:
        """Answer *query*.

        Raises:
            BrokenStageError: a stage misbehaved; nothing is papered over.
        """
        found = self.score(query)
        scores = found.scores
        picks, propensities = self.selector(found.context, query, found.candidates, scores, rng)
        told = self.explain(found.context, found.candidates[picks], found.shares[:, picks])
        choices = [
            Choice(self.ids[found.candidates[p]], float(scores[p]), source, reason, float(chance), details)
            for p, chance, (source, reason, details) in zip(picks, propensities, told, strict=True)
        ]
        left_out = None
        if found.left_out is not None:
            left_out = {reason: [self.ids[place] for place in places] for reason, places in found.left_out.items()}
        return Decision(choices, found.considered, found.removed, self.fallback(found.context), left_out, tuple(found.met.tolist()))

    def order(self, query: Query, depth: int) -> Positions:
        """The positions that *query* would be answered with, and those that come next, *depth* in all, without reasons: for judging."""
        found = self.score(query)
        deeper = replace(query, limit=depth)
        picks, _ = self.selector(found.context, deeper, found.candidates, found.scores, np.random.default_rng(0))
        chosen: Positions = found.candidates[picks]
        return chosen

    def score(self, query: Query) -> Scored[C]:
        """The candidates that the filters leave, with what each scorer gives them.

        Raises:
            BrokenStageError: a stage misbehaved.
        """
        context = self.prepare(query)
        found = self.source(context)
        removed: dict[str, int] = {}
        left_out: dict[str, list[int]] | None = {} if query.explain else None
        candidates, considered, met = self._allowed(query, context, found, removed, left_out), len(found), _watched(query, found)
        if self.widen is not None and len(candidates) < query.limit:
            for more in self.widen(context, found):
                candidates = np.concatenate([candidates, self._allowed(query, context, more, removed, left_out)])
                considered += len(more)
                met = np.concatenate([met, _watched(query, more)])
                if len(candidates) >= query.limit:
                    break
        shares = np.zeros((len(self.scorers), len(candidates)))
        for k, (name, score) in enumerate(self.scorers):
            values = score(context, candidates)
            _check(name, values, len(candidates))
            shares[k] = values
        if query.least is not None:
            enough = shares.sum(axis=0) >= query.least
            if query.owed is not None:
                enough |= query.owed[candidates]
            _leave(TOO_LITTLE, enough, candidates, removed, left_out)
            candidates, shares = candidates[enough], shares[:, enough]
        return Scored(context, candidates, shares, removed, considered, left_out, met)

    def _allowed(
        self, query: Query, context: C, candidates: Positions, removed: dict[str, int], left_out: dict[str, list[int]] | None
    ) -> Positions:
        """The candidates that nothing bars and every filter keeps; the others are counted by reason, and some of them named."""
        barred = ((reason, lambda _, at, mask=mask: ~mask[at]) for reason, mask in query.barred.items())
        for reason, keep_of in itertools.chain(barred, self.filters):
            keep = keep_of(context, candidates)
            _check(reason, keep, len(candidates))
            _leave(reason, keep, candidates, removed, left_out)
            candidates = candidates[keep]
        return candidates


def _leave(
    reason: str, keep: NDArray[np.bool_], candidates: Positions, removed: dict[str, int], left_out: dict[str, list[int]] | None
) -> None:
    """Count those that are not kept under *reason*, and name some of them."""
    if keep.all():
        return
    removed[reason] = removed.get(reason, 0) + int(len(keep) - np.count_nonzero(keep))
    if left_out is not None:
        named = left_out.setdefault(reason, [])
        named += candidates[~keep][: MOST_LEFT_OUT - len(named)].tolist()


def _watched(query: Query, candidates: Positions) -> Positions:
    """Those of the candidates that the query watches."""
    return candidates[:0] if query.watched is None else candidates[query.watched[candidates]]


def _check(stage: str, values: NDArray[Any], length: int) -> None:
    if values.shape != (length,):
        raise BrokenStageError(f"stage {stage!r} gave shape {values.shape} for {length} candidates")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BrokenStageError(f"stage {stage!r} gave a score that is not finite")


def may_reach_her(query: Query, candidates: Positions) -> NDArray[np.bool_]:
    """Nothing stays where the answer would reach the customer through a channel that they have not permitted."""
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

    def __call__(
        self, context: object, query: Query, candidates: Positions, scores: Scores, rng: np.random.Generator
    ) -> tuple[Positions, Scores]:
        """The picks and the chance that each had of its place."""
        return self.pick(top(scores, query.limit + (self.pool if query.explore else 0)), query, rng)

    def pick(self, ranked: Positions, query: Query, rng: np.random.Generator) -> tuple[Positions, Scores]:
        """The same, of candidates that are in order already, ``pool`` more of them than are asked for."""
        if not query.explore or len(ranked) <= query.limit or query.limit < 1:
            best = ranked[: max(query.limit, 0)]
            return best, np.ones(len(best))
        contenders = ranked[query.limit - 1 : query.limit + self.pool]
        winner = int(rng.integers(len(contenders))) if rng.random() < self.epsilon else 0
        picks = np.append(ranked[: query.limit - 1], contenders[winner])
        chances = np.ones(len(picks))
        chances[-1] = self.epsilon / len(contenders) + (1.0 - self.epsilon if winner == 0 else 0.0)
        return picks, chances
