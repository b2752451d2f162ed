"""For the merchandiser: the items of the shop, and every list as somebody would see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args
from urllib.parse import urlencode

import numpy as np
from starlette.responses import Response

from models.attributes import WrongWishError
from models.recommender.listings import Listing
from models.recommender.shelf import DETAILS, KIND, Shelf
from serving.console.goods import FoundItems, find_items, item_facts
from serving.console.lists import list_names, source_said
from serving.console.mistakes import Mistakes
from serving.console.port import RefusedError
from serving.console.shown import ShownItems, model_that
from serving.console.visit import Page, Visit
from serving.console.whom import known_by
from serving.decide.merchandising import RULES
from serving.decide.rules import ABOUT_ITEMS, ShopRule
from serving.privacy.keys import LOCAL

ITEMS_SHOWN = 50
MOST_FILTERS = 5
COLUMNS = 3
ALIKE_SHOWN = 6
"""How many items of each list an item's page shows."""
OFFERED = 8
"""How many items are offered where a name was typed in place of an id."""
SIZES = (5, 10, 20, 50)
NAMED_LEFT_OUT = 12
"""How many of the items that were removed for one reason are named."""
TOLD_INPUTS = 4
MOST_TYPED = 256


# --- the catalogue


async def items(visit: Visit) -> Response:
    """The items that are looked for, what sells most first."""
    asked = visit.query.get("q", "").strip()[:MOST_TYPED]
    wanted, wrong = _filters(visit), ""
    shown = ShownItems(visit.runtime.engine)
    shelf = shown.shelf
    found = FoundItems(0, [], [])
    rows: list[dict[str, Any]] = []
    if shelf is not None:
        try:
            found = await visit.port.work(find_items, shelf, asked, wanted, ITEMS_SHOWN)
        except WrongWishError as error:
            wrong = str(error)
        rows = [{"item_id": each, "label": shown.label(each), **item_facts(shelf, each)} for each in found.item_ids]
    return visit.page(
        "items.html", 422 if wrong else 200, asked_items=asked, wanted=wanted, wrong=wrong, found=found, rows=rows, most=ITEMS_SHOWN,
        attributes=list(shelf.attributes) if shelf is not None else [], has_shelf=shelf is not None,
        columns=_columns(shelf),
        address=lambda filters: f"/items?{urlencode([('q', asked), *(('where', f'{n}={v}') for n, v in filters)])}",
        typed={name: visit.query.get(name, "")[:MOST_TYPED] if wrong else "" for name in ("attribute", "value")},
    )  # fmt: skip


def _columns(shelf: Shelf | None) -> list[str]:
    """The attributes that tell of an item what its name does not."""
    names = [] if shelf is None else list(shelf.attributes)
    told = ("name",) if "name" in names else (*KIND, *DETAILS)
    return [name for name in names if name not in (*told, "price_minor")][:COLUMNS]


def _filters(visit: Visit) -> list[tuple[str, str]]:
    """The attributes and values of a search: those chosen before, and one that was typed."""
    said = [each.partition("=") for each in visit.request.query_params.getlist("where")]
    found = [(name[:MOST_TYPED], value[:MOST_TYPED]) for name, equals, value in said if equals and value]
    if visit.query.get("attribute") and (value := visit.query.get("value", "").strip()):
        found.append((visit.query["attribute"][:MOST_TYPED], value[:MOST_TYPED]))
    return list(dict.fromkeys(found))[-MOST_FILTERS:]


async def item(visit: Visit) -> Response:
    """One item: what is known of it, which rules reach it, and the lists about it."""
    item_id = visit.part("item_id")
    shown, model = ShownItems(visit.runtime.engine), model_that(visit.runtime.engine, "items")
    shelf = shown.shelf
    if shelf is None or model is None or item_id not in shelf.positions:
        raise RefusedError(404, visit.words.say("There is no such item."))
    lists: list[tuple[Listing, Any]] = []
    for listing in ABOUT_ITEMS:
        question = {"listing": listing, "item_ids": [item_id], "limit": ALIKE_SHOWN, "dry_run": True}
        lists.append((listing, await visit.port.ask(f"/v1/{model}", question)))
    rules = await visit.port.work(rules_of, visit, item_id)
    return visit.page(
        "item.html", item_id=item_id, label=shown.label(item_id), facts=item_facts(shelf, item_id), lists=lists, rules=rules,
        shown=shown, **said_of_lists(visit),
    )  # fmt: skip


def rules_of(visit: Visit, item_id: str) -> list[tuple[ShopRule, str, str]]:
    """The rules that reach an item, or that hold on its page, with how they stand; the last made first."""
    engine, now = visit.runtime.engine, visit.runtime.clock()
    name = model_that(engine, "items")
    shelf = None if name is None else engine.champion(name).shelf
    if shelf is None:
        return []
    place = shelf.positions[item_id]
    found: list[tuple[ShopRule, str, str]] = []
    for rule in engine.rules.live():
        reach = shelf.reach(rule)
        at = int(np.searchsorted(reach, place))
        if at < len(reach) and reach[at] == place:
            found.append((rule, "item", rule.state(now)))
        elif item_id in rule.page_item_ids:
            found.append((rule, "page", rule.state(now)))
    return found


