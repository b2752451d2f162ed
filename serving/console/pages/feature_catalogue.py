"""The feature catalogue: what is known of customers and items, how fresh it is, and which models read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.responses import Response

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.listing import Listed, listed
from features.definitions.view import views_of
from features.state.home import Home
from features.store.snapshots import newest_whole
from models.registry import ModelSettings
from serving.console.visit import Page, Visit
from serving.console.words import Words
from serving.decide.engine import MAX_FEATURE_AGE

MAX_ASKED = 100
VIEW_OF = {"customer": "customer_activity", "item": "item_stats"}
FOLD = "fold "
_PLACE = re.compile(r"\{[^}]*\}")


class CatalogueLine(NamedTuple):
    """One feature as the page shows it."""

    name: str
    entity: str
    view: str
    made_of: str
    dtype: str
    allowed: str
    says: str
    models: tuple[str, ...]


async def catalogue(visit: Visit) -> Response:
    """Every feature, or those that fit what is searched for, below how fresh the views are."""
    asked = visit.query.get("find", "").strip()[:MAX_ASKED]
    models = visit.runtime.engine.models
    domain, lines, views = await visit.port.work(_read, visit.runtime.home, models, visit.words)
    words = asked.casefold().split()
    found = [line for line in lines if all(word in _text(line) for word in words)]
    if visit.is_partial:
        return visit.page("_features.html", lines=found, find=asked, all=len(lines))
    now = visit.runtime.clock()
    fresh = [{**view, "age": visit.words.ago(view["as_of"], now), "old": _is_old(view, now)} for view in views]
    return visit.page("features.html", lines=found, find=asked, all=len(lines), views=fresh, domain=domain, now=now)


def _is_old(view: Mapping[str, Any], now: Any) -> bool:
    return view["as_of"] is not None and now - view["as_of"] > MAX_FEATURE_AGE


def _read(home: Home, models: Mapping[str, ModelSettings], words: Words) -> tuple[Any, list[CatalogueLine], list[dict[str, Any]]]:
    domain = domain_named(Shop.load(home).domain)
    lines = [_line(each, models, words) for each in listed(domain)]
    views = []
    for view in views_of(domain.name).values():
        newest = newest_whole(home, view)
        views.append(
            {
                "name": view.name,
                "entity": view.key.removesuffix("_id"),
                "features": sum(line.view == view.name for line in lines),
                "models": [name for name, model in models.items() if view.name in model.kind.views],
                "as_of": newest.as_of if newest else None,
                "rows": newest.rows if newest else None,
            }
        )
    return domain, lines, views


def _line(each: Listed, models: Mapping[str, ModelSettings], words: Words) -> CatalogueLine:
    fold = each.made_of.removeprefix(FOLD) if each.made_of.startswith(FOLD) else ""
    kinds = [kind.strip() for kind in each.inputs_of.split(",") if kind.strip()]
    reads = tuple(name for name, model in models.items() if (fold in model.kind.folds if fold else model.kind.name in kinds))
    # what was not said in the reader's language is in English; the catalogue of texts holds the phrases of reasons
    says = _PLACE.sub("…", words.say(each.says)) if each.says else each.name.replace("_", " ")
    view = "customer_state" if fold else VIEW_OF[each.entity]
    return CatalogueLine(each.name, each.entity, view, each.made_of, each.dtype, each.allowed, says, reads)


def _text(line: CatalogueLine) -> str:
    return " ".join((*line[:7], *line.models)).casefold()


PAGES = [Page("/features", catalogue, "decide", menu="Features", group="Models")]
