"""The single customer view: who they are, what they allow, and what happened, in every channel, as one timeline."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from features.catalogue.shop import Shop
from features.events.event import SealedEvent
from features.events.identifiers import kind_of
from features.people.consent import Consents, told
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.vault import IDENTIFIER
from features.state.home import Home
from features.store.event_log import EventLog

SHOWN = ("occurred_at", "name", "channel", "store_id", "items", "query", "campaign_id", "offer_id", "traits")


class UnknownCustomerError(LookupError):
    """Nobody is known by that id."""


class Lived(NamedTuple):
    """A part of a customer's timeline.

    Attributes:
        rows: what happened, the latest first.
        moments: when each usable event of theirs occurred (microseconds since 1970), the latest first, whether it is among the rows or not.
        withheld: how many events they do not allow to be used.
    """

    rows: list[dict[str, Any]]
    moments: Sequence[int]
    withheld: int


def profile(
    home: Home, identities: Identities, consents: Consents, contacts: Contacts, customer_id: str, limit: int = 100
) -> dict[str, Any]:
    """One customer, for whoever has them before them: identifiers, what is personal, consent, and their latest *limit* events.

    Events that they do not allow to be used are not shown; ``withheld`` counts them.

    Raises:
        UnknownCustomerError: no identifier leads to them.
    """
    told = who_they_are(identities, consents, contacts, customer_id)
    lived = timeline_of(home, identities, consents, told["customer_id"], limit)
    story = told.pop("story")
    return {**told, "events": lived.rows, "withheld": lived.withheld, "story": story}


def who_they_are(identities: Identities, consents: Consents, contacts: Contacts, customer_id: str) -> dict[str, Any]:
    """The customer without what they did: ids, identifiers in clear, what is personal, consent, and how they came to be one customer.

    Raises:
        UnknownCustomerError: no identifier leads to them.
    """
    customer_id = identities.current(customer_id)
    keys = identities.members(customer_id)
    if not keys:
        raise UnknownCustomerError("no customer is known by that id")
    held = contacts.of(keys)
    clear = {each.identity_key: each.value for each in held if each.field == IDENTIFIER}
    return {
        "customer_id": customer_id,
        "formerly": identities.former(customer_id),
        "identifiers": [{"kind": kind_of(key), "value": clear.get(key)} for key in keys],
        "person": {each.field: each.value for each in held if each.field != IDENTIFIER},
        "consent": told(consents, keys),
        "story": [
            {"at": step.known_at, "kind": kind_of(step.identity_key), "cause": step.cause, "event_id": step.event_id}
            for step in identities.story(customer_id)
        ],
    }


def timeline_of(home: Home, identities: Identities, consents: Consents, customer_id: str, limit: int, start: int = 0) -> Lived:
    """The customer's usable events from the *start*-th latest on, *limit* of them: looked up by their identifiers."""
    keys = identities.members(identities.current(customer_id))
    with contextlib.closing(EventLog(home, Shop.load(home).timezone).index) as index:
        occurred = index.occurrences(keys)
        # an event is whose its strongest identifier is, unless that is shared
        unsure = [each.number for each in occurred if not each.strongest]
        others = {n for n, row in index.numbered(unsure).items() if identities.customer_of(row.event) != customer_id}
        usable = consents.judge(keys, "personalization")
        theirs = [each for each in occurred if each.number not in others]
        shown = [each for each in theirs if usable(each.at, each.declared)]
        rows = [_shown(row.event) for row in index.numbered([each.number for each in shown[start : start + limit]]).values()]
    return Lived(rows, [each.at for each in shown], len(occurred) - len(shown))


def _shown(event: SealedEvent) -> dict[str, Any]:
    row = {name: getattr(event, name) for name in SHOWN}
    row["items"] = [msgspec.structs.asdict(item) for item in event.items]
    return {k: v for k, v in row.items() if v not in (None, [], {})}


def events_of(log: EventLog, keys: Sequence[str]) -> list[str]:
    """The ids of all events that carry any of *keys*, usable or not."""
    log.catch_up()
    return [row.event.event_id for row in log.index.of(keys)]
