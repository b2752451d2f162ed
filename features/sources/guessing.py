"""Propose a mapping for an unknown file: what each column seems to hold, and what its owner must decide."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from charset_normalizer import from_bytes
from rich.table import Table

from features.sources.mapping import Mapping
from features.sources.mapping_parts import UNSAID, Files
from features.sources.tabular import LINE, TabularFile, UnreadableFileError

SAMPLE_ROWS = 50_000
ROLES: dict[str, str] = {
    "event.id": r"invoice|order|transaction|basket|receipt|event.?id|message.?id|ticket|sale.?id"
    r"|bestell(?!.*dat)|rechnung(?!.*dat)|beleg|commande|pedido",
    "event.occurred_at": r"date|time|timestamp|occurred|created|\bat\b|_at$|datum|zeit|fecha|jour",
    "event.identifiers.user_id": r"customer|user|client|member|household|shopper|account|card|kunde|cliente",
    "item.id": r"stock.?code|sku|product|item|article|upc|ean|asin|artikel|produkt|producto",
    "item.quantity": r"quantity|qty|units|pieces|count|menge|anzahl|stück|quantit|cantidad",
    "item.amount": r"amount|total|revenue|value|price|sales|spend|paid|preis|betrag|umsatz|summe|prix|montant|importe|precio",
    "item.attributes.type": r"description|product.?name|item.?name|title|bezeichnung|beschreibung|libell|nombre",
    "item.attributes.category": r"category|department|class|warengruppe|kategorie|rubrique|categor",
    "item.attributes.brand": r"brand|marke|marque|marca",
    "event.store_id": r"store|shop|branch|outlet|location|filiale|laden|magasin|tienda",
    "event.currency": r"currency|währung|devise|moneda",
    "event.traits.country": r"country|\bland\b|pays|país",
}
"""What a column's name tells, asked in this order."""
TIME_FORMATS = (
    "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y", "%m/%d/%Y %H:%M:%S",
    "%m/%d/%Y %H:%M", "%m/%d/%Y", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%d-%m-%Y %H:%M", "%d-%m-%Y", "%Y%m%d",
    "%d/%m/%y %H:%M", "%m/%d/%y %H:%M", "%d/%m/%y", "%m/%d/%y", "%d %b %Y", "%b %d, %Y",
)  # fmt: skip
_PURE = re.compile(r"[+-]?\d+([.,]\d+)*$")


@dataclass(frozen=True)
class Column:
    """What a sample shows of a column."""

    name: str
    kind: str
    """``time``, ``number`` or ``text``."""
    examples: list[str]
    empty_share: float
    distinct: int
    formats: list[str] = field(default_factory=list)
    """The time formats that every value fits."""
    negative: bool = False
    fractional: bool = False
    whole_with_point: bool = False
    """Whole numbers written 17850.0."""


@dataclass(frozen=True)
class Proposal:
    """A mapping's text, what is doubtful about it, and the columns it was read from."""

    text: str
    doubts: list[str]
    columns: list[Column]
    roles: dict[str, str]

    def table(self) -> Table:
        """The columns as a table to print."""
        table = Table("column", "seems to hold", "mapped to", "empty", "examples")
        used = {column: role for role, column in self.roles.items()}
        for column in self.columns:
            table.add_row(column.name, column.kind, used.get(column.name, ""), f"{column.empty_share:.0%}", ", ".join(column.examples))
        return table


def propose(path: Path) -> Proposal:
    """Read the first rows of *path* and propose a mapping.

    Raises:
        UnreadableFileError: the file cannot be read.
    """
    files, file_doubts = _files(path)
    file = TabularFile(path, files)
    names = file.columns()
    tables: list[pa.Table] = []
    for table, _ in itertools.islice(file.batches(names), 8):
        tables.append(table)
        if sum(map(len, tables)) >= SAMPLE_ROWS:
            break
    if not tables or not sum(map(len, tables)):
        raise UnreadableFileError(f"{path}: it has no rows to guess from")
    sample = pa.concat_tables(tables).slice(0, SAMPLE_ROWS)
    values = {n: sample[n].to_pylist() for n in sample.column_names if n != LINE}
    columns = [_column(n, v) for n, v in values.items()]
    roles = _roles(columns)
    said, doubts = _mapping(path, files, columns, roles, values)
    text = HEAD.format(name=path.name) + yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120)
    return Proposal(text, [*file_doubts, *doubts], columns, roles)


HEAD = """# A proposal from the first rows of {name}: go over every line, above all source, shop and consent.
# A bare name is a column; a fixed value is written {{value: ...}}.
"""


