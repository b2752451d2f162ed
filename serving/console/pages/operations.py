"""How the service is: what comes in, how fast it answers, what waits, and what is wrong."""

from __future__ import annotations

import shutil
from typing import Any

from starlette.responses import Response

from features.state.disk import RESERVED_BYTES
from serving.console.meters import OUTCOMES, Latency, Meters
from serving.console.visit import Page, Visit
from serving.console.words import Words

WINDOW_SECONDS = 900.0
"""The latencies of lately: of a quarter of an hour."""
LOW_DISK = 4 * RESERVED_BYTES
GB = 1e9


async def health(visit: Visit) -> Response:
    """The whole page."""
    return visit.page("health.html", **await _now(visit), plot=_plot(visit), queue=_queue(visit))


async def health_now(visit: Visit) -> Response:
    """What changes from moment to moment."""
    return visit.page("_health_now.html", **await _now(visit))


async def health_plots(visit: Visit) -> Response:
    """The last hour."""
    return visit.page("_health_plots.html", plot=_plot(visit), queue=_queue(visit))


async def _now(visit: Visit) -> dict[str, Any]:
    runtime, meters, words = visit.runtime, visit.port.meters, visit.words
    problems, degraded = visit.port.state()
    disk = await visit.port.work(shutil.disk_usage, runtime.home.root)
    say, number = words.say, words.number
    stalls = int(meters.value("ubiquo_loop_stalls"))
    facts = [
        (say("Free on the disk"), say("%(free)s of %(all)s GB") % {"free": number(disk.free / GB, 1), "all": number(disk.total / GB, 1)},
         "bad" if disk.free < RESERVED_BYTES else "warn" if disk.free < LOW_DISK else "good"),
        (say("Decisions that could not be kept"), number(runtime.decisions.unlogged), "bad" if runtime.decisions.unlogged else "good"),
        (say("Events that journeys did not see"), number(runtime.intake.unfollowed), "bad" if runtime.intake.unfollowed else "good"),
        (say("Stalls of the event loop (over 100 ms)"), number(stalls), "good" if not stalls else "warn"),
        (say("Longest stall"), say("%(n)s ms") % {"n": number(1000 * meters.value("ubiquo_loop_stall_seconds"))}, ""),
    ]  # fmt: skip
    return {
        "now": runtime.clock(),
        "problems": problems,
        "degraded": degraded,
        "rates": _rates(meters, words),
        "totals": _totals(meters, words),
        "waiting": runtime.intake.waiting,
        "facts": facts,
        "latencies": _latencies(meters, words),
    }


def _rates(meters: Meters, words: Words) -> list[tuple[str, str]]:
    say = words.say
    spans = ((10, say("now")), (60, say("last minute")), (300, say("last 5 minutes")), (900, say("last 15 minutes")))
    return [(name, words.number(meters.rate(seconds), 1)) for seconds, name in spans]


def _totals(meters: Meters, words: Words) -> list[tuple[str, str, str]]:
    says = {
        "accepted": (words.say("Taken"), "good"),
        "duplicates": (words.say("Sent before"), ""),
        "rejected": (words.say("Not taken: dead letters"), "bad"),
        "erased": (words.say("Of people who were erased: not kept"), ""),
    }
    totals = meters.totals()
    return [(says[outcome][0], words.number(totals[outcome]), says[outcome][1] if totals[outcome] else "") for outcome in OUTCOMES]


def _latencies(meters: Meters, words: Words) -> list[dict[str, str]]:
    lately = {each.route: each for each in meters.latencies(WINDOW_SECONDS)}
    nothing = Latency("", 0, None, None)
    rows = []
    for ever in meters.latencies():
        of_late = lately.get(ever.route, nothing)
        rows.append(
            {
                "route": ever.route,
                "lately": words.number(of_late.answers),
                "median": _milliseconds(of_late.median, of_late.answers, words),
                "p99": _milliseconds(of_late.p99, of_late.answers, words),
                "answers": words.number(ever.answers),
                "ever_p99": _milliseconds(ever.p99, ever.answers, words),
            }
        )
    return rows


def _milliseconds(seconds: float | None, answers: int, words: Words) -> str:
    if not answers:
        return "–"
    if seconds is None:
        return words.say("over 10 s")
    return words.number(1000 * seconds, 1 if seconds < 0.1 else 0)


def _plot(visit: Visit) -> dict[str, Any] | None:
    minutes, rates, _ = visit.port.meters.history()
    if len(minutes) < 2:
        return None
    say = visit.words.say
    series = [{"label": say("taken"), "y": rates["accepted"]}, {"label": say("not taken"), "y": rates["rejected"]}]
    if any(rates["duplicates"]):
        series.append({"label": say("sent before"), "y": rates["duplicates"]})
    return {"x": minutes, "series": series, "xlabel": say("minutes from now"), "ylabel": say("events a second"), "x_name": say("minutes")}


def _queue(visit: Visit) -> dict[str, Any] | None:
    minutes, _, waiting = visit.port.meters.history()
    if len(minutes) < 2:
        return None
    say = visit.words.say
    return {"x": minutes, "series": [{"label": say("events waiting"), "y": waiting}], "xlabel": say("minutes from now"), "height": 140}


PAGES = [
    Page("/health", health, "decide", menu="Intake and health", group="Operations"),
    Page("/health/live", health_now, "decide"),
    Page("/health/plots/live", health_plots, "decide"),
]
