"""The rules of the shop: those that hold, wait and have ended; one is made, replaced and ended here, with its effect beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, get_args
from zoneinfo import ZoneInfo

from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from features.events.event import RejectedEvent
from features.state.disk import DamagedStateError, NoSpaceError
from features.state.ports import MissingStateError
from models.recommender.listings import Listing
from serving.console.goods import find_items
from serving.console.lists import answered_under, changes, tried
from serving.console.mistakes import Mistakes
from serving.console.pages.merchandise import OFFERED, chosen_customer, chosen_item, said_of_lists
from serving.console.port import RefusedError
from serving.console.rule_form import RuleForm, field_of
from serving.console.shown import ShownItems, model_that
from serving.console.visit import Page, Visit
from serving.decide.merchandising import RULES
from serving.decide.rules import ABOUT_ITEMS, LAST_PLACE, LEAST_FACTOR, MOST_FACTOR, EndedRuleError, NewRule, ShopRule, UnknownRuleError
from serving.privacy.keys import LOCAL
from serving.runtime import Runtime

ENDED_SHOWN = 100
SHOWN_PLACES = 10
"""How many items of a list the effect of a rule is shown on; of a pin farther down more."""


# --- the rules that there are


async def rules(visit: Visit) -> Response:
    """Those in force, those that wait, and on demand those that have ended."""
    with_ended = bool(visit.query.get("ended"))
    listed = await visit.port.work(visit.runtime.engine.rules.listed, with_ended)
    now = visit.runtime.clock()
    by_state: dict[str, list[ShopRule]] = {"in force": [], "waits": [], "over": [], "ended": []}
    for rule in listed:
        by_state[rule.state(now)].append(rule)
    counts = {state: len(found) for state, found in by_state.items()}
    by_state["ended"] = by_state["ended"][:ENDED_SHOWN]
    return visit.page(
        "rules.html", by_state=by_state, counts=counts, with_ended=with_ended, unread=visit.runtime.engine.broken.get(RULES),
        made=visit.query.get("made", "")[:12], gone=visit.query.get("gone", "")[:12], shown=ShownItems(visit.runtime.engine),
        most=ENDED_SHOWN, **said_of_lists(visit),
    )  # fmt: skip


async def end(visit: Visit) -> Response:
    """End a rule: it no longer holds in the next answer."""
    rule_id, book = visit.said("rule_id")[:12], visit.runtime.engine.rules
    key = visit.key or LOCAL
    try:
        ended = await visit.port.work(_changed, visit.runtime, key.name, "end rule", rule_id, lambda at: book.end(rule_id, key.name, at))
    except UnknownRuleError:
        raise RefusedError(404, visit.words.say("There is no such rule.")) from None
    except EndedRuleError:
        raise RefusedError(409, visit.words.say("This rule was ended before.")) from None
    return visit.go(f"/rules?gone={ended.rule_id}")


def _changed(runtime: Runtime, key: str, action: str, rule_id: str, act: Callable[[datetime], ShopRule]) -> ShopRule:
    """What *act* makes of a rule, written down whatever becomes of it, as the HTTP API does."""
    at = runtime.clock()
    try:
        done = act(at)
    except (UnknownRuleError, EndedRuleError, RejectedEvent, MissingStateError) as error:
        # what was sent as an id may be anything: only what is a rule's is written down
        runtime.audit.note_rule(at, key, action, "" if isinstance(error, UnknownRuleError) else rule_id, "refused")
        raise
    except (SQLAlchemyError, DamagedStateError, NoSpaceError, OSError) as error:
        runtime.audit.note_rule(at, key, action, "", "failed")
        raise RefusedError(503, f"the rules cannot be read or written: {error}") from None
    runtime.audit.note_rule(at, key, action, done.rule_id, "done")
    return done


# --- a new one


async def new(visit: Visit) -> Response:
    """An empty form, or one that says what a rule says that is to be replaced."""
    form, errors = RuleForm(), Mistakes()
    if rule_id := visit.query.get("instead_of", "")[:12]:
        found = next((each for each in visit.runtime.engine.rules.live() if each.rule_id == rule_id), None)
        if found is None:
            raise RefusedError(404, visit.words.say("There is no such rule, or it was ended before."))
        form = RuleForm.of(found, ZoneInfo(visit.words.zone), rule_id)
    elif visit.query:
        asked = {"action": "action", "items": "item", "pages": "page"}
        form = RuleForm({name: visit.query.get(there, "")[:256] for name, there in asked.items()})
        if form.action not in ("pin", "boost", "block"):
            form = replace(form, texts={**form.texts, "action": "pin"})
    return await _form(visit, form, errors, {"listing": form.first_list, "customer": "", "item": form["pages"]})


async def make(visit: Visit) -> Response:
    """Show what a rule would do, or make it; a mistake is told at its field, and what was typed stays."""
    form = RuleForm.read(visit.said, visit.form.getlist)
    for field, button in (("items", "add"), ("pages", "add_page")):
        if item_id := visit.said(button)[:256]:
            form = form.with_item(field, item_id)
    looked = {name: visit.said(f"choose_{name}")[:256] or visit.said(name)[:256] for name in ("customer", "item", "listing")}
    book, zone, key = visit.runtime.engine.rules, ZoneInfo(visit.words.zone), visit.key or LOCAL
    numbers = frozenset(_attributes(visit, "number"))
    is_made = visit.said("do") == "make"
    errors = Mistakes()
    wanted: NewRule | None = None
    if is_made or visit.said("do") == "look" or visit.said("choose_customer") or visit.said("choose_item"):
        try:
            if is_made:
                by = key.name
                made = await visit.port.work(
                    _changed, visit.runtime, by, "add rule", "", lambda at: book.add(form.rule(zone, numbers), by, at)
                )  # fmt: skip
                return visit.go(f"/rules?made={made.rule_id}")
            wanted = form.rule(zone, numbers)
            await visit.port.work(book.check, wanted, visit.runtime.clock())
        except RejectedEvent as error:
            errors[field_of(error.field)], wanted = f"{_spoken(error.field)}{visit.words.reason(error.reason)}", None
        except (UnknownRuleError, EndedRuleError, MissingStateError) as error:
            errors["action"], wanted = str(error), None
    return await _form(visit, form, errors, looked, wanted)


def _spoken(field: str) -> str:
    """Which of several things in a field is meant, where one is."""
    return f"{field.partition('.')[2]}: " if "." in field else ""


def _attributes(visit: Visit, kind: str = "") -> list[str]:
    shelf = ShownItems(visit.runtime.engine).shelf
    return [] if shelf is None else [name for name, column in shelf.attributes.columns.items() if kind in ("", column.kind)]


async def _form(visit: Visit, form: RuleForm, errors: Mistakes, looked: Mapping[str, str], wanted: NewRule | None = None) -> Response:
    shown, model, sought = ShownItems(visit.runtime.engine), model_that(visit.runtime.engine, "items"), visit.said("find")[:256]
    matches: Sequence[str] = ()
    effect: Mapping[str, Any] | None = None
    customers: list[str] = []
    items_meant: Sequence[str] = []
    if shown.shelf is not None and model is not None:
        if sought:
            matches = (await visit.port.work(find_items, shown.shelf, sought, [], OFFERED)).item_ids
        if wanted is not None:
            customers = await chosen_customer(visit, looked["customer"], errors)
            typed = looked["item"] or next(iter(wanted.page_item_ids), "")
            items_meant = await chosen_item(visit, shown.shelf, typed, errors)
            effect = await _effect(visit, model, wanted, looked, customers, items_meant, errors)
    return visit.page(
        "_rule_form.html" if visit.is_partial else "rule.html", 422 if errors else 200, form=form, errors=errors, said=looked,
        first_wrong=next(iter(errors), ""),
        shown=shown, sought=sought, matches=matches, effect=effect, customers=customers, items_meant=items_meant, wanted=wanted,
        attributes=_attributes(visit), numbers=_attributes(visit, "number"), last_place=LAST_PLACE, least=LEAST_FACTOR, most=MOST_FACTOR,
        zone=visit.words.zone, about_items=ABOUT_ITEMS, **said_of_lists(visit),
    )  # fmt: skip


async def _effect(
    visit: Visit, model: str, wanted: NewRule, looked: Mapping[str, str], customers: Sequence[str], items_meant: Sequence[str],
    errors: Mistakes,
) -> Mapping[str, Any] | None:  # fmt: skip
    """A list without and with the rule, as if its time had come."""
    listing = looked["listing"] if looked["listing"] in get_args(Listing) else "for_you"
    if listing in ABOUT_ITEMS and not items_meant and "item" not in errors:
        errors["item"] = visit.words.say("This list is about an item: name one.")
    if "customer" in errors or "item" in errors:
        return None
    question: dict[str, Any] = {"listing": listing, "limit": min(max(SHOWN_PLACES, (wanted.place or 0) + 2), 100)}
    question |= {"customer_id": customers[0]} if customers else {}
    question |= {"item_ids": list(items_meant)} if items_meant else {}
    runtime = visit.runtime
    at, live = runtime.clock(), runtime.engine.rules.live()
    trial = tried(wanted, at)
    after_rules = [trial, *(rule for rule in live if rule.rule_id != wanted.instead_of)]
    try:
        before = await visit.port.decide(answered_under, runtime, model, question, live, at)
        after = await visit.port.decide(answered_under, runtime, model, question, after_rules, at)
    except RefusedError as error:
        errors["listing"] = error.detail
        return None
    now_there = {item["item_id"] for item in after["items"]}
    is_elsewhere = bool(wanted.listings and listing not in wanted.listings) or bool(wanted.page_item_ids and listing not in ABOUT_ITEMS)
    return {
        "listing": listing, "before": before, "after": after, "changes": changes(before["items"], after["items"]), "trial": trial.rule_id,
        "gone": {item["item_id"] for item in before["items"]} - now_there, "is_elsewhere": is_elsewhere,
        "is_same": [i["item_id"] for i in before["items"]] == [i["item_id"] for i in after["items"]],
        "is_for_some": wanted.condition is not None and not customers,
    }  # fmt: skip


PAGES = [
    Page("/rules", rules, "manage", menu="Rules", group="Merchandise"),
    Page("/rules/new", new, "manage"),
    Page("/rules/new", make, "manage", method="POST"),
    Page("/rules/end", end, "manage", method="POST"),
]
