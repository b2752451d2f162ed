"""A rule as a form holds it: what was typed, what it says, and which field a mistake is told of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from serving.console.goods import said_values
from serving.decide.rules import ABOUT_ITEMS, NewRule, RuleContent, WrongRuleError

ROWS = 2
"""How many attributes a new form has room for; one more than a rule that is changed names."""
MOST_ROWS = 20
FIELDS = ("action", "items", "place", "factor", "pages", "condition", "begins", "until", "note", "instead_of")
_NAMES = {"item_ids": "items", "page_item_ids": "pages", "from": "begins"}
"""What the form calls a field of a rule, where that is another name."""


@dataclass(frozen=True)
class RuleForm:
    """What was typed of a rule.

    Attributes:
        texts: by field of the form.
        where: attributes with their values, one a line.
        listings: the lists that were chosen.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    where: Sequence[tuple[str, str]] = ()
    listings: Sequence[str] = ()

    def __getitem__(self, name: str) -> str:
        """What stands in a field."""
        return self.texts.get(name, "")

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The attributes with their values, and room for another."""
        return [*self.where, *[("", "")] * max(1, ROWS - len(self.where))][:MOST_ROWS]

    @property
    def action(self) -> str:
        """What the rule does: ``pin`` where nothing was said."""
        return self["action"] or "pin"

    @property
    def first_list(self) -> str:
        """The list in which its effect shows first."""
        return self.listings[0] if self.listings else ABOUT_ITEMS[0] if self["pages"] else "for_you"

    @classmethod
    def read(cls, said: Callable[[str], str], all_said: Callable[[str], Sequence[Any]]) -> RuleForm:
        """What a form that was sent holds."""
        where = [(name, said(f"values_{k}")) for k in range(MOST_ROWS) if (name := said(f"attribute_{k}")) or said(f"values_{k}")]
        return cls({name: said(name) for name in FIELDS}, where, [str(each) for each in all_said("listings")])

    @classmethod
    def of(cls, rule: RuleContent, zone: ZoneInfo, rule_id: str) -> RuleForm:
        """What says the same as a rule, to be made in its place."""

        def there(moment: datetime | None) -> str:
            return "" if moment is None else f"{moment.astimezone(zone):%Y-%m-%dT%H:%M}"

        texts = {
            "action": rule.action, "items": "\n".join(rule.item_ids), "place": str(rule.place or ""),
            "pages": "\n".join(rule.page_item_ids),
            "factor": "" if rule.factor is None else f"{rule.factor:g}", "condition": rule.condition or "", "begins": there(rule.begins),
            "until": there(rule.until), "note": rule.note, "instead_of": rule_id,
        }  # fmt: skip
        return cls(texts, said_values(rule), list(rule.listings))

    def with_item(self, name: str, item_id: str) -> RuleForm:
        """The form with an item more in a field; a pin has one only."""
        before = [] if name == "items" and self.action == "pin" else _lines(self[name])
        return replace(self, texts={**self.texts, name: "\n".join(dict.fromkeys([*before, item_id]))})

    def rule(self, zone: ZoneInfo, numbers: frozenset[str]) -> NewRule:
        """The rule that it says.

        Args:
            zone: of the shop, in which its times are.
            numbers: the attributes that hold numbers.

        Raises:
            RejectedEvent: it says none.
        """
        said: dict[str, Any] = {
            "action": self.action, "item_ids": _lines(self["items"]), "where": self._where(numbers), "listings": list(self.listings),
            "page_item_ids": _lines(self["pages"]), "condition": self["condition"] or None, "from": _moment("from", self["begins"], zone),
            "until": _moment("until", self["until"], zone), "note": self["note"], "instead_of": self["instead_of"] or None,
        }  # fmt: skip
        # what is of another action is not shown, and not meant
        if self.action == "pin":
            said["place"] = int(_number("place", self["place"], is_whole=True)) if self["place"] else None
        elif self.action == "boost":
            said["factor"] = _number("factor", self["factor"]) if self["factor"] else None
        return NewRule.of(said)

    def _where(self, numbers: frozenset[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, text in self.where:
            if not name:
                raise WrongRuleError("where", "choose the attribute that these are values of")
            if name in found:
                raise WrongRuleError(f"where.{name}", "stands here twice: put its values into one field, one a line")
            if name in numbers and ".." in text:
                low, _, high = text.partition("..")
                ends = {"min": low.strip(), "max": high.strip()}
                found[name] = {end: _number(f"where.{name}", said) for end, said in ends.items() if said}
            else:
                values = _lines(text)
                found[name] = [_number(f"where.{name}", each) for each in values] if name in numbers else values
        return found


def field_of(name: str) -> str:
    """The field of the form that a rule's field is typed into."""
    plain = name.partition("[")[0].partition(".")[0]
    known = _NAMES.get(plain, plain)
    return known if known in (*FIELDS, "where", "listings") else "action"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _number(name: str, text: str, is_whole: bool = False) -> float:
    try:
        found = float(text.replace(",", "."))
    except ValueError:
        raise WrongRuleError(name, f"{text!r} is no number") from None
    if is_whole and not found.is_integer():
        raise WrongRuleError(name, f"{text!r} is no whole number")
    return found


def _moment(name: str, text: str, zone: ZoneInfo) -> datetime | None:
    """A time of the shop's zone, as browsers write it."""
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise WrongRuleError(name, f"{text!r} is no time: write it like 2018-01-08T09:00") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=zone)
