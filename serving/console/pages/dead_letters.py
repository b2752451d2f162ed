"""Dead letters: what could not be taken, why, and the way back into the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import msgspec
from starlette.responses import Response

from features.sources.replay import TRANSLATORS, Replayed
from features.store.dead_letters import DeadLetters
from serving.console.letters import GONE, JOBS, LOOKED_AT, Resending, groups, send_again, value_at
from serving.console.port import RefusedError
from serving.console.visit import Page, Visit
from serving.privacy.keys import Scope

WHO: Scope = "manage"
"""Who may look at what was not taken, and send it again; what a letter says only those see who may read customers."""
A_PAGE = 50
MAX_PAGE = 10_000


async def overview(visit: Visit) -> Response:
    """How many there are, of which reasons, and the newest."""
    chosen = {name: visit.query.get(name, "")[:256] for name in ("source", "field")}
    number = _page_number(visit)
    found = await visit.port.work(_overview, visit.runtime.log.letters, chosen, number)
    pages = -(-found["chosen"] // A_PAGE)
    links = {"before": _address(chosen, number - 1) if number > 1 else "", "after": _address(chosen, number + 1) if number < pages else ""}
    sent = visit.query.get("sent", "")
    return visit.page(
        "dead_letters.html", filter=chosen, number=number, pages=pages, links=links, replayable=set(TRANSLATORS), looked_at=LOOKED_AT,
        sent=_outcomes(visit).get(sent, ""), **found,
    )  # fmt: skip


def _overview(letters: DeadLetters, chosen: Mapping[str, str], number: int) -> dict[str, Any]:
    tallies = letters.tallies()
    within = [t for t in tallies if chosen["source"] in ("", t.source) and chosen["field"] in ("", t.field)]
    looked = letters.newest(chosen["source"], chosen["field"], LOOKED_AT)
    start = (number - 1) * A_PAGE
    shown = looked[start : start + A_PAGE]
    if start + A_PAGE > LOOKED_AT:
        shown = letters.newest(chosen["source"], chosen["field"], A_PAGE, start)
    return {
        "all": sum(t.letters for t in tallies),
        "chosen": sum(t.letters for t in within),
        "sources": sorted({t.source for t in tallies}),
        "fields": sorted({t.field for t in tallies}),
        "groups": groups(looked)[:100],
        "letters": shown,
    }


async def opened(visit: Visit) -> Response:
    """One letter: what is wrong with it, and, for who may read customers, what it says."""
    letter = await _letter(visit)
    if visit.may("read_customer"):
        await _note(visit, "read letter", letter["letter_id"], "done")
    return _one(visit, letter)


async def again(visit: Visit) -> Response:
    """Send one letter again, as it came or as somebody corrected it."""
    letter = await _letter(visit)
    fixed, text = None, None
    if visit.said("corrected"):
        if not visit.may("read_customer"):
            raise RefusedError(403, visit.words.say("Only who may read customers may change what a letter says."))
        # the page that tells of a mistake shows what the letter says
        await _note(visit, "read letter", letter["letter_id"], "done")
        text = visit.said("raw")
        try:
            fixed = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            why = visit.words.say("the text is no JSON:")
            return _one(visit, letter, text, Replayed("", "rejected", "$", f"{why} {error}"))
        if not isinstance(fixed, dict):
            return _one(visit, letter, text, Replayed("", "rejected", "$", visit.words.say("the text must be one JSON object")))
    [told] = await send_again(visit.port, [letter], fixed)
    await _note(visit, "replay letter", letter["letter_id"], told.outcome)
    if told.outcome in GONE.values():
        return visit.go(f"/dead-letters?{urlencode({'sent': told.outcome})}")
    return _one(visit, letter, text, told)


async def many(visit: Visit) -> Response:
    """Send all letters of one reason again, in the background."""
    source, field, kind = (visit.said(name) for name in ("source", "field", "kind"))
    if source not in TRANSLATORS:
        raise RefusedError(400, visit.words.say("Rows of a file are read again by importing the corrected file."))
    assert visit.key is not None
    job = Resending(visit.port, visit.key.name, source, field, kind)
    JOBS.begin(job)
    return visit.go(f"/dead-letters/sending/{job.name}")


async def sending(visit: Visit) -> Response:
    """How far a job has come."""
    return visit.page("dead_letters_sending.html", job=_job(visit), outcomes=_outcomes(visit))


async def sending_now(visit: Visit) -> Response:
    """The part of that page that changes."""
    return visit.page("_dead_letters_sending.html", job=_job(visit), outcomes=_outcomes(visit))


def _job(visit: Visit) -> Resending:
    job = JOBS.get(visit.part("name"))
    if job is None:
        raise RefusedError(404, visit.words.say("Nothing is known of that job any more: the audit log tells how it ended."))
    return job


def _outcomes(visit: Visit) -> dict[str, str]:
    say = visit.words.say
    return {
        "stored": say("taken into the log"),
        "already known": say("in the log already: nothing was counted twice"),
        "erased": say("of somebody who was erased: nothing was kept"),
        "rejected": say("still not taken: it stays here"),
        "from a file": say("from a file: correct the file and import it again"),
    }


async def _letter(visit: Visit) -> dict[str, Any]:
    found = await visit.port.work(visit.runtime.log.letters.letter, visit.part("letter"))
    if found is None:
        raise RefusedError(404, visit.words.say("There is no such letter: it was sent again, or let go of."))
    return found


def _one(visit: Visit, letter: Mapping[str, Any], text: str | None = None, refused: Replayed | None = None) -> Response:
    may_read = visit.may("read_customer")
    raw, is_whole = _laid_out(letter["raw"])
    shown = {"raw": raw if text is None else text, "at_fault": value_at(letter["raw"], letter["field"])} if may_read else {}
    return visit.page(
        "dead_letter.html", 422 if refused else 200, letter={k: v for k, v in letter.items() if k != "raw"}, shown=shown,
        may_read=may_read, is_whole=is_whole, is_file=letter["source"] not in TRANSLATORS, refused=refused,
    )  # fmt: skip


def _laid_out(raw: str) -> tuple[str, bool]:
    """The JSON of a letter, a line a field, and whether it is whole."""
    try:
        return msgspec.json.format(raw.encode(), indent=2).decode(), isinstance(msgspec.json.decode(raw), dict)
    except (msgspec.DecodeError, RecursionError):
        return raw, False


async def _note(visit: Visit, action: str, subject: str, outcome: str) -> None:
    assert visit.key is not None
    await visit.port.work(visit.runtime.audit.note, visit.runtime.clock(), visit.key.name, action, subject, outcome)


def _page_number(visit: Visit) -> int:
    said = visit.query.get("page", "1")
    return min(max(int(said), 1), MAX_PAGE) if said.isascii() and said.isdigit() and len(said) < 7 else 1


def _address(chosen: Mapping[str, str], number: int) -> str:
    parts: Sequence[tuple[str, str]] = [(name, value) for name, value in chosen.items() if value]
    return f"/dead-letters?{urlencode([*parts, ('page', str(number))])}"


PAGES = [
    Page("/dead-letters", overview, WHO, menu="Dead letters", group="Operations"),
    Page("/dead-letters/again", many, WHO, method="POST"),
    Page("/dead-letters/sending/{name}", sending, WHO),
    Page("/dead-letters/sending/{name}/now", sending_now, WHO),
    Page("/dead-letters/one/{letter}", opened, WHO),
    Page("/dead-letters/one/{letter}", again, WHO, method="POST"),
]
