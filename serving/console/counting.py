"""Counts over everything that a home holds, in a process of their own: what they take of memory and time is not the service's."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
from rich.console import Console

from features.state.command import run
from features.state.home import Home

T = TypeVar("T", bound=msgspec.Struct)
Advance = Callable[[int, int], None]
ROOT = Path(__file__).resolve().parents[2]
MOST_SAID = 1_000_000
"""How many characters of the last that such a process says are looked at."""
FORGOTTEN = "Traceback"
"""What stands in the words of a process that ended by a mistake of ours."""


class CoverageCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many customers there are, and what becomes of them when a model is asked about each.

    Attributes:
        as_of: the moment whose features are read.
        own: who gets an answer of their own.
        general: who gets a general answer, by its reason.
        nothing: who gets nothing, by the reason or the stage that took the last of what there was.
    """

    model: str
    channel: str | None
    as_of: datetime
    customers: int
    own: int
    general: dict[str, int]
    nothing: dict[str, int]


class OfferCount(msgspec.Struct, frozen=True, kw_only=True):
    """How often one offer was decided, and what customers did with it."""

    decided: int = 0
    shown: int = 0
    accepted: int = 0
    declined: int = 0
    redeemed: int = 0


class OfferCounts(msgspec.Struct, frozen=True):
    """By offer how often what was done with it."""

    offers: dict[str, OfferCount]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What such a process is to count: ``offers``, or the coverage of a *model*."""

    home: str
    what: str
    model: str = ""
    channel: str | None = None
    at: datetime


def counted(asked: Asked, into: type[T], advance: Advance) -> T:
    """Count in a process of its own.

    Raises:
        RuntimeError: it cannot be counted; the message says why.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        # into a file: a pipe that nobody empties meanwhile would hold up who says much
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "serving.console.counting", msgspec.json.encode(asked).decode()],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            answer = _answer(process.stdout, advance)
            process.communicate()
        finally:
            if process.poll() is None:
                process.kill()
        said.seek(0)
        words = said.read()[-MOST_SAID:]
    if process.returncode or not answer:
        lines = words.strip().splitlines() or [f"the process ended with code {process.returncode}"]
        raise RuntimeError(lines[-1].removeprefix("error: ") if FORGOTTEN not in words else words)
    return msgspec.json.decode(answer, type=into)


def _answer(lines: IO[str], advance: Advance) -> str:
    for line in lines:
        if line.startswith("{"):
            return line
        done, _, of = line.strip().partition(" ")
        # a library may print past what was set aside for it
        if done.isdecimal() and of.isdecimal():
            advance(int(done), int(of))
    return ""


def coverage_of(home: Home, model: str, channel: str | None, at: datetime, advance: Advance) -> CoverageCount:
    """Ask a model about everybody, and count; nothing is given out.

    Raises:
        MissingStateError, NoChampionError: there is nobody or nothing to ask.
    """
    from features.state.ports import deriving
    from serving.bootstrap import open_engine
    from serving.decide.coverage import coverage

    with deriving(home):
        found = coverage(home, open_engine, model, at, 10, channel, advance=advance)  # type: ignore[arg-type]
    return CoverageCount(
        model=model, channel=channel, as_of=at, customers=found.customers, own=found.own, general=dict(found.general.most_common()),
        nothing=dict(found.nothing.most_common()),
    )  # fmt: skip


SHOWN = ("offer_view", "view_promotion", "ad_impression", "message_open")
"""What says that a customer saw an offer."""
_COUNTS = """
WITH chosen AS (
  SELECT decision_id, unnest(from_json(choices, '[{"offer_id": "VARCHAR"}]')).offer_id AS offer_id FROM decided
  WHERE coalesce(request ->> '$.dry_run', 'false') <> 'true'
), meant AS (
  -- what names no offer is about the one of its decision, where that has but one
  SELECT decision_id, any_value(offer_id) AS offer_id FROM chosen GROUP BY decision_id HAVING count(*) = 1
), told AS (
  SELECT coalesce(e.offer_id, m.offer_id) AS offer_id, e.name
  FROM (SELECT name, offer_id, decision_id FROM events WHERE offer_id IS NOT NULL OR decision_id IS NOT NULL) AS e
       LEFT JOIN meant AS m ON m.decision_id = e.decision_id
), counts AS (
  SELECT offer_id, 0 AS decided, count(*) FILTER (name IN (SELECT unnest($shown))) AS shown,
         count(*) FILTER (name = 'offer_accept') AS accepted, count(*) FILTER (name = 'offer_decline') AS declined,
         count(*) FILTER (name = 'offer_redeem') AS redeemed
  FROM told WHERE offer_id IS NOT NULL GROUP BY offer_id
  UNION ALL SELECT offer_id, count(*), 0, 0, 0, 0 FROM chosen WHERE offer_id IS NOT NULL GROUP BY offer_id
)
SELECT offer_id, sum(decided)::BIGINT, sum(shown)::BIGINT, sum(accepted)::BIGINT, sum(declined)::BIGINT, sum(redeemed)::BIGINT
FROM counts GROUP BY offer_id
HAVING sum(decided) + sum(shown) + sum(accepted) + sum(declined) + sum(redeemed) > 0
"""


def offers_of(home: Home, at: datetime) -> OfferCounts:
    """What was decided of each offer, and what customers did with it, of the events that may count in what is true of all.

    Raises:
        MissingStateError: nothing was imported yet.
    """
    from features.people.consent import STATISTICS
    from features.state.ports import DECISIONS, deriving
    from features.store.timeline import open_timeline

    with deriving(home), closing(open_timeline(home, identified_by=at, purposes=STATISTICS)) as timeline:
        con = timeline.events.get_backend().con
        files = home.tables[DECISIONS].files()
        empty = "SELECT NULL::VARCHAR AS decision_id, NULL::VARCHAR AS choices, NULL::VARCHAR AS request WHERE false"
        decided = "SELECT decision_id, choices, request FROM read_parquet($files, union_by_name = true)" if files else empty
        con.execute(f"CREATE TEMP TABLE decided AS {decided}", {"files": files} if files else {})
        rows = con.execute(_COUNTS, {"shown": list(SHOWN)}).fetchall()
    return OfferCounts({
        offer: OfferCount(decided=decided, shown=shown, accepted=accepted, declined=declined, redeemed=redeemed)
        for offer, decided, shown, accepted, declined, redeemed in rows
    })  # fmt: skip


def main() -> None:
    """Count what the command line asks for, and print it."""
    asked = msgspec.json.decode(sys.argv[1], type=Asked)
    home, out = Home(Path(asked.home)), sys.stdout
    # libraries that print must not come between
    sys.stdout = sys.stderr

    def advance(done: int, of: int) -> None:
        out.write(f"{done} {of}\n")
        out.flush()

    found: Any = offers_of(home, asked.at) if asked.what == "offers" else coverage_of(home, asked.model, asked.channel, asked.at, advance)
    out.write(msgspec.json.encode(found).decode() + "\n")
    out.flush()


if __name__ == "__main__":
    from models.registry import NoChampionError

    run(main, Console(stderr=True, width=500), NoChampionError)
