"""For whoever has a customer before them, in the shop or on the phone: who they are, what happened, and what to offer now."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, get_args
from zoneinfo import ZoneInfo

import numpy as np
from starlette.responses import Response

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.events.event import Channel
from features.events.identifiers import IdentifierKind
from features.store.profile import Lived, UnknownCustomerError, timeline_of, who_they_are
from models.inputs import Input
from models.reasons import say
from serving.console.port import RefusedError
from serving.console.shown import ShownItems, event_lines, model_that
from serving.console.visit import Page, Visit
from serving.console.whom import known_by
from serving.runtime import Runtime

EVENTS_SHOWN = 25
WEEKS_SHOWN = 52
RHYTHM_FACTS = 5
MOST_DRAINED = 2_000
"""With more events waiting a page does not move them on: they will come in their turn."""
AT_THE_COUNTER: tuple[Channel, ...] = ("store", "call_centre")
"""By which channels an associate speaks to a customer."""
OUTCOMES = {"accepted": "offer_accept", "declined": "offer_decline", "shown": "view_item_list", "liked": "select_item"}
"""What an associate may tell, and the event that says so."""
FULL_NAME = ("first_name", "last_name")


@dataclass(frozen=True)
class _Seen:
    """What the service knows of one customer."""

    told: Mapping[str, Any]
    lived: Lived
    row: Mapping[str, Any]
    facts: Sequence[str]
    now: datetime
    stamp: str


# --- to find one


async def find(visit: Visit) -> Response:
    """Whoever is known by what was typed: their page, or a choice of several."""
    asked = visit.query.get("q", "").strip()[:256]
    found = await visit.port.work(known_by, visit.runtime, asked) if asked else {}
    if len(found) == 1:
        return visit.go(f"/customers/{next(iter(found))}")
    return visit.page("customers.html", 200 if found or not asked else 404, asked=asked, found=found)


# --- one customer


async def customer(visit: Visit) -> Response:
    """One customer on one page."""
    return await _answer(visit, "customer.html")


async def news(visit: Visit) -> Response:
    """The page's content again where something has happened since; 204 where nothing has."""
    customer_id, seen = visit.part("customer_id"), visit.query.get("seen", "")
    stamp = await visit.port.work(_stamp, visit.runtime, customer_id)
    return Response(status_code=204) if stamp == seen else await _answer(visit, "_customer.html")


async def older(visit: Visit) -> Response:
    """More of the timeline."""
    start = int(said) if (said := visit.query.get("start", "0")).isdigit() else 0
    runtime, customer_id = visit.runtime, visit.part("customer_id")
    lived = await visit.port.work(
        timeline_of, runtime.home, runtime.identities, runtime.consents, customer_id, EVENTS_SHOWN, start
    )  # fmt: skip
    return visit.page("_timeline.html", **_lines(visit, lived, customer_id, start))


async def _answer(visit: Visit, template: str) -> Response:
    customer_id = visit.part("customer_id")
    try:
        seen = await visit.port.work(_look, visit.runtime, customer_id, visit.key.name if visit.key else "")
    except UnknownCustomerError:
        return visit.problem(404, visit.words.say("No customer is known by that id."))
    customer_id = seen.told["customer_id"]
    answers = await _asked(visit, customer_id) if visit.may("decide") else {}
    items = ShownItems(visit.runtime.engine)
    common = _lines(visit, seen.lived, customer_id, 0)
    clear = {each["kind"]: each["value"] for each in reversed(seen.told["identifiers"]) if each["value"]}
    rhythm_facts = [fact for fact in seen.facts if "every" in fact or "visit" in fact][:RHYTHM_FACTS]
    return visit.page(
        template, seen=seen, told=seen.told, name=_name(seen.told["person"]) or next(iter(reversed(clear.values())), customer_id),
        answers=answers, present=_present(seen.row, items), rhythm=_rhythm(visit, seen), rhythm_facts=rhythm_facts,
        favourites=items.favourites(seen.row), channels=AT_THE_COUNTER, can_tell=visit.may("ingest"), **common,
    )  # fmt: skip


