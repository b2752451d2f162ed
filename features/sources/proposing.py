"""The text of a proposed mapping: from roles of columns to what the YAML says, and to what its owner has to look at."""

from __future__ import annotations

import re
import shlex
from typing import Any

import numpy as np
import yaml

from features.catalogue.shop import Shop
from features.catalogue.tables import ITEM_ATTRIBUTES, SHOWN
from features.events.event import REQUIRED_FIELDS
from features.sources.headers import Tongue, known_headers, plain_header
from features.sources.mapping import Mapping
from features.sources.mapping_parts import UNSAID, Files
from features.sources.sampling import FileSample

NEEDS_ITEMS = tuple(name for name, fields in REQUIRED_FIELDS.items() if "items" in fields)
DISAGREE = 0.01
"""From which share of the orders on whose lines disagree their number is not taken for unique."""


def proposed(sample: FileSample, roles: dict[str, str], standing: Shop | None = None) -> tuple[dict[str, Any], list[str]]:
    """What the YAML says, and what of it is doubtful; *standing* is the shop that the home already holds."""
    doubts: list[str] = []
    tongue = known_headers().tongue(sample.columns)
    files = sample.files
    source = re.sub(r"[^a-z0-9]+", "-", plain_header(sample.path.name.split(".")[0])).strip("-") or "my-shop"
    event: dict[str, Any] = {}
    said: dict[str, Any] = {
        "source": source,
        "shop": _shop(sample, roles, source, tongue, doubts) if standing is None else _of_the_home(standing),
        "consent": {"basis": UNSAID, "purposes": ["analytics", "personalization"]},
        "event": event,
    }
    doubts.append("consent.basis: say on what basis the rows were collected; rows not collected for both purposes must stay out")
    if changed := {n: v for n in ("encoding", "delimiter", "decimal", "thousands") if (v := getattr(files, n)) != getattr(Files(), n)}:
        said["files"] = changed
    names = _names(said, sample, roles, doubts)
    for role, column in roles.items():
        part, *rest = role.split(".")
        if part == "event" and rest[0] not in ("occurred_at", "name"):
            inner = event if len(rest) == 1 else event.setdefault(rest[0], {})
            inner[rest[-1]] = {"column": column, "is_integer": True} if sample.columns[column].whole_with_point else column
    doubts += _identity(event, sample, roles)
    event["occurred_at"] = _occurred_at(sample, roles, said["shop"]["timezone"], doubts)
    if (channel := _channel(sample, roles, doubts)) is not None:
        event["channel"] = channel
    _item(said, sample, roles, names, doubts)
    _returns(said, sample, roles, doubts)
    _statuses(said, sample, doubts)
    # what only the owner can say is not said yet; all else must hold
    Mapping.parse(yaml.safe_dump({**said, "consent": {**said["consent"], "basis": "?"}}).encode(), "the proposal")
    return said, doubts


def _shop(sample: FileSample, roles: dict[str, str], source: str, tongue: Tongue | None, doubts: list[str]) -> dict[str, Any]:
    zone, currency = ("Europe/Berlin", "EUR") if sample.files.decimal == "," else ("Europe/London", "GBP")
    if tongue is not None:
        zone, currency = tongue.zone, tongue.currency
    rule = known_headers().rules["event.currency"]
    named = next((c.name for c in sample.columns.values() if c.kind == "text" and rule.rank(c.header) is not None), None)
    told = sample.values[named].dropna().unique() if named is not None else []
    if len(told) and re.fullmatch("[A-Z]{3}", told[0]):
        currency = str(told[0])
    doubts.append(
        "source, shop.name, shop.timezone, shop.currency, shop.domain: the file does not say; these are placeholders. The domain is "
        "grocery (weekly visits) or retail (orders weeks or months apart)"
    )
    if len(told) > 1:
        doubts.append(f"event.currency: {', '.join(told[:5])}: a shop counts in one; rows in another are rejected, so convert or skip them")
    shop = {"name": source, "timezone": zone, "currency": currency, "domain": "retail"}
    if "event.identifiers.phone" in roles:
        phones = sample.values[roles["event.identifiers.phone"]].dropna()
        if not phones.str.lstrip("'").str.startswith(("+", "00")).all():
            shop["phone_region"] = tongue.country if tongue is not None else "GB"
            doubts.append("shop.phone_region: some phone numbers have no country code; they are read as numbers of this country")
    return shop


