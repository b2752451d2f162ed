"""Whether the state of a home lies in its own files or on a database server: written down, so that nobody goes on with the other."""

from __future__ import annotations

from pathlib import Path

import msgspec

from features.state.disk import unlink_all, write_atomically
from features.state.ports import MissingStateError

MOVED = "moved.json"


class MovedStateError(MissingStateError):
    """The databases of a home lie elsewhere than where the settings say; the message names the fix."""


class Moved(msgspec.Struct):
    """Where the databases of a home were moved to."""

    to: str
    """In words, without a password."""


def moved_to(folder: Path) -> str | None:
    """Where the databases of the home in *folder* were moved to; None where they were not."""
    path = folder / MOVED
    return msgspec.json.decode(path.read_bytes(), type=Moved).to if path.exists() else None


def note_moved(folder: Path, to: str) -> None:
    """Note for good that the databases of a home were moved."""
    write_atomically(folder / MOVED, msgspec.json.encode(Moved(to)))


def note_back(folder: Path) -> bool:
    """Take the note away, so that the files count again; returns whether there was one."""
    return unlink_all([folder / MOVED]) > 0


def check_not_moved(folder: Path) -> None:
    """See that the files of a home are what counts.

    Raises:
        MovedStateError: they were moved to a server.
    """
    if (to := moved_to(folder)) is not None:
        raise MovedStateError(
            f"the databases of {folder} were moved to {to}: set UBIQUO_DATABASE to it. To go back to the files as they were before "
            "(what came in since is not there): python -m serving migrate --back"
        )


def check_moved(folder: Path, file: Path) -> None:
    """See that a server is what counts, where a home has had files before.

    Raises:
        MovedStateError: its *file* holds what was not moved to the server.
    """
    if file.exists() and moved_to(folder) is None:
        raise MovedStateError(
            f"UBIQUO_DATABASE is set, and {file} was not moved there: python -m serving migrate --to postgresql://... moves it, or leave "
            "UBIQUO_DATABASE out"
        )
