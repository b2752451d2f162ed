"""A shop to try: whoever clicks through its items sees beside it what ubiquo makes of that, at once."""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from starlette.responses import Response

from features.events.identifiers import IdentifierError
from features.state.clock import moment_of
from features.store.profile import timeline_of
from serving.console.address import ROOT
from serving.console.port import RefusedError
from serving.console.shown import ShownItems, event_lines, model_that
from serving.console.visit import Page, Visit
from serving.runtime import Runtime

VISITOR, CARD = "ubiquo_visitor", "ubiquo_card"
"""The cookies of the demo shop's visitor: who the browser is, and the card that was signed in with."""
DEPARTMENTS = 12
ON_A_SHELF = 12
LATEST = 6
TRIES = 50
"""How many customers are looked at to find one with a card."""
NOWHERE: Mapping[str, Any] = {"cart_item_ids": [], "cart_quantities": [], "session_intent": None}
"""What somebody is at of whom nothing is known."""
ACTIONS = ("view_item", "add_to_cart", "remove_from_cart", "purchase", "search")
"""What may be done in the shop; each is an event."""


@dataclass(frozen=True)
class _Visitor:
    """Who is in the shop."""

    cookie: str
    card: str
    is_new: bool = False

    @property
    def identifiers(self) -> dict[str, str]:
        """What the shop's page knows them by."""
        return {"cookie": self.cookie, **({"loyalty_card": self.card} if self.card else {})}


async def shop(visit: Visit) -> Response:
    """The shop, with a shelf and what ubiquo sees."""
    if not visit.runtime.home.settings.demo_shop:
        return visit.page("shop_closed.html")
    return await _shop(visit, _visitor(visit), "shop.html")


async def act(visit: Visit) -> Response:
    """Do something in the shop: one event, and everything beside it anew."""
    _open(visit)
    visitor, name = _visitor(visit), visit.said("what")
    if name not in ACTIONS:
        raise RefusedError(400, visit.words.say("There is nothing of that kind to do here."))
    items = ShownItems(visit.runtime.engine)
    item_id, query = visit.said("item_id"), visit.said("query")[:200]
    lines: list[dict[str, Any]] = []
    if name == "purchase":
        present = await visit.port.work(_present, visit.runtime, visitor)
        lines = [{"item_id": i, "quantity": n} for i, n in zip(present["cart_item_ids"], present["cart_quantities"], strict=True)]
    elif item_id:
        if not items.knows(item_id):
            raise RefusedError(404, visit.words.say("There is no such item."))
        lines = [{"item_id": item_id}]
    if name != "search" or query:
        await _tell(visit, visitor, name, items=lines, **({"query": query} if name == "search" else {}))
    return await _shop(visit, visitor, "_shop.html", looked_at=item_id if name == "view_item" else "")


async def sign_in(visit: Visit) -> Response:
    """Come in as the holder of a card, or as somebody new."""
    _open(visit)
    card = await visit.port.work(_some_card, visit.runtime) if visit.said("as") == "known" else visit.said("card")
    if card:
        try:
            known = visit.runtime.identities.resolve({"loyalty_card": card}, visit.runtime.phone_region)
        except IdentifierError as error:
            raise RefusedError(400, str(error)) from None
        if known is None:
            raise RefusedError(404, visit.words.say("Nobody has that card.") + f" {card[:64]}")
        visitor = _Visitor(_visitor(visit).cookie, card, is_new=True)
        await _tell(visit, visitor, "login")
    else:
        # another browser: what the one before did stays theirs
        visitor = _Visitor(uuid.uuid4().hex, "", is_new=True)
    found = visit.go("/shop")
    _remember(found, visitor)
    return found


def _some_card(runtime: Runtime) -> str:
    """The card of a customer picked at random; empty where no card is known."""
    customers = runtime.identities.customers()
    for _ in range(TRIES if customers else 0):
        keys = [k for k in runtime.identities.members(random.choice(customers)) if k.startswith("loyalty_card:")]
        if cards := list(runtime.contacts.identifiers(keys).values()):
            return cards[0]
    return ""


def _open(visit: Visit) -> None:
    if not visit.runtime.home.settings.demo_shop:
        raise RefusedError(403, "the demo shop is closed on this installation (UBIQUO_DEMO_SHOP)")


def _visitor(visit: Visit) -> _Visitor:
    cookie = visit.request.cookies.get(VISITOR, "")
    if not cookie.isalnum() or len(cookie) != 32:
        return _Visitor(uuid.uuid4().hex, "", is_new=True)
    return _Visitor(cookie, unquote(visit.request.cookies.get(CARD, "")))


def _remember(response: Response, visitor: _Visitor) -> None:
    for name, value in ((VISITOR, visitor.cookie), (CARD, quote(visitor.card))):
        response.set_cookie(name, value, path=ROOT, httponly=True, samesite="strict")


