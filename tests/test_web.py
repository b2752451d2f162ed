"""What the developer of a shop's pages does: a key in the page's source, Segment's library in a browser, lists for an unknown visitor."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from scene import NEW_YEAR, Pages, Service, copy_home, eventually

from features.events.event import RejectedEvent
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.sources.catalogue_file import load as load_catalogue
from features.sources.replay import replay
from features.state.home import Home
from features.store.event_log import EventLog, connect
from serving.bootstrap import open_engine
from serving.console.application import PAGES
from serving.decide.questions import Position, RecommendationsRequest
from serving.decide.who import NOBODY
from serving.privacy.keys import Key, Keys

ZONE = "America/New_York"
ITEM, OTHER = "1082185", "981760"
SHOP_PAGE = """<!doctype html><meta charset="utf-8"><title>Bananas</title><script src="/segment/index.js"></script>
<script>
const analytics = AnalyticsNext.AnalyticsBrowser.load({ writeKey: "%(key)s", cdnURL: "%(url)s" });
async function recommended(question) {
  let answer;
  do answer = await fetch("%(url)s/v1/recommendations", { method: "POST",
    headers: { "Authorization": "Bearer %(key)s", "Content-Type": "application/json" }, body: JSON.stringify(question) });
  while (answer.status === 503);
  return [answer.status, await answer.json()];
}
</script>"""


@pytest.fixture
def keyed(keyed_service: tuple[Service, dict[str, str]]) -> tuple[Service, dict[str, str]]:
    return keyed_service


@pytest.fixture
def url(keyed: tuple[Service, dict[str, str]]) -> str:
    return f"http://127.0.0.1:{keyed[0].port}"


@pytest.fixture(scope="module")
def library(pages: Pages, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Segment's library for browsers, as npm gives it, among the shop's pages."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("node and npm are not installed (apt-get install nodejs npm)")
    folder = tmp_path_factory.mktemp("segment-browser")
    (folder / "package.json").write_text('{"name": "page", "private": true}')
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", "@segment/analytics-next"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (folder / "node_modules" / "@segment" / "analytics-next" / "dist" / "umd").glob("*.js"):
        pages.files[f"/segment/{path.name}"] = path.read_bytes()


@pytest.fixture
def page(keyed: tuple[Service, dict[str, str]], url: str, pages: Pages, library: None, browser: Browser) -> Iterator[Page]:
    """The shop's page in a browser of a visitor who was never here."""
    pages.files["/"] = (SHOP_PAGE % {"key": keyed[1]["browser"], "url": url}).encode()
    context = browser.new_context()
    opened = context.new_page()
    # a browser that the tests drive reaches nobody but this machine
    elsewhere: list[str] = []
    opened.on("request", lambda request: None if "//127.0.0.1:" in request.url else elsewhere.append(request.url))
    opened.goto(f"{pages.origin}/?utm_source=x")
    yield opened
    assert not elsewhere
    context.close()


def logged(home: Home, cookie: str) -> list[dict[str, Any]]:
    """What the log holds of a cookie."""
    log, identities = EventLog(home, ZONE), Identities(home)
    rows = connect().execute(
        """SELECT event_id, name, source, to_json(items)::VARCHAR, decision_id, to_json(identifiers)::VARCHAR FROM read_parquet(?)
           WHERE list_contains(list_transform(identifiers, lambda i: i.key || ':' || i.value), ?) ORDER BY received_at""",
        [log.files(), identities.vault.key("cookie", cookie)],
    )
    names = ("event_id", "name", "source", "items", "decision_id", "identifiers")
    return [dict(zip(names, row, strict=True)) for row in rows.fetchall()]


