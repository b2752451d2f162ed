"""A domain: what a trade counts and calls leaving. Each is one file in ``features/definitions/domains``."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import features.definitions.domains as found_domains
from features.catalogue.tables import AttributeKind
from features.definitions.feature import Feature
from features.events.event import EVENT_NAMES, NAME_FORM, Event, OwnEvents

DEFAULT = "grocery"
"""The domain of a shop that names none."""


class UnknownDomainError(ValueError):
    """There is no such domain; the message lists those that there are."""


@dataclass(frozen=True)
class Leaving:
    """What it means that a customer has left: no purchase within the horizon, asked of those who were there before.

    Attributes:
        horizon_days: how far ahead one looks where nothing else is asked.
        min_visit_days: with fewer visit days so far a customer is too new to tell.
        max_recency_days: whoever was away for longer has left already.
        segments: by how many visit days in the window of ``segmented_by`` the reports tell customers apart.
        rfm: recency, frequency and money, for the baseline of three numbers.
    """

    horizon_days: int
    min_visit_days: int
    max_recency_days: int
    segmented_by: str
    segments: Mapping[str, tuple[float, float]]
    rfm: tuple[str, str, str]


@dataclass(frozen=True)
class Domain:
    """One trade.

    Attributes:
        about: what it is, in one sentence.
        customer: the windowed features of a customer.
        item: those of an item.
        attributes: what its catalogue tells of items, beside what a shop adds of its own.
        leaving: the label of churn.
        events: what it counts beside the events that every shop has; each with the fields that it must carry.
    """

    name: str
    about: str
    customer: tuple[Feature, ...]
    item: tuple[Feature, ...]
    attributes: Mapping[str, AttributeKind]
    leaving: Leaving
    events: OwnEvents = field(default_factory=dict)

    def __post_init__(self) -> None:
        """See that no feature stands twice and that what the label asks for is there.

        Raises:
            ValueError: one does, or something is missing.
        """
        for features in (self.customer, self.item):
            names = [feature.name for feature in features]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"domain {self.name}: declared twice: {', '.join(twice)}")
        for name, fields in self.events.items():
            if name in EVENT_NAMES or not re.fullmatch(NAME_FORM, name):
                raise ValueError(f"domain {self.name}: events: {name!r} is an event of every shop, or no name such as plan_renewed")
            if unknown := sorted(set(fields) - set(Event.__struct_fields__)):
                raise ValueError(f"domain {self.name}: events.{name}: an event has no field {', '.join(unknown)}")
        named = {feature.name for feature in self.customer}
        needed = {"recency_days", "visit_days_total", self.leaving.segmented_by, *self.leaving.rfm}
        if missing := sorted(needed - named):
            raise ValueError(f"domain {self.name}: its label asks for features that it does not declare: {', '.join(missing)}")

    def inputs_of(self, kind: str) -> tuple[Feature, ...]:
        """The customer features that a kind of model takes, in the order in which they are declared."""
        return tuple(feature for feature in self.customer if kind in feature.inputs_of)


def domain_names() -> list[str]:
    """The domains that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(found_domains.__path__))


def domain_named(name: str) -> Domain:
    """One domain; the default one for an empty name.

    Raises:
        UnknownDomainError: there is no such domain.
    """
    name = name or DEFAULT
    if name not in domain_names():
        raise UnknownDomainError(f"there is no domain {name!r}: use one of {', '.join(domain_names())}")
    domain: Domain = importlib.import_module(f"{found_domains.__name__}.{name}").DOMAIN
    return domain
