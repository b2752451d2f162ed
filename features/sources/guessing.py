"""Propose a mapping for an unknown file: what each column seems to hold, and what its owner must decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.table import Column as TableColumn
from rich.table import Table

from features.catalogue.shop import Shop
from features.catalogue.tables import MAX_ATTRIBUTES, attribute_fault
from features.events.identifiers import IdentifierError, IdentifierKind, normalise
from features.sources.headers import known_headers, plain_header
from features.sources.proposing import catalogue_command, proposed
from features.sources.sampling import Column, FileSample, read_sample

HEAD = """# A proposal from the first rows of {name}: go over every line, above all source, shop and consent.
# A bare name is a column; a fixed value is written {{value: ...}}. docs/import.md tells what each key means.
"""
FEW_TRIED = 300
"""How many values of a column are tried as addresses or phone numbers."""
MOST_WRONG = 0.02
OF_ITEMS = "item.attributes."
FEWEST_ITEMS = 20
"""On fewer items that were bought more than once nothing is said of what depends on the item."""


@dataclass(frozen=True)
class Proposal:
    """A mapping's text, what is doubtful about it, and the columns it was read from.

    Attributes:
        roles: what each column that is used was taken for, as ``event.id`` to its name.
        text: empty where ``catalogue`` says what to do.
    """

    text: str
    doubts: list[str]
    columns: list[Column]
    roles: dict[str, str]
    catalogue: str | None = None
    """Of a file that tells of items rather than of what customers did: the command that loads it, instead of a mapping."""

    def table(self) -> Table:
        """The columns as a table to print."""
        table = Table("column", "seems to hold", TableColumn("mapped to", overflow="fold"), "empty", "examples")
        used: dict[str, list[str]] = {}
        for role, column in self.roles.items():
            used.setdefault(column, []).append(role)
        for each in self.columns:
            examples = ", ".join(example[:40] for example in each.examples)
            table.add_row(each.name, each.kind, ", ".join(used.get(each.name, [])), f"{each.empty_share:.0%}", examples)
        return table


def propose(path: Path, standing: Shop | None = None) -> Proposal:
    """Read the first rows of *path* and propose a mapping, for the shop that the home already holds if there is one.

    Raises:
        UnreadableFileError: the file cannot be read.
    """
    sample = read_sample(path)
    roles, doubts = find_roles(sample)
    if "event.occurred_at" not in roles and "item.id" in roles and "event.id" not in roles:
        command = catalogue_command(sample, roles)
        return Proposal("", [*sample.doubts, *doubts], list(sample.columns.values()), roles, command)
    said, told = proposed(sample, roles, standing)
    text = HEAD.format(name=path.name) + yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120)
    return Proposal(text, [*sample.doubts, *doubts, *told], list(sample.columns.values()), roles)


def find_roles(sample: FileSample) -> tuple[dict[str, str], list[str]]:
    """For each role the column whose header is the surest and whose content fits, and what is doubtful; no column has two."""
    rules, roles, doubts = known_headers().rules, {}, []
    free = dict(sample.columns)
    if (kind := _kind_of_events(sample)) is not None:
        roles["event.name"] = kind
        del free[kind]
    if any("lineitem" in c.header for c in free.values()) and "Name" in free:
        # Shopify calls an order's number its name
        roles["event.id"] = "Name"
        del free["Name"]
    for role in (name for name in rules if "." in name and name not in roles):
        ranked = sorted((rank, place, name) for place, (rank, name) in enumerate(_ranked(role, free, sample)))
        for _, _, name in ranked[:1]:
            roles[role] = name
            del free[name]
    if "event.occurred_at" not in roles and (times := [c.name for c in free.values() if c.kind == "time"]):
        roles["event.occurred_at"] = times[0]
        del free[times[0]]
    if (found := _amount(sample, roles, free)) is not None:
        roles["item.amount"] = found
        del free[found]
    if (currency := roles.get("event.currency")) is not None and sample.columns[currency].empty_share > 0:
        # on some lines of an order alone: the shop's own stands for all
        del roles["event.currency"]
        doubts.append(f"event.currency: {currency} is empty on some rows, so it is left out and every amount taken for the shop's currency")
    doubts += _without_identity(sample, roles)
    doubts += _of_items(sample, roles, free)
    return roles, doubts


def _ranked(role: str, free: dict[str, Column], sample: FileSample) -> Iterator[tuple[int, str]]:
    rule = known_headers().rules[role]
    for name, column in free.items():
        rank = rule.rank(column.header)
        if rank is None or column.kind == "clock" or column.empty_share == 1:
            continue
        if (column.kind == "time") != (rule.content == "time") or (rule.content == "number" and column.kind != "number"):
            continue
        if role in ("event.id", "item.id") and (column.fractional or column.distinct < 2):
            continue
        if role.startswith("event.identifiers.") and not _identifies(role.rsplit(".", 1)[1], column, sample):
            continue
        yield rank, name


def _identifies(kind: str, column: Column, sample: FileSample) -> bool:
    """Whether a column holds identifiers rather than names of people or yes and no."""
    present: list[str] = sample.values[column.name].dropna().unique()[:FEW_TRIED].tolist()
    if kind == "email":
        return sum("@" in value for value in present) >= 0.5 * len(present)
    if kind == "phone":
        return sum(sum(c.isdigit() for c in value) >= 6 for value in present) >= 0.5 * len(present)
    if column.fractional or column.distinct < 2:
        return False
    return sum(" " in value and any(c.isalpha() for c in value) for value in present) < 0.2 * len(present)


def _without_identity(sample: FileSample, roles: dict[str, str]) -> list[str]:
    """Take e-mail addresses and phone numbers out again that no import would take: an event with a broken one is rejected."""
    doubts, tongue = [], known_headers().tongue(sample.columns)
    kinds: tuple[IdentifierKind, ...] = ("email", "phone")
    for kind in kinds:
        if (name := roles.get(role := f"event.identifiers.{kind}")) is None:
            continue
        present = sample.values[name].dropna().unique()[:FEW_TRIED]
        broken = [value for value in present if not _normal(kind, value, tongue.country if tongue is not None else None)]
        if len(broken) > MOST_WRONG * len(present):
            del roles[role]
            doubts.append(
                f"{role}: {name} is left out, for {len(broken)} of {len(present)} values are no {kind}: an event with one would be rejected"
            )
    return doubts


def _normal(kind: IdentifierKind, value: str, region: str | None) -> bool:
    try:
        normalise(kind, value, region)
    except IdentifierError:
        return False
    return True


def _kind_of_events(sample: FileSample) -> str | None:
    """The column that says what happened: few values, most of them known as events."""
    rule, known = known_headers().rules["event_kind"], known_headers().events
    for rank in range(len(rule.patterns)):
        for name, column in sample.columns.items():
            if rule.rank(column.header) == rank and column.kind == "text" and column.distinct <= 60:
                values = sample.values[name].dropna()
                if values.map(lambda value: plain_header(value) in known).mean() >= 0.5:
                    return name
    return None


def _amount(sample: FileSample, roles: dict[str, str], free: dict[str, Column]) -> str | None:
    """The column of the money of a line: a total of the line rather than a price of one, and never the whole order's."""
    rules = known_headers().rules
    found: dict[str, str] = {}
    for name in ("unit_price", "line_total"):
        ranked = [
            (rank, place, column.name)
            for place, column in enumerate(free.values())
            if column.kind == "number" and (rank := rules[name].rank(column.header)) is not None
        ]
        # what is the same on all lines of an order, or stands on one of them alone, is the order's
        kept = [each for each in sorted(ranked) if not _of_the_order(sample, roles, each[2])]
        if kept:
            found[name] = kept[0][2]
    if not found:
        return None
    if "line_total" not in found:
        return found["unit_price"]
    if "unit_price" in found and rules["line_total"].rank(sample.columns[found["line_total"]].header) and "item.quantity" in roles:
        # a header such as "value" is not sure of itself: it must be near the price times the quantity
        reckoned = sample.numbers(found["unit_price"]) * sample.numbers(roles["item.quantity"])
        told = sample.numbers(found["line_total"])
        if not ((told <= reckoned + 0.011) & (told > 0.2 * reckoned)).mean() > 0.8:
            return found["unit_price"]
    return found["line_total"]