class TestSegmentInABrowser:
    def test_the_library_works_unchanged_and_the_next_answer_is_another(self, keyed: tuple[Service, dict[str, str]], page: Page) -> None:
        service, _ = keyed
        cookie = page.evaluate("analytics.ready().then(() => analytics.user()).then((user) => user.anonymousId())")
        question = {"identifiers": {"cookie": cookie}, "listing": "also_like", "limit": 20}
        status, before = page.evaluate("recommended", question)
        assert status == 200, before
        assert before["customer_id"] is None
        assert "nothing is known" in before["fallback"]
        decision = before["decision_id"]
        with page.expect_response(lambda response: response.url.endswith("/v1/p")) as paged:
            page.evaluate("analytics.page()")
        with page.expect_response(lambda response: response.url.endswith("/v1/t")) as tracked:
            page.evaluate(f"analytics.track('Product Viewed', {{ product_id: '{ITEM}', name: 'Bananas', decisionId: '{decision}' }})")
        assert (paged.value.status, tracked.value.status) == (200, 200)
        status, after = page.evaluate("recommended", question)
        assert status == 200
        assert after["fallback"] is None
        assert [i["item_id"] for i in after["items"]] != [i["item_id"] for i in before["items"]]
        assert any(i.get("because_of") == ITEM for i in after["items"])
        eventually(lambda: len(logged(service.home, cookie)) == 2)
        first, second = logged(service.home, cookie)
        assert (first["name"], second["name"], second["decision_id"]) == ("page_view", "view_item", decision)
        assert ITEM in second["items"]
        assert {first["source"], second["source"]} == {"page segment"}
        assert first["event_id"].startswith("page-")
        customer = Identities(service.home).resolve({"cookie": cookie})
        assert customer is not None
        held = Contacts(service.home, Identities(service.home).vault).of(Identities(service.home).members(customer))
        assert {(c.field, c.value) for c in held} == {("identifier", cookie)}, "the title of a page, and a product's name, are nobody's"

    def test_who_somebody_is_a_page_cannot_tell(self, keyed: tuple[Service, dict[str, str]], page: Page) -> None:
        service, _ = keyed
        cookie = page.evaluate("analytics.ready().then(() => analytics.user()).then((user) => user.anonymousId())")
        user = f"user-{uuid.uuid4().hex}"
        with page.expect_response(lambda response: response.url.endswith("/v1/i")) as identified:
            page.evaluate(f"analytics.identify('{user}', {{ email: 'ada@example.org', firstName: 'Ada' }})")
        assert identified.value.status == 200
        assert set(identified.value.json()["left_out"]) == {"identifiers.user_id", "identifiers.email", "personal"}
        for call in (f"alias('{user}')", "track('Order Completed', { order_id: 'o-1', products: [{ product_id: '1082185', price: 9 }] })",
                     "track('Cart Viewed')"):  # fmt: skip
            page.evaluate(f"analytics.{call}")
        eventually(lambda: [row["name"] for row in logged(service.home, cookie)] == ["identify", "view_cart"])
        identities = Identities(service.home)
        assert identities.resolve({"user_id": user}) is None
        assert all("user_id" not in row["identifiers"] for row in logged(service.home, cookie))
        eventually(lambda: sorted(x["field"] for x in letters(service.home, cookie)) == ["name", "name"])

    def test_a_page_of_another_shop_reads_nothing(self, keyed: tuple[Service, dict[str, str]], url: str, page: Page) -> None:
        stranger = Pages()
        try:
            stranger.files["/"] = (SHOP_PAGE % {"key": keyed[1]["browser"], "url": url}).encode()
            page.goto(stranger.origin)
            assert page.evaluate("recommended({}).then(() => 'read', (error) => error.name)") == "TypeError"
        finally:
            stranger.close()


def letters(home: Home, cookie: str) -> list[dict[str, Any]]:
    return [x for x in EventLog(home, ZONE).letters.read() if cookie in x["raw"]]


def sent(cookie: str | None = None, name: str = "view_item", **more: Any) -> dict[str, Any]:
    """An event as a page sends it by hand."""
    who = {"identifiers": {"cookie": cookie}} if cookie else {}
    return {"event_id": uuid.uuid4().hex, "name": name, "occurred_at": NEW_YEAR.isoformat(), "items": [{"item_id": ITEM}], **who, **more}


