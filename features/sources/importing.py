"""Import a source into the log: checked event by event, committed batch by batch, safe to kill and to repeat."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from features.catalogue.shop import Shop
from features.catalogue.tables import Catalogue
from features.definitions.domain import domain_named
from features.events.event import Purpose, RejectedEvent, parse_event
from features.people.identity import Identities
from features.state.clock import system_clock
from features.state.disk import write_atomically
from features.state.home import Home
from features.state.ports import IMPORT
from features.store.dead_letters import DeadLetter
from features.store.event_index import Incoming
from features.store.event_log import EventLog

REHEARSED = 20_000
"""How many events a dry run reads as an import would."""


class Arrival(NamedTuple):
    """An event on its way in: as JSON, and from when on it may be used (None: from when it occurred)."""

    raw: bytes
    known_at: datetime | None = None


class EventSource(Protocol):
    """Where events come from; each time in the same order, so that an import that was killed goes on where it was."""

    name: str
    consent_basis: str
    purposes: tuple[Purpose, ...]
    """For what that basis allows its rows to be used."""

    def fingerprint(self) -> str:
        """Names what would be imported: same fingerprint, same events."""

    def shop(self, standing: Shop | None) -> Shop:
        """The shop that the events belong to: what the source says of it, and else what is *standing* in the home."""

    def count(self) -> int:
        """How many events ``events`` gives in all."""

    def events(self, start: int = 0) -> Iterator[list[Arrival]]:
        """The events from position *start* on, in batches."""

    def letters(self) -> Iterator[DeadLetter]:
        """The rows that never became an event."""

    def write_catalogue(self, catalogue: Catalogue) -> None:
        """Write what the source knows of items, offers and their context."""

    def finish(self) -> None:
        """Told once everything is stored."""


class ImportReport(msgspec.Struct, kw_only=True):
    """What one import did; every event of the source is counted in exactly one field."""

    source: str
    fingerprint: str
    consent_basis: str
    appended: int = 0
    repeated: int = 0
    conflicting: int = 0
    rejected: int = 0
    erased: int = 0
    """Of people who were erased, so not brought back."""
    rows_rejected: int = 0
    """Rows that never became an event."""
    done: int = 0
    """How many of the source's events were dealt with; all of them once the import is complete."""
    complete: bool = False
    reused: bool = False
    """The same import had been completed before, so nothing was read again."""


def report_path(home: Home, source: str) -> Path:
    """Where the report of an import lies, finished or not."""
    return home.root / "imports" / f"{source}.json"


def finished(home: Home, source: EventSource) -> ImportReport | None:
    """The report of this very import if it was completed before."""
    report = _last_report(home, source)
    if report is None or not report.complete:
        return None
    report.reused = True
    return report


def bring_in(home: Home, source: EventSource, advance: Callable[[int], None] = lambda done: None, again: bool = False) -> ImportReport:
    """Bring the whole source into *home*; *advance* is told how many events have been dealt with.

    After each batch the report says how far it got: a killed import goes on from there, and what it had stored after its
    last word is recognised and not stored twice. With *again* the source is read from the start.
    """
    if not again and (standing := finished(home, source)) is not None:
        return standing
    with home.lease.hold(IMPORT):
        report = None if again else _last_report(home, source)
        if report is None:
            report = ImportReport(source=source.name, fingerprint=source.fingerprint(), consent_basis=source.consent_basis)
        shop = source.shop(_standing(home))
        source.write_catalogue(Catalogue(home))
        log, identities = EventLog(home, shop.timezone), Identities(home)
        report.rows_rejected = 0
        for letters in _in_batches(source.letters(), 20_000):
            log.reject(letters)
            report.rows_rejected += len(letters)
        advance(report.done)
        with _without_garbage_collection():
            for arrivals in source.events(report.done):
                _store(log, identities, source, arrivals, shop, report)
                _write(home, report)
                advance(report.done)
        # as it stands by now: what was set during a long import, say the consent policy, stays
        source.shop(_standing(home)).save(home)
        report.complete = True
        _write(home, report)
        source.finish()
    return report


def rehearse(home: Home, source: EventSource, most: int = REHEARSED) -> tuple[int, Counter[tuple[str, str]]]:
    """How many of the first events of a source were looked at, and the field and reason of each that the log would reject."""
    shop, seen = source.shop(_standing(home)), 0
    own, wrong = domain_named(shop.domain).events, Counter[tuple[str, str]]()
    for arrivals in source.events():
        for raw, _ in arrivals[: most - seen]:
            seen += 1
            try:
                parse_event(raw, system_clock(), shop.currency, shop.phone_region, own)
            except RejectedEvent as error:
                wrong[error.field, error.reason] += 1
        if seen >= most:
            break
    return seen, wrong


def _standing(home: Home) -> Shop | None:
    """The shop that the home already holds."""
    return Shop.load(home) if home.shop.exists() else None


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Events hold no reference cycles, and to look for some among ever more of them would make the import quadratic."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _in_batches(rows: Iterable[DeadLetter], size: int) -> Iterator[list[DeadLetter]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, size)):
        yield batch


def _store(log: EventLog, identities: Identities, source: EventSource, arrivals: list[Arrival], shop: Shop, report: ImportReport) -> None:
    received_at = system_clock()
    batch: list[Incoming] = []
    letters: list[DeadLetter] = []
    for raw, known_at in arrivals:
        try:
            event = parse_event(raw, received_at, shop.currency, shop.phone_region, domain_named(shop.domain).events)
        except RejectedEvent as error:
            letters.append(DeadLetter(received_at, source.name, error.field, error.reason, raw.decode()))
            continue
        sealed, content_hash, personal = identities.vault.seal(event)
        known = known_at or event.occurred_at
        basis = (source.name, source.consent_basis, source.purposes)
        batch.append(Incoming(sealed, content_hash, known, received_at, *basis, personal=log.contacts.news(personal)))
    stored = log.append(batch, identities)
    log.reject(letters)
    report.appended += stored.appended
    report.repeated += stored.repeated
    report.conflicting += stored.conflicting
    report.rejected += len(letters)
    report.erased += stored.erased
    report.done += len(arrivals)


def _last_report(home: Home, source: EventSource) -> ImportReport | None:
    """What was last written of an import of exactly this content."""
    path = report_path(home, source.name)
    if not path.exists():
        return None
    report = msgspec.json.decode(path.read_bytes(), type=ImportReport)
    return report if report.fingerprint == source.fingerprint() else None


def _write(home: Home, report: ImportReport) -> None:
    write_atomically(report_path(home, report.source), msgspec.json.encode(report))
