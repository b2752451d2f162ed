"""What the shop has to show: items, offers, and where each item is promoted in which week."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from features.state.disk import make_folder, move_into_place, write_atomically
from features.state.home import Home
from features.state.ports import MissingStateError

_TIME = pa.timestamp("us", tz="UTC")
AttributeKind = Literal["text", "number", "list"]
"""What an attribute of items holds: a text, a number, or a list of texts."""
ATTRIBUTE_TYPES: dict[AttributeKind, pa.DataType] = {"text": pa.string(), "number": pa.float64(), "list": pa.list_(pa.string())}
ITEM_ATTRIBUTES = ("department", "category", "type", "brand", "manufacturer", "size")
"""Attributes that many catalogues tell; a shop adds any of its own."""
SHOWN: Mapping[str, AttributeKind] = {"name": "text", "price_minor": "number", "image_url": "text", "url": "text"}
"""What answers show of an item, where the catalogue tells it: its name, its price now in minor units, its picture and its page."""
LINKS = ("image_url", "url")
"""Those of them that are links: shown, and nothing to filter by or to learn from."""
MAX_LINK = 2_048
LINK_FORM = r"^https?://[^\s/?#@\\\"'<>]+([/?#][^\s\\\"'<>]*)?$"
"""A link over http or https, without a user's name, blanks or quotes."""
_ATTRIBUTE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_NO_ATTRIBUTES = frozenset({"item_id", "recommendable", "popularity", "buyers", "purchases"})
MAX_ATTRIBUTES = 100
KEPT_OFFERS = 20
"""How many earlier tables of offers are kept to go back to."""


def attribute_fault(name: str) -> str | None:
    """Why an attribute may not be called so; None where it may."""
    if name in _NO_ATTRIBUTES:
        return "the catalogue itself uses that name: give the attribute another"
    return None if _ATTRIBUTE_NAME.fullmatch(name) else "use small letters, digits and underscores, a letter first"


def link_fault(text: str) -> str | None:
    """Why a text is no link that answers may show; None where it is one."""
    if len(text) > MAX_LINK:
        return f"is longer than {MAX_LINK} characters"
    if re.match(LINK_FORM, text, re.ASCII) is None or not text.isprintable():
        return f"{text[:80]!r} is no link: write it like https://shop.example/milk.jpg"
    return None


def items_schema(attributes: Mapping[str, AttributeKind]) -> pa.Schema:
    """The table of items with these attributes."""
    told = ((name, ATTRIBUTE_TYPES[kind]) for name, kind in attributes.items())
    return pa.schema([("item_id", pa.string()), *told, ("recommendable", pa.bool_())])


ITEMS = items_schema(dict.fromkeys(ITEM_ATTRIBUTES, "text"))
OFFERS = pa.schema(
    [
        ("offer_id", pa.string()),
        ("campaign_id", pa.string()),
        ("campaign_type", pa.string()),
        ("valid_from", _TIME),
        ("valid_until", _TIME),
        ("item_ids", pa.list_(pa.string())),
        *((name, pa.string()) for name in ("kind", "stage", "title", "text", "category", "where", "eligible")),
        *((name, pa.list_(pa.string())) for name in ("channels", "store_ids")),
        *((name, pa.int64()) for name in ("benefit_minor", "cost_minor", "margin_minor", "budget", "stock")),
        *((name, pa.float64()) for name in ("benefit_percent", "lever")),
        *((name, pa.bool_()) for name in ("transactional", "fallback")),
    ]
)
ITEM_CONTEXT = pa.schema(
    [
        ("item_id", pa.string()),
        ("valid_from", _TIME),
        ("valid_until", _TIME),
        ("mailer_stores", pa.int64()),
        ("display_stores", pa.int64()),
    ]
)
STORES = pa.schema(
    [
        *((name, pa.string()) for name in ("store_id", "name", "city", "region", "country")),
        *((name, pa.float64()) for name in ("latitude", "longitude")),
    ]
)
SCHEMAS = {"items": ITEMS, "offers": OFFERS, "item_context": ITEM_CONTEXT, "stores": STORES}