def _of_the_order(sample: FileSample, roles: dict[str, str], name: str) -> bool:
    if (order := roles.get("event.id")) is None or "item.id" not in roles:
        return False
    lines = sample.values.groupby(order)[roles["item.id"]].nunique()
    several = sample.values[sample.values[order].isin(lines[lines > 1].index)]
    if several.empty:
        return False
    grouped = several.groupby(order)
    is_one = (grouped[name].nunique() <= 1) & (grouped[roles["item.id"]].nunique() > 1)
    return bool(several[name].isna().mean() > 0.2 or is_one.mean() > 0.9)


def _of_items(sample: FileSample, roles: dict[str, str], free: dict[str, Column]) -> list[str]:
    """Add the shop's own attributes, which are the same wherever an item stands; take out again what is told of items and is not."""
    if "item.id" not in roles:
        for role in [role for role in roles if role.startswith(OF_ITEMS)]:
            del roles[role]
        return []
    doubts = []
    for role, name in [(role, name) for role, name in roles.items() if role.startswith(OF_ITEMS)]:
        same, items = _sameness(sample, roles, name)
        if items >= FEWEST_ITEMS and same < 0.8:
            del roles[role]
            doubts.append(
                f"{role}: {name} differs between lines of one item, so it is left out. If it tells variants apart, "
                f"write item.id: {{columns: [{roles['item.id']}, {name}]}}"
            )
    for name, column in free.items():
        is_price = known_headers().rules["unit_price"].rank(column.header) is not None
        own = "price" if is_price else "_".join(column.header.split())[:64]
        if column.kind in ("time", "clock") or column.distinct < 2 or attribute_fault(own) or OF_ITEMS + own in roles:
            continue
        same, items = _sameness(sample, roles, name)
        if items >= FEWEST_ITEMS and same > 0.98 and len([r for r in roles if r.startswith(OF_ITEMS)]) < MAX_ATTRIBUTES:
            roles[OF_ITEMS + own] = name
    return doubts


def _sameness(sample: FileSample, roles: dict[str, str], name: str) -> tuple[float, int]:
    """The share of items with one value of a column wherever they stand, and of how many items that is known: those of several orders."""
    item, order = roles["item.id"], roles.get("event.id")
    told = sample.values[sample.values[name].notna()]
    grouped = told.groupby(item)
    times = grouped[order].nunique() if order is not None else grouped.size()
    several = grouped[name].nunique()[times > 1]
    return (float((several == 1).mean()) if len(several) else 1.0), len(several)
