"""How often a customer may be contacted: caps by calendar, quiet hours, rests. Pure; the ledger keeps it exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Annotated, Any, Literal, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from features.events.event import ContactChannel
from features.people.consent import CONTACT_CHANNELS

Period = Literal["day", "week", "month"]
Most = Annotated[int, msgspec.Meta(ge=0, le=500)]
RestDays = Annotated[int, msgspec.Meta(ge=1, le=31)]
"""Days of 24 hours; messages are known for 32 days."""
RESTING = "had as often as contact allows"
TimeOfDay = Annotated[str, msgspec.Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]


Answers = Sequence[tuple[datetime, str, str]]
"""When the customer answered, which offer and which decision; '' where it was not told."""
MAX_ZONE = 64


class Contacted(NamedTuple):
    """One message that was sent, or that was promised to go out."""

    at: datetime
    channel: str
    offer_id: str
    message: str
    """Names the message: what carries the same name is counted once."""
    decision_id: str = ""
    """The decision that led to it, where that is known."""


class Cap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At most so many messages in a calendar day, week (from Monday) or month of the shop; 0 means none."""

    most: Most
    per: Period
    channels: tuple[ContactChannel, ...] = ()
    """Which channels count, and are closed once it is reached; none named: all together."""
    each: Literal["customer", "offer"] = "customer"
    """Whether a customer's messages are counted, or those of each offer alone."""


class QuietHours(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"start": "from", "end": "to"}):
    """From when until when (the shop's time) nothing goes out; it may pass midnight."""

    start: TimeOfDay
    end: TimeOfDay
    channels: tuple[ContactChannel, ...] = ()
    """By which channels; none named: all."""

    def holds(self, channel: str, local: datetime) -> bool:
        """Whether it is quiet then."""
        start, end, now = time.fromisoformat(self.start), time.fromisoformat(self.end), local.time()
        quiet = start <= now < end if start <= end else now >= start or now < end
        return quiet and (not self.channels or channel in self.channels)


class ContactPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contact part of a policy file. What is not named has no cap."""

    caps: tuple[Cap, ...] = ()
    quiet_hours: QuietHours | None = None
    reserved_minutes: Annotated[int, msgspec.Meta(ge=1, le=60 * 24 * 31)] = 1_440
    """How long a decision counts before its message must have been sent (a ``message_sent`` with its ``decision_id``)."""
    offer_rest_days: RestDays | None = None
    """For how long an offer rests once it was sent to the customer."""
    item_rest_days: RestDays | None = None
    """For how long every offer rests that is on an item of one that was sent."""
    answered_rest_days: RestDays | None = None
    """For how long an offer that the customer answered is not repeated, through whatever channel."""
    complaint_days: Annotated[int, msgspec.Meta(ge=1, le=3_650)] | None = None
    """For how long nothing is sold to a customer who has complained."""
    timezone: Literal["customer", "shop"] = "customer"
    """Whose days and hours count; of a customer whose time zone no event told, the shop's."""

    def __bool__(self) -> bool:
        """Whether there is anything to keep of messages."""
        rests = (self.offer_rest_days, self.item_rest_days, self.answered_rest_days, self.complaint_days)
        return bool(self.caps) or self.quiet_hours is not None or any(rests)

    def why_not(self, contacts: Sequence[Contacted], channel: str, now: datetime, zone: ZoneInfo) -> str | None:
        """Why the customer may not be contacted by *channel* now; None where they may."""
        local = now.astimezone(zone)
        if self.quiet_hours is not None and self.quiet_hours.holds(channel, local):
            return f"quiet hours by {channel}: from {self.quiet_hours.start} to {self.quiet_hours.end}"
        for cap in self._of("customer", channel):
            if len({c.message for c in _counted(cap, contacts, local)}) >= cap.most:
                through = f" by {', '.join(cap.channels)}" if cap.channels else ""
                return f"the customer has had the {cap.most} messages{through} that a {cap.per} may bring"
        return None

    def resting(self, contacts: Sequence[Contacted], channel: str, now: datetime, zone: ZoneInfo) -> frozenset[str]:
        """The offers that the customer has had as often as they may."""
        found: set[str] = set()
        for cap in self._of("offer", channel):
            messages: dict[str, set[str]] = {}
            for contact in _counted(cap, contacts, now.astimezone(zone)):
                messages.setdefault(contact.offer_id, set()).add(contact.message)
            found |= {offer for offer, each in messages.items() if offer and len(each) >= cap.most}
        return frozenset(found)

    def rests(self, contacts: Sequence[Contacted], answers: Answers, now: datetime) -> dict[str, frozenset[str]]:
        """By reason the offers that rest: those sent lately, and those answered."""
        found: dict[str, frozenset[str]] = {}
        if self.offer_rest_days:
            sent = frozenset(c.offer_id for c in contacts if c.offer_id and c.at > now - timedelta(days=self.offer_rest_days))
            found[f"sent in the last {self.offer_rest_days} days"] = sent
        if self.answered_rest_days:
            since = now - timedelta(days=self.answered_rest_days)
            by_decision = {c.decision_id: c.offer_id for c in contacts if c.decision_id}
            told = {offer or by_decision.get(decision, "") for at, offer, decision in answers if at > since}
            found[f"answered in the last {self.answered_rest_days} days"] = frozenset(told - {""})
        return {reason: offers for reason, offers in found.items() if offers}

    def sent_lately(self, contacts: Sequence[Contacted], now: datetime) -> frozenset[str]:
        """The offers whose items rest."""
        since = now - timedelta(days=self.item_rest_days or 0)
        return frozenset(c.offer_id for c in contacts if self.item_rest_days and c.offer_id and c.at > since)

    def complained(self, row: Mapping[str, Any], now: datetime) -> str | None:
        """Why nothing is sold to the customer for now; None where it may be."""
        at = row.get("complained_at")
        if self.complaint_days is None or at is None or now - datetime.fromtimestamp(int(at), UTC) > timedelta(days=self.complaint_days):
            return None
        return f"the customer complained in the last {self.complaint_days} days"

    def zone_of(self, row: Mapping[str, Any], shop: ZoneInfo) -> ZoneInfo:
        """The zone whose days and hours count for a customer."""
        told = row.get("timezone")
        if self.timezone == "shop" or not told or len(told) > MAX_ZONE:
            return shop
        try:
            return ZoneInfo(told)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            # whatever a device told
            return shop

    @property
    def closed(self) -> frozenset[str]:
        """The channels by which no offer may go out at all."""
        return frozenset(c for cap in self.caps if cap.each == "offer" and cap.most == 0 for c in cap.channels or CONTACT_CHANNELS)

    def _of(self, each: str, channel: str) -> Iterable[Cap]:
        return (cap for cap in self.caps if cap.each == each and (not cap.channels or channel in cap.channels))


