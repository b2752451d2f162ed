"""Dead letters taken up again: read anew as they came, or as somebody mended them, and brought into the log if they are good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.events.event import Event, RejectedEvent, parse_event
from features.people.identity import Identities
from features.sources import ga4, page, segment
from features.state.home import Home
from features.store.event_index import Incoming
from features.store.event_log import EventLog

Translate = Callable[[Any, datetime, str | None], Any]
TRANSLATORS: Mapping[str, Translate] = {
    "http": lambda raw, received_at, currency: raw,
    segment.SOURCE: segment.to_event,
    ga4.SOURCE: ga4.to_event,
    page.SOURCE: lambda raw, received_at, currency: raw,
    page.SEGMENT_SOURCE: lambda raw, received_at, currency: page.left_out_of(segment.to_event(raw, received_at, currency))[0],
}
"""How what came from each source becomes a canonical event; rows of files are read again by importing the mended file."""
AS_SENT = ("http", page.SOURCE)
"""The sources whose events are canonical, so that their time is part of what they say."""
FROM_PAGES = (page.SOURCE, page.SEGMENT_SOURCE)
"""The sources of which ``page.admitted`` decides what they may tell."""
FROM_A_FILE = "correct the file and import it again"


class Replayed(NamedTuple):
    """What became of one letter."""

    letter_id: str
    outcome: str
    """``stored``, ``already known``, ``erased``, ``rejected`` or ``from a file``."""
    field: str = ""
    reason: str = ""


def replay(home: Home, letters: Sequence[Mapping[str, Any]], known_at: datetime, mended: Any = None) -> list[Replayed]:
    """Read each letter again, at the moment of its receipt; what is stored now, or was before, leaves the dead letters.

    An event of a letter is known from *known_at* on: nobody could use it before.

    Args:
        home: the installation.
        letters: as ``EventLog.dead_letters`` gives them.
        known_at: now.
        mended: what to read in place of the one letter's own content.
    """
    shop = Shop.load(home)
    log, identities = EventLog(home, shop.timezone), Identities(home)
    replayed: list[Replayed] = []
    for letter in letters:
        replayed.append(_replay(log, identities, shop, letter, known_at, mended))
    log.forget_letters([each.letter_id for each in replayed if each.outcome in ("stored", "already known", "erased")])
    return replayed


def read_again(letter: Mapping[str, Any], shop: Shop, mended: Any = None) -> tuple[Any, Event]:
    """The message of a letter, or *mended* in its place, and the event that it makes at the moment of the letter's receipt.

    Raises:
        RejectedEvent: it makes none.
        LookupError: it is a row of a file.
    """
    translate = TRANSLATORS.get(letter["source"])
    if translate is None:
        raise LookupError(FROM_A_FILE)
    try:
        raw = mended if mended is not None else msgspec.json.decode(letter["raw"])
        said, own = translate(raw, letter["received_at"], shop.currency), domain_named(shop.domain).events
        event = parse_event(said, letter["received_at"], shop.currency, shop.phone_region, own)
        # what a page may not tell it may not tell by way of a dead letter
        return raw, page.admitted(event) if letter["source"] in FROM_PAGES else event
    except (msgspec.DecodeError, RecursionError):
        raise RejectedEvent("$", "the letter is no whole JSON: it was cut short, being too long to keep") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, RejectedEvent):
            raise
        raise RejectedEvent("$", f"a value in it is of a kind or size that cannot be read ({type(error).__name__})") from None


def _replay(log: EventLog, identities: Identities, shop: Shop, letter: Mapping[str, Any], known_at: datetime, mended: Any) -> Replayed:
    name = letter["letter_id"]
    try:
        _, event = read_again(letter, shop, mended)
    except LookupError as error:
        return Replayed(name, "from a file", letter["field"], str(error.args[0]))
    except RejectedEvent as error:
        return Replayed(name, "rejected", error.field, error.reason)
    sealed, content_hash, personal = identities.vault.seal(event, timeless=letter["source"] not in AS_SENT)
    row = Incoming(sealed, content_hash, known_at, letter["received_at"], letter["source"], personal=log.contacts.news(personal))
    report = log.append([row], identities)
    if report.conflicting:
        return Replayed(name, "rejected", "event_id", "is stored with other content: give a corrected event an id of its own")
    return Replayed(name, "stored" if report.appended else "erased" if report.erased else "already known")
