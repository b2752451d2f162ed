"""A search of everything that an installation holds for what a customer was known by."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import msgspec
import sqlalchemy as sa

from features.state.disk import DamagedStateError
from features.state.home import Home
from features.state.sqlite_file import SQLiteFile
from features.store.outputs import outputs
from serving.privacy.holdings import Subject
from serving.privacy.traces import EVENT_ID, Found, Trace, search

logger = logging.getLogger("ubiquo")
SHORTEST_SEARCHED = 8
"""Shorter values are searched for only together with their kind: a card number of four digits is part of any number."""


class Proof(msgspec.Struct):
    """A search of every file, and of every table on a database server, for everything that the customer was known by."""

    files: int
    values: int
    found: list[Found]
    tables: int = 0


def prove(home: Home, subject: Subject, leaving_out: Collection[Path] = ()) -> Proof:
    """Search for everything that the subject was known by: every file of *home*, every file or object of its tables, every batch file, and
    every table on its database server. A database's file that still shows a trace is written anew from its rows, and searched again.

    Raises:
        subprocess.CalledProcessError: the search broke off.
    """
    traces = list(_traces(subject))
    with contextlib.ExitStack() as stack:
        # where the tables lie in a lake, the home does not hold them
        tables = [Path(each) for table in home.tables.values() for each in stack.enter_context(table.held())]
        files = sorted({*(p for p in home.root.rglob("*") if p.is_file()), *tables, *outputs(home)} - {*leaving_out})
        searched = search(files, traces, home.settings.database)
    # what is deleted from a file of SQLite's may still stand between its rows, now and then
    rewritten = [path for database in home.databases_at({each.file for each in searched.found}) for path in _rewritten(database)]
    found = [each for each in searched.found if Path(each.file) not in rewritten]
    if rewritten:
        found += search(rewritten, traces).found
    return Proof(len(files), len(traces), found, searched.tables)


def _rewritten(database: SQLiteFile) -> Sequence[Path]:
    """The files of a database that was written anew; none where that failed: then the proof tells what they show."""
    try:
        database.rewrite()
    except (OSError, DamagedStateError, sa.exc.DBAPIError):
        logger.exception("%s shows who was erased and could not be written anew", database.place)
        return ()
    return database.files


def _traces(subject: Subject) -> Iterator[Trace]:
    for kind, value in subject.clear:
        yield Trace(f"{kind}:{value}", kind, whole=True)
        yield Trace(f'"{kind}":"{value}"', kind)
        if len(value) >= SHORTEST_SEARCHED:
            yield Trace(value, kind)
    yield from (Trace(key.partition(":")[2], "keyed hash") for key in subject.keys)
    yield from (Trace(customer_id, "customer id") for customer_id in subject.customer_ids)
    # an id may be the beginning of another's
    yield from (Trace(event_id, EVENT_ID, whole=True) for event_id in subject.event_ids if len(event_id) >= SHORTEST_SEARCHED)
    yield from (Trace(value, "personal") for value in subject.personal if len(value) >= SHORTEST_SEARCHED)