def sent_to(row: Mapping[str, Any]) -> list[Contacted] | None:
    """The messages that a feature row tells of; None where it does not tell whether there were any.

    What was sent by one channel in one second for one decision is one message, of whatever many offers.
    """
    if "contacted_at" not in row:
        return None
    told = [row.get(name) for name in ("contacted_at", "contacted_by", "contacted_offers", "contacted_decisions")]
    if any(column is None for column in told):
        return []
    found = []
    for number, (at, channel, offer, decision) in enumerate(zip(*told, strict=True)):
        name = f"{decision} {channel} {at}" if decision else f"sent {number}"
        found.append(Contacted(datetime.fromtimestamp(int(at), UTC), channel, offer, name, decision))
    return found


def answers_of(row: Mapping[str, Any]) -> Answers:
    """The answers that a feature row tells of."""
    told = [row.get(name) for name in ("answered_at", "answered_offers", "answered_decisions")]
    if any(column is None for column in told):
        return []
    return [(datetime.fromtimestamp(int(at), UTC), offer, decision) for at, offer, decision in zip(*told, strict=True)]


def together(sent: Sequence[Contacted], promised: Sequence[Contacted], now: datetime) -> list[Contacted]:
    """What counts: every message sent, with the offers that its promise named, and every promise that is not known to have been sent.

    A promise counts as if its message went out now: it may at any moment, be it tomorrow.
    """
    by_decision: dict[str, list[Contacted]] = {}
    for message in sent:
        by_decision.setdefault(message.decision_id, []).append(message)
    found = list(sent)
    for promise in promised:
        kept = by_decision.get(promise.decision_id, []) if promise.decision_id else []
        found += [message._replace(offer_id=promise.offer_id) for message in kept]
        if not kept:
            found.append(promise._replace(at=max(promise.at, now)))
    return found


def _counted(cap: Cap, contacts: Sequence[Contacted], local: datetime) -> Iterable[Contacted]:
    """The contacts of the cap's channels, and those of which no channel is known, from the beginning of its period on."""
    begins = beginning(cap.per, local)
    return (c for c in contacts if c.at >= begins and (not cap.channels or not c.channel or c.channel in cap.channels))


def beginning(per: Period, local: datetime) -> datetime:
    """When the calendar day, week or month of a local time began."""
    day = local.date()
    first = {"day": day, "week": day - timedelta(days=day.weekday()), "month": day.replace(day=1)}[per]
    return datetime.combine(first, time(), local.tzinfo)
