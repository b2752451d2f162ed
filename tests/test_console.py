"""The console as its readers meet it: who gets in, what they see, in a real browser, in both languages, by keyboard, and from this host alone."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import pytest
from babel.messages.extract import extract_from_dir
from playwright.sync_api import Browser, BrowserContext, Page, expect
from scene import ROOT, Service, loyalty_cards

from features.definitions.domain import domain_named, domain_names
from features.events.event import EVENT_NAMES, Channel, ContactChannel, Purpose
from features.events.identifiers import KINDS
from serving.console.application import PAGES
from serving.console.catalog import FOLDER, catalog
from serving.console.words import Words, language_of
from serving.privacy.keys import Audit

READABLE = [page.path for page in PAGES if page.method == "GET" and "{" not in page.path and not page.path.endswith((".csv", "/live"))]
MOST_BYTES = 300_000
PLACES = re.compile(r"%\(\w+\)s")
TEXTS = {"**.py": "python", "**/templates/**.html": "jinja2.ext:babel_extract"}
INTENTS = ("looking", "searching", "comparing", "buying", "bought")


def client(service: Service, key: str = "", **headers: str) -> httpx.Client:
    cookies = {"ubiquo_key": key} if key else {}
    return httpx.Client(base_url=f"http://127.0.0.1:{service.port}", cookies=cookies, headers=headers, timeout=30)


def from_here(service: Service) -> dict[str, str]:
    return {"origin": f"http://127.0.0.1:{service.port}"}


def now(service: Service) -> str:
    return str(service.ask("churn", {"customer_id": "nobody"})["as_of"])


def happens(service: Service, name: str, who: dict[str, str], **more: Any) -> str:
    event = {"event_id": uuid.uuid4().hex, "name": name, "occurred_at": now(service), "identifiers": who, **more}
    answer = service.ask("events", event)
    assert answer["accepted"] == 1, answer
    return str(answer["events"][0]["customer_id"])


class TestTheDoor:
    def test_whoever_has_not_signed_in_is_asked_to_and_comes_to_where_they_were_going(
        self, keyed_service: tuple[Service, dict[str, str]]
    ) -> None:
        service, keys = keyed_service
        with client(service) as nobody:
            sent_on = nobody.get("/console/customers?q=17")
            assert sent_on.status_code == 303
            door = sent_on.headers["location"]
            assert door.startswith("/console/sign-in?next=")
            assert nobody.post(door, data={"key": "ubq_wrong"}, headers=from_here(service)).status_code == 401
            entered = nobody.post(door, data={"key": keys["admin"]}, headers=from_here(service))
        assert (entered.status_code, entered.headers["location"]) == (303, "/console/customers?q=17")
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert "path=/console" in cookie

    @pytest.mark.parametrize("elsewhere", ["https://evil.example", "//evil.example", "/console.evil.example", "/\\evil.example"])
    def test_no_link_sends_a_reader_elsewhere_once_they_sign_in(
        self, keyed_service: tuple[Service, dict[str, str]], elsewhere: str
    ) -> None:
        service, keys = keyed_service
        with client(service) as nobody:
            entered = nobody.post("/console/sign-in", params={"next": elsewhere}, data={"key": keys["admin"]}, headers=from_here(service))
        assert entered.headers["location"] == "/console"

    def test_a_key_sees_what_its_scopes_let_it_see(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        for scope, token in keys.items():
            with client(service, token) as reader:
                for page in PAGES:
                    if page.path in READABLE:
                        status = reader.get(f"/console{page.path}").status_code
                        assert (status != 403) == ({page.scope, *page.also} == {scope} or scope == "admin"), (scope, page.path, status)

    def test_the_menu_offers_nothing_that_would_be_refused(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        with client(service, keys["decide"]) as reader:
            text = reader.get("/console").text
            links = set(re.findall(r'href="(/console[^"]*)"', text))
            assert "/console/customers" not in links
            assert all(reader.get(link).status_code < 400 for link in links if "/static/" not in link)

    def test_a_page_of_another_site_changes_nothing(self, own_service: Service) -> None:
        with client(own_service) as reader:
            act = {"what": "view_item", "item_id": "1082185"}
            for origin in ({"origin": "https://evil.example"}, {"origin": "null"}, {}):
                assert reader.post("/console/shop/act", data=act, headers=origin).status_code == 403
            assert reader.post("/console/shop/act", data=act, headers=from_here(own_service)).status_code == 200

    def test_without_keys_a_strangers_name_for_this_machine_is_not_this_site(self, own_service: Service) -> None:
        with client(own_service, host="rebound.example") as reader:
            assert reader.get("/console").status_code == 403

    def test_pages_load_nothing_from_elsewhere_and_are_kept_by_nobody(self, own_service: Service) -> None:
        with client(own_service) as reader:
            headers = reader.get("/console").headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"

    def test_nothing_beside_the_static_files_can_be_fetched(self, own_service: Service) -> None:
        with client(own_service) as reader:
            assert reader.get("/console/static/console.css").status_code == 200
            for path in ("/console/static/../application.py", "/console/static/%2e%2e/application.py", "/console/nothing"):
                assert reader.get(path).status_code == 404


class TestBothLanguages:
    def test_every_text_is_there_in_italian_with_its_placeholders(self) -> None:
        options = {"**/templates/**.html": {"silent": "false", "newstyle_gettext": "true"}}
        keywords = {"_": None, "say": None, "many": (1, 2), "gettext": None, "ngettext": (1, 2)}
        said: set[str] = set()
        for _, _, message, _, _ in extract_from_dir(ROOT / "serving" / "console", list(TEXTS.items()), options, keywords):
            said.update([message] if isinstance(message, str) else [each for each in message if each])
        said |= {text for page in PAGES for text in (page.menu, page.group) if text}
        said |= {name.replace("_", " ") for name in EVENT_NAMES} | {*INTENTS, *KINDS, *get_args(Channel), *get_args(ContactChannel)}
        said |= set(get_args(Purpose))
        italian = catalog("it")
        assert sorted(text for text in said if text.strip() and text not in italian) == []
        for text in said & italian.keys():
            assert sorted(PLACES.findall(text)) == sorted(PLACES.findall(italian[text])), text

    def test_what_the_models_say_is_said_in_italian_too(self, own_service: Service) -> None:
        words, english = Words("it"), list[str]()
        for card in loyalty_cards(own_service.home)[50:70]:
            whom = {"identifiers": {"loyalty_card": card}}
            said = own_service.ask("churn", whom)["reason"].split("; ")
            for listing in ("for_you", "also_like", "buy_again", "trending"):
                answer = own_service.ask("recommendations", {**whom, "listing": listing, "limit": 8})
                said += [item["reason"] for item in answer["items"]] + [each for each in [answer["fallback"]] if each]
            said += [reason["text"] for offer in own_service.ask("next-best-offer", whom)["offers"] for reason in offer["reasons"]]
            english += [text for text in said if words.reason(text) == text]
        assert english == []

    def test_every_feature_of_every_domain_has_an_italian_phrase(self) -> None:
        features = [feature for name in domain_names() for feature in domain_named(name).customer]
        said = {text for feature in features for text in (feature.phrase, feature.unknown) if text}
        assert sorted(said - catalog("it").keys()) == []

    def test_a_reason_within_a_reason_is_translated_with_its_numbers(self) -> None:
        text = "often bought with Pane: Integrale, which you buy every 5 days"
        assert Words("it").reason(text) == "spesso comprato con Pane: Integrale, che compri ogni 5 giorni"
        assert Words("it").reason("usually comes every 4.2 days; spent 1,204.50 EUR in the last 4 weeks") == (
            "di solito viene ogni 4,2 giorni; ha speso 1,204.50 EUR nelle ultime 4 settimane"
        )
        assert Words("en").reason(text) == text

    def test_no_text_is_translated_twice(self) -> None:
        keys = re.findall(r'^msgid "(.+)"$', (FOLDER / "it.po").read_text(), re.MULTILINE)
        assert sorted({key for key in keys if keys.count(key) > 1}) == []

    def test_a_browser_gets_the_language_that_it_asks_for_until_the_reader_chooses(self, own_service: Service) -> None:
        with client(own_service, **{"accept-language": "it-IT,it;q=0.9,en;q=0.5"}) as reader:
            assert 'lang="it"' in reader.get("/console").text
            reader.post("/console/look", data={"language": "en", "next": "/console"}, headers=from_here(own_service))
            assert 'lang="en"' in reader.get("/console").text

    def test_what_a_browser_cannot_name_is_answered_in_english(self) -> None:
        assert [language_of(None, said) for said in ("", "xx", ";;;,", "de-DE", "it")] == ["en", "en", "en", "en", "it"]


@pytest.fixture
def window(browser: Browser, own_service: Service) -> Iterator[Page]:
    """A page in a browser of its own, which notes what was loaded and what went wrong."""
    context = browser.new_context(base_url=f"http://127.0.0.1:{own_service.port}", locale="en-GB", viewport={"width": 1280, "height": 900})
    context.set_default_timeout(15_000)
    page = context.new_page()
    yield page
    context.close()


def wrong_on(page: Page) -> list[str]:
    """Notes from here on what a page complains of and what it loads from another host."""
    found: list[str] = []
    here = urlsplit(page.url).netloc
    # a browser asks for one beside a bare picture, which is the first page that a test opens; no page of the console does
    own = lambda message: message.type == "error" and not message.location["url"].endswith("/favicon.ico")  # noqa: E731
    page.on("console", lambda message: found.append(message.text) if own(message) else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: found.append(request.url) if here and urlsplit(request.url).netloc not in (here, "") else None)
    return found


class TestEveryPage:
    @pytest.mark.parametrize("path", [*READABLE, "CUSTOMER"])
    def test_it_keeps_nobody_out_and_is_small(self, browser: Browser, own_service: Service, axe: str, path: str) -> None:
        if path == "CUSTOMER":
            card = loyalty_cards(own_service.home)[0]
            path = f"/customers/{own_service.ask('churn', {'identifiers': {'loyalty_card': card}})['customer_id']}"
        for locale, scheme, width in (("en-GB", "light", 1280), ("it-IT", "dark", 820)):
            context = self._context(browser, own_service, locale, scheme, width)
            page, sizes = context.new_page(), list[int]()
            page.goto("/console/static/icon.svg")
            wrong = wrong_on(page)
            page.on("response", lambda response, sizes=sizes: sizes.append(len(response.body())) if response.ok else None)
            answer = page.goto(f"/console{path}", wait_until="load")
            assert answer is not None
            assert answer.status < 400, page.content()
            page.evaluate(axe)
            found = page.evaluate("axe.run()")["violations"]
            serious = [f"{v['id']}: {[n['target'] for n in v['nodes']]}" for v in found if v["impact"] in ("serious", "critical")]
            too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert (path, serious, wrong, max(0, too_wide)) == (path, [], [], 0)
            assert sum(sizes) < MOST_BYTES, (path, sum(sizes))
            assert page.locator("h1").count() == 1
            context.close()

    @staticmethod
    def _context(browser: Browser, service: Service, locale: str, scheme: Any, width: int) -> BrowserContext:
        context = browser.new_context(
            base_url=f"http://127.0.0.1:{service.port}", locale=locale, color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        context.set_default_timeout(15_000)
        return context

    def test_a_customers_page_is_reached_and_used_by_keyboard_alone(self, window: Page, own_service: Service) -> None:
        card = loyalty_cards(own_service.home)[3]
        window.goto("/console")
        window.keyboard.press("Tab")
        expect(window.locator(":focus")).to_have_text("Skip to the content")
        window.keyboard.press("/")
        window.keyboard.type(card)
        window.keyboard.press("Enter")
        expect(window.get_by_role("heading", name="What happened, in every channel")).to_be_visible()
        button = window.get_by_role("button", name="Show it in the store").first
        if button.count():
            button.focus()
            window.keyboard.press("Enter")
            window.get_by_role("button", name="Accepted").wait_for()


class TestAtTheCounter:
    def test_last_nights_browsing_is_on_the_page_once_the_card_is_read(self, window: Page, own_service: Service) -> None:
        card, cookie = loyalty_cards(own_service.home)[5], uuid.uuid4().hex
        happens(own_service, "view_item", {"cookie": cookie}, channel="web", items=[{"item_id": "1082185"}])
        happens(own_service, "login", {"cookie": cookie, "loyalty_card": card}, channel="app")
        window.goto("/console")
        window.get_by_role("searchbox").fill(card)
        window.keyboard.press("Enter")
        timeline = window.locator(".timeline")
        expect(timeline.get_by_text("view item").first).to_be_visible()
        expect(timeline.get_by_text("login").first).to_be_visible()

    def test_what_happens_meanwhile_appears_by_itself(self, window: Page, own_service: Service) -> None:
        card = loyalty_cards(own_service.home)[6]
        customer = happens(own_service, "store_visit", {"loyalty_card": card}, channel="store", store_id="17")
        window.goto(f"/console/customers/{customer}")
        happens(own_service, "add_to_cart", {"loyalty_card": card}, channel="app", items=[{"item_id": "1082185"}])
        expect(window.locator(".timeline").get_by_text("add to cart").first).to_be_visible()
        expect(window.get_by_text("In the cart")).to_be_visible()

    def test_a_complaint_by_phone_is_there_at_once(self, window: Page, own_service: Service) -> None:
        card = loyalty_cards(own_service.home)[7]
        customer = happens(own_service, "store_visit", {"loyalty_card": card}, channel="store")
        window.goto(f"/console/customers/{customer}")
        happens(own_service, "complaint", {"loyalty_card": card}, channel="call_centre", traits={"about": "a broken jar"})
        expect(window.locator(".timeline .complaint, .timeline li.complaint").first).to_contain_text("a broken jar")

    def test_an_offer_is_shown_accepted_and_joined_to_its_decision(self, window: Page, own_service: Service) -> None:
        for card in loyalty_cards(own_service.home)[8:40]:
            customer = str(own_service.ask("churn", {"identifiers": {"loyalty_card": card}})["customer_id"])
            window.goto(f"/console/customers/{customer}")
            button = window.get_by_role("button", name="Show it in the store").first
            if button.count():
                break
        button.click()
        window.get_by_role("button", name="Accepted").click()
        expect(window.get_by_text("kept: accepted")).to_be_visible()
        _, told = own_service.post("/v1/profile", {"customer_id": customer})
        names = [event["name"] for event in told["events"][:2]]
        assert names == ["offer_accept", "offer_view"]
        expect(window.locator(".timeline").get_by_text("offer accept").first).to_be_visible()

    def test_reading_a_customer_is_audited_under_the_readers_key(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        with client(service, keys["admin"]) as reader:
            found = reader.get("/console/customers", params={"q": loyalty_cards(service.home)[1]})
            assert found.status_code == 303
            customer = found.headers["location"].rpartition("/")[2]
            assert reader.get(found.headers["location"]).status_code == 200
        from features.people.vault import Vault

        lines = Audit(service.home, Vault.open(service.home)).lines(customer)
        assert ("admin-key", "read", "done") in {(line["key"], line["action"], line["outcome"]) for line in lines}

    def test_nobody_is_invented_for_what_leads_to_nobody(self, own_service: Service) -> None:
        with client(own_service) as reader:
            answer = reader.get("/console/customers", params={"q": "<b>nobody</b>"})
            assert answer.status_code == 404
            assert "<b>nobody</b>" not in answer.text
            assert reader.get("/console/customers/c_0000000000000000").status_code == 404


class TestTheDemoShop:
    def test_a_newcomers_clicks_change_what_stands_beside_the_shop(self, window: Page, own_service: Service) -> None:
        window.goto("/console/shop")
        wrong = wrong_on(window)
        expect(window.get_by_role("heading", name="You are an anonymous visitor")).to_be_visible()
        expect(window.get_by_text("nobody yet")).to_be_visible()
        window.get_by_role("button", name="Look at").nth(2).click()
        expect(window.locator(".watch").get_by_text("looking", exact=True)).to_be_visible()
        expect(window.locator(".watch").get_by_text("looked at recently").first).to_be_visible()
        window.get_by_role("button", name="Into the cart").nth(1).click()
        expect(window.locator("#cart")).to_contain_text("1")
        expect(window.locator(".watch .timeline")).to_contain_text("add to cart")
        window.get_by_role("button", name="Buy").click()
        expect(window.locator(".watch .timeline")).to_contain_text("purchase")
        expect(window.locator("#cart")).to_contain_text("0")
        assert wrong == []

    def test_a_cart_filled_in_the_app_is_there_on_the_web(self, window: Page, own_service: Service) -> None:
        card = loyalty_cards(own_service.home)[41]
        happens(own_service, "add_to_cart", {"loyalty_card": card}, channel="app", items=[{"item_id": "1082185"}])
        window.goto("/console/shop")
        window.get_by_label("Loyalty card").fill(card)
        window.get_by_role("button", name="Sign in with this card").click()
        expect(window.get_by_role("heading", name=f"You are the holder of card {card}")).to_be_visible()
        expect(window.locator("#cart")).to_contain_text("1")

    def test_a_card_that_nobody_has_is_told_and_nobody_is_made_of_it(self, own_service: Service) -> None:
        with client(own_service) as reader:
            answer = reader.post("/console/shop/sign-in", data={"card": "no such card"}, headers=from_here(own_service))
            assert answer.status_code == 404

    def test_it_is_closed_unless_an_operator_opens_it(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        with client(service, keys["admin"]) as reader:
            assert "UBIQUO_DEMO_SHOP" in reader.get("/console/shop").text
            assert reader.post("/console/shop/act", data={"what": "view_item"}, headers=from_here(service)).status_code == 403
