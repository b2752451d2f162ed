"""The files that were written for people and hold rows of customers, wherever they lie: an erasure has to find them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from features.state.disk import write_atomically
from features.state.home import Home

OUTPUTS = "outputs.json"
"""The list of these files."""
PART = ".part"


def outputs(home: Home) -> list[Path]:
    """The files that were written from this home, those that still lie there."""
    path = home.root / OUTPUTS
    listed = msgspec.json.decode(path.read_bytes(), type=list[str]) if path.exists() else []
    return [path for each in listed if (path := home.root / each).exists()]


def owners_of(out: Path) -> Path:
    """The file beside *out* that tells whose each of its rows is, where the rows themselves do not: a list of customers' ids."""
    return out.with_name(f"{out.name}.customers")


def is_owners(path: Path) -> bool:
    """Whether a file is one that tells whose another's rows are."""
    return path.suffix == ".customers"


def part_of(out: Path) -> Path:
    """Under which name this process writes *out* until it is whole."""
    return out.with_name(f".{out.name}.{os.getpid()}{PART}")


def is_part(path: Path) -> bool:
    """Whether a file is one that was never made whole."""
    return path.suffix == PART


def remember_output(home: Home, *outs: Path) -> None:
    """Note that *outs* will hold rows of customers; before they are written, as a crash may come after."""
    # two who note at once must not take each other's files off the list
    with home.lease.hold("outputs"):
        known = {path.resolve() for path in (*outputs(home), *outs)}
        # a home may be moved
        named = [str(path.relative_to(home.root) if path.is_relative_to(home.root) else path) for path in sorted(known)]
        write_atomically(home.root / OUTPUTS, msgspec.json.encode(named))
