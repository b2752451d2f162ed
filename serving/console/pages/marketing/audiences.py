"""Segments and audiences: who they are by a condition, how many, how many of them each channel reaches, and a file of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args
from urllib.parse import urlencode

import msgspec
from starlette.responses import Response

from features.definitions.conditions import ConditionError
from features.definitions.segments import SEGMENTS, Vocabulary
from features.definitions.standing import BUILT_IN
from features.events.event import ContactChannel
from features.people.consent import CONTACT_CHANNELS
from features.state.ports import deriving
from serving.console.jobs import Advance, jobs_of
from serving.console.pages.marketing.exporting import Exported, export
from serving.console.pages.marketing.segments_file import add_segment
from serving.console.port import RefusedError
from serving.console.visit import Page, Visit
from serving.decide.audience import Audiences
from serving.decide.formats import FORMATS, FormatName
from serving.runtime import Runtime

ADDRESS = "/audiences"
SIZES = "segments"
RIGHT = {"file": "", "condition": "", "name": ""}
"""What may be wrong on the page, where nothing is."""
MOST_CHARACTERS = 2_000
"""Of a condition, as conditions themselves are bounded."""


class SegmentSizes(msgspec.Struct, frozen=True):
    """For how many customers each segment holds."""

    sizes: dict[str, int]


class Reach(msgspec.Struct, frozen=True):
    """How many of an audience a file for one channel has, and how many it has not, by the reason."""

    reached: int
    left_out: dict[str, int]


class AudienceFound(msgspec.Struct, frozen=True, kw_only=True):
    """How many an audience is, of how many customers whose data may be used, and whom each channel reaches."""

    condition: str
    customers: int
    members: int
    reach: dict[str, Reach]


def audiences_of(runtime: Runtime) -> Audiences:
    """What asks conditions about everybody, with what customers said up to this moment."""
    return Audiences(runtime.home, runtime.engine, None, runtime.identities, runtime.consents, runtime.contacts)


def _sizes(runtime: Runtime, advance: Advance) -> SegmentSizes:
    return SegmentSizes(audiences_of(runtime).sizes())


def _reach(runtime: Runtime, condition: str, advance: Advance) -> AudienceFound:
    found = audiences_of(runtime).reach(condition, CONTACT_CHANNELS)
    first = next(iter(found.values()))
    reach = {str(channel): Reach(size.reached, dict(size.left_out.most_common())) for channel, size in found.items()}
    return AudienceFound(condition=condition, customers=first.customers, members=first.members, reach=reach)


async def audiences_page(visit: Visit) -> Response:
    """The segments, and one audience with its size; a part of it while it is being counted."""
    condition = visit.query.get("condition", "").strip()[:MOST_CHARACTERS]
    if not visit.is_partial:
        return await _shown(visit, condition)
    jobs = jobs_of(visit.runtime)
    name = visit.query.get("job", "")
    # the audience at hand, the file that is written of it, or the sizes of all segments
    if name not in (SIZES, _name(condition), f"export-{_name(condition)}") or jobs.running(name) is None:
        return visit.go("/exports" if name.startswith("export-") and jobs.failed(name) is None else f"{ADDRESS}?{_query(condition)}")
    return visit.page("_job.html", job=_job(visit, name, condition))


async def _shown(visit: Visit, condition: str, wrong: Mapping[str, str] | None = None, status: int = 200) -> Response:
    runtime, jobs, wrong = visit.runtime, jobs_of(visit.runtime), {**RIGHT, **(wrong or {})}
    in_force = runtime.engine.governor.vocabulary
    try:
        _, written = await visit.port.work(runtime.engine.governor.read)
    except (ValueError, OSError) as error:
        written, wrong["file"] = in_force, str(error)
    sizes = await visit.port.work(jobs.found, SIZES, SegmentSizes)
    found = await visit.port.work(jobs.found, _name(condition), AudienceFound) if condition else None
    if condition and wrong == RIGHT:
        wrong |= _wrong(written, condition)
    own = {name: each.text for name, each in written.segments.items() if BUILT_IN.get(name) != each.text}
    return visit.page(
        "audiences.html", status, condition=condition, wrong=wrong, found=None if found is None else found.value,
        own=own, built_in={name: each.text for name, each in written.segments.items() if name not in own},
        waiting=[name for name in own if name not in in_force.segments], sizes={} if sizes is None else sizes.value.sizes,
        counting_sizes=_job(visit, SIZES, condition, None if sizes is None else sizes),
        counting=_job(visit, _name(condition), condition, found) if condition else None,
        exporting=_job(visit, f"export-{_name(condition)}", condition) if condition else None,
        names=written.names, formats={name: form.about for name, form in FORMATS.items() if name != "plain"}, file=SEGMENTS,
        channels=CONTACT_CHANNELS, name=visit.said("name"), may_save=visit.may("manage"), may_export=visit.may("read_customer"),
    )  # fmt: skip


async def count_audience(visit: Visit) -> Response:
    """Begin to count an audience, or the sizes of all segments."""
    runtime, jobs = visit.runtime, jobs_of(visit.runtime)
    condition = _said(visit)
    if visit.said("job") == SIZES:
        jobs.start(SIZES, lambda advance: _sizes(runtime, advance))
    elif not condition:
        raise RefusedError(422, visit.words.say("Write a condition, or choose a segment."))
    elif wrong := _wrong(runtime.engine.governor.vocabulary, condition):
        return await _shown(visit, condition, wrong, 422)
    else:
        jobs.start(_name(condition), lambda advance: _reach(runtime, condition, advance))
    if visit.is_partial:
        return visit.page("_job.html", job=_job(visit, visit.said("job") or _name(condition), condition))
    return visit.go(f"{ADDRESS}?{_query(condition)}")


async def save_audience(visit: Visit) -> Response:
    """Give a condition a name, so that it is a segment."""
    if not visit.may("manage"):
        raise RefusedError(403, visit.words.say("Your key does not hold the scope that this needs:") + " manage")
    runtime, condition, name = visit.runtime, _said(visit), visit.said("name")
    try:
        await visit.port.work(add_segment, runtime.home, name, condition)
    except ValueError as error:
        return await _shown(visit, condition, {"name": str(error)}, 422)
    return visit.go(f"{ADDRESS}?{_query(name)}")


async def export_audience(visit: Visit) -> Response:
    """Begin to write a file of those whom a channel may reach."""
    runtime, jobs, condition, key = visit.runtime, jobs_of(visit.runtime), _said(visit), visit.key
    channel = next((each for each in get_args(ContactChannel) if each == visit.said("channel")), None)
    form: FormatName | None = next((each for each in get_args(FormatName) if each == visit.said("for")), None)
    if channel is None or form is None or key is None:
        raise RefusedError(422, visit.words.say("Choose a channel and the program that opens the file."))
    if wrong := _wrong(runtime.engine.governor.vocabulary, condition):
        return await _shown(visit, condition, wrong, 422)

    def write(advance: Advance) -> Exported:
        with deriving(runtime.home):
            return export(runtime, audiences_of(runtime), condition, channel, form, key.name)

    name = f"export-{_name(condition)}"
    jobs.start(name, write)
    return visit.page("_job.html", job=_job(visit, name, condition)) if visit.is_partial else visit.go(f"{ADDRESS}?{_query(condition)}")


def _said(visit: Visit) -> str:
    """The condition that a form tells: the segments that were ticked, all or any of them, and what was written beside."""
    written = visit.said("condition")
    ticked = [str(each) for each in visit.form.getlist("segment")]
    joined = (" || " if visit.said("how") == "any" else " && ").join(ticked)
    if not ticked:
        return written
    return joined if not written else f"({joined}) && ({written})"


def _wrong(vocabulary: Vocabulary, condition: str) -> dict[str, str]:
    try:
        vocabulary.parse_condition(condition)
    except ConditionError as error:
        return {"condition": str(error)}
    return {}


def _name(condition: str) -> str:
    """Under which name the size of an audience is kept."""
    return f"audience-{hashlib.blake2b(condition.encode(), digest_size=8).hexdigest()}"


def _query(condition: str) -> str:
    return urlencode({"condition": condition})


def _job(visit: Visit, name: str, condition: str, kept: Any = None) -> Any:
    say = visit.words.say
    button = say("Count all segments") if name == SIZES else say("Count now")
    return jobs_of(visit.runtime).view(name, ADDRESS, button, kept, {"condition": condition, "job": name})


PAGES: Sequence[Page] = [
    Page(ADDRESS, audiences_page, "decide", menu="Audiences", group="Marketing"),
    Page(ADDRESS, count_audience, "decide", "POST"),
    Page(f"{ADDRESS}/save", save_audience, "decide", "POST"),
    Page(f"{ADDRESS}/export", export_audience, "read_customer", "POST"),
]
