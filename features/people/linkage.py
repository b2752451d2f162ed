"""People who are known twice: links between contacts by probability (Fellegi and Sunter 1969, as Splink fits it), proposed or joined."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import pandas as pd

from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.vault import IDENTIFIER
from features.state.ports import LOG, MissingStateError, State

FIELDS: Mapping[str, Sequence[str]] = {
    "first_name": ("given_name", "firstname", "forename"),
    "last_name": ("surname", "lastname", "family_name"),
    "birth_date": ("date_of_birth", "birthday", "dob"),
    "street": ("address_1", "address", "address.street", "street_address"),
    "house_number": ("street_number",),
    "postal_code": ("postcode", "zip", "address.postal_code", "address.postalcode"),
    "city": ("suburb", "town", "address.city"),
    "national_id": ("soc_sec_id", "tax_id"),
}
"""What people are compared by, and the other names that sources have for it."""
ACCEPT_WEIGHT = 4.0
"""Match weight (log2 of the odds) from which a link is accepted: the least at which none is wrong on febrl3, with its id number
and without (``tests/bench_linkage.py``); judged on febrl4."""
REVIEW_WEIGHT = -4.0
"""From here on a link is worth a look."""
SEED = 1
LEAST_PAIRS = 50
"""Fewer likely pairs teach nothing about how people are misspelt."""
RULES: Sequence[Sequence[str]] = (
    ("national_id",), ("first_name", "last_name", "birth_date"), ("last_name", "birth_date", "postal_code"),
    ("first_name", "last_name", "house_number", "postal_code"),
)  # fmt: skip
"""Exact rules: records that are equal in all of these are of one person. They stand beside, for comparison."""


class Pair(NamedTuple):
    """Two records that may be of one person."""

    one: str
    other: str
    weight: float
    agreeing: list[str]
    """The fields that speak for it."""


class Link(NamedTuple):
    """A pair of customers, and what became of it: ``joined``, ``to review`` or ``parted by hand``."""

    one: str
    other: str
    weight: float
    agreeing: list[str]
    outcome: str


def propose(state: State, accept_above: float, now: datetime) -> list[Link]:
    """Compare all customers by their contacts; joins those whose weight reaches *accept_above*, and lists the likely ones.

    Raises:
        MissingStateError: too few customers have a name or an address to compare.
    """
    identities = Identities(state)
    people = people_of(Contacts(state, identities.vault), identities)
    if len(people) < 2 or len(comparable(people)) < 2:
        raise MissingStateError("too few customers have names or addresses to compare: identify them with first_name, last_name, ...")
    found: list[Link] = []
    for pair in sorted(link(people), key=lambda each: -each.weight):
        if pair.weight < REVIEW_WEIGHT:
            continue
        outcome = "to review"
        if pair.weight >= accept_above:
            outcome = "joined" if _join(identities, pair, now) else "parted by hand"
        found.append(Link(*pair, outcome))
    with state.lease.hold(LOG):
        identities.flush()
    return found


def _join(identities: Identities, pair: Pair, now: datetime) -> bool:
    one, other = identities.current(pair.one), identities.current(pair.other)
    if identities.parted(one, other):
        return False
    if one != other:
        identities.join(one, other, now, f"linked by contacts: {', '.join(pair.agreeing)} (weight {pair.weight:.1f})")
    return True


def people_of(contacts: Contacts, identities: Identities) -> pd.DataFrame:
    """One row a customer: ``unique_id`` and ``FIELDS``, each the value known last, None where nothing is known."""
    ours = {name: field for field, names in FIELDS.items() for name in (field, *names)}
    rows: dict[str, dict[str, Any]] = {}
    for contact in sorted(contacts.everything(), key=lambda each: each.known_at):
        customer = identities.owner_of([contact.identity_key])
        if customer is not None and contact.field != IDENTIFIER and contact.field in ours:
            rows.setdefault(customer, {})[ours[contact.field]] = normal(contact.value)
    return pd.DataFrame([{"unique_id": customer, **row} for customer, row in sorted(rows.items())], columns=["unique_id", *FIELDS])


def normal(value: Any) -> str | None:
    """A value as it is compared: lower case, single spaces, None where empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return " ".join(str(value).lower().split()) or None


def comparable(people: pd.DataFrame) -> list[str]:
    """The fields that at least two people have."""
    return [field for field in FIELDS if field in people.columns and people[field].notna().sum() >= 2]


