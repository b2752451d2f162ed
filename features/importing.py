"""Import a source into the log: checked row by row, committed batch by batch, safe to kill and to repeat."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC

import msgspec

from features.adapters.complete_journey import CompleteJourney
from features.catalogue import Catalogue
from features.event_log import DeadLetter, EventLog, Incoming
from features.events import RejectedEvent, parse_event
from features.home import Home, write_atomically
from features.identity import Identities


class ImportReport(msgspec.Struct, kw_only=True):
    """What one import did; every row of the source is counted in exactly one field."""

    source: str
    fingerprint: str
    appended: int = 0
    repeated: int = 0
    conflicting: int = 0
    rejected: int = 0
    reused: bool = False
    """The same import had been completed before, so nothing was read again."""


def import_complete_journey(
    home: Home, source: CompleteJourney, advance: Callable[[int], None] = lambda rows: None, again: bool = False
) -> ImportReport:
    """Bring the whole source into *home*; *advance* is told how many rows each step has dealt with.

    The mark that an import is complete is written last, so a killed import is simply run again: what it had stored is
    recognised and not stored twice. With *again* the source is read even where the mark stands.
    """
    shop = source.shop()
    report = ImportReport(source=shop.name, fingerprint=source.fingerprint())
    mark = home.root / "imports" / f"{shop.name}.json"
    if mark.exists() and not again:
        done = msgspec.json.decode(mark.read_bytes(), type=ImportReport)
        if done.fingerprint == report.fingerprint:
            done.reused = True
            return done
    source.write_catalogue(Catalogue(home))
    log, identities = EventLog(home, shop.timezone), Identities(home)
    received_at = shop.data_end.astimezone(UTC)
    for rows in source.events():
        batch: list[Incoming] = []
        letters: list[DeadLetter] = []
        for raw in rows:
            try:
                event = parse_event(raw, received_at)
            except RejectedEvent as error:
                letters.append(DeadLetter(received_at, shop.name, error.field, error.reason, raw.decode()))
                continue
            batch.append(Incoming(event, known_at=event.occurred_at, received_at=received_at, source=shop.name))
        done_now = log.append(batch, identities)
        log.reject(letters)
        report.appended += done_now.appended
        report.repeated += done_now.repeated
        report.conflicting += done_now.conflicting
        report.rejected += len(letters)
        advance(len(rows))
    shop.save(home)
    write_atomically(mark, msgspec.json.encode(report))
    return report