class TestAPublicKey:
    """What everybody may do who reads the source of a page."""

    @pytest.fixture
    def key(self, keyed: tuple[Service, dict[str, str]]) -> dict[str, str]:
        return {"authorization": f"Bearer {keyed[1]['browser']}"}

    @pytest.mark.parametrize(
        ("more", "field"),
        [
            ({"identifiers": {"cookie": "c", "user_id": "u"}}, "identifiers.user_id"),
            ({"identifiers": {"loyalty_card": "1"}}, "identifiers.loyalty_card"),
            ({"identifiers": {"email": "ada@example.org"}}, "identifiers.email"),
            ({}, "identifiers.cookie"),
            ({"identifiers": {"cookie": "undefined"}}, "identifiers.cookie"),
            ({"identifiers": {"cookie": "c"}, "name": "alias", "previous": {"user_id": "u"}}, "name"),
            ({"identifiers": {"cookie": "c"}, "previous": {"user_id": "u"}}, "previous"),
            ({"identifiers": {"cookie": "c"}, "personal": {"first_name": "Ada"}}, "personal"),
            ({"identifiers": {"cookie": "c"}, "consent": {"purposes": {"analytics": False, "personalization": True}}},
             "consent.purposes.personalization"),
            ({"identifiers": {"cookie": "c"}, "name": "consent_update", "consent": {"permissions": {"email": True}}}, "consent.permissions.email"),
            ({"identifiers": {"cookie": "c"}, "event_id": "x" * 253}, "event_id"),
            *(({"identifiers": {"cookie": "c"}, "name": name, "offer_id": "o", "campaign_id": "x"}, "name") for name in (
                "purchase", "refund", "offer_redeem", "offer_accept", "sign_up", "login", "erasure", "message_sent", "message_click", "call")),
        ],
    )  # fmt: skip
    def test_tells_nothing_that_counts_as_proof(
        self, keyed: tuple[Service, dict[str, str]], key: dict[str, str], more: dict[str, Any], field: str
    ) -> None:
        status, problem = keyed[0].post("/v1/events", sent(**more), **key)
        assert (status, problem["field"]) == (400, field)
        assert "server" in problem["detail"] or field in ("event_id", "identifiers.cookie")

    @pytest.mark.parametrize(
        ("path", "body", "field"),
        [
            ("recommendations", {"customer_id": "c_1"}, "customer_id"),
            ("recommendations", {"identifiers": {"cookie": "c", "email": "ada@example.org"}}, "identifiers.email"),
            ("recommendations", {"channel": "email"}, "channel"),
            ("recommendations", {"explain": True}, "explain"),
            ("next-best-offer", {}, None),
            ("churn", {}, None),
            ("profile", {}, None),
            ("import", {"batch": []}, None),
        ],
    )
    def test_asks_for_lists_of_its_own_visitor_only(
        self, keyed: tuple[Service, dict[str, str]], key: dict[str, str], path: str, body: Any, field: str | None
    ) -> None:
        status, problem = keyed[0].post(f"/v1/{path}", body, **key)
        assert (status, problem.get("field")) == (403, field)
        assert "server" in problem["detail"]

    def test_opens_no_customer_and_no_metrics(self, keyed: tuple[Service, dict[str, str]], key: dict[str, str]) -> None:
        for method, path in (
            ("GET", "/metrics"),
            ("GET", "/v1/customers/c_1"),
            ("DELETE", "/v1/customers/c_1"),
            ("GET", "/v1/customers/c_1/export"),
        ):
            assert keyed[0].get(path, method, **key)[0] == 403
        for path in ("/bento/events", "/bento/recommendations", "/mp/collect"):
            assert keyed[0].post(path, {"request": {}}, **key)[0] == 403

    def test_opens_no_page_of_the_console(self) -> None:
        assert not [page.path for page in PAGES if Key("page", frozenset({"browser"})).may(page.scope)]

    def test_takes_no_id_that_a_servers_event_will_have(self, keyed: tuple[Service, dict[str, str]], key: dict[str, str]) -> None:
        service, tokens = keyed
        name, cookie = uuid.uuid4().hex, uuid.uuid4().hex
        status, answer = service.post("/v1/events", sent(cookie, event_id=name), **key)
        assert (status, answer["accepted"], answer["events"][0]["customer_id"]) == (200, 1, None)
        assert service.post("/v1/events", sent(cookie, event_id=name), **key)[1]["duplicates"] == 1
        money = sent(None, "purchase", event_id=name, identifiers={"loyalty_card": name})
        assert service.post("/v1/events", money, authorization=f"Bearer {tokens['ingest']}")[1]["accepted"] == 1

    def test_a_withdrawal_is_heard(self, keyed: tuple[Service, dict[str, str]], key: dict[str, str]) -> None:
        service, cookie = keyed[0], uuid.uuid4().hex
        asked = {"identifiers": {"cookie": cookie}, "listing": "session"}
        assert service.post("/v1/events", sent(cookie), **key)[0] == 200
        assert service.post("/v1/recommendations", asked, **key)[1]["fallback"] is None
        said = sent(cookie, "consent_update", items=[], consent={"purposes": {"personalization": False}})
        assert service.post("/v1/events", said, **key)[0] == 200
        assert "does not allow" in service.post("/v1/recommendations", asked, **key)[1]["fallback"]

    def test_a_refused_event_stays_refused_when_its_letter_is_replayed(
        self, keyed: tuple[Service, dict[str, str]], key: dict[str, str]
    ) -> None:
        service, cookie = keyed[0], uuid.uuid4().hex
        bought = {"event": "Order Completed", "anonymousId": cookie, "properties": {"product_id": ITEM, "price": 5}}
        assert service.post("/v1/t", bought, **key) == (200, {"success": True})
        assert service.post("/v1/events", sent(cookie, "purchase"), **key)[0] == 400
        eventually(lambda: len(letters(service.home, cookie)) == 2)
        told = replay(service.home, letters(service.home, cookie), NEW_YEAR)
        assert [(each.outcome, each.field) for each in told] == [("rejected", "name")] * 2

    def test_its_requests_are_small(self, keyed: tuple[Service, dict[str, str]], key: dict[str, str]) -> None:
        assert keyed[0].post("/v1/events", b" " * 70_000, **key)[0] == 413

    def test_it_stands_alone(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="read by everybody"):
            Keys(Home(tmp_path)).create("page", ["browser", "ingest"], NEW_YEAR)

    def test_only_it_stands_in_the_address_of_the_librarys_settings(self, keyed: tuple[Service, dict[str, str]]) -> None:
        service, tokens = keyed
        status, text = service.get(f"/v1/projects/{tokens['browser']}/settings", origin="https://shop.example")
        [[name, sends_to]] = json.loads(text)["integrations"].items()
        assert (status, name, sends_to["protocol"]) == (200, "Segment.io", "https"), "a page under TLS can call nothing else"
        assert sends_to["apiHost"] == f"127.0.0.1:{service.port}/v1"
        assert service.get(f"/v1/projects/{tokens['admin']}/settings")[0] == 403
        assert service.get("/v1/projects/wrong/settings")[0] == 401
        assert service.get(f"/v1/projects/{tokens['browser']}")[0] in (401, 404)
        assert service.get(f"/v1/projects/{tokens['browser']}/settings", "DELETE")[0] == 405


