"""The offers of a catalogue file: each row in the table's own types, and what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import msgspec
import yaml

from features.catalogue.offers import OfferKind, OfferTerms, Stage
from features.catalogue.tables import OFFERS
from features.catalogue.yaml_file import load_yaml
from features.definitions.conditions import ConditionError
from features.definitions.segments import Vocabulary
from features.events.event import Channel, explain
from features.events.spelling import meant
from features.sources.tabular import UnreadableFileError
from features.state.clock import local_midnight, parse_as_of

Wrong = list[tuple[str, str]]
CHOICES = {"kind": get_args(OfferKind), "stage": get_args(Stage)}
LISTS = ("item_ids", "channels", "store_ids")
OLD_CHANNEL = "channel"
"""What ``channels`` was called while it could be one alone."""


@dataclass
class OfferReader:
    """Reads the offers of one file.

    Attributes:
        zone: of the shop, in which dates without a time are meant.
        items: the ids of the items in force.
        attributes: of the items in force, by name the texts that it holds; None of one that holds numbers.
        stores: the ids of the stores in force; none are known where no stores were loaded, and any is taken then.
        vocabulary: what eligibility may name.
    """

    zone: str
    items: frozenset[str]
    attributes: Mapping[str, frozenset[str] | None]
    stores: frozenset[str]
    vocabulary: Vocabulary
    _types: dict[str, tuple[str, int]] = field(default_factory=dict)

    def record(self, row: Mapping[str, str | None], parts: Any, line: int) -> tuple[dict[str, Any], Wrong]:
        """A row as the table has it; *parts* splits a list."""
        wrong: Wrong = [(name, "is empty") for name in ("offer_id", "valid_from", "valid_until") if not row.get(name)]
        record: dict[str, Any] = dict.fromkeys(OFFERS.names) | {"offer_id": row.get("offer_id")}
        told = {name: value for name, value in row.items() if value is not None and name in OfferTerms.__struct_fields__}
        told |= {name: parts(row.get(name) or "") for name in LISTS if row.get(name)}
        if row.get(OLD_CHANNEL):
            told["channels"] = parts(row[OLD_CHANNEL])
        try:
            if "where" in told:
                told["where"] = msgspec.json.decode(str(told["where"]))
            record |= msgspec.structs.asdict(msgspec.convert(told, OfferTerms, strict=False))
        except msgspec.ValidationError as error:
            at, reason = explain(error)
            name = at.partition("[")[0].partition(".")[0]
            if reason.startswith("Invalid enum value") and name in CHOICES:
                reason += f": use one of {', '.join(CHOICES[name])}{meant(str(told[name]), tuple(CHOICES[name]))}"
            named = OLD_CHANNEL if name == "channels" and row.get(OLD_CHANNEL) else at
            if name == "channels":
                bad = next((each for each in told["channels"] if each not in get_args(Channel)), "that")
                reason = f"{bad!r} is not one of {', '.join(get_args(Channel))}{meant(bad, get_args(Channel))}"
            wrong.append((named or "$", reason))
            record |= {"item_ids": told.get("item_ids", [])}
        except msgspec.DecodeError:
            wrong.append(("where", 'is no mapping of attributes to lists: write it like {"category": ["FROZEN"]}'))
        record["item_ids"] = list(record["item_ids"] or [])
        record["campaign_id"] = record["campaign_id"] or record["offer_id"]
        record["kind"] = record["kind"] or "coupon"
        record["campaign_type"] = record["campaign_type"] or record["kind"]
        record["valid_from"], record["valid_until"] = self._validity(row, wrong)
        wrong += self._mistakes(record, line, bool(wrong))
        record["where"] = msgspec.json.encode(record["where"]).decode() if isinstance(record["where"], dict) else None
        return record, wrong

    def _validity(self, row: Mapping[str, str | None], wrong: Wrong) -> tuple[datetime | None, datetime | None]:
        found: list[datetime | None] = []
        # an offer that ends on a date is in force on that whole day
        for name, days in (("valid_from", 0), ("valid_until", 1)):
            text, moment = row.get(name), None
            if text:
                try:
                    moment = (
                        local_midnight(date.fromisoformat(text) + timedelta(days=days), self.zone)
                        if len(text) == 10
                        else parse_as_of(text, self.zone)
                    )
                except ValueError:
                    wrong.append((name, f"{text!r} is neither a date like 2017-12-04 nor a time with its zone like 2017-12-04T05:00:00Z"))
            found.append(moment)
        start, end = found
        if start is not None and end is not None and not start < end:
            wrong.append(("valid_until", f"lies before valid_from ({start.isoformat()})"))
        return start, end

    def _mistakes(self, record: Mapping[str, Any], line: int, is_wrong: bool) -> Iterator[tuple[str, str]]:
        if unknown := [item for item in record["item_ids"] if item not in self.items]:
            yield "item_ids", f"{unknown[0]!r} is not in the items' catalogue: load the items first"
        where = record["where"] if isinstance(record["where"], dict) else {}
        for name, values in where.items():
            if name not in self.attributes:
                yield (
                    "where",
                    (
                        f"{name!r} is no attribute of the items in force: use one of {', '.join(self.attributes)}"
                        f"{meant(name, tuple(self.attributes))}"
                    ),
                )
            elif (held := self.attributes[name]) is None:
                yield "where", f"{name!r} holds numbers: choose by an attribute that holds texts"
            elif strange := [value for value in values if value not in held]:
                near = difflib.get_close_matches(strange[0], held, 3)
                yield "where", f"no item in force has {name} {strange[0]!r}" + (f": is it {', '.join(map(repr, near))}?" if near else "")
        if not is_wrong and record["kind"] in ("coupon", "product") and not record["item_ids"] and not where:
            yield "item_ids", "is empty: name the items, or choose them by their attributes with where"
        if self.stores and (strange := [store for store in record["store_ids"] or () if store not in self.stores]):
            yield "store_ids", f"{strange[0]!r} is not among the stores: load the stores first"
        if record["benefit_percent"] and record["benefit_minor"]:
            yield "benefit_minor", "an offer takes a share off the price or an amount, not both"
        if record["fallback"] and record["transactional"]:
            yield "fallback", "a message that is owed to the customer is no stopgap"
        if record["eligible"]:
            try:
                self.vocabulary.parse_condition(record["eligible"])
            except ConditionError as error:
                yield "eligible", str(error)
        if record["campaign_id"]:
            kind, first = self._types.setdefault(record["campaign_id"], (record["campaign_type"], line))
            if kind != record["campaign_type"]:
                yield "campaign_type", f"{record['campaign_type']!r}, but line {first} of the same campaign says {kind!r}"


def yaml_rows(path: Path) -> Iterator[tuple[dict[str, int], dict[str, Any]]]:
    """The offers of a YAML file, a list of mappings, each with the line of each of its fields, and under '' that where it begins.

    Raises:
        UnreadableFileError: it is no such list, or says something that no offer has.
    """
    text = path.read_bytes()
    try:
        said, tree = load_yaml(text), yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableFileError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(said, list) or not isinstance(tree, yaml.SequenceNode) or not all(isinstance(each, dict) for each in said):
        raise UnreadableFileError(f"{path}: write a list of offers, each beginning with '- offer_id:'")
    known = {*OFFERS.names, OLD_CHANNEL}
    for node, row in zip(tree.value, said, strict=True):
        line = node.start_mark.line + 1
        lines = {"": line, **{key.value: key.start_mark.line + 1 for key, _ in node.value}}
        if strange := [name for name in row if name not in known]:
            hint = meant(strange[0], tuple(OFFERS.names))
            raise UnreadableFileError(
                f"{path}, line {line}: {strange[0]!r} is nothing that an offer has: use {', '.join(OFFERS.names)}{hint}"
            )
        yield lines, row