def _look(runtime: Runtime, customer_id: str, reader: str) -> _Seen:
    now = runtime.clock()
    try:
        told = who_they_are(runtime.identities, runtime.consents, runtime.contacts, customer_id)
    except UnknownCustomerError:
        runtime.audit.note(now, reader, "read", customer_id, "unknown")
        raise
    stamp = _stamp(runtime, customer_id)
    who = runtime.who(told["customer_id"])
    lived = timeline_of(runtime.home, runtime.identities, runtime.consents, told["customer_id"], EVENTS_SHOWN)
    row: Mapping[str, Any] = {}
    facts: list[str] = []
    if who.may_be_used:
        domain = domain_named(Shop.load(runtime.home).domain)
        row = runtime.reader.everything(who.customer_id, now)
        for feature in domain.customer:
            value = row.get(feature.name)
            if feature.phrase and isinstance(value, int | float) and not math.isnan(value) and value:
                facts.append(say(Input(feature.name, feature.phrase, feature.unknown), float(value), runtime.currency))
    # before the page leaves: what was read is in the audit log whoever hangs up
    runtime.audit.note(now, reader, "read", told["customer_id"], "done")
    return _Seen(told, lived, row, facts, now, stamp)


def _stamp(runtime: Runtime, customer_id: str) -> str:
    """What changes whenever something about the customer does."""
    if 0 < runtime.intake.waiting <= MOST_DRAINED:
        # what was just acknowledged belongs on the page
        runtime.intake.drain()
    current = runtime.identities.current(customer_id)
    return f"{current}-{runtime.intake.revision(current)}"


async def _asked(visit: Visit, customer_id: str) -> dict[str, Any]:
    """What the models say of the customer; a model that cannot answer says why."""
    engine = visit.runtime.engine
    answers: dict[str, Any] = {"scores": [], "lists": [], "offers": None, "refused": []}
    whom = {"customer_id": customer_id}
    for name, model in engine.models.items():
        kind = model.kind.answers
        try:
            if kind == "score":
                answers["scores"].append({"name": name, **await visit.port.ask(f"/v1/{name}", {**whom, "dry_run": True})})
            elif kind == "items":
                for listing in ("for_you", "also_like"):
                    question = {**whom, "listing": listing, "limit": 4}
                    answers["lists"].append({"listing": listing, **await visit.port.ask(f"/v1/{name}", question)})
            elif answers["offers"] is None:
                answers["offers"] = await visit.port.ask(f"/v1/{name}", {**whom, "limit": 3, "dry_run": True})
        except RefusedError as error:
            answers["refused"].append(f"{name}: {error.detail}")
    return answers


def _name(person: Mapping[str, str]) -> str:
    full = " ".join(person[part] for part in FULL_NAME if person.get(part))
    return full or person.get("name", "")


def _present(row: Mapping[str, Any], items: ShownItems) -> dict[str, Any]:
    """What the customer is at: the visit, the cart, where they were last."""
    cart = zip(row.get("cart_item_ids") or (), row.get("cart_quantities") or (), strict=False)
    return {
        "is_here": bool(row.get("session_is_open")),
        "intent": row.get("session_intent"),
        "looked_at": [items.label(each) for each in (row.get("session_item_ids") or ())[:5]],
        "searched": list((row.get("session_queries") or ())[:3]),
        "cart": [(items.label(item_id), quantity) for item_id, quantity in cart],
        "cart_minor": row.get("cart_minor"),
        "last_at": row.get("last_touch_at"),
        "last_channel": row.get("last_channel"),
        "last_store": row.get("last_store_id"),
    }


def _rhythm(visit: Visit, seen: _Seen) -> dict[str, Any]:
    """How often the customer was met in each week of the last year."""
    zone = ZoneInfo(visit.words.zone)
    today = seen.now.astimezone(zone).date()
    monday = today - timedelta(days=today.weekday())
    weeks = [monday - timedelta(weeks=k) for k in reversed(range(-1, WEEKS_SHOWN))]
    starts = [datetime(week.year, week.month, week.day, tzinfo=zone).timestamp() for week in weeks]
    met, _ = np.histogram(np.array(seen.lived.moments, np.float64) / 1e6, starts)
    series = [{"label": visit.words.say("events a week"), "y": met.tolist(), "bars": True}]
    return {"x": starts[:-1], "time": True, "height": 150, "series": series}


