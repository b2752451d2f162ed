"""What a shop's page may tell with a key that everybody can read: what its own visitor does, and nothing that counts as proof."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from features.events.event import MAX_ID, Event, EventName, RejectedEvent
from features.events.identifiers import OF_A_PERSON
from features.sources import segment

SOURCE = "page"
SEGMENT_SOURCE = f"{SOURCE} {segment.SOURCE}"
"""What the events of pages are marked with: sent as they are, and by Segment's library."""
TOLD: frozenset[EventName] = frozenset(
    {
        "view_item_list", "select_item", "view_item", "search", "add_to_cart", "remove_from_cart", "view_cart", "begin_checkout",
        "view_promotion", "select_promotion", "offer_view", "offer_decline", "page_view", "screen_view", "identify", "consent_update",
        "custom",
    }
)  # fmt: skip
"""What a page sees for itself. Money and redemptions (purchase, refund, offer_accept, offer_redeem), who somebody is (sign_up, login,
alias), what was sent to them (message and ad events) and what happened elsewhere (calls, visits, bookings, complaints) a page can only
claim."""
PREFIX = "page-"
"""How the ids of pages' events begin: no page can take the id that an event of a server will have."""
FROM_A_SERVER = "a page's key cannot tell this: send it from your server, with a key of the scope ingest"


def left_out_of(event: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A canonical event of Segment's library without what a page cannot tell, and the names of the fields that were left out.

    The library names the user, and consents, with every message; the message is taken for the cookie all the same.
    """
    said, names = dict(event), []
    identifiers = said.get("identifiers", {})
    names += [f"identifiers.{kind}" for kind in identifiers if kind != "cookie"]
    said["identifiers"] = {kind: value for kind, value in identifiers.items() if kind == "cookie"}
    if said.pop("personal", None):
        names.append("personal")
    of_a_person = [name for name in said.get("traits", {}) if OF_A_PERSON.search(name)]
    if of_a_person:
        names += [f"traits.{name}" for name in of_a_person]
        said["traits"] = {name: value for name, value in said["traits"].items() if name not in of_a_person}
    if consent := said.pop("consent", None):
        for group in ("purposes", "permissions"):
            answers = consent.get(group, {})
            names += [f"consent.{group}.{what}" for what, allowed in answers.items() if allowed]
            consent = {**consent, group: {what: allowed for what, allowed in answers.items() if not allowed}}
        if consent["purposes"] or consent["permissions"]:
            said["consent"] = consent
    return said, names


def admitted(event: Event) -> Event:
    """The event under an id of pages.

    Raises:
        RejectedEvent: it tells what a page cannot know, or of anybody but its own visitor.
    """
    if event.name not in TOLD:
        raise RejectedEvent("name", f"{event.name}: {FROM_A_SERVER}")
    if event.previous:
        raise RejectedEvent("previous", FROM_A_SERVER)
    for kind in event.identifiers:
        if kind != "cookie":
            raise RejectedEvent(f"identifiers.{kind}", f"a page speaks of its cookie only: {FROM_A_SERVER}")
    if not event.identifiers:
        raise RejectedEvent("identifiers.cookie", "an event of a page needs the cookie of its visitor (Segment: anonymousId)")
    if event.personal:
        raise RejectedEvent("personal", FROM_A_SERVER)
    if event.consent is not None:
        for group in ("purposes", "permissions"):
            for what, allowed in getattr(event.consent, group).items():
                if allowed:
                    raise RejectedEvent(f"consent.{group}.{what}", f"a page may withdraw a consent, and give none: {FROM_A_SERVER}")
    if len(event.event_id) > MAX_ID - len(PREFIX):
        raise RejectedEvent("event_id", f"an id of a page's event may hold {MAX_ID - len(PREFIX)} characters")
    return msgspec.structs.replace(event, event_id=PREFIX + event.event_id)