def _files(path: Path) -> tuple[Files, list[str]]:
    """Encoding, delimiter and decimal sign of the file."""
    kind = TabularFile(path).kind
    if kind != "csv":
        return Files(), []
    raw = TabularFile(path).open().read(1 << 20)
    doubts = []
    try:
        # a sample may end within a character
        raw[: raw.rfind(b"\n") + 1 or len(raw)].decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = _encoding(raw)
        doubts.append(f"files.encoding: it is not UTF-8; {encoding} is likely: see that names with accents come out right")
    lines = raw.decode(encoding, errors="replace").splitlines()[:200]
    header = lines[0] if lines else ""
    delimiter = max(",;\t|", key=header.count)
    cells = [cell.strip('" ') for line in lines[1:] for cell in line.split(delimiter)]
    commas = sum(bool(re.fullmatch(r"-?\d+(\.\d{3})*,\d{1,2}", cell)) for cell in cells)
    points = sum(bool(re.fullmatch(r"-?\d+(,\d{3})*\.\d{1,2}", cell)) for cell in cells)
    decimal: Any = "," if commas > points else "."
    thousands: Any = ""
    other = "." if decimal == "," else ","
    if any(re.fullmatch(rf"-?\d{{1,3}}(\{other}\d{{3}})+(\{decimal}\d+)?", cell) for cell in cells) and delimiter != other:
        thousands = other
    return Files(encoding=encoding, delimiter=None if delimiter == "," else delimiter, decimal=decimal, thousands=thousands), doubts


def _encoding(raw: bytes) -> str:
    """Excel's own for a text with a few accents in it; where other letters prevail, what their frequencies tell."""
    strange = sum(byte >= 0x80 for byte in raw) / max(len(raw), 1)
    if strange < 0.1:
        return "windows-1252"
    best = from_bytes(raw).best()
    return "windows-1252" if best is None else best.encoding


