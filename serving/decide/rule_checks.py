"""Sees that a rule that is to be made fits the shop: its items and values are in the catalogue, its condition can be told of a customer."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from features.catalogue.tables import Catalogue
from features.definitions.conditions import ConditionError
from features.definitions.segments import Vocabulary
from features.state.home import Home
from models.attributes import Attributes
from serving.decide.questions import Between, UnknownAttributeError
from serving.decide.rules import NewRule, WrongRuleError
from serving.decide.wishes import plain, wishes_of

NO_ATTRIBUTES = ("item_id", "recommendable")
MOST_COMPARED = 20_000
"""With how many ids an unknown one is compared, so that a mistake is told at once in any catalogue."""


class RuleChecks:
    """Checks new rules against one home as it stands."""

    def __init__(self, home: Home, vocabulary: Callable[[], Vocabulary]) -> None:
        self._catalogue, self._vocabulary = Catalogue(home), vocabulary

    def __call__(self, rule: NewRule) -> None:
        """See that a rule fits.

        Raises:
            WrongRuleError: it does not.
            MissingStateError: there is no catalogue.
        """
        if rule.condition is not None:
            self._check_condition(rule.condition)
        items = self._catalogue.read("items")
        named = [(f"item_ids[{k}]", each) for k, each in enumerate(rule.item_ids)]
        named += [(f"page_item_ids[{k}]", each) for k, each in enumerate(rule.page_item_ids)]
        if named:
            known = items["item_id"].to_pylist()
            _check_items(named, known)
        if not rule.where:
            return
        names = [name for name in items.column_names if name not in NO_ATTRIBUTES]
        for name in rule.where:
            if name not in names:
                raise WrongRuleError(f"where.{name}", f"is no attribute of items{_near(name, names)}: use one of {', '.join(names)}")
        attributes = Attributes.of({name: items[name].to_pylist() for name in rule.where})
        try:
            wishes_of("where", rule.where, attributes)
        except UnknownAttributeError as error:
            raise WrongRuleError(error.field, error.reason) from None
        _check_values(rule, attributes, len(items))

    def _check_condition(self, text: str) -> None:
        vocabulary = self._vocabulary()
        try:
            condition = vocabulary.parse_condition(text)
        except ConditionError as error:
            raise WrongRuleError("condition", str(error)) from None
        if told := sorted(vocabulary.needs(condition) & vocabulary.context.keys()):
            raise WrongRuleError("condition", f"names {told[0]!r}, which only questions for offers tell: use what is known of the customer")


def _check_items(named: Iterable[tuple[str, str]], known: list[str]) -> None:
    there = frozenset(known)
    for field, item in named:
        if item not in there:
            raise WrongRuleError(field, f"{item!r} is not in the catalogue{_near(item, known)}")


def _check_values(rule: NewRule, attributes: Attributes, count: int) -> None:
    for name, values in rule.where.items():
        # of numbers a value that no item has is no slip of the pen
        if isinstance(values, Between) or attributes[name].kind == "number":
            continue
        words = attributes[name].words
        for k, value in enumerate(map(plain, values)):
            if value not in words:
                raise WrongRuleError(f"where.{name}[{k}]", f"no item has {value!r}{_near(value, words)}")


def _near(word: str, known: Iterable[Any]) -> str:
    """The nearest of what is known, in words; nothing where none is near."""
    alike = [each for each in known if abs(len(each) - len(word)) <= 2 and each != word]
    if len(alike) > MOST_COMPARED:
        alike = [each for each in alike if each[:2].lower() == word[:2].lower()][:MOST_COMPARED]
    near = difflib.get_close_matches(word, alike, 1, 0.5) or difflib.get_close_matches(word.upper(), alike, 1, 0.5)
    return f": did you mean {near[0]!r}?" if near else ""
