"""What a customer lives through in every channel, and what the shop then knows and may do. Everything over real HTTP."""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from scene import Service, command, customer, eventually, loyalty_cards

from features.catalogue.shop import Shop
from features.people.consent import Consents
from features.people.identity import Identities
from models.registry import model_names

ITEM, OTHER_ITEM = "1082185", "1029743"


class Story:
    """A person and the shop's service; each step is one request."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.tag = uuid.uuid4().hex[:12]

    def email(self, who: str = "ada") -> str:
        return f"{who}.{self.tag}@example.org"

    def name(self, what: str) -> str:
        return f"{what}-{self.tag}"

    def now(self) -> datetime:
        as_of = self.service.ask("churn", {"customer_id": "nobody"})["as_of"]
        return datetime.fromisoformat(as_of).astimezone(UTC)

    def happens(self, name: str, who: dict[str, str], **more: Any) -> str | None:
        """Send one event; the customer it was taken for."""
        items = [{"item_id": item} for item in more.pop("items", [])]
        event = {
            "event_id": uuid.uuid4().hex, "name": name, "occurred_at": more.pop("at", self.now()).isoformat(), "identifiers": who,
            **({"items": items} if items else {}), **more,
        }  # fmt: skip
        answer = self.service.ask("events", event)
        assert answer["accepted"] == 1, answer
        found: str | None = answer["events"][0]["customer_id"]
        return found

    def consents(self, who: dict[str, str], **said: Any) -> None:
        self.happens("consent_update", who, consent={**said, "policy_version": "2018-01", "source": "web form"})

    def erases(self, customer: str) -> dict[str, Any]:
        status, said = self.service.get(f"/v1/customers/{customer}", "DELETE")
        begun = json.loads(said)
        while status == 202:
            time.sleep(0.2)
            status, said = self.service.get(begun["ask"])
        assert status == 200, said
        receipt: dict[str, Any] = json.loads(said)
        return receipt

    def recommended(self, who: dict[str, str], **more: Any) -> dict[str, Any]:
        return self.service.ask("recommendations", {"identifiers": who, "limit": 5, **more})

    def profile(self, who: dict[str, str]) -> dict[str, Any]:
        return self.service.ask("profile", {"identifiers": who})


@pytest.fixture(params=["files", "servers"])
def story(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Story:
    """On the files of one home, and with PostgreSQL and Redis."""
    if request.param == "files":
        return Story(request.getfixturevalue("own_service"))
    service, servers = request.getfixturevalue("far_service")
    for name, value in servers.items():
        monkeypatch.setenv(name, value)
    return Story(service)


def test_a_search_gives_no_email_without_permission_and_one_after_she_consents(story: Story) -> None:
    her = {"email": story.email()}
    story.happens("search", her, channel="web", query="bananas")
    story.happens("view_item", her, channel="web", items=[ITEM])
    before = story.recommended(her, channel="email")
    assert before["items"] == []
    assert "not permitted contact by email" in before["fallback"]
    assert len(story.recommended(her, channel="web")["items"]) == 5, "on the page that she opened herself she is answered"
    story.consents(her, permissions={"email": True})
    assert len(story.recommended(her, channel="email")["items"]) == 5
    story.happens("message_unsubscribe", her, channel="email")
    assert story.recommended(her, channel="email")["items"] == []


def test_a_till_receipt_with_a_loyalty_card_joins_last_nights_anonymous_session(story: Story) -> None:
    browser, card, receipt = {"cookie": story.name("cookie")}, {"loyalty_card": story.name("card")}, {"receipt": story.name("receipt")}
    last_night = story.now() - timedelta(hours=12)
    anonymous = story.happens("view_item", browser, channel="web", items=[ITEM], at=last_night)
    story.happens("begin_checkout", {**browser, **receipt}, channel="web", items=[ITEM], at=last_night + timedelta(minutes=9))
    story.happens("purchase", {**card, **receipt}, channel="store", items=[OTHER_ITEM])
    known = story.profile(card)
    assert story.profile(browser)["customer_id"] == known["customer_id"] == anonymous
    assert [e["name"] for e in known["events"]] == ["purchase", "begin_checkout", "view_item"]
    assert [e["channel"] for e in known["events"]] == ["store", "web", "web"]


def test_an_ad_an_email_a_call_and_a_booking_become_one_timeline(story: Story) -> None:
    cookie, email, phone = (
        {"cookie": story.name("cookie")},
        {"email": story.email()},
        {"phone": "+44 20 7946 " + f"{int(story.tag[:4], 16) % 10_000:04d}"},
    )
    account = {"user_id": story.name("user")}
    story.happens("ad_impression", cookie, channel="ads", campaign_id="winter")
    story.happens("ad_click", cookie, channel="ads", campaign_id="winter")
    story.happens("sign_up", {**account, **cookie, **email}, channel="web", traits={"first_name": "Ada"})
    story.happens("message_open", {"email": story.email().upper()}, channel="email", campaign_id="welcome")
    story.happens("identify", {**account, **phone}, channel="call_centre")
    story.happens("call", phone, channel="call_centre")
    story.happens("booking", account, channel="app")
    view = story.profile(account)
    assert {story.profile(each)["customer_id"] for each in (cookie, email, phone)} == {view["customer_id"]}
    assert [e["name"] for e in reversed(view["events"])] == [
        "ad_impression", "ad_click", "sign_up", "message_open", "identify", "call", "booking",
    ]  # fmt: skip
    assert view["person"] == {"first_name": "Ada"}
    assert {"kind": "email", "value": story.email()} in view["identifiers"]


def test_an_associate_sees_what_the_customer_who_just_signed_in_is_at(story: Story) -> None:
    cookie, account = {"cookie": story.name("cookie")}, {"user_id": story.name("user")}
    story.happens("search", cookie, channel="web", query="red shoes", session_id="visit")
    story.happens("add_to_cart", cookie, channel="web", items=[ITEM], session_id="visit")
    story.happens("login", {**account, **cookie}, channel="app", at=story.now() + timedelta(seconds=1))
    now = story.profile(account)["now"]
    assert now["cart_item_ids"] == [ITEM]
    assert (now["session_queries"], now["session_intent"], now["session_is_open"]) == (["red shoes"], "buying", True)
    assert (now["last_channel"], set(now["channels_used"])) == ("app", {"app", "web"})
    story.consents(account, purposes={"personalization": False})
    assert story.profile(account)["now"] is None


def test_a_households_tablet_is_not_merged_into_one_person(story: Story) -> None:
    tablet = {"device": story.name("tablet")}
    hers, his = {"user_id": story.name("her")}, {"user_id": story.name("him")}
    she = story.happens("login", {**hers, **tablet}, channel="app")
    assert story.happens("view_item", tablet, channel="app", items=[ITEM]) == she, "until a second person uses it, it is hers"
    he = story.happens("login", {**his, **tablet}, channel="app")
    assert he not in (None, she)
    assert story.happens("view_item", tablet, channel="app", items=[OTHER_ITEM]) is None, "whose finger it was nobody can tell"
    assert story.happens("view_item", {**hers, **tablet}, channel="app", items=[ITEM]) == she


def test_a_withdrawn_consent_changes_the_next_answer(story: Story) -> None:
    card = {"loyalty_card": loyalty_cards(story.service.home)[3]}
    before = story.recommended(card)
    assert before["fallback"] is None
    assert story.service.ask("churn", {"identifiers": card})["probability"] is not None
    story.consents(card, purposes={"personalization": False})
    after = story.recommended(card)
    assert "does not allow" in after["fallback"]
    assert after["customer_id"] is None
    assert story.service.ask("churn", {"identifiers": card})["probability"] is None
    eventually(lambda: story.profile(card)["events"] == [])
    assert story.profile(card)["withheld"] > 0
    story.consents(card, purposes={"personalization": True})
    eventually(lambda: [i["item_id"] for i in story.recommended(card)["items"]] == [i["item_id"] for i in before["items"]])


def test_tomorrows_email_keeps_consent_and_permission_and_everybody_is_in_the_file(story: Story, tmp_path: Path) -> None:
    home = story.service.home
    withdrawn, permitted, silent = ({"loyalty_card": card} for card in loyalty_cards(home)[5:8])
    story.consents(withdrawn, purposes={"personalization": False}, permissions={"email": True})
    story.consents(permitted, permissions={"email": True})
    asked = {name: story.recommended(who)["decision_id"] for name, who in (("withdrawn", withdrawn), ("permitted", permitted))}
    out = tmp_path / "tomorrow.jsonl"
    done = command("serving", "score", "recommendations", "--channel", "email", "--limit", "3", "--out", str(out), home=home.root)
    assert done.returncode == 0, done.stdout + done.stderr
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, out.read_text().splitlines()):
        lines.setdefault(line["customer_id"], []).append(line)
    assert {customer(card) for card in loyalty_cards(home)[:1000]} <= set(lines), "every customer is in the file"
    names = {name: customer(who["loyalty_card"]) for name, who in (("withdrawn", withdrawn), ("permitted", permitted), ("silent", silent))}
    assert len(lines[names["permitted"]]) == 3
    [said] = lines[names["silent"]]
    assert (said["id"], said["fallback"]) == (None, "the customer has not permitted contact by email")
    [said] = lines[names["withdrawn"]]
    assert (said["id"], said["score"]) == (None, None)
    assert "does not allow" in said["fallback"]

    def logged() -> dict[str, Any]:
        rows = pq_rows(home.decisions / "table")
        return {row["decision_id"]: row for row in rows}

    eventually(lambda: set(asked.values()) <= set(logged()))
    decisions = logged()
    assert decisions[asked["withdrawn"]]["customer_id"] is None
    assert decisions[asked["withdrawn"]]["features"] == "{}"
    assert decisions[asked["permitted"]]["customer_id"] == names["permitted"]


@pytest.mark.parametrize("kind", model_names())
def test_no_kind_of_answer_goes_out_by_a_channel_without_permission(story: Story, tmp_path: Path, kind: str) -> None:
    """Over HTTP and in batch, by one rule and in the same words, whatever else stands against an answer."""
    home, refusal = story.service.home, "the customer has not permitted contact by email"
    permitted, silent, withdrawn, unsubscribed = ({"loyalty_card": card} for card in loyalty_cards(home)[10:14])
    story.consents(permitted, permissions={"email": True})
    story.consents(unsubscribed, permissions={"email": True})
    story.happens("message_unsubscribe", unsubscribed, channel="email")
    story.consents(withdrawn, purposes={"personalization": False})
    unknown = {"loyalty_card": story.name("card")}
    for who in (silent, unsubscribed, withdrawn, unknown):
        answer = story.service.ask(kind, {"identifiers": who, "channel": "email"})
        assert answer["fallback"] == refusal
        assert found_in(answer) in ([], None)
        assert refusal not in (story.service.ask(kind, {"identifiers": who, "channel": "web"})["fallback"] or "")
    allowed = story.service.ask(kind, {"identifiers": permitted, "channel": "email"})
    assert refusal not in (allowed["fallback"] or "")
    assert found_in(allowed) == found_in(story.service.ask(kind, {"identifiers": permitted}))
    # at once: whoever is acknowledged now is known to a file that is begun now
    out = tmp_path / "tomorrow.jsonl"
    done = command("serving", "score", kind, "--channel", "email", "--limit", "2", "--out", str(out), home=home.root)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = {customer(who["loyalty_card"]) for who in (silent, withdrawn, unsubscribed)}
    refused = {line["customer_id"]: line for line in lines if line["fallback"] == refusal}
    assert names <= set(refused)
    assert {(line["id"], line["score"], line["rank"]) for line in refused.values()} == {(None, None, 1)}
    theirs = [line for line in lines if line["customer_id"] == customer(permitted["loyalty_card"])]
    assert theirs
    assert customer(permitted["loyalty_card"]) not in refused
    assert [line["score"] for line in theirs] != [None] or found_in(allowed) in ([], None)
    consents, identities = Consents(home, Shop.load(home).consent), Identities(home)
    for line in lines:
        may = "email" not in consents.forbidden_channels(identities.members(line["customer_id"]))
        assert may == (line["customer_id"] not in refused), line


def found_in(answer: dict[str, Any]) -> Any:
    """What an answer holds, of whatever kind it is: a probability, or the ids of what was chosen."""
    if "probability" in answer:
        return answer["probability"]
    return [choice.get("item_id") or choice["offer_id"] for choice in answer.get("items", answer.get("offers"))]


def pq_rows(table: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = DeltaTable(str(table)).to_pyarrow_table().to_pylist() if table.exists() else []
    return rows


def test_an_erased_person_stays_erased(story: Story) -> None:
    her = {"loyalty_card": story.name("card"), "email": story.email("grace"), "cookie": story.name("cookie")}
    past = {
        "event_id": f"order-{story.tag}", "name": "purchase", "occurred_at": (story.now() - timedelta(days=2)).isoformat(),
        "identifiers": her, "items": [{"item_id": ITEM}], "channel": "store",
    }  # fmt: skip
    assert story.service.ask("events", past)["accepted"] == 1
    customer = story.profile(her)["customer_id"]
    receipt = story.erases(customer)
    assert receipt["proof"]["found"] == [], receipt
    assert receipt["places"]["events"] == 1
    assert story.service.post("/v1/profile", {"identifiers": her})[0] == 404
    assert story.service.ask("events", past)["erased"] == 1, "the same order, sent again"
    assert story.service.ask("events", {**past, "event_id": "another"})["erased"] == 1, "an order of before, under another number"
    late = {**past, "event_id": "late", "name": "view_item", "occurred_at": story.now().isoformat()}
    assert story.service.ask("events", late)["erased"] == 1, "her browser goes on sending"
    assert story.service.post("/v1/profile", {"identifiers": her})[0] == 404
    assert story.happens("sign_up", {"email": story.email("grace")}, channel="web") is not None, "she comes back by her own will"
    assert len(story.profile({"email": story.email("grace")})["events"]) == 1
