"""A catalogue table from a file: checked as a whole, every mistake with its line, and in force only if there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from iso4217 import Currency

from features.catalogue.shop import Shop
from features.catalogue.tables import (
    ATTRIBUTE_TYPES,
    ITEM_ATTRIBUTES,
    ITEMS,
    LINKS,
    OFFERS,
    SHOWN,
    STORES,
    AttributeKind,
    Catalogue,
    attribute_fault,
    items_schema,
    link_fault,
)
from features.definitions.segments import Vocabulary
from features.events.spelling import meant
from features.sources.mapping_parts import Files
from features.sources.offers_file import LISTS, OLD_CHANNEL, OfferReader, yaml_rows
from features.sources.tabular import LINE, TabularFile
from features.state.home import Home

Row = Mapping[str, str | None]
Record = dict[str, Any]
LISTED_MISTAKES = 20
LISTED = "\x1f"
"""Between the parts of what was a list in the file."""
REQUIRED = {
    "items": ("item_id",),
    "stores": ("store_id",),
    "offers": ("offer_id", "valid_from", "valid_until"),
}
SCHEMAS = {"items": ITEMS, "offers": OFFERS, "stores": STORES}
PRICE = "price"
"""A price in major units, such as 3.99: kept as ``price_minor``."""
MAX_NAME, MAX_PRICE = 256, 10**12
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class CatalogueError(ValueError):
    """A catalogue file with mistakes; the message lists them by line and field. The table in force stays."""


class Mistake(msgspec.Struct, frozen=True):
    """One thing wrong with the file."""

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"  line {self.line}: {self.field}: {self.reason}"


@dataclass(frozen=True)
class CatalogueTable:
    """A checked table, ready to be put in force."""

    home: Home
    name: Literal["items", "offers", "stores"]
    rows: list[Record]
    schema: pa.Schema

    def lost(self) -> list[str]:
        """The attributes of items in force that this table has not."""
        path = Catalogue(self.home).path(self.name)
        return [n for n in pq.read_schema(path).names if n not in self.schema.names] if self.name == "items" and path.exists() else []

    def remarks(self) -> list[str]:
        """What is in order and may surprise."""
        if self.name == "items":
            plain = sum(str(row.get(link) or "").startswith("http://") for row in self.rows for link in LINKS)
            return (
                [f"{plain} links begin with http://: pages and mails that are sent over https do not show such pictures"] if plain else []
            )
        if self.name != "offers":
            return []
        worthless = [r["offer_id"] for r in self.rows if r["margin_minor"] is None and not r["item_ids"] and not r["where"]]
        told = f"{', '.join(worthless[:5])}{' ...' if len(worthless) > 5 else ''}"
        return [f"without items and margin_minor, so worth 0 beside others: {told}"] if worthless else []

    def save(self) -> None:
        """Replace the table in force."""
        catalogue = Catalogue(self.home)
        catalogue.ensure()
        catalogue.save(self.name, pa.Table.from_pylist(self.rows, self.schema), self.schema)


def load(
    home: Home, name: str, path: Path, renamed: Sequence[str] = (), files: Files | None = None, own: Sequence[str] = ()
) -> CatalogueTable:
    """Read and check *path* as the table *name*.

    Args:
        home: the installation whose shop and catalogue the table must fit.
        name: ``items``, ``offers`` or ``stores``.
        path: a CSV (lists split by ``|``), JSON Lines or Parquet file; offers may be YAML too.
        renamed: ``THEIRS=OURS`` where a column has another name.
        files: how a CSV is written.
        own: ``NAME:KIND`` of each attribute of items that is the shop's own; a kind is ``text``, ``number`` or ``list``.

    Raises:
        CatalogueError: the file has mistakes, or the table is unknown.
    """
    if name not in SCHEMAS:
        raise CatalogueError(f"there is no catalogue table {name!r}: use {', '.join(SCHEMAS)}")
    attributes = _own_attributes(name, own)
    schema = items_schema({**dict.fromkeys(ITEM_ATTRIBUTES, "text"), **SHOWN, **attributes}) if name == "items" else SCHEMAS[name]
    mistakes: list[Mistake] = []
    rows: list[tuple[int, Row]]
    places_of_money = 0
    places: list[dict[str, int]] = []
    """Of each row the lines of its fields, where they have several."""
    if name == "offers" and path.suffix in (".yaml", ".yml"):
        found = list(yaml_rows(path))
        rows = [(lines[""], {key: _told(value) for key, value in row.items()}) for lines, row in found]
        places = [lines for lines, _ in found]
    else:
        file = TabularFile(path, files or Files())
        names = _names(file, name, renamed, schema)
        if absent := [attribute for attribute in attributes if attribute not in names]:
            raise CatalogueError(f"--attribute {absent[0]}: {path} has no such column; --column THEIRS={absent[0]} names it")
        if name == "items":
            if PRICE in names:
                places_of_money = Currency(Shop.load(home).currency).exponent or 0
            # of what no item has there is no column
            shown = {each: kind for each, kind in SHOWN.items() if each in names or (each == "price_minor" and PRICE in names)}
            attributes = {**shown, **attributes}
            schema = items_schema({**dict.fromkeys(ITEM_ATTRIBUTES, "text"), **attributes})
        rows = list(_rows(file, names))
        mistakes += [Mistake(bad.row, "$", bad.reason) for bad in file.bad]
    offers = _offer_reader(home) if name == "offers" else None
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, (line, row) in enumerate(rows):
        record, wrong = (
            offers.record(row, _parts, line)
            if offers is not None
            else _record(name, row, schema, attributes, files or Files(), places_of_money)
        )
        wrong += [(c, "is longer than 256 characters") for c, v in record.items() if c.endswith("_id") and v and len(v) > 256]
        key = f"{name[:-1]}_id"
        if (first := seen.setdefault(record.get(key) or f"\0{line}", line)) != line:
            wrong.append((key, f"{record[key]!r} is on line {first} too: each stands once"))
        records.append(record)
        at = places[number] if places else {}
        mistakes += [Mistake(at.get(re.split(r"[.\[]", field)[0], line), field, reason) for field, reason in wrong]
    if not rows:
        mistakes.append(Mistake(1, "$", "the file has no rows: an empty table would take every one away"))
    if mistakes:
        mistakes.sort(key=lambda m: m.line)
        more = f"\n  and {len(mistakes) - LISTED_MISTAKES} more" if len(mistakes) > LISTED_MISTAKES else ""
        listed = "\n".join(map(str, mistakes[:LISTED_MISTAKES]))
        raise CatalogueError(f"{path}: {len(mistakes)} mistakes; the {name} in force stay as they were:\n{listed}{more}")
    return CatalogueTable(home, name, records, schema)  # type: ignore[arg-type]


def _offer_reader(home: Home) -> OfferReader:
    shop, catalogue = Shop.load(home), Catalogue(home)
    items = catalogue.read("items")
    stores = catalogue.read("stores")["store_id"].to_pylist() if catalogue.path("stores").exists() else []
    holds = {name: _texts(items[name]) for name in items.column_names if name not in ("item_id", "recommendable", *LINKS)}
    known = frozenset(items["item_id"].to_pylist())
    return OfferReader(shop.timezone, known, holds, frozenset(stores), Vocabulary.load(home, shop.domain))


def _texts(column: pa.ChunkedArray) -> frozenset[str] | None:
    """The texts of a column; None of one that holds numbers."""
    if pa.types.is_floating(column.type):
        return None
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return frozenset(text for text in pc.unique(flat).to_pylist() if text is not None)


def _own_attributes(table: str, own: Sequence[str]) -> dict[str, AttributeKind]:
    found: dict[str, AttributeKind] = {}
    for said in own:
        name, _, kind = said.partition(":")
        fault = attribute_fault(name) or ("every catalogue knows it as a text" if name in ITEM_ATTRIBUTES else None)
        if SHOWN.get(name, kind) != kind:
            fault = f"answers show it, and it holds {SHOWN[name]}: leave the option out"
        if table != "items":
            fault = "only items have attributes of a shop's own"
        if kind not in ATTRIBUTE_TYPES:
            fault = f"say what it holds: {name}:{'|'.join(ATTRIBUTE_TYPES)}"
        if fault:
            raise CatalogueError(f"--attribute {said}: {fault}")
        found[name] = kind  # type: ignore[assignment]
    return found


def _names(file: TabularFile, name: str, renamed: Sequence[str], schema: pa.Schema) -> dict[str, str]:
    """Their column for each of ours that the file has."""
    more = {"offers": (OLD_CHANNEL,), "items": (PRICE,)}.get(name, ())
    present, ours = file.columns(nested=True), [*schema.names, *more]
    names = {column: column for column in ours if column in present}
    for pair in renamed:
        theirs, _, mine = pair.partition("=")
        if theirs not in present or mine not in ours:
            hint = meant(theirs, tuple(present)) if theirs not in present else meant(mine, tuple(ours))
            raise CatalogueError(f"--column {pair}: {file.path} has {', '.join(present)}; the {name} have {', '.join(ours)}{hint}")
        names[mine] = theirs
    if missing := [c for c in REQUIRED[name] if c not in names]:
        if len(present) == 1 and (between := next((d for d in ";\t|," if d in present[0]), None)):
            raise CatalogueError(f"{file.path}: its columns seem to be divided by {between!r}: --delimiter {between!r} says so")
        raise CatalogueError(
            f"{file.path}: it has no column {missing[0]!r}; it has {', '.join(present)}: --column THEIRS={missing[0]} names it"
        )
    return names


def _rows(file: TabularFile, names: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    if file.kind == "parquet":
        # lists stay lists here
        for number, row in enumerate(pq.read_table(file.path, columns=list(names.values())).to_pylist(), 1):
            yield number, {ours: _told(row[theirs]) for ours, theirs in names.items()}
        return
    for table, numbers in file.batches([c for c in names.values() if c not in (*LISTS, "where")]):
        for number, row in zip(numbers.tolist(), table.to_pylist(), strict=True):
            if LINE in row:
                whole = msgspec.json.decode(row[LINE])
                yield number, {ours: _told(whole.get(theirs)) for ours, theirs in names.items()}
            else:
                yield number, {ours: row[theirs] for ours, theirs in names.items()}


def _told(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, list):
        # a list keeps its parts, whatever they hold
        return LISTED + LISTED.join(str(each).strip() for each in value if each is not None)
    if isinstance(value, dict):
        return msgspec.json.encode(value).decode()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, datetime | date):
        return value.isoformat()
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(text: str, files: Files) -> str:
    """A number as the file writes it, in the form that Python reads.

    Raises:
        ValueError: it is none: thousands stand in groups of three, and before the decimal sign alone.
    """
    if files.thousands:
        grouped = rf"[+-]?(\d+|\d{{1,3}}({re.escape(files.thousands)}\d{{3}})+)({re.escape(files.decimal)}\d*)?"
        if not re.fullmatch(grouped, text):
            raise ValueError(text)
        text = text.replace(files.thousands, "")
    if files.decimal == "," and "." in text:
        raise ValueError(text)
    return text.replace(files.decimal, ".")


def _parts(text: str) -> list[str]:
    """The parts of a list, as it was or as a CSV writes it."""
    return [part.strip() for part in text.split(LISTED if text.startswith(LISTED) else "|") if part.strip()]


def _record(
    name: str, row: Row, schema: pa.Schema, attributes: Mapping[str, AttributeKind], files: Files, places_of_money: int
) -> tuple[Record, list[tuple[str, str]]]:
    """A row in the table's own types, and what is wrong with it."""
    record: Record = {column: row.get(column) for column in schema.names}
    wrong = [(c, "is empty") for c in REQUIRED[name] if not row.get(c)]
    if name == "items":
        wrong += list(_shown_faults(record, row, files, places_of_money))
    if name == "items":
        told = (row.get("recommendable") or "true").lower()
        record["recommendable"] = TRUTHS.get(told)
        if record["recommendable"] is None:
            wrong.append(("recommendable", f"{told!r} is neither true nor false"))
    for column, most in (("latitude", 90.0), ("longitude", 180.0)) if name == "stores" else ():
        text = record[column]
        try:
            record[column] = None if text is None else float(text)
        except ValueError:
            record[column] = math.nan
        if record[column] is not None and not abs(record[column]) <= most:
            record[column] = None
            wrong.append((column, f"{text!r} is no number between -{most:.0f} and {most:.0f}: write degrees like 48.8584"))
    if name == "stores" and (record["latitude"] is None) != (record["longitude"] is None):
        wrong.append(("longitude" if record["longitude"] is None else "latitude", "is empty: a place has both"))
    for attribute, kind in attributes.items():
        text = record[attribute]
        if text is None or kind == "text" or not isinstance(text, str):
            continue
        if kind == "list":
            record[attribute] = _parts(text)
            continue
        try:
            record[attribute] = float(_number(text, files))
        except ValueError:
            record[attribute] = float("nan")
        if not math.isfinite(record[attribute]):
            record[attribute] = None
            signs = "" if files.decimal == "." and not files.thousands else f", with {files.decimal!r} for the point"
            hint = "; --decimal , and --thousands . say how it is written" if not signs and "," in text else ""
            wrong.append((attribute, f"{text!r} is no number: write it like 1200{files.decimal}5{signs}{hint}"))
    return record, wrong


def _shown_faults(record: Record, row: Row, files: Files, places_of_money: int) -> Iterator[tuple[str, str]]:
    """What is wrong with what is shown of an item; a price in major units becomes one in minor units."""
    for link in LINKS:
        if (text := record.get(link)) is not None and (fault := link_fault(text)) is not None:
            yield link, fault
    if len(record.get("name") or "") > MAX_NAME:
        yield "name", f"is longer than {MAX_NAME} characters"
    told, field = (row.get("price_minor"), "price_minor") if row.get("price_minor") else (row.get(PRICE), PRICE)
    if told is None or "price_minor" not in record:
        return
    try:
        price = Decimal(_number(told.strip(), files)).scaleb(places_of_money if field == PRICE else 0)
        # a whole number of the smallest coins
        record["price_minor"] = float(round(price)) if price.is_finite() and 0 <= price <= MAX_PRICE else None
    except (InvalidOperation, ValueError):
        record["price_minor"] = None
    if record["price_minor"] is None:
        yield field, f"{told!r} is no price: write it like {f'3{files.decimal}99' if field == PRICE else '399'}"
