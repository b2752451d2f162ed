"""The shop's policy for what goes out: who is held out, who sees which variant, how often customers are contacted. One YAML file,
checked whole before it counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from features.catalogue.offers import OfferKind, Stage
from features.catalogue.yaml_file import read_yaml
from features.events.event import ContactChannel, Text
from features.people.consent import CONTACT_CHANNELS
from models.kind import Answers
from serving.decide.contact import ContactPolicy

Group = Literal["control", "treated"]
Covered = Literal["offers", "contacts", "recommendations"]
"""Offers; whatever goes out by a channel through which customers are contacted; every list of items, those of a page too."""
Factor = Literal["probability", "value", "cost", "lever", "context"]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
HELD_OUT = "the customer is in the control group: nothing is offered, so that it can be seen what offering brings"


class ControlGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Customers to whom nothing is offered, always the same ones as long as the salt stays."""

    share: Share
    salt: Text
    covers: tuple[Covered, ...] = ("offers", "contacts")

    def __post_init__(self) -> None:
        """A share of 1 would end all offers: refused."""
        if self.share == 1.0:
            raise ValueError("a share of 1 leaves nobody to offer anything to: give less than 1")


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way of treating customers, and the share of them that gets it."""

    name: Text
    share: Share


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Variants among which customers are divided; who falls into none has no variant."""

    name: Text
    salt: Text
    variants: Annotated[tuple[Variant, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Shares of more than the whole, and two variants of one name, are refused."""
        if (total := sum(variant.share for variant in self.variants)) > 1.0 + 1e-9:
            raise ValueError(f"the shares of its variants add up to {total:g}: give no more than 1 together")
        _once("variants", [variant.name for variant in self.variants])


class ContextRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Offers that count for more, or less, in some situation; of several rules that hold the factors multiply."""

    when: str
    """A condition in CEL on the customer and the question."""
    factor: Annotated[float, msgspec.Meta(ge=0, le=1000)]
    kinds: tuple[OfferKind, ...] = ()
    stages: tuple[Stage, ...] = ()
    categories: tuple[Text, ...] = ()
    """Which offers; none named: all."""


class Arbitration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an offer's priority is made of: probability x (margin - cost) x lever x context, less what it costs to send it."""

    leave_out: tuple[Factor, ...] = ()
    sending_minor: dict[ContactChannel, Annotated[float, msgspec.Meta(ge=0)]] = {}
    """What one message costs, by channel, in minor units."""
    context: tuple[ContextRule, ...] = ()
    least: float | None = None
    """Offers of a lower priority are not made: 0 is what brings less than it costs."""


class Exploration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How freely offers are drawn where a question asks to explore."""

    always: bool = False
    """Whether every decision explores, asked or not."""
    temperature: Annotated[float, msgspec.Meta(ge=0.001, le=100)] = 0.1
    """In shares of the best priority: over so much the chance falls by a factor of e."""
    uniform: Share = 0.05
    """The share of places drawn evenly."""


class Assignment(NamedTuple):
    """What one customer is in: the control group or not, and a variant of each experiment; None where there is none, or nobody is known."""

    group: Group | None
    variants: Mapping[str, str]


UNASSIGNED = Assignment(None, {})


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of a policy file."""

    control_group: ControlGroup | None = None
    contact: ContactPolicy = ContactPolicy()
    arbitration: Arbitration = Arbitration()
    exploration: Exploration = Exploration()
    experiments: tuple[Experiment, ...] = ()

    def __post_init__(self) -> None:
        """Two experiments of one name are refused."""
        _once("experiments", [experiment.name for experiment in self.experiments])

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read and check a policy file; where there is none, nothing is held out.

        Raises:
            WrittenError: see ``parse``.
        """
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return cls()
        return cls.parse(text, path.name)

    @classmethod
    def parse(cls, text: bytes, name: str) -> Policy:
        """Read and check a policy's text; *name* is what messages call it.

        Raises:
            WrittenError: it is no YAML, or a field is not known or says something that it may not.
        """
        return read_yaml(text, name, cls)

    def assigned(self, customer_id: str | None) -> Assignment:
        """What a customer is in. The same customer, salt and shares give the same answer in every process."""
        if customer_id is None:
            return UNASSIGNED
        group: Group | None = None
        if self.control_group is not None:
            group = "control" if drawn(self.control_group.salt, customer_id) < self.control_group.share else "treated"
        return Assignment(group, dict(self._variants(customer_id)))

    def holds_out(self, assignment: Assignment, answers: Answers, channel: str | None) -> bool:
        """Whether a question of that kind, its answer to go out by *channel*, is not answered because of the control group."""
        if assignment.group != "control" or self.control_group is None or answers == "score":
            return False
        covers = self.control_group.covers
        contacts = "contacts" in covers and channel in CONTACT_CHANNELS
        return contacts or ("offers" if answers == "offers" else "recommendations") in covers

    def is_kept_from(self, assignment: Assignment, channel: str | None) -> bool:
        """Whether a customer is left out of whatever is sent by *channel*, because of the control group."""
        covers = self.control_group.covers if self.control_group is not None else ()
        return assignment.group == "control" and channel in CONTACT_CHANNELS and "contacts" in covers

    def _variants(self, customer_id: str) -> Iterator[tuple[str, str]]:
        for experiment in self.experiments:
            number, upper = drawn(experiment.salt, customer_id), 0.0
            for variant in experiment.variants:
                upper += variant.share
                if number < upper:
                    yield experiment.name, variant.name
                    break


def drawn(salt: str, customer_id: str) -> float:
    """A number in [0, 1) that is the customer's own under a salt: independent of those under other salts."""
    digest = hashlib.blake2b(f"{salt}\0{customer_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def _once(what: str, names: list[str]) -> None:
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two {what} are called {min(twice)!r}: give each a name of its own")