def _of_the_home(shop: Shop) -> dict[str, Any]:
    """What a second source has to say of the shop: the same as the first."""
    return {"name": shop.name, "timezone": shop.timezone, "currency": shop.currency, **({"domain": shop.domain} if shop.domain else {})}


def _names(said: dict[str, Any], sample: FileSample, roles: dict[str, str], doubts: list[str]) -> set[str]:
    """What the rows tell of: their events' names, which are returned."""
    event, column = said["event"], roles.get("event.name")
    if column is None:
        event["name"] = {"value": "purchase"}
        doubts.append(
            "event.name: every row is taken for a purchase; a column of event types goes to {column: ..., values: {theirs: ours}}"
        )
        return {"purchase"}
    known, values = known_headers().events, {}
    strange = []
    for value in sorted(sample.values[column].dropna().unique()):
        if (ours := known.get(plain_header(value))) is not None:
            values[value] = ours
        else:
            strange.append(value)
    event["name"] = {"column": column} if all(theirs == ours for theirs, ours in values.items()) else {"column": column, "values": values}
    if strange:
        said["skip"] = [{"because": "no event of ours", "when": [{"column": column, "one_of": strange}]}]
        doubts.append(
            f"skip: {', '.join(strange[:10])} are no events that are known: translate them in event.name.values, or leave them out"
        )
    return set(values.values())


def _identity(event: dict[str, Any], sample: FileSample, roles: dict[str, str]) -> list[str]:
    """Who the events are of, and whether an order's number names one order alone."""
    doubts = []
    if not event.get("identifiers"):
        doubts.append("event.identifiers: no column looks like a customer's id; all events would be anonymous")
    if (order := roles.get("event.id")) is None:
        doubts.append("event.id: no column looks like an order number; without it each row is an event of its own")
        return doubts
    by_order = sample.values.assign(_day=_days(sample, roles))
    told = [column for role, column in roles.items() if role.startswith(("event.identifiers.", "event.store_id"))] + ["_day"]

    def disagreeing(by: list[str]) -> float:
        groups = by_order.groupby(by, dropna=False)
        sizes = groups.size()
        apart = (groups[told].nunique() > 1).any(axis=1)
        return float(apart[sizes > 1].mean()) if (sizes > 1).any() else 0.0

    if disagreeing([order]) <= DISAGREE:
        return doubts
    store, at = roles.get("event.store_id"), roles.get("event.occurred_at")
    # a till counts its receipts anew each day, and each shop has its own
    for more in ([store], [at], [store, at]):
        if None not in more and disagreeing([order, *("_day" if m == at else str(m) for m in more)]) <= DISAGREE:
            columns = [*(str(m) for m in more), order]
            event["id"] = {"columns": columns}
            doubts.append(f"event.id: {order} is given more than once, so it is taken together with {' and '.join(columns[:-1])}")
            if at in more and sample.values[str(at)].str.contains(":").any():
                doubts.append(f"event.id: {at} holds the time of day: do all lines of one order have the same?")
            return doubts
    doubts.append(f"event.id: lines with the same {order} disagree about who, where or when; such orders are rejected")
    return doubts


def _days(sample: FileSample, roles: dict[str, str]) -> Any:
    at = roles.get("event.occurred_at")
    return sample.values[at].str.slice(0, 10) if at is not None else ""


