"""The single customer view: who she is, what she allows, and what happened, in every channel, as one timeline."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import duckdb

from features.consent import Consents, told
from features.contacts import Contacts
from features.event_log import EventLog, connect
from features.home import Home
from features.identifiers import kind_of
from features.identity import Identities
from features.shop import Shop
from features.timeline import open_timeline
from features.vault import IDENTIFIER

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
    events, withheld = _timeline(home, consents, customer_id, keys, limit)
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


def _timeline(home: Home, consents: Consents, customer_id: str, keys: Sequence[str], limit: int) -> tuple[list[dict[str, Any]], int]:
    log = EventLog(home, Shop.load(home).timezone)
    if not log.exists:
        return [], 0
    # later than anything known, as a timeline is strictly before
    with contextlib.closing(open_timeline(home, datetime(9998, 1, 1, tzinfo=UTC), [customer_id], consents=consents)) as opened:
        mine = opened.events.filter(opened.events.customer_id == customer_id)
        rows = mine.order_by([mine.occurred_at.desc(), mine.event_id]).limit(limit).select(*SHOWN).to_pyarrow().to_pylist()
        usable = int(mine.count().execute())
    for row in rows:
        row["traits"] = dict(row["traits"] or [])
    return [{k: v for k, v in row.items() if v not in (None, [], {})} for row in rows], len(events_of(log.files(), keys)) - usable


def events_of(files: Sequence[str], keys: Sequence[str], connection: duckdb.DuckDBPyConnection | None = None) -> list[str]:
    """The ids of all events that carry any of *keys*, usable or not."""
    if not files or not keys:
        return []
    db = connection or connect()
    db.execute("CREATE OR REPLACE TEMP TABLE hers AS SELECT unnest(?) AS identity_key", [list(keys)]).fetchall()
    query = """
        SELECT event_id FROM (SELECT event_id, unnest(identifiers) AS pair FROM read_parquet(?))
        WHERE pair.key || ':' || pair.value IN (SELECT identity_key FROM hers) GROUP BY event_id
    """
    return [event_id for (event_id,) in db.execute(query, [list(files)]).fetchall()]
