"""Audiences: for whom of all customers a condition holds, how many of them can be reached, and who they are. Reads feature rows, no log."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pyarrow as pa

from features.catalogue.shop import Shop
from features.definitions.conditions import CelCondition, ConditionError, folds_of
from features.definitions.folds.fold import OutdatedStateError
from features.definitions.folds.registered import NAMES, nothing
from features.definitions.segments import Told, of_the_question
from features.events.event import Channel
from features.people.consent import Consents
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.state.clock import clock_of, moment_of
from features.state.disk import make_folder
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.feature_store import FeatureStore
from serving.decide.addresses import Addresses, missing
from serving.decide.batch import PLAIN, Delivery, whole
from serving.decide.batch_files import CsvFile, JsonLinesFile, ParquetFile, Writer
from serving.decide.engine import Engine
from serving.decide.formats import CONTACT, FORMATS
from serving.decide.policy import HELD_OUT
from serving.decide.who import who_is

AT_ONCE = 500
"""How many customers' rows are held at once."""
SERVICE = "customer_v1"
TOLD = ("rfm_segment", "lifecycle", "value_tier", "churn_risk", "favourite_category")
"""What a file tells of each member, beside how they are reached."""
NOT_YET = "nobody asked about has features online: python -m features materialize makes them"


class Member(NamedTuple):
    """One customer for whom the condition holds.

    Attributes:
        why_not: why they are not reached by the channel asked about: no permission, no address, or the control group; None where they are.
        told: where they stand (``TOLD``).
        contact: of those who are reached, in clear, where it was asked for.
    """

    customer_id: str
    why_not: str | None
    told: Mapping[str, Any]
    contact: Mapping[str, str]


@dataclass
class AudienceSize:
    """How many they are.

    Attributes:
        condition: the condition in CEL.
        channel: by which they are to be reached; None: by none.
        customers: how many customers have feature rows.
        members: for how many of them the condition holds.
        reached: how many members a file for the channel would have.
        left_out: how many it would not, by the reason.
        feature_at: the moment of the oldest row that was read.
    """

    condition: str
    channel: Channel | None
    customers: int = 0
    members: int = 0
    reached: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    feature_at: datetime | None = None

    def check(self) -> None:
        """See that there was anybody to ask about.

        Raises:
            MissingStateError: there are no feature rows.
        """
        if not self.customers:
            raise MissingStateError(NOT_YET)

    def count(self, member: Member) -> None:
        """Count one member."""
        self.members += 1
        if member.why_not is None:
            self.reached += 1
        else:
            self.left_out[member.why_not] += 1