@dataclass(frozen=True)
class Catalogue:
    """The door to the catalogue tables of one home; each is one Parquet file, replaced as a whole."""

    home: Home

    def save(self, name: str, table: pa.Table, schema: pa.Schema) -> None:
        """Replace one table.

        Raises:
            pyarrow.ArrowInvalid: the table does not fit the schema.
        """
        make_folder(self.home.catalogue)
        part = self.home.catalogue / f".{name}.{os.getpid()}.part"
        whole = _with_all_columns(table, schema) if name in GROWN else table
        pq.write_table(whole.select(schema.names).cast(schema), part)
        if name == "offers":
            self._keep_offers(part)
        move_into_place(part, self.path(name))

    def earlier_offers(self) -> list[Path]:
        """The tables of offers that were in force before, the last first; so many as ``KEPT_OFFERS``."""
        return sorted(self.home.catalogue.glob("offers-*.parquet"), reverse=True)

    def roll_back_offers(self) -> int:
        """Put the offers in force that were so before; returns how many there are.

        Raises:
            MissingStateError: there were none before.
        """
        if not (earlier := self.earlier_offers()):
            raise MissingStateError("there are no earlier offers to go back to")
        table = pq.read_table(earlier[0])
        # what was in force goes: to load its file again brings it back
        move_into_place(earlier[0], self.path("offers"))
        return len(table)

    def _keep_offers(self, part: Path) -> None:
        """Keep the offers that are about to be replaced by *part*, unless they are the same."""
        standing = self.path("offers")
        if not standing.exists() or standing.read_bytes() == part.read_bytes() or not len(pq.read_table(standing)):
            return
        earlier = self.earlier_offers()
        number = int(earlier[0].stem.partition("-")[2]) + 1 if earlier else 1
        write_atomically(self.home.catalogue / f"offers-{number:06}.parquet", standing.read_bytes())
        for path in earlier[KEPT_OFFERS - 1 :]:
            path.unlink()

    def ensure(self) -> None:
        """Make the tables that do not exist yet, empty."""
        for name, schema in SCHEMAS.items():
            if not self.path(name).exists():
                self.save(name, schema.empty_table(), schema)

    def add_items(self, items: pa.Table) -> None:
        """Add rows to the items, with whatever attributes they have: of the others an item has none."""
        known = self.read("items")
        both = pa.concat_tables([known, items], promote_options="default")
        last = "recommendable"
        self.save("items", both, pa.schema([*(field for field in both.schema if field.name != last), both.schema.field(last)]))

    def digest(self, *names: str) -> str:
        """Names the content of these tables; a missing one counts as empty."""
        content = b"".join(self.path(name).read_bytes() if self.path(name).exists() else b"" for name in names)
        return hashlib.sha256(content).hexdigest()

    def path(self, name: str) -> Path:
        """Where a table lies: ``items``, ``offers``, ``item_context`` or ``stores``."""
        return self.home.catalogue / f"{name}.parquet"

    def read(self, name: str) -> pa.Table:
        """Read one table.

        Raises:
            MissingStateError: it was never written.
        """
        if not self.path(name).exists():
            raise MissingStateError(f"the catalogue has no {name}: import a source first (python -m features import)")
        table = pq.read_table(self.path(name))
        return _with_all_columns(table, SCHEMAS[name]) if name in GROWN else table


GROWN = ("offers", "stores")
"""The tables that earlier versions knew less of."""


def _with_all_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of a version that knew less: what it does not tell is unknown."""
    if "channel" in table.column_names and "channels" in schema.names:
        # it could be one alone
        one = [None if channel is None else [channel] for channel in table["channel"].to_pylist()]
        table = table.drop_columns(["channel"]).append_column("channels", pa.array(one, pa.list_(pa.string())))
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names)
