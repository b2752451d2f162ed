"""Merchandising rules at work: which of them hold for a question, what they make of it, and how an answer tells of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from features.definitions.conditions import CelCondition, ConditionError
from features.definitions.segments import Vocabulary, of_the_question
from models.decision import Choice, Decision, Query
from models.recommender.arrange import placed
from serving.decide.governor import Governor
from serving.decide.rule_shelf import RuleEffect, RuleShelf
from serving.decide.rules import ABOUT_ITEMS, ShopRule

RULES = "rules"
"""Under which name is told what of the rules is not in force, and what they multiply scores by."""
BLOCKED = "blocked by a rule"
PINNED, RAISED, LOWERED = "pinned by a rule", "boosted by a rule", "lowered by a rule"
Ranked = tuple[int, ShopRule]
"""A rule with its rank among all, 0 the strongest: the last made."""


class HeldRules(NamedTuple):
    """The rules that hold for a question, on the shelf that answers it."""

    effect: RuleEffect
    shelf: RuleShelf


@dataclass(frozen=True)
class _Listed:
    """The rules of one list for as long as none of them begins or ends.

    Attributes:
        always: those that hold whoever asks; ``rules`` and ``key`` are the same, and their ids.
        on_pages: by item, those that hold on its page alone, whoever asks.
        asked: those with a condition.
    """

    since: datetime | None
    until: datetime | None
    always: Sequence[Ranked]
    rules: Sequence[ShopRule]
    key: tuple[str, ...]
    on_pages: Mapping[str, Sequence[Ranked]]
    asked: Sequence[tuple[int, ShopRule, CelCondition, frozenset[str]]]

    def covers(self, at: datetime) -> bool:
        return (self.since is None or self.since <= at) and (self.until is None or at < self.until)


@dataclass(frozen=True)
class _Reading:
    """The rules as they were read last, and what their conditions mean.

    Attributes:
        broken: by rule, why it does not act.
        needs: what the conditions must be told of a customer, by name.
        listed: by list, made once it is asked for.
    """

    live: Sequence[ShopRule]
    vocabulary: Vocabulary
    conditions: Mapping[str, CelCondition]
    broken: Mapping[str, str]
    needs: frozenset[str]
    listed: dict[str, _Listed] = field(default_factory=dict)

    @classmethod
    def of(cls, live: Sequence[ShopRule], vocabulary: Vocabulary) -> _Reading:
        conditions: dict[str, CelCondition] = {}
        broken: dict[str, str] = {}
        for rule in live:
            if rule.condition is not None:
                try:
                    conditions[rule.condition] = conditions.get(rule.condition) or vocabulary.parse_condition(rule.condition)
                except ConditionError as error:
                    # it names a segment that is no more: nobody is in it
                    broken[rule.rule_id] = f"its condition {error}"
        needs = frozenset[str]().union(*(vocabulary.needs(condition) for condition in conditions.values()))
        return cls(live, vocabulary, conditions, broken, needs)

    def at(self, listing: str, at: datetime) -> _Listed:
        """The rules of one list at a moment."""
        found = self.listed.get(listing)
        if found is None or not found.covers(at):
            found = self.listed[listing] = self._made(listing, at)
        return found

    def _made(self, listing: str, at: datetime) -> _Listed:
        turns = [turn for rule in self.live for turn in (rule.begins, rule.until) if turn is not None]
        always: list[Ranked] = []
        on_pages: dict[str, list[Ranked]] = {}
        asked = []
        for rank, rule in enumerate(self.live):
            lists: Sequence[str] = rule.listings or (ABOUT_ITEMS if rule.page_item_ids else [listing])
            if listing not in lists or not rule.holds(at):
                continue
            if rule.condition is not None:
                if rule.condition in self.conditions:
                    asked.append((rank, rule, self.conditions[rule.condition], frozenset(rule.page_item_ids)))
            elif rule.page_item_ids:
                for item in rule.page_item_ids:
                    on_pages.setdefault(item, []).append((rank, rule))
            else:
                always.append((rank, rule))
        since, until = max((t for t in turns if t <= at), default=None), min((t for t in turns if t > at), default=None)
        rules = [rule for _, rule in always]
        return _Listed(since, until, always, rules, tuple([rule.rule_id for rule in rules]), on_pages, asked)


class LiveRules(Protocol):
    """Where the rules that have not ended are looked up."""

    unread: str | None

    def live(self) -> Sequence[ShopRule]:
        """The rules, the last made first: the same object as long as nothing has changed."""


@dataclass
class TriedRules:
    """Rules to be tried, in the place of those of a home."""

    rules: Sequence[ShopRule]
    unread: str | None = None

    def live(self) -> Sequence[ShopRule]:
        """These."""
        return self.rules


class Merchandiser:
    """Applies the rules of one home to questions that are answered with items."""

    def __init__(self, rules: LiveRules, governor: Governor) -> None:
        self.rules, self._governor = rules, governor
        self._last = _Reading.of((), governor.vocabulary)

    def needs(self) -> frozenset[str]:
        """What the conditions of the rules must be told of a customer, by name."""
        return self._reading().needs

    def bound(self, query: Query, shelf: RuleShelf | None, at: datetime) -> tuple[Query, HeldRules | None]:
        """The question within the rules that hold for it at *at*; None where none does."""
        reading = self._reading()
        if not reading.live or shelf is None:
            return query, None
        rules, key = self._holding(reading, query, at)
        if not rules:
            return query, None
        effect = shelf.effect(rules, key)
        changed: dict[str, Any] = {"watched": effect.watched, "proposed": effect.proposed}
        if effect.blocked is not None:
            changed["barred"] = {**query.barred, BLOCKED: effect.blocked}
        if effect.factors is not None:
            changed["factors"] = {**query.factors, RULES: effect.factors}
        if effect.pins:
            changed["pinned"] = tuple((place, item) for place, item, _ in effect.pins if place <= query.limit)
        return replace(query, **changed), HeldRules(effect, shelf)

    def told(self, query: Query, held: HeldRules | None, decision: Decision) -> tuple[Decision, list[str]]:
        """The decision with what the rules did said of each choice, and the ids of the rules that acted."""
        if held is None:
            return decision, []
        effect, positions = held.effect, held.shelf.positions
        standing = set(placed(query, {choice.id for choice in decision.choices}).values()) if effect.pins else ()
        pinned: dict[str, str] = {}
        for place, item, rule_id in effect.pins:
            if item in standing and place <= query.limit:
                # of several pins of one item the strongest
                pinned.setdefault(item, rule_id)
        choices = [_told(choice, pinned.get(choice.id), effect, positions) for choice in decision.choices]
        acted = {*pinned.values(), *(rule_id for position in decision.met for rule_id in effect.at(position))}
        return replace(decision, choices=choices), [rule_id for rule_id in effect.rule_ids if rule_id in acted]

    def refresh(self, shelves: Iterable[RuleShelf]) -> str | None:
        """Make ready what an answer would otherwise have to; returns which rules do not act, and why."""
        reading = self._reading()
        found = dict(reading.broken)
        for shelf in shelves:
            shelf.keep_only(reading.live)
            for rule in reading.live:
                shelf.reach(rule)
            found |= dict(shelf.lost)
        told = "; ".join(f"{rule_id}: {why}" for rule_id, why in sorted(found.items()))
        return self.rules.unread or (f"some do not act: {told}"[:500] if told else None)

    def _reading(self) -> _Reading:
        """The rules and what their names mean, taken in anew where either has changed."""
        live, vocabulary, last = self.rules.live(), self._governor.vocabulary, self._last
        if live is not last.live or vocabulary is not last.vocabulary:
            last = self._last = _Reading.of(live, vocabulary)
        return last

    def _holding(self, reading: _Reading, query: Query, at: datetime) -> tuple[Sequence[ShopRule], tuple[str, ...]]:
        """The rules that hold for a question, the strongest first, and their ids."""
        listed = reading.at(query.listing, at)
        found: list[Ranked] = []
        for item in dict.fromkeys(query.item_ids) if listed.on_pages else ():
            found += listed.on_pages.get(item, ())
        if listed.asked:
            found += self._asked(reading.vocabulary, listed, query, at)
        if not found:
            return listed.rules, listed.key
        # a rule may be of two of the pages
        ranked = dict([*listed.always, *found])
        rules = [ranked[rank] for rank in sorted(ranked)]
        return rules, tuple([rule.rule_id for rule in rules])

    def _asked(self, vocabulary: Vocabulary, listed: _Listed, query: Query, at: datetime) -> Iterator[Ranked]:
        question = of_the_question(at, self._governor.zone_of(query.row), query.channel, query.store_id)
        told = vocabulary.told(query.row, question)
        about, known = frozenset(query.item_ids), dict[str, bool]()
        for rank, rule, condition, pages in listed.asked:
            if pages and not pages & about:
                continue
            if condition.text not in known:
                known[condition.text] = condition.holds(told)
            if known[condition.text]:
                yield rank, rule


def _told(choice: Choice, pinned_by: str | None, effect: RuleEffect, positions: Mapping[str, int]) -> Choice:
    """A choice that says which rule put it where it stands, or moved its score."""
    if pinned_by is not None:
        details = {name: value for name, value in choice.details.items() if name != "because_of"}
        return replace(choice, source=PINNED, reason="put in this place by the shop", details={**details, "rule_ids": [pinned_by]})
    position = positions.get(choice.id)
    if effect.factors is None or position is None or effect.factors[position] == 1.0:
        return choice
    is_raised = bool(effect.factors[position] > 1.0)
    return replace(
        choice,
        source=f"{choice.source}, {RAISED if is_raised else LOWERED}",
        reason=f"{choice.reason}; {'put forward' if is_raised else 'held back'} by the shop",
        details={**choice.details, "rule_ids": [*effect.at(position)]},
    )