async def _tell(visit: Visit, visitor: _Visitor, name: str, **more: Any) -> None:
    event = {
        "event_id": f"shop-{uuid.uuid4().hex}", "name": name, "occurred_at": visit.runtime.clock().isoformat(), "channel": "web",
        "identifiers": visitor.identifiers, "session_id": f"shop-{visitor.cookie}", **more,
    }  # fmt: skip
    [receipt] = (await visit.port.take([event]))["events"]
    if receipt["status"] == "rejected":
        raise RefusedError(400, f"{receipt.get('field')}: {receipt.get('reason')}")


async def _shop(visit: Visit, visitor: _Visitor, template: str, looked_at: str = "") -> Response:
    items, model = ShownItems(visit.runtime.engine), model_that(visit.runtime.engine, "items")
    if model is None:
        raise RefusedError(503, "no model recommends items: train one (python -m training recommendations)")
    attribute = next((a for a in ("department", "category", "type") if a in items.texts), "")
    wanted = visit.said("shelf") or visit.query.get("shelf", "")
    departments = items.commonest(attribute, DEPARTMENTS)
    shelf = wanted if wanted in departments else ""
    whom: dict[str, Any] = {"identifiers": visitor.identifiers}
    about: dict[str, Any] = {**whom, "limit": ON_A_SHELF, **({"include": {attribute: [shelf]}} if shelf else {})}
    goods = (await visit.port.ask(f"/v1/{model}", about))["items"]
    beside = []
    if looked_at:
        for listing in ("similar", "bought_together"):
            answer = await visit.port.ask(f"/v1/{model}", {**whom, "listing": listing, "item_ids": [looked_at], "limit": 4})
            beside.append((listing, answer["items"]))
    before = [each for each in (visit.said("before") or "").split(",") if each]
    watched = await _watched(visit, visitor, model, before)
    found = visit.page(
        template, departments=departments, shelf=shelf, goods=goods, beside=beside, visitor=visitor, items=items, attribute=attribute,
        looked_at=looked_at, **watched,
    )  # fmt: skip
    if visitor.is_new:
        _remember(found, visitor)
    return found


async def _watched(visit: Visit, visitor: _Visitor, model: str, before: Sequence[str]) -> dict[str, Any]:
    """What ubiquo sees and would say, of whoever is in the shop."""
    runtime, whom = visit.runtime, {"identifiers": visitor.identifiers}
    likes = await visit.port.ask(f"/v1/{model}", {**whom, "listing": "also_like", "limit": 5})
    scores, offers = [], None
    for name, settings in runtime.engine.models.items():
        if name in runtime.engine.missing():
            continue
        if settings.kind.answers == "score":
            scores.append({"name": name, **await visit.port.ask(f"/v1/{name}", {**whom, "dry_run": True})})
        elif settings.kind.answers == "offers" and offers is None:
            offers = await visit.port.ask(f"/v1/{name}", {**whom, "channel": "web", "dry_run": True})
    seen = await visit.port.work(_seen, runtime, likes["customer_id"], visit.key.name if visit.key else "")
    present = await visit.port.work(_present, runtime, visitor)
    lines = event_lines(seen["events"], ShownItems(runtime.engine), visit.words)
    fresh = {item["item_id"] for item in likes["items"]} - set(before) if before else set()
    told = {"likes": likes, "fresh": fresh, "scores": scores, "offers": offers}
    return {**told, "present": present, "lines": lines, "runs": seen["runs"]}


def _present(runtime: Runtime, visitor: _Visitor) -> Mapping[str, Any]:
    customer = runtime.identities.resolve(visitor.identifiers, runtime.phone_region)  # type: ignore[arg-type]
    return runtime.reader.present(customer, runtime.clock()) or NOWHERE


def _seen(runtime: Runtime, customer_id: str | None, reader: str) -> dict[str, Any]:
    """The latest of the customer's timeline, and where they stand in journeys."""
    if customer_id is None:
        return {"events": [], "runs": []}
    # what was just done belongs on the page, and starts journeys
    runtime.intake.drain()
    lived = timeline_of(runtime.home, runtime.identities, runtime.consents, customer_id, LATEST)
    runs = []
    for run in runtime.journeys.runs.active(runtime.who(customer_id).ids):
        plan = runtime.journeys.runner.plans.plans.get(run.journey)
        step = plan.operations[run.position].told() if plan is not None and plan.digest == run.plan else ""
        runs.append({"journey": run.journey, "step": step, "due": None if run.due_at is None else moment_of(run.due_at)})
    runtime.audit.note(runtime.clock(), reader, "read", customer_id, "done")
    return {"events": lived.rows, "runs": runs}


PAGES = [
    Page("/shop", shop, "decide", menu="Demo shop", group="Overview", also=("read_customer",)),
    Page("/shop/act", act, "ingest", method="POST", also=("decide", "read_customer")),
    Page("/shop/sign-in", sign_in, "ingest", method="POST", also=("decide", "read_customer")),
]
"""Whoever comes in with a card sees beside the shop what its holder did: that is to read a customer."""