class TestAnUnknownVisitor:
    """Over HTTP, with the key of a page and a cookie that nobody has seen."""

    @pytest.fixture
    def ask(self, keyed: tuple[Service, dict[str, str]]) -> Callable[..., dict[str, Any]]:
        service, tokens = keyed

        def asked(path: str = "recommendations", **body: Any) -> dict[str, Any]:
            status, answer = service.post(f"/v1/{path}", body, authorization=f"Bearer {tokens['browser']}")
            assert status == 200, answer
            return answer

        return asked

    @pytest.mark.parametrize("listing", ["basket", "session", "similar", "bought_together"])
    def test_the_items_of_the_page_or_the_cart_answer_from_the_first_view(self, ask: Callable[..., dict[str, Any]], listing: str) -> None:
        who = {"identifiers": {"cookie": uuid.uuid4().hex}, "listing": listing, "channel": "web"}
        first, second = ask(**who, item_ids=[ITEM]), ask(**who, item_ids=[OTHER])
        assert (first["fallback"], second["fallback"]) == (None, None)
        assert ids(first) != ids(second)
        assert {i["because_of"] for i in first["items"] if "because_of" in i} == {ITEM}
        assert not {ITEM} & set(ids(first))
        both = ask(**who, item_ids=[ITEM, OTHER])
        assert not {ITEM, OTHER} & set(ids(both)) or listing in ("similar", "bought_together")
        beside = ask(**who, item_ids=[ITEM], exclude_item_ids=ids(first)[:2])
        assert not set(ids(first)[:2]) & set(ids(beside)), "what lies in the cart is left out beside the page's items"

    def test_one_look_and_the_lists_of_the_visit_go_by_it(self, ask: Callable[..., dict[str, Any]]) -> None:
        cookie = uuid.uuid4().hex
        who = {"identifiers": {"cookie": cookie}}
        before = {listing: ask(**who, listing=listing) for listing in ("session", "also_like", "basket")}
        assert all(answer["fallback"] for answer in before.values())
        ask("events", **sent(cookie, items=[{"item_id": ITEM}], channel="web"))
        session, also = ask(**who, listing="session"), ask(**who, listing="also_like")
        assert (session["fallback"], also["fallback"]) == (None, None)
        assert ids(session) == ids(ask(listing="session", item_ids=[ITEM])), "as if the page had named what was looked at"
        assert {i["because_of"] for i in session["items"] if "because_of" in i} == {ITEM}
        assert ids(also) != ids(before["also_like"])
        assert ITEM not in ids(also)
        ask("events", **sent(cookie, "add_to_cart", items=[{"item_id": OTHER}], channel="web"))
        basket = ask(**who, listing="basket")
        assert (basket["fallback"], ids(basket)) == (None, ids(ask(listing="basket", item_ids=[OTHER]))), (
            "as if the page had named the cart"
        )
        another = ask(identifiers={"cookie": uuid.uuid4().hex}, listing="session")
        assert another["fallback"], "another visitor's look is not theirs"

    def test_where_the_visitor_is_stands_for_the_nearest_store(self, trained: Home, tmp_path: Path) -> None:
        home = copy_home(trained, tmp_path / "home")
        busiest = "SELECT store_id FROM read_parquet(?) WHERE store_id IS NOT NULL GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 2"
        (near,), (far,) = connect().execute(busiest, [EventLog(home, ZONE).files()]).fetchall()
        (tmp_path / "stores.csv").write_text(f"store_id,latitude,longitude\n{near},40.7,-74.0\n{far},34.05,-118.2\n")
        load_catalogue(home, "stores", tmp_path / "stores.csv").save()
        engine = open_engine(home)

        def asked(**where: Any) -> tuple[list[str], Any]:
            request = RecommendationsRequest(listing="trending", **where)
            answer, record = engine.recommendations("recommendations", request, NOBODY, {}, NEW_YEAR)
            return [item.item_id for item in answer.items], record["request"]

        here, kept = asked(position=Position(40.8, -74.1))
        assert here == asked(store_id=near)[0] != asked(position=Position(34.0, -118.0))[0]
        assert kept.position is None, "the place is not logged"
        with pytest.raises(RejectedEvent, match="leave out store_id"):
            asked(position=Position(40.8, -74.1), store_id=near)


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]
