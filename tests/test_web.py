"""What the developer of a shop's pages does: a key in the page's source, Segment's library in a browser, lists for an unknown visitor."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from scene import NEW_YEAR, Pages, Service, eventually

from features.people.contacts import Contacts
from features.people.identity import Identities
from features.sources.replay import replay
from features.state.home import Home
from features.store.event_log import EventLog, connect
from serving.privacy.keys import Keys

ZONE = "America/New_York"
ITEM = "1082185"
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
