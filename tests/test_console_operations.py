"""The console's pages of the operator and the data scientist: health, dead letters, keys, the audit log, features and models."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import pytest
from playwright.sync_api import Browser, expect
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from scene import NEW_YEAR, Service, TinyShop, eventually
from starlette.requests import Request

from features.catalogue.shop import Shop
from features.definitions.domain import domain_named
from features.definitions.listing import listed
from features.people.vault import Vault
from features.state.home import Home
from features.store.dead_letters import DeadLetter
from features.store.event_log import EventLog
from models.reports import (
    CalibrationPoint,
    Document,
    DriftReport,
    InputDrift,
    JudgedCut,
    Measured,
    ModelReport,
    TrainedVersion,
    drift_path,
    history_path,
    version_path,
)
from serving.console.letters import alike, groups, value_at
from serving.console.meters import KEPT, Meters, quantile
from serving.console.pages.operations import health_now
from serving.console.quality import calibration_plot, gain_plot
from serving.console.visit import Visit
from serving.console.words import Words
from serving.privacy.keys import LOCAL, Audit, Keys

AS_IT_IS = {"as": "it is"}


class Reader(httpx.Client):
    """Somebody who reads the console of a service, with a key or without."""

    def __init__(self, service: Service, key: str = "") -> None:
        here = f"http://127.0.0.1:{service.port}"
        super().__init__(base_url=here, cookies={"ubiquo_key": key} if key else {}, headers={"origin": here}, timeout=30)

    def page(self, path: str, status: int = 200) -> str:
        answer = self.get(f"/console{path}")
        assert answer.status_code == status, answer.text
        return answer.text


@pytest.fixture
def reader(own_service: Service) -> Iterator[Reader]:
    with Reader(own_service) as made:
        yield made


def raw(name: str = "page_view", **more: Any) -> dict[str, Any]:
    """An event that can be taken."""
    who = {"loyalty_card": "console-operator"}
    return {"event_id": uuid.uuid4().hex, "name": name, "occurred_at": "2018-01-01T04:00:00Z", "identifiers": who, **more}


def letter_of(service: Service, said: Any, source: str = "http", field: str = "name", reason: str = "is no event here") -> str:
    """A letter that an earlier version refused, or anybody else; returns its id."""
    text = said if isinstance(said, str) else json.dumps(said)
    letter = DeadLetter(NEW_YEAR, source, field, reason, text)
    EventLog(service.home, "UTC").reject([letter])
    return str(Vault.open(service.home).hash("letter", "\0".join(letter[1:])))


def has_letter(service: Service, letter: str) -> bool:
    return EventLog(service.home, "UTC").letters.letter(letter) is not None


def happened(service: Service, event: dict[str, Any]) -> list[str]:
    """The names of the events of who it is about that are of its moment."""
    _, told = service.post("/v1/profile", {"identifiers": event["identifiers"]})
    return [each["name"] for each in told["events"]]


class TestMeters:
    """What came in the last hour, in a ring that does not grow."""

    @pytest.fixture
    def shop(self) -> dict[str, Any]:
        registry, now = CollectorRegistry(), [1000.0]
        events = Counter("ubiquo_events", "-", ["outcome"], registry=registry)
        seconds = Histogram("ubiquo_request_seconds", "-", ["route"], registry=registry)
        waiting = Gauge("ubiquo_events_waiting", "-", registry=registry)
        return {"now": now, "events": events, "seconds": seconds, "waiting": waiting, "meters": Meters(registry, lambda: now[0])}

    def test_the_rate_is_of_the_span_that_was_asked_for(self, shop: dict[str, Any]) -> None:
        meters, events, now = shop["meters"], shop["events"].labels("accepted"), shop["now"]
        assert meters.rate(60) is None
        for second in range(0, 100, 10):
            now[0] = 1000.0 + second
            meters.take()
            events.inc(10 if second < 50 else 100)
        now[0] = 1100.0
        assert meters.rate(50) == pytest.approx(10.0)
        assert meters.rate(100) == pytest.approx(550 / 100)
        minutes, rates, _ = meters.history()
        assert rates["accepted"] == [1.0] * 5 + [10.0] * 4
        assert minutes[-1] == pytest.approx(-1 / 6, abs=0.01)

    def test_the_ring_holds_an_hour_and_no_more(self, shop: dict[str, Any]) -> None:
        for second in range(0, 40_000, 10):
            shop["now"][0] = 1000.0 + second
            shop["meters"].take()
        assert len(shop["meters"].history()[0]) == KEPT - 1
        assert shop["meters"].history()[0][0] == pytest.approx(-60, abs=0.5)

    def test_latencies_of_lately_leave_out_what_was_before(self, shop: dict[str, Any]) -> None:
        meters, seconds, now = shop["meters"], shop["seconds"].labels("/v1/churn"), shop["now"]
        seconds.observe(4.0)
        for second in range(0, 2000, 10):
            now[0] = 1000.0 + second
            meters.take()
        seconds.observe(0.02)
        [lately], [ever] = meters.latencies(900), meters.latencies()
        assert (lately.answers, ever.answers) == (1, 2)
        assert 0.01 < lately.p99 < 0.025
        assert 2.5 < ever.p99 <= 5.0

    @pytest.mark.parametrize(
        ("buckets", "share", "found"),
        [
            ([(0.1, 0.0), (0.2, 100.0), (float("inf"), 100.0)], 0.5, 0.15),
            ([(0.1, 50.0), (0.2, 100.0), (float("inf"), 100.0)], 0.5, 0.1),
            ([(0.1, 1.0), (float("inf"), 100.0)], 0.99, None),
            ([], 0.5, None),
            ([(float("inf"), 0.0)], 0.5, None),
        ],
    )
    def test_a_quantile_is_interpolated_within_its_band(self, buckets: Any, share: float, found: float | None) -> None:
        assert quantile(buckets, share) == (None if found is None else pytest.approx(found))


class TestHealth:
    def test_the_page_counts_what_the_metrics_count(self, own_service: Service, reader: Reader) -> None:
        own_service.ask("events", raw())
        assert own_service.post("/v1/events", raw("no_such_event"))[0] == 400
        text = reader.page("/health/live")
        counters = dict(re.findall(r'ubiquo_events_total{outcome="(\w+)"} ([\d.]+)', own_service.get("/metrics")[1]))
        shown = {name: int(value.replace(",", "")) for name, value in re.findall(r"<dt>([^<]+)</dt><dd><span[^>]*>([\d,]+)</span>", text)}
        assert shown["Taken"] == float(counters["accepted"]) > 0
        assert shown["Not taken: dead letters"] == float(counters["rejected"]) > 0
        assert "/v1/events" in text
        assert "Interpolated" in text

    @pytest.mark.parametrize(
        ("problems", "degraded", "told"),
        [
            ([], [], "All is well"),
            ([], ["churn: no champion"], "some answers are less than they should be"),
            (["the disk has 3 MB left"], ["churn: no champion"], '<p class="alert">the disk has 3 MB left</p>'),
        ],
    )
    def test_what_is_wrong_stands_first(self, tmp_path: Path, problems: list[str], degraded: list[str], told: str) -> None:
        async def work(task: Any, *arguments: Any) -> Any:
            return task(*arguments)

        runtime = SimpleNamespace(
            home=Home(tmp_path),
            clock=lambda: NEW_YEAR,
            decisions=SimpleNamespace(unlogged=2),
            intake=SimpleNamespace(unfollowed=0, waiting=5),
        )
        port = SimpleNamespace(runtime=runtime, meters=Meters(CollectorRegistry()), state=lambda: (problems, degraded), work=work)
        request = Request({"type": "http", "method": "GET", "path": "/console/health/live", "headers": [], "query_string": b""})
        answer = asyncio.run(health_now(Visit(request, cast(Any, port), LOCAL, Words("en"))))
        text = bytes(answer.body).decode()
        assert told in text
        assert ("All is well" in text) == (not problems and not degraded)
        assert [line for line in (*problems, *degraded) if line not in text] == []
        assert '<dt>Decisions that could not be kept</dt><dd><span class="badge bad">2</span>' in text

    def test_it_renews_itself(self, browser: Browser, own_service: Service) -> None:
        context = browser.new_context(base_url=f"http://127.0.0.1:{own_service.port}", locale="en-GB")
        page = context.new_page()
        page.goto("/console/health")
        taken = page.locator("dt", has_text=re.compile("^Taken$")).locator("xpath=following-sibling::dd[1]")
        before = int(taken.inner_text().replace(",", ""))
        own_service.ask("events", raw())
        expect(taken).to_have_text(f"{before + 1:,}", timeout=15_000)
        context.close()


class TestDeadLetters:
    def test_a_refused_event_is_listed_explained_corrected_and_taken(self, own_service: Service, reader: Reader) -> None:
        event = raw("page_viewed_in_a_dream")
        assert own_service.post("/v1/events", event)[0] == 400
        eventually(lambda: "page_viewed_in_a_dream" in reader.page("/dead-letters?field=name"))
        listed_page = reader.page("/dead-letters?source=http&field=name")
        names = re.findall(r"/console(/dead-letters/one/\w+)", listed_page)
        address = next(name for name in names if event["event_id"] in reader.page(name))
        opened = reader.page(address)
        assert "is no event here: use one of" in opened
        assert "&#34;page_viewed_in_a_dream&#34;" in opened
        # one that still means nothing is refused, and nothing is lost: neither the letter nor what was typed
        still = {**event, "name": "screen_viewed_in_a_dream"}
        refused = reader.post(f"/console{address}", data={"corrected": "yes", "raw": json.dumps(still)})
        assert refused.status_code == 422
        assert "screen_viewed_in_a_dream" in refused.text
        assert "page_viewed_in_a_dream" in reader.page(address)
        taken = reader.post(f"/console{address}", data={"corrected": "yes", "raw": json.dumps({**event, "name": "screen_view"})})
        assert (taken.status_code, taken.headers["location"]) == (303, "/console/dead-letters?sent=stored")
        assert "taken into the log" in reader.page("/dead-letters?sent=stored")
        reader.page(address, 404)
        assert "screen_view" in happened(own_service, event)

    @pytest.mark.parametrize("text", ["{", "[1]", '"a"', "null", "", "{" * 5000])
    def test_a_correction_that_is_no_object_changes_nothing(self, own_service: Service, reader: Reader, text: str) -> None:
        letter = letter_of(own_service, raw("never_known"))
        answer = reader.post(f"/console/dead-letters/one/{letter}", data={"corrected": "yes", "raw": text})
        assert answer.status_code == 422
        assert has_letter(own_service, letter)

    def test_sent_as_it_is_it_stays_as_long_as_its_cause_does(self, own_service: Service, reader: Reader) -> None:
        letter = letter_of(own_service, raw("never_known"))
        before = len(EventLog(own_service.home, "UTC").letters.read())
        answer = reader.post(f"/console/dead-letters/one/{letter}", data=AS_IT_IS)
        assert answer.status_code == 422
        assert "is no event here" in answer.text
        assert len(EventLog(own_service.home, "UTC").letters.read()) == before

    def test_after_a_crash_between_sending_and_removing_it_counts_once(self, own_service: Service, reader: Reader) -> None:
        event = raw("booking", identifiers={"loyalty_card": uuid.uuid4().hex[:8]})
        letter = letter_of(own_service, event)
        # as if the process had ended right after the intake had taken it
        own_service.ask("events", event)
        answer = reader.post(f"/console/dead-letters/one/{letter}", data=AS_IT_IS)
        assert answer.headers["location"] == "/console/dead-letters?sent=already+known"
        assert not has_letter(own_service, letter)
        assert happened(own_service, event) == ["booking"]

    def test_all_of_one_reason_are_sent_again_once_the_cause_is_gone(self, own_service: Service, reader: Reader) -> None:
        cards = [uuid.uuid4().hex[:8] for _ in range(3)]
        reason = "'feedback' was unknown to this version"
        known = [letter_of(own_service, raw("feedback", identifiers={"loyalty_card": card}), reason=reason) for card in cards]
        other = letter_of(own_service, raw("feedback"), reason="'feedback' was refused for another reason")
        unknown = letter_of(own_service, raw("never_known"), reason=reason)
        begun = reader.post("/console/dead-letters/again", data={"source": "http", "field": "name", "kind": alike(reason)})
        assert begun.status_code == 303
        progress = begun.headers["location"].removeprefix("/console")
        eventually(lambda: "Done: 4 letters" in reader.page(f"{progress}/now"))
        assert "taken into the log" in reader.page(progress)
        assert f"/console/dead-letters/one/{unknown}" in reader.page(progress)
        assert [has_letter(own_service, each) for each in (*known, other, unknown)] == [False, False, False, True, True]
        assert [happened(own_service, {"identifiers": {"loyalty_card": card}}) for card in cards] == [["feedback"]] * 3
        told = Audit(own_service.home, Vault.open(own_service.home)).page(1, action="replay letters")[1]
        assert told[0]["outcome"] == "1 rejected, 3 stored"

    def test_a_message_of_another_vendors_client_is_read_as_at_its_receipt(self, own_service: Service, reader: Reader) -> None:
        card = uuid.uuid4().hex[:8]
        sent = NEW_YEAR + timedelta(hours=1)
        message = {
            "type": "track", "event": "Product Viewed", "userId": card, "messageId": uuid.uuid4().hex, "sentAt": sent.isoformat(),
            "timestamp": (sent - timedelta(minutes=1)).isoformat(), "properties": {"product_id": "1082185"},
        }  # fmt: skip
        letter = letter_of(own_service, message, source="segment")
        assert reader.post(f"/console/dead-letters/one/{letter}", data=AS_IT_IS).status_code == 303
        _, told = own_service.post("/v1/profile", {"identifiers": {"user_id": card}})
        [event] = told["events"]
        # its clock was an hour ahead when it was received
        assert event["occurred_at"][:16] == (NEW_YEAR - timedelta(minutes=1)).isoformat()[:16]

    def test_a_page_cannot_tell_by_way_of_a_letter_what_it_may_not_tell(self, own_service: Service, reader: Reader) -> None:
        event = raw("page_view", identifiers={"cookie": uuid.uuid4().hex})
        letter = letter_of(own_service, event, source="page")
        bought = {**event, "name": "purchase", "items": [{"item_id": "1082185", "quantity": 1}]}
        answer = reader.post(f"/console/dead-letters/one/{letter}", data={"corrected": "yes", "raw": json.dumps(bought)})
        assert answer.status_code == 422
        assert has_letter(own_service, letter)

    def test_rows_of_files_and_what_was_cut_short_are_told_what_helps(self, own_service: Service, reader: Reader) -> None:
        of_a_file = letter_of(own_service, {"row": 7}, source="sales.csv")
        cut = letter_of(own_service, '{"event_id": "e1", "name": "pag... (90000 characters)')
        assert "import it again" in reader.page(f"/dead-letters/one/{of_a_file}")
        assert "Send as it is" not in reader.page(f"/dead-letters/one/{of_a_file}")
        assert reader.post("/console/dead-letters/again", data={"source": "sales.csv", "field": "name", "kind": "-"}).status_code == 400
        assert "cut short" in reader.page(f"/dead-letters/one/{cut}")
        assert reader.post(f"/console/dead-letters/one/{cut}", data=AS_IT_IS).status_code == 422
        assert has_letter(own_service, of_a_file)
        assert has_letter(own_service, cut)

    def test_opening_one_is_audited_and_kept_from_who_may_not(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        letter = letter_of(service, raw("never_known", identifiers={"email": "ada@example.org"}))
        for scope in ("decide", "ingest"):
            with Reader(service, keys[scope]) as other:
                assert "ada@" not in other.page(f"/dead-letters/one/{letter}", 403)
                assert other.post(f"/console/dead-letters/one/{letter}", data=AS_IT_IS).status_code == 403
                assert other.post("/console/dead-letters/again", data={"source": "http"}).status_code == 403
        with Reader(service, keys["admin"]) as operator:
            assert "ada@example.org" in operator.page(f"/dead-letters/one/{letter}")
            assert "ada@example.org" not in operator.page("/dead-letters")
        lines = Audit(service.home, Vault.open(service.home)).lines(letter)
        assert [(line["key"], line["action"], line["outcome"]) for line in lines] == [("admin-key", "read letter", "done")]

    def test_who_runs_it_may_send_letters_again_without_seeing_what_they_say(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        event = raw("feedback", identifiers={"email": f"{uuid.uuid4().hex}@example.org"})
        letter = letter_of(service, event, reason="'feedback' was unknown to this version")
        email = event["identifiers"]["email"]
        with Reader(service, keys["manage"]) as operator:
            assert "was unknown to this version" in operator.page("/dead-letters")
            text = operator.page(f"/dead-letters/one/{letter}")
            assert "was unknown to this version" in text
            assert email not in text
            assert "read_customer" in text
            corrected = {"corrected": "yes", "raw": json.dumps(event)}
            assert operator.post(f"/console/dead-letters/one/{letter}", data=corrected).status_code == 403
            assert has_letter(service, letter)
            assert operator.post(f"/console/dead-letters/one/{letter}", data=AS_IT_IS).status_code == 303
        assert not has_letter(service, letter)
        lines = Audit(service.home, Vault.open(service.home)).lines(letter)
        assert [(line["key"], line["action"], line["outcome"]) for line in lines] == [("manage-key", "replay letter", "stored")]

    def test_lists_read_a_page_and_filters_narrow_it(self, tiny: TinyShop) -> None:
        letters = tiny.log.letters
        assert (letters.newest(), letters.tallies(), letters.letter("none")) == ([], [], None)
        for k in range(7):
            at = NEW_YEAR + timedelta(minutes=k)
            tiny.log.reject([DeadLetter(at, "http" if k % 2 else "segment", f"field{k % 3}", "why", f'{{"n": {k}}}')])
        assert [json.loads(each["raw"])["n"] for each in letters.newest(limit=3)] == [6, 5, 4]
        assert [json.loads(each["raw"])["n"] for each in letters.newest(limit=3, offset=3)] == [3, 2, 1]
        assert [json.loads(each["raw"])["n"] for each in letters.newest("segment", "field0")] == [6, 0]
        assert sum(tally.letters for tally in letters.tallies()) == 7
        newest = letters.newest(limit=1)[0]
        assert letters.letter(newest["letter_id"]) == newest

    def test_reasons_that_differ_in_a_number_are_one(self) -> None:
        later = "2030-01-01T00:00:00+00:00 lies after it was received (2018-01-01T05:00:00+00:00): check the clock"
        soon = "2019-07-01T00:00:00+00:00 lies after it was received (2018-01-02T05:00:00+00:00): check the clock"
        made = [{"source": "http", "field": "occurred_at", "reason": each, "received_at": NEW_YEAR} for each in (later, soon)]
        [group] = groups(made)
        assert (group.letters, group.newest["reason"]) == (2, later)

    @pytest.mark.parametrize(
        ("field", "found"),
        [("items[1].quantity", '"two"'), ("name", '"x"'), ("$", None), ("items[9].quantity", None), ("nothing.there", None), ("", None)],
    )
    def test_what_stands_at_the_field_is_shown(self, field: str, found: str | None) -> None:
        said = {"name": "x", "items": [{"quantity": 1}, {"quantity": "two"}]}
        assert value_at(json.dumps(said), field) == found


class TestKeysAndAudit:
    def test_a_key_is_shown_once_and_opens_what_its_scopes_open(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        name = f"till {uuid.uuid4().hex[:6]}"
        with Reader(service, keys["admin"]) as admin:
            made = admin.post("/console/keys", data={"name": name, "scope_decide": "yes", "scope_ingest": "yes"})
            [token] = re.findall(r'value="(ubq_[\w-]+)"', made.text)
            assert token not in admin.page("/keys")
            key = Keys(service.home).check(token)
            assert key is not None
            assert (key.name, key.scopes) == (name, {"decide", "ingest"})
            assert admin.post("/console/keys", data={"name": name, "scope_decide": "yes"}).status_code == 422
            assert admin.post("/console/keys/revoke", data={"name": name}).status_code == 303
            assert Keys(service.home).check(token) is None
            assert admin.post("/console/keys/revoke", data={"name": name}).status_code == 404
            assert token not in admin.page("/audit")
            lines = admin.page("/audit?key=admin-key&action=create+key")
            assert f"done: {name} (ingest decide)" in lines
            assert f"done: {name}" in admin.page(f"/audit?action=revoke+key&customer={name}")

    @pytest.mark.parametrize(
        "said",
        [{"name": "", "scope_decide": "yes"}, {"name": "<b>", "scope_decide": "yes"}, {"name": "x" * 65, "scope_decide": "yes"},
         {"name": "no scope"}, {"name": "both", "scope_browser": "yes", "scope_admin": "yes"}],
    )  # fmt: skip
    def test_a_mistaken_key_is_told_and_not_made(self, keyed_service: tuple[Service, dict[str, str]], said: dict[str, str]) -> None:
        service, keys = keyed_service
        before = len(Keys(service.home).listed())
        with Reader(service, keys["admin"]) as admin:
            answer = admin.post("/console/keys", data=said)
        assert answer.status_code == 422
        assert 'role="alert"' in answer.text
        assert len(Keys(service.home).listed()) == before

    def test_nobody_locks_themselves_out(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        with Reader(service, keys["admin"]) as admin:
            assert admin.post("/console/keys/revoke", data={"name": "admin-key"}).status_code == 409
        assert Keys(service.home).check(keys["admin"]) is not None

    def test_without_the_scope_there_is_neither_page_nor_menu_nor_change(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, keys = keyed_service
        for scope in ("decide", "read_customer", "ingest"):
            with Reader(service, keys[scope]) as other:
                for path in ("/keys", "/audit", "/dead-letters"):
                    other.page(path, 403)
                assert other.post("/console/keys", data={"name": "mine", "scope_admin": "yes"}).status_code == 403
                assert other.post("/console/keys/revoke", data={"name": "admin-key"}).status_code == 403
        with Reader(service, keys["decide"]) as other:
            menu = other.page("/models")
            assert "/console/health" in menu
            assert not [path for path in ("/console/keys", "/console/audit", "/console/dead-letters") if f'"{path}"' in menu]
        assert "mine" not in {key["name"] for key in Keys(service.home).listed()}

    def test_the_audit_log_comes_a_page_at_a_time_newest_first(self, tiny: TinyShop) -> None:
        audit = Audit(tiny.home, Vault.open(tiny.home))
        for k in range(25):
            audit.note(NEW_YEAR + timedelta(minutes=k), f"key{k % 2}", "read", f"c{k % 5}", "done")
        count, lines = audit.page(10)
        assert (count, [line["at"].minute for line in lines][:3]) == (25, [24, 23, 22])
        count, lines = audit.page(10, 10, key="key0")
        assert (count, [line["at"].minute for line in lines]) == (13, [4, 2, 0])
        assert audit.page(10, customer_id="c1")[0] == 5
        assert audit.page(10, customer_id="c1", action="erase") == (0, [])
        assert audit.named() == (["key0", "key1"], ["read"])


class TestFeatures:
    def test_every_feature_is_there_and_the_views_tell_their_age(self, own_service: Service, reader: Reader) -> None:
        text = reader.page("/features")
        features = list(listed(domain_named(Shop.load(own_service.home).domain)))
        assert [each.name for each in features if f">{each.name}</th>" not in text] == []
        assert "last visit … days ago" in text
        rows = dict(re.findall(r'<th scope="row" class="mono">(\w+)</th>(.*?)</tr>', text, re.DOTALL))
        assert sorted(rows) == ["customer_activity", "customer_state", "item_stats"]
        for view, row in rows.items():
            # what was materialized is of the end of the data; a home made before a view had its columns names the command
            assert '<span class="badge good">' in row or "not computed yet in this form" in row, (view, row)
        assert '<span class="badge good">' in rows["customer_state"], rows["customer_state"]

    def test_the_search_finds_by_meaning_and_by_model(self, reader: Reader) -> None:
        found = reader.get("/console/features", params={"find": "last visit recency"}, headers={"hx-request": "true"}).text
        assert re.findall(r'class="mono nowrap">(\w+)</th>', found) == ["recency_days"]
        of_a_model = reader.page("/features?find=recommendations")
        assert "bought_item_ids" in of_a_model
        assert ">recency_days</th>" not in of_a_model
        assert "No feature fits" in reader.page("/features?find=%3Cscript%3E")


def reported(version: int, value: float = 0.42, promoted: bool = True) -> ModelReport:
    """What a run of churn found: the last tenth of the customers holds most of those who left."""
    main = {"average_precision": Measured(value, value - 0.05, value + 0.05), "auc": Measured(0.84, 0.82, 0.86)}
    simple = {"average_precision": Measured(0.33, 0.29, 0.39), "auc": Measured(0.74, 0.71, 0.78)}
    points = [CalibrationPoint(predicted=k / 20, observed=Measured(k / 20, k / 25, k / 15), rows=100) for k in range(10)]
    return ModelReport(
        model="churn", kind="churn", version=version, run_id="r", trained_at=NEW_YEAR, as_of=NEW_YEAR, horizon_days=28, log_version="1",
        commit="c", features="churn_v1", metric="average_precision", served="lightgbm", baseline="recency",
        quality={"recency": simple, "lightgbm": main}, lead=Measured(0.08, 0.05, 0.12), rivals={}, cuts=[JudgedCut(name="a", at=NEW_YEAR, rows=9)],
        base_rate=0.2, calibration=points, segment_metric="auc", segments={"new ones": (9, Measured(0.6, 0.5, 0.7))}, inputs=[],
        reference_rows=100, settings={}, promoted=promoted, verdict="it leads", limits=["not for newcomers"], document=Document("t", []),
        data=Document("d", []),
    )  # fmt: skip


def keep_report(home: Home, report: ModelReport) -> None:
    """As the training job leaves it: a file a version, and a line in the history."""
    path, history = version_path(home.root, report.model, report.version), history_path(home.root, report.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(report))
    measures = (report.quality[name][report.metric] for name in (report.served, report.baseline))
    told = {name: getattr(report, name) for name in TrainedVersion.__struct_fields__ if name in ModelReport.__struct_fields__}
    line = TrainedVersion(**told, **dict(zip(("value", "baseline_value"), measures, strict=True)))
    with history.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def keep_drift(home: Home, report: DriftReport) -> None:
    path = drift_path(home.root, report.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(report))


class TestModels:
    @pytest.fixture
    def reports(self, own_service: Service) -> Iterator[Any]:
        """The home of a service whose churn has a report; what was there before comes back."""
        home = own_service.home
        folder, away = home.root / "reports", home.root / "reports.away"
        if folder.exists():
            folder.rename(away)
        yield home
        shutil.rmtree(folder, ignore_errors=True)
        if away.exists():
            away.rename(folder)

    def test_where_nothing_was_kept_the_command_is_named(self, reports: Any, reader: Reader) -> None:
        text = reader.page("/models/churn")
        assert "No report of version 1 is kept" in text
        assert "python -m training drift churn" in text
        overview = reader.page("/models")
        for name in ("churn", "recommendations", "next-best-offer"):
            assert f"python -m training {name}" in overview

    def test_a_champion_stands_beside_the_simple_model_with_intervals(self, reports: Any, reader: Reader) -> None:
        keep_report(reports, reported(1))
        overview = reader.page("/models")
        assert "0.420 [0.370; 0.470]" in overview
        assert "0.330 [0.290; 0.390]" in overview
        assert '<span class="badge good">0.080 [0.050; 0.120]' in overview
        text = reader.page("/models/churn")
        assert "champion since" in text
        assert "The tenth with the highest scores holds 20% of those it is about." in text
        assert "not for newcomers" in text

    def test_quality_is_drawn_over_the_versions(self, reports: Any, reader: Reader) -> None:
        for version, value in ((1, 0.42), (2, 0.4), (3, 0.45)):
            keep_report(reports, reported(version, value, promoted=version == 1))
        text = reader.page("/models/churn")
        plots = [json.loads(each) for each in re.findall(r"data-plot='([^']+)'", text)]
        [history] = [plot for plot in plots if plot["x"] == [1, 2, 3]]
        assert history["series"][0]["y"] == [0.42, 0.4, 0.45]
        assert text.count("stayed challenger") == 2
        # the report is that of the version that answers, not the newest
        assert "0.420 [0.370; 0.470]" in text

    def test_drift_is_told_with_its_thresholds_and_the_version_it_is_of(self, reports: Any, reader: Reader) -> None:
        moved = InputDrift(
            name="recency_days", psi=0.31, chance=0.02, verdict="moved", edges=[1.0], before=[0.5, 0.5, 0.0], now=[0.2, 0.7, 0.1]
        )
        calm = InputDrift(
            name="visit_days_28", psi=0.01, chance=0.02, verdict="stable", edges=[1.0], before=[0.5, 0.5, 0.0], now=[0.5, 0.5, 0.0]
        )
        keep_drift(
            reports,
            DriftReport(model="churn", version=7, computed_at=NEW_YEAR, as_of=NEW_YEAR, rows=90, reference_rows=100, inputs=[moved, calm]),
        )
        text = reader.page("/models/churn")
        assert "1 of 2 inputs are to be watched." in text
        assert "stable below 0.1, to be watched from there on, moved from 0.25 on" in text
        assert "computed for version 7, not for the one that answers" in text
        assert '<span class="badge bad">moved</span>' in text

    def test_a_damaged_report_is_named_and_takes_nothing_else_away(self, reports: Any, reader: Reader) -> None:
        keep_report(reports, reported(1))
        version_path(reports.root, "churn", 1).write_text('{"model": "churn"')
        history_path(reports.root, "churn").write_text("{\n")
        for path in ("/models", "/models/churn"):
            text = reader.page(path)
            assert "1.json" in text
            assert "history.jsonl, line 1" in text
            assert "version 1" in text

    def test_a_name_that_is_no_models_is_not_found(self, reader: Reader) -> None:
        for name in ("nothing", "..%2f..%2fetc", "%3Cscript%3E"):
            reader.page(f"/models/{name}", 404)

    def test_plots_of_no_probabilities_and_of_nothing_that_came_true_are_left_out(self) -> None:
        words = Words("en")
        assert calibration_plot([], words) is None
        assert gain_plot([], words) is None
        never = [CalibrationPoint(predicted=0.1, observed=Measured(0.0, 0.0, 0.1), rows=10)]
        assert gain_plot(never, words) is None
        assert calibration_plot(never, words) is not None
        twice = [CalibrationPoint(predicted=0.1, observed=Measured(share, 0.0, 1.0), rows=10) for share in (0.0, 0.5)]
        plot = calibration_plot(twice, words)
        assert plot is not None
        assert plot["x"][0] < plot["x"][1]
        gained = gain_plot(twice, words)
        assert gained is not None
        assert (gained[0]["y"] if "y" in gained[0] else gained[0]["series"][0]["y"]) == [0.0, 100.0, 100.0]
