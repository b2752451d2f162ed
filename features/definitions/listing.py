"""The feature catalogue: everything that is known of a customer or an item in a domain, told from the declarations themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from features.definitions.domain import Domain
from features.definitions.feature import Derived, Dtype, Feature
from features.definitions.folds.registered import FOLDS
from features.events.event import Purpose
from features.people.consent import FEATURES, STATISTICS


class Listed(NamedTuple):
    """One line of the catalogue."""

    entity: str
    name: str
    dtype: Dtype
    made_of: str
    """The table that it is measured on, the fold that tells it, or ``other features``."""
    allowed: str
    """Between what its values lie."""
    inputs_of: str
    """The kinds of models that take it."""
    says: str
    """What it says to people."""
    purposes: tuple[Purpose, ...]


def listed(domain: Domain) -> Iterator[Listed]:
    """Every feature of a domain, in the order in which they are declared."""
    for feature in domain.customer:
        yield _of_feature("customer", feature, FEATURES)
    for fold in FOLDS:
        for output in fold.outputs:
            yield Listed("customer", output.name, output.dtype, f"fold {fold.name}", "", "", output.about, FEATURES)
    for feature in domain.item:
        yield _of_feature("item", feature, STATISTICS)


def as_markdown(domain: Domain) -> str:
    """The catalogue as a Markdown table."""
    rows = [
        f"| {each.entity} | {each.name} | {each.dtype} | {each.made_of} | {each.allowed} | {each.inputs_of} | {each.says} |"
        for each in listed(domain)
    ]
    head = "| of | feature | type | made of | range | input of | says |\n|---|---|---|---|---|---|---|"
    return "\n".join([f"**{domain.name}**: {domain.about}", "", head, *rows])


def _of_feature(entity: str, feature: Feature, purposes: tuple[Purpose, ...]) -> Listed:
    definition = feature.definition
    made_of = "other features" if isinstance(definition, Derived) else definition.base.__name__
    low, high = ("" if bound is None else f"{bound:g}" for bound in (feature.low, feature.high))
    allowed = f"{low} to {high}" if high else f"at least {low}" if low else ""
    return Listed(entity, feature.name, feature.dtype, made_of, allowed, ", ".join(feature.inputs_of), feature.phrase, purposes)