def _column(name: str, values: Sequence[str | None]) -> Column:
    present = [v for v in values if v is not None]
    distinct = set(present)
    examples = list(dict.fromkeys(present))[:3]
    empty = 1 - len(present) / max(len(values), 1)
    some = sorted(distinct)[:: max(len(distinct) // 2000, 1)]
    numbers = [v for v in some if _PURE.match(v)]
    formats = [f for f in TIME_FORMATS if some and _fits(some, f)]
    iso = bool(some) and all(re.match(r"\d{4}-\d{2}-\d{2}", v) for v in some)
    if iso or (formats and not (formats == ["%Y%m%d"] and not re.search(ROLES["event.occurred_at"], name, re.I))):
        return Column(name, "time", examples, empty, len(distinct), formats)
    # a few placeholders such as "n/a" do not make a text of it
    if numbers and sum(bool(_PURE.match(v)) for v in present) >= 0.95 * len(present):
        return Column(
            name, "number", examples, empty, len(distinct),
            negative=any(v.startswith("-") for v in present),
            fractional=any(re.search(r"[.,]\d*[1-9]", v) for v in present),
            whole_with_point=all(v.endswith(".0") for v in numbers),
        )  # fmt: skip
    return Column(name, "text", examples, empty, len(distinct))


def _fits(values: Sequence[str], format: str) -> bool:
    try:
        for value in values:
            datetime.strptime(value, format)
    except ValueError:
        return False
    return True


def _roles(columns: Sequence[Column]) -> dict[str, str]:
    """For each role the first column whose name and content fit; no column has two."""
    roles: dict[str, str] = {}
    for role, pattern in ROLES.items():
        for column in columns:
            if column.name in roles.values() or not re.search(pattern, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.name), re.I):
                continue
            if role == "event.occurred_at" and column.kind != "time":
                continue
            if role in ("item.quantity", "item.amount") and column.kind != "number":
                continue
            if role != "event.occurred_at" and column.kind == "time":
                continue
            if role in ("event.id", "item.id") and (column.fractional or column.distinct < 2):
                continue
            roles[role] = column.name
            break
    if "event.occurred_at" not in roles and (times := [c.name for c in columns if c.kind == "time"]):
        roles["event.occurred_at"] = times[0]
    return roles


def _mapping(
    path: Path, files: Files, columns: Sequence[Column], roles: dict[str, str], values: dict[str, list[str | None]]
) -> tuple[dict[str, Any], list[str]]:
    by_name = {c.name: c for c in columns}
    doubts = [
        "source, shop.name, shop.timezone, shop.currency: not in the file; these are placeholders",
        "consent.basis: say on what basis the rows were collected; rows not collected for both purposes must stay out",
    ]
    zone = _zone(files)
    source = re.sub(r"[^a-z0-9]+", "-", path.name.split(".")[0].lower()).strip("-") or "my-shop"
    event: dict[str, Any] = {"name": {"value": "purchase"}}
    said: dict[str, Any] = {
        "source": source,
        "shop": {"name": source, "timezone": zone, "currency": "EUR" if files.decimal == "," else "GBP"},
        "consent": {"basis": UNSAID, "purposes": ["analytics", "personalization"]},
        "event": event,
    }
    changed = {n: v for n in ("encoding", "delimiter", "decimal", "thousands") if (v := getattr(files, n)) != getattr(Files(), n)}
    if changed:
        said["files"] = changed
    doubts.append("event.name: every row is taken for a purchase; a column of event types goes to {column: ..., values: {theirs: ours}}")
    for role, column in roles.items():
        part, *rest = role.split(".")
        if part == "event" and rest[0] != "occurred_at":
            inner = event if len(rest) == 1 else event.setdefault(rest[0], {})
            inner[rest[-1]] = {"column": column, "is_integer": True} if by_name[column].whole_with_point else column
    if "event.id" not in roles:
        doubts.append("event.id: no column looks like an order number; without it each row is an event of its own")
    if "event.identifiers.user_id" not in roles:
        doubts.append("event.identifiers: no column looks like a customer's id; all events would be anonymous")
    event["occurred_at"], told = _occurred_at(by_name, roles, zone)
    doubts += told
    doubts += _item(said, by_name, roles)
    doubts += _returns(said, roles, by_name, values)
    # what only the owner can say is not said yet; all else must hold
    Mapping.parse(yaml.safe_dump({**said, "consent": {**said["consent"], "basis": "?"}}).encode(), "the proposal")
    return said, doubts


def _item(said: dict[str, Any], by_name: dict[str, Column], roles: dict[str, str]) -> list[str]:
    """The item of each row, and what is doubtful about it."""
    doubts: list[str] = []
    if "item.id" in roles:
        item: dict[str, Any] = {"id": roles["item.id"]}
        if "item.quantity" in roles:
            item["quantity"] = {"column": roles["item.quantity"]}
            if by_name[roles["item.quantity"]].fractional:
                item["quantity"]["fractions"] = "round_up"
                doubts.append("item.quantity: it holds fractions (weights?), which are rounded up to whole pieces")
        if "item.amount" in roles:
            single = bool(re.search("price|unit|preis|prix|precio", roles["item.amount"], re.I)) and "item.quantity" in roles
            item["amount"] = {"column": roles["item.amount"], "per": "unit" if single else "line"}
            doubts.append(
                f"item.amount: {roles['item.amount']} is taken for {'one unit' if single else 'the whole line'}, in pounds not pence"
            )
        item["attributes"] = {r.rsplit(".", 1)[1]: c for r, c in roles.items() if r.startswith("item.attributes.")}
        said["item"] = item
        doubts.append("item.leave_out: name the codes that are no items, such as postage and fees")
    else:
        doubts.append("item.id: no column looks like a product; a purchase needs items")
    return doubts


def _zone(files: Files) -> str:
    """A placeholder: where decimals are commas it is hardly London."""
    return "Europe/Berlin" if files.decimal == "," else "Europe/London"


def _occurred_at(by_name: dict[str, Column], roles: dict[str, str], zone: str) -> tuple[dict[str, Any], list[str]]:
    column = roles.get("event.occurred_at")
    if column is None:
        return {"column": UNSAID, "timezone": zone}, ["event.occurred_at: no column looks like a time"]
    time: dict[str, Any] = {"column": column}
    formats, doubts = by_name[column].formats, []
    if formats:
        time["format"] = formats[0]
    if len(formats) > 1:
        doubts.append(f"event.occurred_at.format: every date of the sample fits {' and '.join(formats)}: day or month first?")
    if not any(re.search(r"(Z|[+-]\d{2}:?\d{2})$", e) for e in by_name[column].examples):
        time["timezone"] = zone
        doubts.append("event.occurred_at.timezone: the times do not carry a zone; whose clock wrote them?")
    return time, doubts


def _returns(said: dict[str, Any], roles: dict[str, str], by_name: dict[str, Column], values: dict[str, list[str | None]]) -> list[str]:
    """Where quantities are negative: rows of orders whose number starts with a letter of its own are refunds, else ask."""
    quantity, order = roles.get("item.quantity"), roles.get("event.id")
    if quantity is None or not by_name[quantity].negative:
        return []
    negative = np.array([v is not None and v.startswith("-") for v in values[quantity]])
    if order is not None:
        letters = np.array([(v or " ")[0] if (v or " ")[0].isalpha() else "" for v in values[order]])
        for letter in sorted(set(letters[negative]) - {""}):
            if (negative[letters == letter]).all():
                said["refunds"] = {"when": [{"column": order, "matches": f"^{letter}"}]}
                said["skip"] = [
                    {"because": "negative quantity outside a cancellation",
                     "when": [{"column": quantity, "below": 0}, {"column": order, "matches": f"^{letter}", "negate": True}]}
                ]  # fmt: skip
                return [f"refunds: {order} starting with {letter} has only negative quantities, so these rows are taken for cancellations"]
    said["refunds"] = {"when": [{"column": quantity, "below": 0}]}
    return ["refunds: rows of negative quantity are taken for returns; stock corrections belong under skip"]