def said_of_lists(visit: Visit) -> dict[str, Any]:
    """What templates that show lists need."""
    return {"names": list_names(visit.words), "source_said": lambda source: source_said(source, visit.words)}


# --- a list, as somebody would see it


async def preview(visit: Visit) -> Response:
    """The form, with the list that the address asks for."""
    asked = {name: visit.query.get(name, "")[:MOST_TYPED] for name in ("listing", "item", "store", "limit", "customer_id")}
    return await _preview(visit, {**asked, "customer": asked["customer_id"], "explain": "yes"}, bool(asked["listing"]))


async def previewed(visit: Visit) -> Response:
    """The list that the form asks for: what was typed of a customer stands in no address."""
    asked = {name: visit.said(name)[:MOST_TYPED] for name in ("listing", "item", "store", "limit", "customer", "explain")}
    for field in ("customer", "item"):
        asked[field] = visit.said(f"choose_{field}")[:MOST_TYPED] or asked[field]
    return await _preview(visit, asked, is_asked=True)


async def _preview(visit: Visit, asked: Mapping[str, str], is_asked: bool) -> Response:
    shown, model = ShownItems(visit.runtime.engine), model_that(visit.runtime.engine, "items")
    if model is None or shown.shelf is None:
        return visit.page("preview.html", said=asked, answer=None, errors=Mistakes(), has_model=False, **_nothing(visit))
    errors = Mistakes()
    question: dict[str, Any] = {"dry_run": True, "explain": bool(asked["explain"]), "listing": asked["listing"] or "for_you"}
    question["limit"] = int(asked["limit"]) if asked["limit"] in map(str, SIZES) else 10
    if asked["store"]:
        question["store_id"] = asked["store"]
    if question["listing"] not in get_args(Listing):
        errors["listing"] = visit.words.say("There is no such list.")
    customers = await chosen_customer(visit, asked["customer"], errors)
    items_meant = await chosen_item(visit, shown.shelf, asked["item"], errors)
    if not asked["item"] and question["listing"] in ABOUT_ITEMS and is_asked:
        errors["item"] = visit.words.say("This list is about an item: name one.")
    answer, status = None, 422 if errors and is_asked else 200
    if is_asked and not errors:
        question |= {"customer_id": customers[0]} if customers else {}
        question |= {"item_ids": items_meant} if items_meant else {}
        try:
            answer = await visit.port.ask(f"/v1/{model}", question)
        except RefusedError as error:
            if error.status != 400:
                raise
            errors["store" if error.detail.startswith("store") else "listing"], status = error.detail, 422
    told = {**_nothing(visit), "shown": shown, "customers": customers, "items_meant": items_meant}
    asked = {**asked, "listing": question["listing"], "limit": str(question["limit"])}
    return visit.page("preview.html", status, said=asked, answer=answer, errors=errors, has_model=True, **told)


def _nothing(visit: Visit) -> dict[str, Any]:
    return {
        "shown": None, "customers": [], "items_meant": [], "sizes": SIZES, "named": NAMED_LEFT_OUT, "inputs": TOLD_INPUTS,
        "rules_unread": visit.runtime.engine.broken.get(RULES), **said_of_lists(visit),
    }  # fmt: skip


async def chosen_customer(visit: Visit, typed: str, errors: Mistakes) -> list[str]:
    """Whom *typed* leads to; a mistake is told of the field ``customer``. That they were looked at is audited.

    Raises:
        RefusedError: the reader may not see customers.
    """
    if not typed:
        return []
    if not visit.may("read_customer"):
        raise RefusedError(403, visit.words.say("Your key may not see customers: leave the customer out."))
    found = list(await visit.port.work(known_by, visit.runtime, typed))
    if not found:
        errors["customer"] = visit.words.say("Nobody is known by that card, e-mail, phone or id.")
    elif len(found) > 1:
        errors["customer"] = visit.words.say("This leads to several customers: choose one.")
    else:
        key = visit.key or LOCAL
        await visit.port.work(visit.runtime.audit.note, visit.runtime.clock(), key.name, "read", found[0], "done")
    return found


async def chosen_item(visit: Visit, shelf: Shelf, typed: str, errors: Mistakes) -> Sequence[str]:
    """The item that was typed by its id, or those whose names hold what was typed; a mistake is told of the field ``item``."""
    if not typed or typed in shelf.positions:
        return [typed] if typed else []
    found = await visit.port.work(find_items, shelf, typed, [], OFFERED)
    if not found.count:
        errors["item"] = visit.words.say("No item has that id, or that in its name.")
    elif found.count > 1:
        errors["item"] = visit.words.say("Several items have that in their name: choose one.")
    return found.item_ids


PAGES = [
    Page("/items", items, "decide", menu="Items", group="Merchandise"),
    Page("/items/one/{item_id:path}", item, "decide"),
    Page("/preview", preview, "decide", menu="Preview a list", group="Merchandise"),
    Page("/preview", previewed, "decide", method="POST"),
]
