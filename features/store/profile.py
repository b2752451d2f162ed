"""The single customer view: who she is, what she allows, and what happened, in every channel, as one timeline."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

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


def profile(
    home: Home, identities: Identities, consents: Consents, contacts: Contacts, customer_id: str, limit: int = 100
) -> dict[str, Any]:
    """One customer, for whoever has her before him: identifiers, what is personal, consent, and her latest *limit* events.

    Events that she does not allow to be used are not shown; ``withheld`` counts them.

    Raises:
        UnknownCustomerError: no identifier leads to her.
    """
    customer_id = identities.current(customer_id)
    keys = identities.members(customer_id)
    if not keys:
        raise UnknownCustomerError("no customer is known by that id")
    held = contacts.of(keys)
    clear = {each.identity_key: each.value for each in held if each.field == IDENTIFIER}
    events, withheld = _timeline(home, identities, consents, customer_id, keys, limit)
    return {
        "customer_id": customer_id,
        "formerly": identities.former(customer_id),
        "identifiers": [{"kind": kind_of(key), "value": clear.get(key)} for key in keys],
        "person": {each.field: each.value for each in held if each.field != IDENTIFIER},
        "consent": told(consents, keys),
        "events": events,
        "withheld": withheld,
        "story": [
            {"at": step.known_at, "kind": kind_of(step.identity_key), "cause": step.cause, "event_id": step.event_id}
            for step in identities.story(customer_id)
        ],
    }


def _timeline(
    home: Home, identities: Identities, consents: Consents, customer_id: str, keys: Sequence[str], limit: int
) -> tuple[list[dict[str, Any]], int]:
    """The customer's latest usable events and how many are withheld: looked up by their identifiers."""
    with contextlib.closing(EventLog(home, Shop.load(home).timezone).index) as index:
        occurred = index.occurrences(keys)
        # an event is whose its strongest identifier is, unless that is shared
        unsure = [each.number for each in occurred if not each.strongest]
        others = {n for n, row in index.numbered(unsure).items() if identities.customer_of(row.event) != customer_id}
        usable = consents.judge(keys, "personalization")
        theirs = [each for each in occurred if each.number not in others]
        shown = [each.number for each in theirs if usable(each.occurred_at, each.declared)]
        rows = [_shown(row.event) for row in index.numbered(shown[:limit]).values()]
    return rows, len(occurred) - len(shown)


def _shown(event: SealedEvent) -> dict[str, Any]:
    row = {name: getattr(event, name) for name in SHOWN}
    row["items"] = [msgspec.structs.asdict(item) for item in event.items]
    return {k: v for k, v in row.items() if v not in (None, [], {})}


def events_of(log: EventLog, keys: Sequence[str]) -> list[str]:
    """The ids of all events that carry any of *keys*, usable or not."""
    log.catch_up()
    return [row.event.event_id for row in log.index.of(keys)]
