"""The console's pages of the merchandiser: items are found, lists looked at as somebody would see them, and rules made, tried and ended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args
from zoneinfo import ZoneInfo

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, expect
from scene import NEW_YEAR, Service, loyalty_cards

from features.people.vault import Vault
from models.attributes import Attributes, WrongWishError
from models.recommender.listings import Listing
from models.recommender.shelf import STATISTICS, Shelf
from serving.console.goods import find_items, item_facts
from serving.console.rule_form import RuleForm, field_of
from serving.console.words import Words
from serving.decide.rules import ABOUT_ITEMS, NewRule, RuleContent, WrongRuleError
from serving.privacy.keys import Audit

NEW_YORK = ZoneInfo("America/New_York")
BANANAS = "1082185"
MARKED = re.compile(r'<p class="alert" id="(\w+)-wrong">([^<]*)</p>')


class Merchandiser:
    """Somebody who reads the console of a service, and changes its rules."""

    def __init__(self, service: Service, key: str = "") -> None:
        self.service = service
        here = f"http://127.0.0.1:{service.port}"
        self._http = httpx.Client(base_url=here, cookies={"ubiquo_key": key} if key else {}, headers={"origin": here}, timeout=30)

    def page(self, path: str, status: int = 200) -> str:
        answer = self._http.get(f"/console{path}")
        assert answer.status_code == status, answer.text
        return answer.text

    def send(self, path: str, status: int = 200, **form: Any) -> str:
        """What sending a form is answered with, or the address that it leads to."""
        answer = self._http.post(f"/console{path}", data=form)
        assert answer.status_code == status, answer.text
        return answer.headers["location"] if status == 303 else answer.text

    def make(self, **form: Any) -> str:
        """Make a rule; returns its id."""
        return self.send("/rules/new", 303, do="make", **form).partition("made=")[2]

    def mistakes(self, do: str = "make", **form: Any) -> dict[str, str]:
        """What is said of a rule that cannot be, by field."""
        return dict(MARKED.findall(self.send("/rules/new", 422, do=do, **form)))

    def list_of(self, **question: Any) -> list[dict[str, Any]]:
        return list(self.service.ask("recommendations", question)["items"])

    def close(self) -> None:
        """Leave no rule behind."""
        for rule in self.service.get("/v1/rules")[1].split('"rule_id":"')[1:] if not self._http.cookies else ():
            self.send("/rules/end", 303, rule_id=rule.partition('"')[0])
        self._http.close()


@pytest.fixture
def shop(own_service: Service) -> Iterator[Merchandiser]:
    made = Merchandiser(own_service)
    yield made
    made.close()


@pytest.fixture
def customer(own_service: Service) -> dict[str, str]:
    """A customer of whom much is known: card and id."""
    card = loyalty_cards(own_service.home)[20]
    return {"card": card, "id": own_service.ask("churn", {"identifiers": {"loyalty_card": card}})["customer_id"]}


def shown_ids(text: str) -> list[str]:
    """The items of the list on a page, in order."""
    return re.findall(r'data-item="(\w+)"', text.partition('<ol class="ranked"')[2].partition("</ol>")[0])


# --- items


def shelf_of(count: int = 60) -> Shelf:
    """A shelf of odd and even things; the higher the number, the better it sells."""
    attributes = Attributes.of(
        {
            "name": [f"Café {k}" if k % 2 else f"Tea {k}" for k in range(count)],
            "brand": ["Own" if k % 3 else None for k in range(count)],
            "weight_g": [float(k) for k in range(count)],
            "tags": [["hot", "loose"] if k < 10 else [] for k in range(count)],
        }
    )
    return Shelf([f"i-{k}" for k in range(count)], attributes, {name: np.arange(count, dtype=float) for name in STATISTICS})


class TestFindingItems:
    @pytest.mark.parametrize(
        ("said", "wanted", "found"),
        [
            ("café", [], [f"i-{k}" for k in range(59, 0, -2)]),
            ("CAFÉ 5", [], ["i-59", "i-57", "i-55", "i-53", "i-51", "i-45", "i-35", "i-25", "i-15", "i-5"]),
            ("i-33", [], ["i-33"]),
            ("loose tea", [], ["i-8", "i-6", "i-4", "i-2", "i-0"]),
            ("", [("weight_g", "3..5")], ["i-5", "i-4", "i-3"]),
            ("", [("weight_g", "..2")], ["i-2", "i-1", "i-0"]),
            ("tea", [("brand", "Own"), ("weight_g", "50..")], ["i-58", "i-56", "i-52", "i-50"]),
            ("coffee", [], []),
        ],
    )
    def test_every_word_is_part_of_an_id_or_a_value_and_what_sells_most_comes_first(
        self, said: str, wanted: list[tuple[str, str]], found: list[str]
    ) -> None:
        told = find_items(shelf_of(), said, wanted, 50)
        assert (told.count, told.item_ids) == (len(found), found)

    def test_of_many_the_first_are_named_and_all_are_counted(self) -> None:
        told = find_items(shelf_of(), "", [], 5)
        assert (told.count, told.item_ids) == (60, [f"i-{k}" for k in range(59, 54, -1)])

    @pytest.mark.parametrize(("name", "value"), [("weight_g", "heavy"), ("colour", "red")])
    def test_a_filter_that_cannot_be_is_told(self, name: str, value: str) -> None:
        with pytest.raises(WrongWishError):
            find_items(shelf_of(), "", [(name, value)], 5)

    def test_what_is_known_of_an_item_is_told_with_its_rank(self) -> None:
        told = item_facts(shelf_of(), "i-58")
        assert (told["rank"], told["price"], told["sold"]["buyers"]) == (2, 58.0, 58.0)
        assert ("weight_g", "58", "number") in told["attributes"]

    def test_the_page_finds_by_name_and_by_id_and_narrows_down(self, shop: Merchandiser) -> None:
        every = shop.page("/items?q=bananas")
        assert f"/items/one/{BANANAS}" in every
        assert f"/items/one/{BANANAS}" in shop.page(f"/items?q={BANANAS}")
        narrowed = shop.page("/items?q=bananas&where=department%3DPRODUCE&attribute=brand&value=National")
        assert 'name="where" value="brand=National"' in narrowed
        assert "Nothing has all of that" in shop.page("/items?q=bananas&where=department%3DNOWHERE")
        assert "is no attribute of items" in shop.page("/items?attribute=colour&value=red", 422)

    def test_an_items_page_shows_the_lists_about_it_and_the_rules_that_act_on_it(self, shop: Merchandiser) -> None:
        about = shop.page(f"/items/one/{BANANAS}")
        similar = shop.list_of(listing="similar", item_ids=[BANANAS], limit=6)
        assert shown_ids(about) == [item["item_id"] for item in similar]
        assert "None is about this item." in about
        by_value = shop.make(action="boost", attribute_0="department", values_0="PRODUCE", factor="1,5", note="fresh week")
        on_page = shop.make(action="pin", items=similar[2]["item_id"], place="1", pages=BANANAS)
        about = shop.page(f"/items/one/{BANANAS}")
        assert all(rule in about for rule in (by_value, on_page, "fresh week", "on its page"))
        assert shown_ids(about)[0] == similar[2]["item_id"]
        shop.page("/items/one/no-such-item", 404)


# --- a list, as somebody would see it


class TestPreview:
    @pytest.mark.parametrize("listing", get_args(Listing))
    def test_every_list_is_shown_as_it_would_be_answered(self, shop: Merchandiser, customer: dict[str, str], listing: str) -> None:
        about = {"item": BANANAS} if listing in ABOUT_ITEMS else {}
        question = {"listing": listing, "customer_id": customer["id"], **({"item_ids": [BANANAS]} if about else {})}
        text = shop.send("/preview", listing=listing, customer=customer["card"], explain="yes", **about)
        assert shown_ids(text) == [item["item_id"] for item in shop.list_of(**question)]
        assert customer["id"] in text

    def test_what_was_removed_is_named_under_its_reason(self, shop: Merchandiser, customer: dict[str, str]) -> None:
        first = shop.list_of(listing="for_you", customer_id=customer["id"])[0]["item_id"]
        shop.make(action="block", items=first)
        text = shop.send("/preview", listing="for_you", customer=customer["id"], explain="yes")
        assert first not in shown_ids(text)
        assert "blocked by a rule" in text
        assert f"/items/one/{first}" in text.partition("What was removed")[2]

    def test_mistakes_are_told_at_their_fields_and_what_was_typed_stays(self, shop: Merchandiser) -> None:
        text = shop.send("/preview", 422, listing="similar", customer="nobody has this", store="no.one@example.com")
        assert {name for name, _ in MARKED.findall(text)} == {"customer", "item"}
        assert 'value="nobody has this"' in text
        assert "store" in dict(MARKED.findall(shop.send("/preview", 422, listing="trending", store="no.one@example.com")))
        several = shop.send("/preview", 422, listing="similar", item="bananas")
        assert f'name="choose_item" value="{BANANAS}"' in several
        chosen = shop.send("/preview", listing="similar", item="bananas", choose_item=BANANAS)
        assert shown_ids(chosen) == [item["item_id"] for item in shop.list_of(listing="similar", item_ids=[BANANAS])]

    def test_only_who_may_see_customers_previews_for_one_and_that_is_audited(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        card = loyalty_cards(service.home)[21]
        decides, everything = Merchandiser(service, keys["decide"]), Merchandiser(service, keys["admin"])
        assert 'name="customer"' not in decides.page("/preview")
        decides.send("/preview", 403, listing="for_you", customer=card)
        text = everything.send("/preview", listing="for_you", customer=card)
        [found] = set(re.findall(r"/console/customers/(c_\w+)", text))
        lines = Audit(service.home, Vault.open(service.home)).lines(found)
        assert ("admin-key", "read", "done") in {(line["key"], line["action"], line["outcome"]) for line in lines}


# --- rules


def rule_lines(service: Service) -> list[tuple[str, str, str, str]]:
    lines = Audit(service.home, Vault.open(service.home)).lines()
    return [(line["key"], line["action"], line["subject"], line["outcome"]) for line in lines if "rule" in line["action"]]


class TestRules:
    def test_every_change_is_audited_under_the_key_that_made_it(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        before = len(rule_lines(service))
        manages = Merchandiser(service, keys["manage"])
        made = manages.make(action="pin", items=BANANAS, place="2")
        manages.mistakes(action="pin", items=BANANAS, place="0")
        manages.send("/rules/end", 303, rule_id=made)
        manages.send("/rules/end", 409, rule_id=made)
        manages.send("/rules/end", 404, rule_id="somebody")
        assert rule_lines(service)[before:] == [
            ("manage-key", "add rule", made, "done"),
            ("manage-key", "add rule", "", "refused"),
            ("manage-key", "end rule", made, "done"),
            ("manage-key", "end rule", made, "refused"),
            ("manage-key", "end rule", "", "refused"),
        ]

    def test_who_may_only_look_makes_and_ends_no_rule(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        decides = Merchandiser(service, keys["decide"])
        decides.send("/rules/new", 403, do="make", action="pin", items=BANANAS, place="1")
        decides.send("/rules/end", 403, rule_id="r1")
        assert "/console/rules/new" not in decides.page(f"/items/one/{BANANAS}")

    @pytest.mark.parametrize(
        ("form", "field"),
        [
            ({"action": "pin", "items": BANANAS, "place": "101"}, "place"),
            ({"action": "pin", "items": BANANAS, "place": "first"}, "place"),
            ({"action": "pin", "items": f"{BANANAS}\n1029743", "place": "1"}, "items"),
            ({"action": "pin", "items": "1082186", "place": "1"}, "items"),
            ({"action": "boost", "items": BANANAS, "factor": "11"}, "factor"),
            ({"action": "block", "attribute_0": "department", "values_0": "PRODUSE"}, "where"),
            ({"action": "block", "values_0": "PRODUCE"}, "where"),
            ({"action": "block", "items": BANANAS, "condition": "visit_days_28 >"}, "condition"),
            ({"action": "block", "items": BANANAS, "begins": "2018-02-01T00:00", "until": "2018-01-31T00:00"}, "until"),
            ({"action": "block", "items": BANANAS, "until": "2017-06-01T00:00"}, "until"),
            ({"action": "block", "items": BANANAS, "begins": "tomorrow"}, "begins"),
            ({"action": "block", "items": BANANAS, "pages": BANANAS, "listings": "for_you"}, "listings"),
            ({"action": "block", "items": BANANAS, "listings": "best_of"}, "listings"),
            ({"action": "block", "items": BANANAS, "note": "ask ann@example.com"}, "note"),
            ({"action": "hide", "items": BANANAS}, "action"),
            ({"action": "block", "items": BANANAS, "instead_of": "r999999"}, "action"),
        ],
    )
    def test_a_mistake_is_told_at_its_field_and_what_was_typed_stays(self, shop: Merchandiser, form: dict[str, str], field: str) -> None:
        text = shop.send(
            "/rules/new", 422, do="make", note=form.get("note", "kept as it was typed"), **{k: v for k, v in form.items() if k != "note"}
        )
        assert set(dict(MARKED.findall(text))) == {field}
        assert form.get("note", "kept as it was typed") in text
        assert f">{BANANAS}" in text or "items" not in form or field == "items"
        assert shop.service.get("/v1/rules")[1].count("rule_id") == 0

    def test_the_effect_is_shown_before_the_rule_is_made_and_nothing_is_made_of_it(
        self, shop: Merchandiser, customer: dict[str, str]
    ) -> None:
        before = [item["item_id"] for item in shop.list_of(listing="for_you", customer_id=customer["id"])]
        form = {"action": "pin", "items": before[4], "place": "1", "listings": "for_you"}
        text = shop.send("/rules/new", do="look", listing="for_you", customer=customer["card"], **form)
        without, with_it = re.findall(r'<ol class="plain-list">(.*?)</ol>', text, re.DOTALL)
        ids = re.compile(r'data-item="(\w+)"')
        assert ids.findall(without) == before
        assert ids.findall(with_it)[:6] == [before[4], *before[:4], before[5]]
        assert [item["item_id"] for item in shop.list_of(listing="for_you", customer_id=customer["id"])] == before
        # one that begins later is shown as if its time had come
        later = shop.send("/rules/new", do="look", listing="for_you", customer=customer["card"], begins="2018-03-01T00:00", **form)
        assert ids.findall(re.findall(r'<ol class="plain-list">(.*?)</ol>', later, re.DOTALL)[1])[0] == before[4]
        elsewhere = shop.send("/rules/new", do="look", listing="trending", **form)
        assert "does not hold in this list" in elsewhere

    def test_a_rule_is_replaced_by_one_that_says_what_it_said_but_for_the_change(self, shop: Merchandiser) -> None:
        first = shop.make(action="boost", attribute_0="brand", values_0="Private", factor="2", begins="2018-01-05T09:30", note="own brand")
        form = shop.page(f"/rules/new?instead_of={first}")
        assert 'value="2018-01-05T09:30"' in form
        assert 'value="own brand"' in form
        second = shop.make(
            action="boost", attribute_0="brand", values_0="Private", factor="3", begins="2018-01-05T09:30", note="own brand", instead_of=first
        )  # fmt: skip
        told = shop.page("/rules?ended=1")
        assert re.search(f'id="{first}".*?ended', told, re.DOTALL)
        assert second in told.partition("Scheduled")[2]
        shop.page(f"/rules/new?instead_of={first}", 404)
        shop.page("/rules/new?instead_of=nothing", 404)

    def test_an_item_is_added_by_a_part_of_its_name(self, shop: Merchandiser) -> None:
        found = shop.send("/rules/new", do="find", action="pin", find="bananas", place="4")
        assert f'name="add" value="{BANANAS}"' in found
        added = shop.send("/rules/new", action="pin", find="bananas", place="4", add=BANANAS)
        assert f">{BANANAS}</textarea>" in added
        assert 'value="4"' in added

    @pytest.mark.parametrize(
        "said",
        [
            {"action": "pin", "item_ids": ["1"], "place": 3, "page_item_ids": ["2", "3"], "listings": ["similar"]},
            {"action": "boost", "where": {"brand": ["Private", "Own"], "weight_g": {"min": 100.0}, "pack": [6.0]}, "factor": 0.25},
            {"action": "block", "where": {"weight_g": {"max": 2.5}}, "condition": "visit_days_28 > 8.0", "note": "too light"},
            {"action": "block", "item_ids": ["1", "2"], "from": NEW_YEAR, "until": NEW_YEAR.replace(month=2)},
        ],
    )
    def test_the_form_of_a_rule_says_the_same_rule(self, said: dict[str, Any]) -> None:
        rule = NewRule.of(said)
        again = RuleForm.of(rule, NEW_YORK, "r7").rule(NEW_YORK, frozenset({"weight_g", "pack"}))
        assert again.instead_of == "r7"
        assert [getattr(again, name) for name in RuleContent.__struct_fields__] == [
            getattr(rule, name) for name in RuleContent.__struct_fields__
        ]

    def test_every_mistake_has_a_field_of_the_form(self) -> None:
        assert [field_of(name) for name in ("item_ids[3]", "where.brand[0]", "from", "page_item_ids", "$", "place")] == [
            "items", "where", "begins", "pages", "action", "place"
        ]  # fmt: skip
        with pytest.raises(WrongRuleError, match="twice"):
            RuleForm({"action": "block"}, [("brand", "A"), ("brand", "B")]).rule(NEW_YORK, frozenset())

    def test_what_rules_say_is_said_in_italian_too(self) -> None:
        words = Words("it")
        assert words.reason("put in this place by the shop") == "messo a questo posto dal negozio"
        for text in ("like Pane; put forward by the shop", "popular now; held back by the shop", "a pin needs a place from 1 to 100"):
            assert not set(words.reason(text).split("; ")) & set(text.split("; "))


class TestAMerchandisersDay:
    def test_an_item_is_pinned_shown_to_the_customer_and_let_go_again(
        self, browser: Browser, shop: Merchandiser, customer: dict[str, str]
    ) -> None:
        question = {"listing": "for_you", "customer_id": customer["id"], "limit": 10}
        before = [item["item_id"] for item in shop.list_of(**question)]
        pinned = next(i["item_id"] for i in shop.list_of(listing="trending", limit=30) if i["item_id"] not in before)
        context = browser.new_context(base_url=f"http://127.0.0.1:{shop.service.port}", locale="en-GB")
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.goto("/console/items")
        page.get_by_label("A part of a name, an attribute or an id").fill(pinned)
        page.keyboard.press("Enter")
        page.locator("table").get_by_role("link").first.click()
        page.get_by_role("link", name="Pin it").click()
        page.get_by_label("Place in the list").fill("3")
        page.get_by_label("Customer", exact=True).fill(customer["card"])
        page.get_by_role("button", name="Show the effect").last.click()
        expect(page.locator(".beside li.hit")).to_contain_text(pinned)
        page.get_by_label("Place in the list").fill("300")
        page.locator("form.rule").evaluate("form => { form.noValidate = true; }")
        page.get_by_role("button", name="Make the rule").click()
        expect(page.get_by_label("Place in the list")).to_be_focused()
        expect(page.get_by_label("Customer", exact=True)).to_have_value(customer["card"])
        page.get_by_label("Place in the list").fill("3")
        page.get_by_role("button", name="Make the rule").click()
        expect(page.get_by_text("it counts in the next answer within its time")).to_be_visible()
        answer = shop.list_of(**question)
        assert [item["item_id"] for item in answer] == [*before[:2], pinned, *before[2:9]]
        assert answer[2]["source"] == "pinned by a rule"
        page.goto("/console/preview")
        page.get_by_label("Customer", exact=True).fill(customer["card"])
        page.get_by_role("button", name="Show the list").click()
        expect(page.locator(".ranked > li").nth(2)).to_contain_text("put in this place by the shop")
        page.goto("/console/rules")
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name=re.compile("^End it")).first.click()
        expect(page.get_by_text("it counts in no answer from now on")).to_be_visible()
        assert [item["item_id"] for item in shop.list_of(**question)] == before
        context.close()
