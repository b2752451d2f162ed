"""The console against who means it ill: what events carry stays text, a scope opens its own pages and no more, no reading goes unseen."""

from __future__ import annotations

import re
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import httpx
import pytest
from scene import Service, loyalty_cards
from test_console import client, from_here, happens

from features.people.identity import Identities
from features.people.vault import Vault
from serving.console.counting import Asked, OfferCounts, counted
from serving.console.pages.marketing.exporting import customers_in
from serving.console.rule_form import RuleForm
from serving.console.visit import FOLDER, _environment
from serving.console.words import Words
from serving.decide.rules import WrongRuleError
from serving.http.console_gate import cookie_of, not_ours
from serving.privacy.keys import Audit

Keyed = tuple[Service, dict[str, str]]


def readings(service: Service, customer: str) -> list[tuple[str, str]]:
    lines = Audit(service.home, Vault.open(service.home)).lines(customer)
    return [(line["key"], line["outcome"]) for line in lines if line["action"] == "read"]


class TestWhatEventsCarryStaysText:
    def test_the_names_of_what_is_personal_are_no_markup(self, own_service: Service) -> None:
        who = {"loyalty_card": loyalty_cards(own_service.home)[60]}
        told = {"<form hx-post=/console/keys hx-trigger=load>": "x", "100% wool": "<i>yes</i>"}
        customer = happens(own_service, "identify", who, traits=told)
        with client(own_service) as reader:
            page = reader.get(f"/console/customers/{customer}")
        assert page.status_code == 200
        assert "<form hx-post=/console/keys" not in page.text
        assert "&lt;form hx-post=/console/keys" in page.text
        assert "100% wool" in page.text

    def test_no_text_that_a_template_translates_is_markup(self) -> None:
        assert _environment(Words("it")).from_string("{{ _(said) }}").render(said="<b>") == "&lt;b&gt;"

    def test_templates_translate_their_own_words_alone(self) -> None:
        # anything else goes by words.say: a per cent sign in it would be read as a place for a value
        for template in sorted(FOLDER.glob("*.html")):
            assert re.findall(r"(?<![\w.])_\((?!\")[^)]*\)", template.read_text()) == [], template.name


class TestAScopeOpensItsOwnPagesAndNoMore:
    @pytest.mark.parametrize("scope", ["ingest", "decide"])
    def test_a_key_that_may_not_read_customers_acts_on_none(self, keyed_service: Keyed, scope: str) -> None:
        service, keys = keyed_service
        with client(service, keys[scope]) as reader:
            for page in ("customers/c_1/propose", "customers/c_1/outcome", "shop/act", "shop/sign-in"):
                assert reader.post(f"/console/{page}", data={"channel": "store"}, headers=from_here(service)).status_code == 403, page
            assert reader.get("/console/shop").status_code == 403

    def test_of_nobody_nothing_is_decided_or_told(self, keyed_service: Keyed) -> None:
        service, keys = keyed_service
        with client(service, keys["admin"]) as reader:
            for page, form in (("propose", {"channel": "store", "offer_id": "x"}), ("outcome", {"outcome": "accepted"})):
                answer = reader.post(f"/console/customers/c_0000000000000000/{page}", data=form, headers=from_here(service))
                assert answer.status_code == 404, page


class TestNoReadingGoesUnseen:
    def test_a_part_of_a_timeline_is_a_reading(self, keyed_service: Keyed) -> None:
        service, keys = keyed_service
        with client(service, keys["read_customer"]) as reader:
            customer = (
                reader.get("/console/customers", params={"q": loyalty_cards(service.home)[61]}).headers["location"].rpartition("/")[2]
            )
            before = len(readings(service, customer))
            assert reader.get(f"/console/customers/{customer}/timeline", params={"start": "25"}).status_code == 200
        assert len(readings(service, customer)) == before + 1

    def test_what_stands_beside_the_demo_shop_is_a_reading(self, own_service: Service) -> None:
        card = loyalty_cards(own_service.home)[62]
        customer = happens(own_service, "page_view", {"loyalty_card": card})
        with client(own_service) as reader:
            reader.post("/console/shop/sign-in", data={"card": card}, headers=from_here(own_service))
            assert card in reader.get("/console/shop").text
        assert ("local", "done") in readings(own_service, customer)

    def test_a_file_of_which_nothing_tells_whose_it_is_is_not_handed_out(self, keyed_service: Keyed) -> None:
        service, keys = keyed_service
        file = service.home.root / "exports" / "stray-email-excel.csv"
        file.parent.mkdir(exist_ok=True)
        file.write_text("email\nada@shop.example\n")
        try:
            with client(service, keys["read_customer"]) as reader:
                answer = reader.get("/console/exports/stray-email-excel.csv")
            assert answer.status_code == 409
            assert "ada@shop.example" not in answer.text
        finally:
            file.unlink()

    def test_a_damaged_list_of_owners_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv.customers").write_text('["c_1",')
        assert customers_in(tmp_path / "a.csv") is None