def link(people: pd.DataFrame, other: pd.DataFrame | None = None) -> list[Pair]:
    """Every pair that shares enough to be compared, with its match weight; within *people*, or between it and *other*.

    The model is fitted to these very records without labels: m by expectation maximisation, u from random pairs.
    """
    try:
        import splink.comparison_library as cl
        from splink import DuckDBAPI, Linker, SettingsCreator, block_on
    except ImportError:
        raise MissingStateError("the search for people who are known twice needs Splink: pip install 'ubiquo[linkage]'") from None

    logging.getLogger("splink").setLevel(logging.ERROR)
    fields = [field for field in comparable(people) if other is None or field in comparable(other)]
    makers = {
        "first_name": lambda: cl.NameComparison("first_name"), "last_name": lambda: cl.NameComparison("last_name"),
        "birth_date": lambda: cl.LevenshteinAtThresholds("birth_date", [1, 2]),
        "street": lambda: cl.JaroWinklerAtThresholds("street", [0.9, 0.8]),
        "house_number": lambda: cl.LevenshteinAtThresholds("house_number", [1]),
        "postal_code": lambda: cl.LevenshteinAtThresholds("postal_code", [1, 2]),
        "city": lambda: cl.JaroWinklerAtThresholds("city", [0.9, 0.8]),
        "national_id": lambda: cl.LevenshteinAtThresholds("national_id", [1, 2]),
    }  # fmt: skip
    blocks = [block_on(*each) for each in _blocks(fields)]
    settings = SettingsCreator(
        link_type="dedupe_only" if other is None else "link_only",
        comparisons=[makers[field]() for field in fields],
        blocking_rules_to_generate_predictions=blocks,
        retain_intermediate_calculation_columns=True,
    )
    db = DuckDBAPI()
    columns = ["unique_id", *fields]
    tables = [db.register(frame[columns], table_name=name) for name, frame in (("one", people), ("other", other)) if frame is not None]
    linker = Linker(tables if len(tables) > 1 else tables[0], settings, log_level=logging.ERROR)
    exact = [block_on(*rule) for rule in RULES if set(rule) <= set(fields)]
    if exact:
        linker.training.estimate_probability_two_random_records_match(exact, recall=0.8)
    linker.training.estimate_u_using_random_sampling(max_pairs=1e6, seed=SEED)
    for each in _trainable(people, other, fields)[:3]:
        linker.training.estimate_parameters_using_expectation_maximisation(block_on(*each))
    rows = linker.inference.predict(threshold_match_weight=REVIEW_WEIGHT - 10).as_pandas_dataframe()
    return [_pair(row, fields) for row in rows.to_dict("records")]


def exact_pairs(people: pd.DataFrame, other: pd.DataFrame | None = None, without: Sequence[str] = ()) -> set[frozenset[str]]:
    """The pairs that the exact ``RULES`` join."""
    found: set[frozenset[str]] = set()
    right = people if other is None else other
    for rule in RULES:
        if not set(rule) & set(without) and set(rule) <= set(people.columns):
            both = people.dropna(subset=list(rule)).merge(right.dropna(subset=list(rule)), on=list(rule), suffixes=("_1", "_2"))
            pairs: Iterable[tuple[str, str]] = zip(both["unique_id_1"], both["unique_id_2"], strict=True)
            found |= {frozenset(pair) for pair in pairs if pair[0] != pair[1]}
    return found


def _blocks(fields: Sequence[str]) -> list[list[str]]:
    """What two records must share to be compared at all; several ways, as any one field may be misspelt."""
    wanted = [
        ["first_name", "last_name"], ["birth_date"], ["postal_code", "street"], ["last_name", "postal_code"], ["national_id"],
        ["first_name", "postal_code"], ["city", "last_name"], ["house_number", "street"], ["city", "first_name"],
    ]  # fmt: skip
    possible = [block for block in wanted if set(block) <= set(fields)]
    return possible or [[fields[0]]]


def _trainable(people: pd.DataFrame, other: pd.DataFrame | None, fields: Sequence[str]) -> list[list[str]]:
    """The blocks with enough pairs to learn from.

    Raises:
        MissingStateError: there are none.
    """
    found = []
    for block in _blocks(fields):
        left = people.dropna(subset=block).groupby(block).size()
        pairs = (left * (left - 1) / 2).sum() if other is None else (left * other.dropna(subset=block).groupby(block).size()).dropna().sum()
        if pairs >= LEAST_PAIRS:
            found.append(block)
    if not found:
        raise MissingStateError("too few customers resemble one another to learn from how much: nobody seems to be known twice")
    return found


def _pair(row: Mapping[str, Any], fields: Sequence[str]) -> Pair:
    agreeing = [field for field in fields if float(row.get(f"mw_{field}", 0.0) or 0.0) > 0]
    return Pair(str(row["unique_id_l"]), str(row["unique_id_r"]), float(row["match_weight"]), agreeing)
