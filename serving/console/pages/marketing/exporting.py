"""The files that pages write: where they lie, whose data is in them, and how long they stay."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import msgspec

from features.events.event import ContactChannel
from features.state.home import Home
from features.store.outputs import is_owners, is_part, outputs, owners_of
from serving.decide.audience import Audiences
from serving.decide.batch import Delivery
from serving.decide.formats import FormatName
from serving.runtime import Runtime

FOLDER = "exports"
"""Where in a home the files lie that pages write."""
MOST_FILES = 20
"""How many of them stay: what holds addresses is not to lie about."""
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,150}\.csv\Z")
EXPORTED, DOWNLOADED = "contact data into a file", "contact data downloaded"
"""What the audit log calls what is done here."""


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """One file that was written: for whom, for which channel and program, and how many rows it has."""

    file: str
    condition: str
    channel: str
    form: str
    rows: int
    left_out: dict[str, int]


def export(runtime: Runtime, audiences: Audiences, condition: str, channel: ContactChannel, form: FormatName, key_name: str) -> Exported:
    """Write a file of those of an audience whom *channel* may reach now; who is in it is in the audit log before it can be read.

    Raises:
        ValueError: the condition is wrong, or the file cannot be written so.
        MissingStateError: there are no feature rows yet.
    """

    def note(customers: Sequence[str]) -> None:
        runtime.audit.note_all(runtime.clock(), key_name, EXPORTED, customers, "done")

    name = re.sub(r"[^a-z0-9_]+", "-", condition.lower())[:40].strip("-_") or "audience"
    # two that begin alike within a second are two files
    digest = hashlib.blake2b(condition.encode(), digest_size=3).hexdigest()
    out = runtime.home.root / FOLDER / f"{name}-{channel}-{form}-{runtime.clock():%Y%m%d-%H%M%S}-{digest}.csv"
    found = audiences.export(condition, out, channel, Delivery(form, with_contact=True, note=note))
    for old in files_of(runtime.home)[MOST_FILES:]:
        remove(old)
    return Exported(
        file=out.name, condition=condition, channel=channel, form=form, rows=found.reached, left_out=dict(found.left_out.most_common())
    )


def files_of(home: Home) -> list[Path]:
    """The files that pages wrote, the newest first."""
    found = [path for path in (home.root / FOLDER).glob("*.csv") if NAME.match(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name), reverse=True)


def file_named(home: Home, name: str) -> Path | None:
    """One of them; None where there is none of that name."""
    path = home.root / FOLDER / name
    return path if NAME.match(name) and path.is_file() else None


def customers_in(path: Path) -> list[str] | None:
    """Whose data is in a file; None where what tells it is gone, or damaged."""
    try:
        return msgspec.json.decode(owners_of(path).read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError):
        return None


def remove(path: Path) -> None:
    """Delete a file with what tells whose its rows are."""
    for each in (path, owners_of(path)):
        each.unlink(missing_ok=True)


@dataclass(frozen=True)
class HeldFile:
    """A file with rows of customers as a page lists it."""

    name: str
    place: str
    bytes: int
    written_at: datetime
    rows: int | None
    is_ours: bool
    """Whether a page wrote it, and may hand it out or delete it."""


@lru_cache(256)
def _rows(path: Path, written_at: int, size: int) -> int | None:
    """How many customers are in a file as it was written: a page asks again and again, and the lists may be long."""
    customers = customers_in(path)
    return None if customers is None else len(customers)


def held_files(home: Home) -> list[HeldFile]:
    """All files that hold rows of customers, wherever they lie, the newest first."""
    found, ours = [], {path.resolve() for path in files_of(home)}
    for path in outputs(home):
        if is_owners(path) or is_part(path):
            continue
        with contextlib.suppress(OSError):
            told = path.stat()
            rows = _rows(path, told.st_mtime_ns, told.st_size)
            at = datetime.fromtimestamp(told.st_mtime, UTC)
            found.append(HeldFile(path.name, str(path), told.st_size, at, rows, path.resolve() in ours))
    return sorted(found, key=lambda each: each.written_at, reverse=True)
