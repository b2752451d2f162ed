"""What merchandising rules come to on the shelf of one model: which items they reach, what they bar and multiply."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.attributes import Attributes
from models.decision import Positions
from serving.decide.questions import UnknownAttributeError
from serving.decide.rules import ShopRule
from serving.decide.wishes import wishes_of

PROPOSED = 10
"""How many of the raised items are candidates of every list: those that are named, then what sells most."""
MOST_BYTES = 64_000_000
"""How much is kept of what sets of rules come to, beside one."""


@dataclass(frozen=True)
class RuleEffect:
    """What a set of rules does to a list.

    Attributes:
        blocked: which positions it bars; None for none.
        factors: what it multiplies the score of each position by; None where it leaves all as they are.
        watched: which positions it blocks or multiplies.
        pins: places and items with their rules, the strongest first.
        proposed: what it makes candidates.
        reached: every blocked or multiplied position once for each of its rules, in order.
        rules_reaching: the rule of each of them, as a place in ``rule_ids``.
        known: the rules of the positions that were asked about: at most those reached.
    """

    blocked: NDArray[np.bool_] | None
    factors: NDArray[np.float64] | None
    watched: NDArray[np.bool_]
    pins: Sequence[tuple[int, str, str]]
    proposed: Positions
    reached: Positions
    rules_reaching: Positions
    rule_ids: Sequence[str]
    known: dict[int, Sequence[str]] = field(default_factory=dict)

    def at(self, position: int) -> Sequence[str]:
        """The rules that block or multiply an item."""
        found = self.known.get(position)
        if found is None:
            first, last = np.searchsorted(self.reached, position, "left"), np.searchsorted(self.reached, position, "right")
            found = self.known[position] = [self.rule_ids[k] for k in self.rules_reaching[first:last].tolist()]
        return found


class RuleShelf:
    """The items of one model, as rules reach them. Holds no customer data.

    Args:
        ids: position to item.
        positions: item to position.
        attributes: of the items, by position.
        popularity: of the items, by position; more is more popular.
    """

    def __init__(self, ids: Sequence[str], positions: Mapping[str, int], attributes: Attributes, popularity: NDArray[np.float32]) -> None:
        self.positions, self._ids, self._attributes, self._popularity = positions, ids, attributes, popularity
        self._reach: dict[str, Positions] = {}
        self._effects: OrderedDict[tuple[str, ...], RuleEffect] = OrderedDict()
        self._most = max(MOST_BYTES // max(10 * len(ids), 1), 4)
        self._lock = threading.Lock()
        self.lost: dict[str, str] = {}
        """By rule, why it reaches nothing."""

    def reach(self, rule: ShopRule) -> Positions:
        """The positions of the items that a rule names, in order; what the shelf does not have is passed over."""
        found = self._reach.get(rule.rule_id)
        if found is None:
            found = self._reach[rule.rule_id] = self._found(rule)
            if not len(found):
                self.lost.setdefault(rule.rule_id, "no item in the catalogue is what it names")
        return found

    def keep_only(self, rules: Sequence[ShopRule]) -> None:
        """Forget what rules reach that are no more."""
        known = {rule.rule_id for rule in rules}
        for rule_id in [each for each in list(self._reach) if each not in known]:
            self._reach.pop(rule_id, None)
            self.lost.pop(rule_id, None)

    def effect(self, rules: Sequence[ShopRule], key: tuple[str, ...]) -> RuleEffect:
        """What these rules, the strongest first, come to together; *key* is their ids."""
        with self._lock:
            found = self._effects.get(key)
            if found is not None:
                self._effects.move_to_end(key)
                return found
        made = self._made(rules)
        with self._lock:
            self._effects[key] = made
            while len(self._effects) > self._most:
                self._effects.popitem(last=False)
        return made

    def _found(self, rule: ShopRule) -> Positions:
        if rule.item_ids:
            return np.array(sorted({self.positions[each] for each in rule.item_ids if each in self.positions}), np.intp)
        try:
            wishes = wishes_of("where", rule.where, self._attributes)
        except UnknownAttributeError as error:
            # the catalogue has changed since the rule was made
            self.lost[rule.rule_id] = str(error)
            return np.empty(0, np.intp)
        return np.flatnonzero(self._attributes.keep(wishes, {}, np.arange(len(self._ids)))).astype(np.intp)

    def _made(self, rules: Sequence[ShopRule]) -> RuleEffect:
        blocked, factors = np.zeros(len(self._ids), bool), np.ones(len(self._ids))
        named: list[Positions] = [np.empty(0, np.intp)]
        for rule in rules:
            reach = self.reach(rule)
            if rule.action == "block":
                blocked[reach] = True
            elif rule.action == "boost" and rule.factor is not None:
                factors[reach] *= rule.factor
                if rule.item_ids:
                    named.append(reach)
        pairs = [(np.empty(0, np.intp), 0)]
        for k, rule in enumerate(rules):
            if rule.action != "pin":
                reach = self.reach(rule)
                # what is blocked is not raised or lowered
                pairs.append((reach if rule.action == "block" else reach[~blocked[reach]], k))
        reached = np.concatenate([reach for reach, _ in pairs])
        reaching = np.repeat([k for _, k in pairs], [len(reach) for reach, _ in pairs])
        order = np.argsort(reached, kind="stable")
        raised = np.flatnonzero((factors > 1.0) & ~blocked)
        is_named = np.isin(raised, np.concatenate(named))
        best = np.lexsort((raised, -self._popularity[raised], ~is_named))[:PROPOSED]
        return RuleEffect(
            blocked=blocked if blocked.any() else None,
            factors=factors if (factors != 1.0).any() else None,
            watched=blocked | (factors != 1.0),
            pins=[(rule.place, rule.item_ids[0], rule.rule_id) for rule in rules if rule.action == "pin" and rule.place is not None],
            proposed=raised[best].astype(np.intp),
            reached=reached[order],
            rules_reaching=reaching[order].astype(np.intp),
            rule_ids=[rule.rule_id for rule in rules],
        )