class Audiences:
    """Asks conditions about everybody.

    Args:
        home: the installation.
        engine: its policy, its segments and its champions.
        store, identities, consents, contacts: read from the home unless given; a running service gives its own.
    """

    def __init__(
        self,
        home: Home,
        engine: Engine,
        store: FeatureStore | None = None,
        identities: Identities | None = None,
        consents: Consents | None = None,
        contacts: Contacts | None = None,
    ) -> None:
        shop = Shop.load(home)
        self._home, self._engine, self._zone = home, engine, ZoneInfo(shop.timezone)
        self._store = store or FeatureStore(home, engine.services())
        self._identities = identities or Identities(home)
        self._consents = consents or Consents(home, shop.consent)
        self._addresses = Addresses(self._identities, contacts or Contacts(home, self._identities.vault))

    def parse(self, condition: str) -> CelCondition:
        """A segment by its name, or a condition in CEL.

        Raises:
            ConditionError: it names what is not known, or gives neither true nor false; the message says which.
        """
        text = condition.strip()
        try:
            return self._engine.governor.vocabulary.parse_condition(text)
        except ConditionError as error:
            raise ConditionError(f"{text!r} {error}") from None

    def size(self, condition: str, channel: Channel | None = None, among: Collection[str] | None = None) -> AudienceSize:
        """Count an audience, and how many of it a file for *channel* would have; *among* some customers' ids, or all.

        Raises:
            ConditionError: see ``parse``.
            MissingStateError: there are no feature rows yet.
        """
        found = AudienceSize(condition, channel)
        for member in self.members(condition, channel, among, found):
            found.count(member)
        found.check()
        return found

    def sizes(self) -> dict[str, int]:
        """For how many customers each segment holds, the shop's own and those that every shop has, in one pass over all rows.

        Raises:
            MissingStateError: there are no feature rows yet.
        """
        vocabulary, asked = self._engine.governor.vocabulary, AudienceSize("", None)
        folds = folds_of(frozenset().union(*(vocabulary.needs(condition) for condition in vocabulary.segments.values())))
        found = dict.fromkeys(vocabulary.segments, 0)
        for told in self._told(sorted(self._identities.customers()), folds, None, asked):
            for name in found:
                found[name] += bool(told[name])
        asked.check()
        return found

    def reach(self, condition: str, channels: Sequence[Channel]) -> dict[Channel, AudienceSize]:
        """Count an audience, and for each of *channels* how many of it a file would have, in one pass over all rows.

        Raises:
            ConditionError: see ``parse``.
            MissingStateError: there are no feature rows yet.
        """
        if "channel" in self._engine.governor.vocabulary.needs(self.parse(condition)):
            # by each channel they are others
            return {channel: self.size(condition, channel) for channel in channels}
        asked, found = AudienceSize(condition, None), {channel: AudienceSize(condition, channel) for channel in channels}
        members = self.members(condition, None, None, asked)
        while some := list(itertools.islice(members, AT_ONCE)):
            contacts = self._addresses.of([member.customer_id for member in some])
            for member, (channel, size) in itertools.product(some, found.items()):
                size.count(member._replace(why_not=self._why_not(member.customer_id, channel, contacts.get(member.customer_id, {}))))
        asked.check()
        for size in found.values():
            size.customers, size.feature_at = asked.customers, asked.feature_at
        return found

    def _told(
        self, customers: Sequence[str], folds: Sequence[str], channel: Channel | None, counted: AudienceSize | None
    ) -> Iterator[Told]:
        """What is known of each of *customers* who has feature rows and allows them to be used."""
        now = clock_of(self._home.settings)()
        question = of_the_question(now, self._zone, channel, None)
        for start in range(0, len(customers), AT_ONCE):
            held = self._rows(customers[start : start + AT_ONCE], folds, now, counted)
            for row, risk in zip(held, self._engine.risk.probabilities(held), strict=True):
                yield self._engine.governor.vocabulary.told({**row, "churn_probability": risk}, question)

    def members(
        self,
        condition: str,
        channel: Channel | None = None,
        among: Collection[str] | None = None,
        counted: AudienceSize | None = None,
        with_contact: bool = False,
    ) -> Iterator[Member]:
        """Everybody for whom the condition holds, in the order of their ids; memory holds some customers at a time.

        Who does not allow their data to be used is no member: nothing of theirs may decide. *counted* is told how many were asked.

        Raises:
            ConditionError: see ``parse``.
        """
        asked = self.parse(condition)
        folds = folds_of(self._engine.governor.vocabulary.needs(asked))
        everybody = sorted(self._identities.customers() if among is None else set(map(self._identities.current, among)))
        fits = (told for told in self._told(everybody, folds, channel, counted) if asked.holds(told))
        while some := list(itertools.islice(fits, AT_ONCE)):
            contacts = self._addresses.of([str(told["customer_id"]) for told in some]) if channel is not None else {}
            for told in some:
                customer = str(told["customer_id"])
                contact = contacts.get(customer, {})
                why_not = self._why_not(customer, channel, contact)
                known = contact if with_contact and why_not is None else {}
                yield Member(customer, why_not, {name: told.get(name) for name in TOLD}, known)

    def _rows(self, customers: Sequence[str], folds: Sequence[str], now: datetime, counted: AudienceSize | None) -> list[dict[str, Any]]:
        """The feature rows of those who have any, and allow them to be used."""
        rows = []
        for row in self._store.online(SERVICE, customers):
            at = row.get("customer_activity_at")
            if at is None or not who_is(self._identities, self._consents, row["customer_id"]).may_be_used:
                continue
            try:
                rows.append(self._store.expanded(row, now, folds))
            except OutdatedStateError:
                # made by an earlier version: until it is made anew nothing is known of what it would tell
                rows.append({**{name: value for name, value in row.items() if name not in NAMES}, **nothing(folds)})
            if counted is not None:
                counted.customers += 1
                moment = moment_of(int(at))
                counted.feature_at = moment if counted.feature_at is None else min(counted.feature_at, moment)
        return rows

    def _why_not(self, customer: str, channel: Channel | None, contact: Mapping[str, str]) -> str | None:
        """Why a member is not in a file for the channel."""
        if channel is None:
            return None
        who, policy = who_is(self._identities, self._consents, customer), self._engine.governor.policy
        if (why := who.not_reached(channel) or missing(contact, channel)) is not None:
            return why
        return HELD_OUT if policy.is_kept_from(policy.assigned(customer), channel) else None

    def export(
        self,
        condition: str,
        out: Path,
        channel: Channel | None = None,
        delivery: Delivery = PLAIN,
        among: Collection[str] | None = None,
    ) -> AudienceSize:
        """Write the members who may be reached by *channel* into a file that is there whole or not at all; without one, all members.

        The rows hold where each stands, and contact data where *delivery* says so. Hold ``deriving`` meanwhile.

        Raises:
            ValueError: the file cannot be written so.
            ConditionError: see ``parse``.
        """
        delivery.check(out, channel)
        self.parse(condition)
        form, found = FORMATS[delivery.form], AudienceSize(condition, channel)
        make_folder(out.parent.absolute())

        def writer_of(part: Path, owners: Path) -> Writer:
            told = dict.fromkeys(TOLD)
            columns = [c for c in form.row("", {}, told) if delivery.with_contact or c not in CONTACT]
            if out.suffix == ".csv":
                return CsvFile(part, owners, columns, form, delivery.delimiter, self._zone)
            schema = pa.schema([(name, pa.string()) for name in columns])
            return ParquetFile(part, schema) if out.suffix == ".parquet" else JsonLinesFile(part, schema)

        with whole(self._home, out, writer_of) as writer:
            waiting: list[Member] = []
            for member in self.members(condition, channel, among, found, delivery.with_contact):
                found.count(member)
                if member.why_not is None:
                    waiting.append(member)
                if len(waiting) >= AT_ONCE:
                    _write(writer, delivery, waiting)
                    waiting = []
            _write(writer, delivery, waiting)
            found.check()
        return found


def _write(writer: Writer, delivery: Delivery, members: Sequence[Member]) -> None:
    if delivery.with_contact and members:
        # before it can be read in the file
        delivery.note([member.customer_id for member in members])
    form = FORMATS[delivery.form]
    writer.write_rows([(each.customer_id, form.row(each.customer_id, each.contact, each.told)) for each in members])