def _occurred_at(sample: FileSample, roles: dict[str, str], zone: str, doubts: list[str]) -> dict[str, Any]:
    column = roles.get("event.occurred_at")
    if column is None:
        doubts.append("event.occurred_at: no column looks like a time")
        return {"column": UNSAID, "timezone": zone}
    time: dict[str, Any] = {"column": column}
    formats = sample.columns[column].formats
    has_hour = any(re.search(r"\d{2}[:.]\d{2}", each[8:]) for each in sample.columns[column].examples) or "epoch" in "".join(formats)
    clocks = [c for c in sample.columns.values() if c.kind == "clock"]
    if not has_hour and clocks:
        rule = known_headers().rules["clock"]
        clock = min(clocks, key=lambda c: (rule.rank(c.header) is None, rule.rank(c.header) or 0))
        time = {"columns": [column, clock.name]}
        roles["event.occurred_at (time of day)"] = clock.name
        formats = [f"{day} {clock.formats[0]}" for day in formats]
    elif not has_hour:
        doubts.append("event.occurred_at: there is no time of day, so every event is taken to be at midnight")
    if formats and not formats[0].startswith("%Y-%m-%d"):
        time["format"] = formats[0]
    if len({f[:8] for f in formats}) > 1:
        doubts.append(f"event.occurred_at.format: every date of the sample fits {' and '.join(formats)}: day or month first?")
    is_zoned = any(re.search(r"(Z|[+-]\d{2}:?\d{2})$", e) for e in sample.columns[column].examples if ":" in e)
    if not is_zoned and not (formats and formats[0].startswith("epoch")):
        time["timezone"] = zone
        doubts.append("event.occurred_at.timezone: the times do not carry a zone; whose clock wrote them?")
    return time


def _channel(sample: FileSample, roles: dict[str, str], doubts: list[str]) -> dict[str, Any] | None:
    rule, known = known_headers().rules["channel"], known_headers().channels
    for name, column in sample.columns.items():
        if rule.rank(column.header) is None or column.distinct > 30 or column.kind != "text":
            continue
        values = {value: known.get(plain_header(value)) for value in sorted(sample.values[name].dropna().unique())}
        if all(values.values()):
            return {"column": name, "values": values}
        strange = [value for value, ours in values.items() if ours is None]
        doubts.append(
            f"event.channel: {name} is left out, for {', '.join(strange[:5])} must be translated: {{column: {name}, values: {{...}}}}"
        )
    if "event.name" in roles and {"event.identifiers.cookie", "event.identifiers.device"} & roles.keys():
        doubts.append("event.channel: cookies and devices are of the web or an app; it is taken for the web")
        return {"value": "web"}
    return None


def _item(said: dict[str, Any], sample: FileSample, roles: dict[str, str], names: set[str], doubts: list[str]) -> None:
    """The item of each row, and what is doubtful about it."""
    if "item.id" not in roles:
        if names & {*NEEDS_ITEMS}:
            doubts.append("item.id: no column looks like a product; a purchase needs items")
        return
    column = roles["item.id"]
    item: dict[str, Any] = {"id": {"column": column, "is_integer": True} if sample.columns[column].whole_with_point else column}
    if "item.quantity" in roles:
        item["quantity"] = {"column": roles["item.quantity"]}
        if sample.columns[roles["item.quantity"]].fractional:
            item["quantity"]["fractions"] = "round_up"
            doubts.append("item.quantity: it holds fractions (weights?), which are rounded up to whole pieces")
    if (amount := roles.get("item.amount")) is not None:
        price = known_headers().rules["unit_price"].rank(sample.columns[amount].header) is not None
        per = "unit" if price and "item.quantity" in roles else "line"
        item["amount"] = {"column": amount, "per": per}
        meaning = "one unit" if per == "unit" else "the whole line"
        doubts.append(f"item.amount: {amount} is taken for {meaning}, in amounts like 12.50; in cents it takes unit: minor")
    if "amount" not in item and "purchase" in names:
        doubts.append("item.amount: no column looks like the money of a line; without it nothing is known of what customers spend")
    attributes: dict[str, Any] = {}
    for name, of_items in ((role.rsplit(".", 1)[1], c) for role, c in roles.items() if role.startswith("item.attributes.")):
        attributes[name] = of_items if name in (*ITEM_ATTRIBUTES, *SHOWN) else {"column": of_items, "holds": _holds(sample, of_items)}
    if attributes:
        item["attributes"] = attributes
    said["item"] = item
    doubts += [
        f"item.discount: {c.name} is left out; if it is money taken off the line, write item.discount: {{column: {c.name}}}"
        for c in sample.columns.values()
        if c.kind == "number" and known_headers().rules["discount"].rank(c.header) is not None
    ]
    doubts.append("item.leave_out: name the codes that are no items, such as postage and fees")