def _lines(visit: Visit, lived: Lived, customer_id: str, start: int) -> dict[str, Any]:
    lines = event_lines(lived.rows, ShownItems(visit.runtime.engine), visit.words)
    more = start + len(lines) if start + len(lines) < len(lived.moments) else None
    return {"lines": lines, "more": more, "withheld": lived.withheld, "all_events": len(lived.moments), "customer_id": customer_id}


# --- what comes of it


async def propose(visit: Visit) -> Response:
    """Decide an offer for real, and tell that the customer was shown it: its place under caps and budgets is held from here on."""
    name, channel = model_that(visit.runtime.engine, "offers"), visit.said("channel")
    if name is None or channel not in get_args(Channel):
        raise RefusedError(400, visit.words.say("Choose a channel."))
    customer_id, offer_id = visit.part("customer_id"), visit.said("offer_id")
    answer = await visit.port.ask(f"/v1/{name}", {"customer_id": customer_id, "offer_ids": [offer_id], "channel": channel, "limit": 1})
    if not answer["offers"]:
        return visit.problem(
            409, visit.words.say("That offer may not be made to this customer now:") + f" {answer['fallback'] or answer['group']}"
        )
    offer = answer["offers"][0]
    await _tell(visit, customer_id, "offer_view", answer["decision_id"], channel, offer)
    return visit.page("_proposed.html", offer=offer, decision_id=answer["decision_id"], channel=channel, customer_id=customer_id)


async def outcome(visit: Visit) -> Response:
    """Take in what the customer said to an offer or a recommended item."""
    said, names = (
        visit.said("outcome"),
        {"accepted": "offer_accept", "declined": "offer_decline", "shown": "view_item_list", "liked": "select_item"},
    )
    if said not in names:
        raise RefusedError(400, visit.words.say("Say what came of it: accepted, declined, shown or liked."))
    customer_id = visit.part("customer_id")
    told = {"offer_id": visit.said("offer_id"), "campaign_id": visit.said("campaign_id")}
    shown = [item for item in visit.said("item_ids").split(",") if item]
    await _tell(visit, customer_id, OUTCOMES[said], visit.said("decision_id"), visit.said("channel") or "store", told, shown)
    return visit.page("_told.html", said=said)


async def _tell(
    visit: Visit, customer_id: str, name: str, decision_id: str, channel: str, offer: Mapping[str, Any], items: Sequence[str] = ()
) -> None:
    kind, value = await visit.port.work(_spoken_of, visit.runtime, customer_id)
    event = {
        # a button that is pressed twice tells it once
        "event_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{decision_id}/{name}/{','.join(items)}")),
        "name": name, "occurred_at": visit.runtime.clock().isoformat(), "channel": channel, "identifiers": {kind: value},
        "decision_id": decision_id, "items": [{"item_id": item} for item in items],
        **{field: offer[field] for field in ("offer_id", "campaign_id") if offer.get(field)},
    }  # fmt: skip
    [receipt] = (await visit.port.take([event]))["events"]
    if receipt["status"] == "rejected" and "other content" not in (receipt.get("reason") or ""):
        raise RefusedError(400, f"{receipt.get('field')}: {receipt.get('reason')}")


def _spoken_of(runtime: Runtime, customer_id: str) -> tuple[IdentifierKind, str]:
    """An identifier of the customer in clear: the strongest that is known."""
    told = who_they_are(runtime.identities, runtime.consents, runtime.contacts, customer_id)
    for each in told["identifiers"]:
        if each["value"]:
            return each["kind"], each["value"]
    raise RefusedError(409, "no identifier of this customer is known in clear, so nothing can be told of them")


PAGES = [
    Page("/customers", find, "read_customer", menu="Find a customer", group="Customers"),
    Page("/customers/{customer_id}", customer, "read_customer"),
    Page("/customers/{customer_id}/news", news, "read_customer"),
    Page("/customers/{customer_id}/timeline", older, "read_customer"),
    Page("/customers/{customer_id}/propose", propose, "ingest", method="POST"),
    Page("/customers/{customer_id}/outcome", outcome, "ingest", method="POST"),
]
