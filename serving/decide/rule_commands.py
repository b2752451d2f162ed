"""The commands about merchandising rules. A running service takes what they change within a second."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer
from rich.console import Console
from rich.table import Table

from features.catalogue.shop import Shop
from features.state.clock import clock_of, parse_as_of
from features.state.home import Home

if TYPE_CHECKING:
    from serving.decide.rules import Rules, ShopRule

BY = "command line"
rules_app = typer.Typer(help="Merchandising rules: what is pinned, boosted and blocked in lists of items, and when.", no_args_is_help=True)
console = Console()
_DATES = "a date, which begins in the shop's zone, or a time with its zone"


@rules_app.command()
def add(
    action: Annotated[str, typer.Argument(help="pin, boost or block.")],
    items: Annotated[list[str] | None, typer.Argument(help="Ids of items; a pin takes one.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="All items of a value, e.g. brand=Private, or of numbers weight_g=100..500; repeat.")
    ] = None,
    place: Annotated[int | None, typer.Option(help="Of a pin: the place in the list, counted from 1.")] = None,
    factor: Annotated[float | None, typer.Option(help="Of a boost: from 0.1 to 10; below 1 it lowers.")] = None,
    listing: Annotated[list[str] | None, typer.Option(help="In which list, e.g. for_you; repeat; default: all.")] = None,
    page: Annotated[list[str] | None, typer.Option(help="On which item's page; repeat; default: all.")] = None,
    when: Annotated[str | None, typer.Option(help="For which customers: a condition in CEL, as in segments.yaml.")] = None,
    begins: Annotated[str | None, typer.Option("--from", help=f"From when: {_DATES}; default: at once.")] = None,
    until: Annotated[str | None, typer.Option(help=f"Until when, that moment not included: {_DATES}.")] = None,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    instead_of: Annotated[str | None, typer.Option(help="The id of a rule that ends where this one begins to be.")] = None,
) -> None:
    """Make a rule; it holds in the next answers."""
    from serving.decide.rules import NewRule

    home = Home.from_environment()
    zone = Shop.load(home).timezone
    said: dict[str, Any] = {
        "action": action, "item_ids": items or [], "where": _where(where or []), "place": place, "factor": factor,
        "listings": listing or [], "page_item_ids": page or [], "condition": when, "from": _moment("--from", begins, zone),
        "until": _moment("--until", until, zone), "note": note, "instead_of": instead_of,
    }  # fmt: skip
    made = _rules(home).add(NewRule.of(said), BY, clock_of(home.settings)())
    console.print(f"{made.rule_id}: {_what(made)}", highlight=False, markup=False)


@rules_app.command("list")
def show(
    with_ended: Annotated[bool, typer.Option("--all", help="Those that have ended too.")] = False,
    at: Annotated[str | None, typer.Option(help=f"Those that were in force then: {_DATES}.")] = None,
) -> None:
    """Show the rules, the last made first: of two that claim one place the last made has it."""
    home = Home.from_environment()
    zone, now = ZoneInfo(Shop.load(home).timezone), clock_of(home.settings)()
    rules, then = _rules(home), _moment("--at", at, zone.key)
    found = rules.listed(with_ended) if then is None else rules.then(then)

    def told(moment: datetime | None) -> str:
        return "" if moment is None else f"{moment.astimezone(zone):%Y-%m-%d %H:%M}"

    table = Table("rule", "what", "where", "for whom", "from", "until", "state", "made", "ended", "note", title=f"times are {zone.key}'s")
    for rule in found:
        made, ended = f"{told(rule.made_at)} {rule.made_by}", f"{told(rule.ended_at)} {rule.ended_by or ''}"
        cells = [
            rule.rule_id, _what(rule), _place_of(rule), rule.condition or "everybody", told(rule.begins), told(rule.until),
            rule.state(now), made, ended.strip(), rule.note,
        ]  # fmt: skip
        # their words may hold brackets, which are no markup
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    console.print(table)


@rules_app.command()
def end(rule: Annotated[str, typer.Argument(help="The id of the rule, as list shows it.")]) -> None:
    """End a rule; it no longer holds in the next answers, and stays in the list of all."""
    home = Home.from_environment()
    ended = _rules(home).end(rule, BY, clock_of(home.settings)())
    console.print(f"{ended.rule_id}: ended", highlight=False)


def _rules(home: Home) -> Rules:
    from features.definitions.segments import Vocabulary
    from serving.decide.rule_checks import RuleChecks
    from serving.decide.rules import Rules

    return Rules(home, RuleChecks(home, lambda: Vocabulary.load(home, Shop.load(home).domain)))


def _moment(option: str, text: str | None, zone: str) -> datetime | None:
    if text is None:
        return None
    try:
        return parse_as_of(text, zone)
    except ValueError:
        told = "neither a date like 2017-12-04 nor a time with its zone like 2017-12-04T05:00:00Z"
        raise ValueError(f"{option} {text!r} is {told}") from None


def _where(said: list[str]) -> dict[str, Any]:
    """By attribute its values, or the numbers from one to another."""
    found: dict[str, Any] = {}
    for each in said:
        name, equals, value = each.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--where {each!r}: write NAME=VALUE, or NAME=FROM..TO of numbers")
        low, dots, high = value.partition("..")
        try:
            numbers = {end: float(text) for end, text in (("min", low), ("max", high)) if text} if dots else None
        except ValueError:
            # a name may hold dots
            numbers = None
        if numbers:
            found[name] = numbers
        elif isinstance(found.get(name), dict):
            raise ValueError(f"--where {each!r}: {name} is asked for numbers already: make it one or the other")
        else:
            found[name] = [*found.get(name, []), value]
    return found


def _what(rule: ShopRule) -> str:
    """What a rule does, in words."""
    from serving.decide.questions import Between

    told = [
        f"{name} from {'any' if v.min is None else v.min} to {'any' if v.max is None else v.max}"
        if isinstance(v, Between)
        else f"{name} {' or '.join(map(str, v))}"
        for name, v in rule.where.items()
    ]
    more = f" and {len(rule.item_ids) - 5} more" if len(rule.item_ids) > 5 else ""
    which = ", ".join(rule.item_ids[:5]) + more if rule.item_ids else " and ".join(told)
    how = {"pin": f" to place {rule.place}", "boost": f" times {rule.factor or 1:g}", "block": ""}[rule.action]
    return f"{rule.action} {which}{how}"


def _place_of(rule: ShopRule) -> str:
    lists = ", ".join(rule.listings) or ("an item's page" if rule.page_item_ids else "every list")
    return lists + (f", on {', '.join(rule.page_item_ids[:5])}" if rule.page_item_ids else "")