def _holds(sample: FileSample, column: str) -> str:
    """A number only where each value is one, and none is a code that begins with a nought."""
    present = sample.values[column].notna()
    is_code = sample.values[column].str.match(r"0\d").fillna(False).any()
    return "number" if sample.numbers(column)[present].notna().all() and not is_code else "text"


def _returns(said: dict[str, Any], sample: FileSample, roles: dict[str, str], doubts: list[str]) -> None:
    """Where quantities are negative: rows of orders whose number starts with a letter of its own are refunds, else ask."""
    quantity, order = roles.get("item.quantity"), roles.get("event.id")
    if quantity is None or not sample.columns[quantity].negative:
        return
    negative = np.array([v is not None and v.startswith("-") for v in sample.values[quantity]])
    if order is not None:
        letters = np.array([(v or " ")[0] if (v or " ")[0].isalpha() else "" for v in sample.values[order]])
        for letter in sorted(set(letters[negative]) - {""}):
            if (negative[letters == letter]).all():
                said["refunds"] = {"when": [{"column": order, "matches": f"^{letter}"}]}
                said.setdefault("skip", []).append(
                    {"because": "negative quantity outside a cancellation",
                     "when": [{"column": quantity, "below": 0}, {"column": order, "matches": f"^{letter}", "negate": True}]}
                )  # fmt: skip
                doubts.append(
                    f"refunds: {order} starting with {letter} has only negative quantities, so these rows are taken for cancellations"
                )
                return
    said["refunds"] = {"when": [{"column": quantity, "below": 0}]}
    doubts.append("refunds: rows of negative quantity are taken for returns; stock corrections belong under skip")


def _statuses(said: dict[str, Any], sample: FileSample, doubts: list[str]) -> None:
    """Orders that came to nothing are skipped where every row says so; where one of an order's rows does, its owner is asked."""
    rule, cancelled = known_headers().rules["status"], known_headers().cancelled
    for name, column in sample.columns.items():
        if rule.rank(column.header) is None or column.distinct > 60:
            continue
        void = sorted(value for value in sample.values[name].dropna().unique() if plain_header(value) in cancelled)
        if void and column.empty_share < 0.01:
            said.setdefault("skip", []).append({"because": "came to nothing", "when": [{"column": name, "one_of": void}]})
            doubts.append(f"skip: rows whose {name} is {', '.join(void)} are left out; is anything else of it no sale?")
        elif void:
            doubts.append(f"skip: {name} says {', '.join(void)} on some rows of an order alone: take such orders out of the file")


def catalogue_command(sample: FileSample, roles: dict[str, str]) -> str:
    """The command that loads a file of items, with all that it needs to be told."""
    parts = ["python -m features catalogue items", shlex.quote(str(sample.path))]
    for name in ("encoding", "delimiter", "decimal", "thousands"):
        if (value := getattr(sample.files, name)) != getattr(Files(), name):
            parts.append(f"--{name} {shlex.quote(value)}")
    named = {"item_id": roles["item.id"]} | {r.rsplit(".", 1)[1]: c for r, c in roles.items() if r.startswith("item.attributes.")}
    if "item.amount" in roles:
        named["price"] = roles["item.amount"]
    parts += [f"--column {shlex.quote(f'{theirs}={ours}')}" for ours, theirs in named.items() if ours != theirs]
    parts += [
        f"--attribute {ours}:{_holds(sample, theirs)}"
        for ours, theirs in named.items()
        if ours not in (*ITEM_ATTRIBUTES, *SHOWN, "price", "item_id")
    ]
    return " \\\n  ".join(parts)
