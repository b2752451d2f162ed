"""Coverage: who would end with nothing, and at which stage, if everybody were asked about now."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import get_args
from zoneinfo import ZoneInfo

from starlette.responses import Response

from features.catalogue.shop import Shop
from features.events.event import Channel
from serving.console.counting import Asked, CoverageCount, counted
from serving.console.jobs import Jobs, JobView, Kept, jobs_of
from serving.console.port import RefusedError
from serving.console.visit import Page, Visit

ADDRESS = "/coverage"


def _name(model: str, channel: str | None) -> str:
    return f"coverage-{model}-{channel or 'any'}"


async def coverage_page(visit: Visit) -> Response:
    """What became of the customers when it was last counted, for one model and channel; a part of it while it is being counted."""
    jobs, models = jobs_of(visit.runtime), list(visit.runtime.engine.models)
    model, channel = _asked(visit, visit.query.get("model", ""), visit.query.get("channel", ""))
    kept = await visit.port.work(jobs.found, _name(model, channel), CoverageCount)
    job = _view(visit, jobs, model, channel, kept)
    if visit.is_partial:
        return visit.page("_job.html", job=job) if job.running else visit.go(f"{ADDRESS}?{job.query}")
    others = await visit.port.work(_others, jobs, models)
    return visit.page(
        "coverage.html", job=job, models=models, channels=get_args(Channel), model=model, channel=channel,
        found=None if kept is None else kept.value, others=others,
    )  # fmt: skip


async def count_coverage(visit: Visit) -> Response:
    """Begin to count."""
    runtime, jobs = visit.runtime, jobs_of(visit.runtime)
    model, channel = _asked(visit, visit.said("model"), visit.said("channel"))
    shop = await visit.port.work(Shop.load, runtime.home)
    asked = Asked(
        home=str(runtime.home.root.resolve()), what="coverage", model=model, channel=channel,
        at=_last_midnight(shop, runtime.clock()),
    )  # fmt: skip
    jobs.start(_name(model, channel), lambda advance: counted(asked, CoverageCount, advance))
    job = _view(visit, jobs, model, channel, None)
    return visit.page("_job.html", job=job) if visit.is_partial else visit.go(f"{ADDRESS}?{job.query}")


def _last_midnight(shop: Shop, now: datetime) -> datetime:
    """When the shop's day began: everybody's features are worked out once a day at most."""
    return max(now.astimezone(ZoneInfo(shop.timezone)).replace(hour=0, minute=0, second=0, microsecond=0), shop.data_end)


def _view(visit: Visit, jobs: Jobs, model: str, channel: str | None, kept: Kept[CoverageCount] | None) -> JobView:
    return jobs.view(_name(model, channel), ADDRESS, visit.words.say("Count now"), kept, {"model": model, "channel": channel or ""})


def _asked(visit: Visit, model: str, channel: str) -> tuple[str, str | None]:
    """The model and the channel that are asked for; none named: the first that chooses offers, and no channel."""
    models = visit.runtime.engine.models
    first = next((name for name, settings in models.items() if settings.kind.answers == "offers"), next(iter(models), ""))
    if (model or first) not in models:
        raise RefusedError(404, visit.words.say("There is no model of that name:") + f" {model}")
    if channel and channel not in get_args(Channel):
        raise RefusedError(422, visit.words.say("There is no channel of that name:") + f" {channel}")
    return model or first, channel or None


def _others(jobs: Jobs, models: Sequence[str]) -> list[CoverageCount]:
    """What else was counted, the newest first."""
    names = [_name(model, channel) for model in models for channel in (None, *get_args(Channel))]
    found = [kept for name in names if (kept := jobs.found(name, CoverageCount)) is not None]
    return [kept.value for kept in sorted(found, key=lambda kept: kept.at, reverse=True)]


PAGES: Sequence[Page] = [
    Page(ADDRESS, coverage_page, "decide", menu="Coverage", group="Marketing"),
    Page(ADDRESS, count_coverage, "decide", "POST"),
]
