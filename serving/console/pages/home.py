"""The overview: whose shop this is, how it is, and where to go from here."""

from __future__ import annotations

from starlette.responses import Response

from features.catalogue.shop import Shop
from serving.console.visit import Page, Visit


async def home(visit: Visit) -> Response:
    """The first page."""
    runtime = visit.runtime
    shop = await visit.port.work(Shop.load, runtime.home)
    problems, degraded = visit.port.state()
    customers = await visit.port.work(runtime.identities.count)
    models = len(runtime.engine.models) - len(runtime.engine.missing())
    say, number = visit.words.say, visit.words.number
    figures = [
        (say("customers"), number(customers)),
        (say("models that answer"), f"{models} / {len(runtime.engine.models)}"),
        (say("events waiting for the log"), number(runtime.intake.waiting)),
    ]
    return visit.page("home.html", shop=shop, now=runtime.clock(), figures=figures, problems=problems, degraded=degraded)


PAGES = [Page("", home, "decide", menu="Overview", group="Overview")]