class TestTheGate:
    @pytest.mark.parametrize("beside", ['basket={"a": 1}', "broken", "a@b=1", 'q="open'])
    def test_cookies_of_another_application_lock_nobody_out(self, beside: str) -> None:
        assert cookie_of({b"cookie": f"{beside}; ubiquo_key=ubq_1".encode()}) == "ubq_1"

    @pytest.mark.parametrize("origin", [b"http://[", b"http://", b"null", b""])
    def test_what_is_no_address_is_not_this_site(self, origin: bytes) -> None:
        form = {b"content-type": b"application/x-www-form-urlencoded", b"origin": origin}
        assert not_ours("POST", {**form, b"host": b"shop.example"}, is_local=False) is not None
        assert not_ours("POST", {**form, b"host": b""}, is_local=False) is not None
        assert not_ours("GET", {b"host": b"["}, is_local=True) is not None

    def test_without_keys_no_name_of_a_stranger_opens_customers(self, own_service: Service) -> None:
        with client(own_service, host="rebound.example") as stranger:
            for path in ("/v1/customers/c_1", "/v1/customers/c_1/export", "/v1/rules"):
                assert stranger.get(path).status_code == 403, path
            assert stranger.post("/v1/profile", json={"customer_id": "c_1"}).status_code == 403
            assert stranger.post("/v1/churn", json={"customer_id": "c_1"}).status_code == 200

    def test_a_form_in_an_encoding_of_its_own_is_refused(self, keyed_service: Keyed) -> None:
        service, _ = keyed_service
        body = b'--x\r\nContent-Disposition: form-data; name="key"\r\n\r\n+2AA-\r\n--x--\r\n'
        headers = {**from_here(service), "content-type": "multipart/form-data; boundary=x; charset=utf-7"}
        answer = httpx.post(f"http://127.0.0.1:{service.port}/console/sign-in", content=body, headers=headers)
        assert answer.status_code == 403


class TestOddValues:
    @pytest.mark.parametrize("number", ["²", "0", "-1", "9" * 5000])
    def test_a_page_that_is_no_number_is_the_first(self, own_service: Service, number: str) -> None:
        whom = happens(own_service, "page_view", {"loyalty_card": loyalty_cards(own_service.home)[63]})
        with client(own_service) as reader:
            for page in ("offers", "audit", "dead-letters"):
                assert reader.get(f"/console/{page}", params={"page": number}).status_code == 200, page
            assert reader.get(f"/console/customers/{whom}/timeline", params={"start": number}).status_code == 200

    @pytest.mark.parametrize("number", ["nan", "inf", "1e999"])
    def test_no_rule_is_made_of_what_is_no_number(self, number: str) -> None:
        form = RuleForm({"action": "block"}, [("price", f"{number}..{number}")])
        with pytest.raises(WrongRuleError, match="is no number"):
            form.rule(ZoneInfo("UTC"), frozenset({"price"}))

    def test_a_day_without_end_is_told(self) -> None:
        end = datetime(9999, 12, 31, 23, 59, tzinfo=UTC)
        assert "9999" in Words("it", "Europe/Rome").day(end)
        assert "9999" in Words("it", "Europe/Rome").moment(end)

    def test_customers_are_counted_as_they_are_listed(self, own_service: Service) -> None:
        known = Identities(own_service.home)
        assert known.count() == len(known.customers()) > 0

    def test_a_shop_that_cannot_be_read_takes_no_page_away(self, own_service: Service) -> None:
        path = own_service.home.shop
        whole = path.read_bytes()
        try:
            path.write_bytes(b"{")
            with client(own_service) as reader:
                assert reader.get("/console/health").status_code == 200
        finally:
            path.write_bytes(whole)


def test_a_count_that_says_much_comes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chatty = tmp_path / "chatty"
    says = "head -c 300000 /dev/zero | tr '\\0' x >&2\necho '[Warning] from C'\necho 3 4\necho '{\"offers\": {}}'\n"
    chatty.write_text(f"#!/bin/sh\n{says}")
    chatty.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(chatty))
    found, steps = list[OfferCounts](), list[tuple[int, int]]()
    asked = Asked(home=str(tmp_path), what="offers", at=datetime(2018, 1, 1, tzinfo=UTC))

    def count() -> None:
        found.append(counted(asked, OfferCounts, lambda done, of: steps.append((done, of))))

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    counting.join(30)
    assert (found, steps) == ([OfferCounts({})], [(3, 4)])
