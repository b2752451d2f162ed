"""Offers: which there are, what of them is left, how often they were shown and taken, and whether each is in force now, or why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Literal

from starlette.responses import Response

from features.catalogue.tables import Catalogue
from features.state.home import Home
from features.state.ports import MissingStateError
from models.offers import Offer
from serving.console.counting import Asked, OfferCount, OfferCounts, counted
from serving.console.jobs import Jobs, JobView, Kept, jobs_of
from serving.console.visit import Page, Visit
from serving.console.words import Words
from serving.runtime import Runtime

ADDRESS, COUNT, NAME = "/offers", "/offers/count", "offers"
ON_A_PAGE = 25
Shown = Literal["now", "not", "all"]


@dataclass(frozen=True)
class OfferLine:
    """One offer as the page shows it.

    Attributes:
        items: on how many items it names; more may be chosen by their attributes.
        given, redeemed: how often it is given out, of a budget, and redeemed, of a stock; None where it has none.
        why_not: why it is not in force now; None where it is.
        count: what was done with it; None where that was not counted.
    """

    offer: Offer
    items: int
    given: int | None
    redeemed: int | None
    why_not: str | None
    count: OfferCount | None = None

    @property
    def title(self) -> str:
        """What to call it."""
        return self.offer.title or self.offer.offer_id


@dataclass(frozen=True)
class OfferTable:
    """The offers of the table in force.

    Attributes:
        lines: those that are asked for and fit on a page.
        found: how many are asked for.
        in_force, all: how many there are.
        earlier: how many tables were in force before.
    """

    lines: Sequence[OfferLine]
    found: int
    in_force: int
    all: int
    earlier: int

    @property
    def has_limits(self) -> bool:
        """Whether any of the lines has a budget or a stock."""
        return any(line.given is not None or line.redeemed is not None for line in self.lines)


@dataclass(frozen=True)
class OfferWish:
    """Which offers are asked for."""

    text: str = ""
    shown: Shown = "now"
    kind: str = ""
    stage: str = ""
    page: int = 1

    def wants(self, line: OfferLine) -> bool:
        """Whether an offer is among them."""
        offer, text = line.offer, self.text.casefold()
        named = not text or any(
            text in (said or "").casefold() for said in (offer.offer_id, offer.campaign_id, offer.title, offer.category)
        )
        stands = self.shown == "all" or (line.why_not is None) == (self.shown == "now")
        return named and stands and self.kind in ("", offer.kind) and self.stage in ("", offer.stage)


@lru_cache(2)
def _read(home: Home, changed: int) -> tuple[Sequence[Offer], Sequence[int]]:
    """The offers of the table, and how many items each names; read once for each *changed*, as a large one takes seconds."""
    read = Catalogue(home).read("offers")
    items = read["item_ids"].combine_chunks().value_lengths().to_pylist()
    return [Offer.from_row(row) for row in read.drop_columns(["item_ids"]).to_pylist()], [number or 0 for number in items]


def table_of(runtime: Runtime, wish: OfferWish, now: datetime, words: Words) -> OfferTable:
    """The offers that are asked for, those in force first.

    Raises:
        MissingStateError: there is no table of offers.
    """
    catalogue = Catalogue(runtime.home)
    file = catalogue.path("offers")
    offers, items = _read(runtime.home, file.stat().st_mtime_ns if file.exists() else 0)
    budgets = {offer.offer_id: offer.budget for offer in offers if offer.budget is not None}
    stocks = {offer.offer_id: offer.stock for offer in offers if offer.stock is not None}
    given, redeemed = runtime.engine.governor.taken(list(budgets), list(stocks), now)
    closed = runtime.engine.governor.policy.contact.closed
    lines = []
    for offer, number in zip(offers, items, strict=True):
        out = None if offer.budget is None else given.get(offer.offer_id, 0)
        back = None if offer.stock is None else redeemed.get(offer.offer_id, 0)
        line = OfferLine(offer, number, out, back, None)
        lines.append(replace(line, why_not=next(_reasons(line, now, closed, words), None)))
    lines.sort(key=lambda line: (line.why_not is not None, -line.offer.valid_from.timestamp(), line.offer.offer_id))
    found = [line for line in lines if wish.wants(line)]
    start = (wish.page - 1) * ON_A_PAGE
    in_force = sum(line.why_not is None for line in lines)
    return OfferTable(found[start : start + ON_A_PAGE], len(found), in_force, len(lines), len(catalogue.earlier_offers()))


def _reasons(line: OfferLine, now: datetime, closed: frozenset[str], words: Words) -> Iterator[str]:
    """Why an offer reaches nobody now."""
    offer, say = line.offer, words.say
    if now < offer.valid_from:
        yield say("begins on %(day)s") % {"day": words.day(offer.valid_from)}
    if now >= offer.valid_until:
        yield say("ended on %(day)s") % {"day": words.day(offer.valid_until)}
    if offer.budget is not None and (line.given or 0) >= offer.budget:
        yield say("given out as often as its budget allows")
    if offer.stock is not None and (line.redeemed or 0) >= offer.stock:
        yield say("all are redeemed")
    if offer.channels and closed.issuperset(offer.channels):
        yield say("no offer may go out by its channels (policy.yaml)")


def _with_counts(table: OfferTable, kept: Kept[OfferCounts] | None) -> OfferTable:
    if kept is None:
        return table
    known: Mapping[str, OfferCount] = kept.value.offers
    return replace(table, lines=[replace(line, count=known.get(line.offer.offer_id, OfferCount())) for line in table.lines])


async def offers_page(visit: Visit) -> Response:
    """The table."""
    runtime, query = visit.runtime, visit.query
    shown: Shown = next((each for each in ("now", "not", "all") if each == query.get("shown")), "now")
    page = int(number) if (number := query.get("page", "1")).isdigit() and 0 < int(number) < 1_000_000 else 1
    wish = OfferWish(query.get("q", "").strip()[:200], shown, query.get("kind", ""), query.get("stage", ""), page)
    jobs = jobs_of(runtime)
    kept = await visit.port.work(jobs.found, NAME, OfferCounts)
    try:
        table: OfferTable | None = _with_counts(await visit.port.work(table_of, runtime, wish, runtime.clock(), visit.words), kept)
    except MissingStateError:
        table = None
    models = [name for name, settings in runtime.engine.models.items() if settings.kind.answers == "offers"]
    silent = [name for name in models if name in runtime.engine.missing()]
    broken = [f"{name}: {why}" for name, why in runtime.engine.broken.items() if name in (*models, "policy.yaml")]
    return visit.page(
        "offers.html", table=table, wish=wish, job=_view(visit, jobs, kept), pages=0 if table is None else -(-table.found // ON_A_PAGE),
        silent=silent, broken=broken, has_counts=kept is not None,
    )  # fmt: skip


async def offers_count(visit: Visit) -> Response:
    """How far the count is."""
    jobs = jobs_of(visit.runtime)
    job = _view(visit, jobs, await visit.port.work(jobs.found, NAME, OfferCounts))
    return visit.page("_job.html", job=job) if visit.is_partial and job.running else visit.go(ADDRESS)


async def count_offers(visit: Visit) -> Response:
    """Begin to count what was done with each offer."""
    runtime, jobs = visit.runtime, jobs_of(visit.runtime)
    asked = Asked(home=str(runtime.home.root.resolve()), what="offers", at=runtime.clock())
    jobs.start(NAME, lambda advance: counted(asked, OfferCounts, advance))
    return visit.page("_job.html", job=_view(visit, jobs, None)) if visit.is_partial else visit.go(ADDRESS)


def _view(visit: Visit, jobs: Jobs, kept: Kept[OfferCounts] | None) -> JobView:
    return jobs.view(NAME, COUNT, visit.words.say("Count what was shown and taken"), kept)


PAGES: Sequence[Page] = [
    Page(ADDRESS, offers_page, "decide", menu="Offers", group="Marketing"),
    Page(COUNT, offers_count, "decide"),
    Page(COUNT, count_offers, "decide", "POST"),
]
