"""The marketer's pages: audiences and their files, offers, journeys as flows, experiments, coverage, exports."""

from __future__ import annotations

import csv
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Page
from scene import NEW_YEAR, Service, TinyShop, copy_home, event, eventually, loyalty_cards, start_service, stop_service

from features.catalogue.shop import Shop
from features.catalogue.tables import OFFERS, Catalogue
from features.definitions.segments import SEGMENTS, Vocabulary
from features.events.event import EVENT_NAMES
from features.people.identity import Identities
from features.state.home import Home
from models.reports import ExperimentReport, Measured, VariantEffect, experiment_path
from serving.console.counting import Asked, CoverageCount, OfferCount, OfferCounts, counted, offers_of
from serving.console.jobs import MOST_WAITING, Jobs
from serving.console.pages.marketing.exporting import DOWNLOADED, EXPORTED, files_of
from serving.console.pages.marketing.flow import FlowNode, flow_of
from serving.console.pages.marketing.offers import OfferWish, table_of
from serving.console.pages.marketing.segments_file import add_segment, spelled_out
from serving.console.port import RefusedError
from serving.console.words import Words
from serving.decide.governor import Governor
from serving.decide.ledger import Ledger, Promise
from serving.decide.policy import Policy
from serving.demo import SAMPLES, copy_samples
from serving.journeys.plan import JOURNEYS, JourneyPlan, PlacedStep, Plans
from serving.journeys.runs import Runs
from serving.privacy.keys import Audit, Keys
from serving.runtime import Runtime

ENGLISH = Words("en", "America/New_York", "USD")
POLICY = """
control_group: {share: 0.2, salt: pages, covers: [offers, contacts]}
experiments:
  - {name: subject-line, salt: first, variants: [{name: plain, share: 0.5}, {name: discount, share: 0.5}]}
"""
BRANCHED = """
sinks: [{name: files, channels: [email, push, ads]}]
journeys:
  - name: cart-left
    start: {on: [add_to_cart], after: 1h}
    stop_on: [purchase]
    steps:
      - offer: {channels: [push]}
      - branch:
          - when: answered
            steps:
              - wait: 2d
              - branch:
                  - when: opened
                    steps: [{offer: {channels: [ads]}}]
                  - steps: [{wait: 3h}]
          - when: opened
            steps: []
          - steps: [{offer: {channels: [email]}}, {wait: 90m}]
      - wait: 1d
    after_conversion: [{wait: 3d}, {offer: {channels: [email]}}]
"""


class Marketer:
    """One service with segments, journeys and a policy, and who may what on its pages."""

    def __init__(self, service: Service, keys: Mapping[str, str]) -> None:
        self.service, self.home, self.keys = service, service.home, keys

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.service.port}"

    def client(self, key: str = "marketer") -> httpx.Client:
        return httpx.Client(base_url=self.address, cookies={"ubiquo_key": self.keys[key]}, headers={"origin": self.address}, timeout=60)

    def page(self, path: str, key: str = "marketer") -> str:
        with self.client(key) as client:
            answer = client.get(f"/console{path}")
        assert answer.status_code == 200, (path, answer.status_code, answer.text[-2000:])
        return answer.text

    def send(self, path: str, key: str = "marketer", **fields: Any) -> httpx.Response:
        with self.client(key) as client:
            return client.post(f"/console{path}", data=fields)

    def happens(self, card: str, name: str, **more: Any) -> None:
        token = {"authorization": f"Bearer {self.keys['everything']}"}
        at = (NEW_YEAR + timedelta(seconds=1)).isoformat()
        told = {"event_id": uuid.uuid4().hex, "name": name, "occurred_at": at, "identifiers": {"loyalty_card": card}, **more}
        status, answer = self.service.post("/v1/events", told, **token)
        assert (status, answer["accepted"]) == (200, 1), answer

    def counted(self, path: str, wanted: str) -> str:
        """The page once what was begun has been counted."""
        eventually(lambda: wanted in self.page(path), 240)
        return self.page(path)


@pytest.fixture(scope="module")
def marketer(trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Marketer]:
    home = copy_home(trained, tmp_path_factory.mktemp("marketing") / "home")
    copy_samples(home)
    (home.root / "policy.yaml").write_text(POLICY)
    scopes: dict[str, list[Any]] = {
        "looker": ["decide"],
        "marketer": ["decide", "read_customer"],
        "keeper": ["decide", "manage"],
        "everything": ["admin"],
    }
    keys = {name: Keys(home).create(name, each, NEW_YEAR) for name, each in scopes.items()}
    running = start_service(home)
    yield Marketer(running, keys)
    stop_service(running)


def number_beside(text: str, what: str) -> int:
    """The number in the tile of that name."""
    found = re.search(rf'class="value">([\d,]+)</span><span>{what}<', text)
    assert found is not None, what
    return int(found[1].replace(",", ""))


class TestAudiences:
    @pytest.fixture
    def window(self, browser: Browser, marketer: Marketer) -> Iterator[Page]:
        context = browser.new_context(base_url=marketer.address, locale="en-GB", viewport={"width": 1280, "height": 900})
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.goto("/console/sign-in?next=/console/audiences")
        page.fill("#key", marketer.keys["marketer"])
        page.keyboard.press("Enter")
        page.wait_for_url("**/console/audiences")
        yield page
        context.close()

    def test_a_marketer_builds_an_audience_sees_its_size_and_exports_it_without_whoever_withdrew(
        self, marketer: Marketer, window: Page, axe: str
    ) -> None:
        home, identities = marketer.home, Identities(marketer.home)
        policy = Policy.read(home.root / "policy.yaml")
        cards = {card: identities.owner_of([identities.vault.key("loyalty_card", card)]) for card in loyalty_cards(home)}
        window.get_by_label("weekly_shoppers").check()
        window.fill("#condition", "recency_days < 60.0")
        window.get_by_role("button", name="Count", exact=True).click()
        window.wait_for_selector(".big")
        assert window.locator("#audience code").first.inner_text() == "(weekly_shoppers) && (recency_days < 60.0)"
        size = int(window.locator(".big strong").inner_text().replace(",", ""))
        reached = {
            row.locator("th").inner_text(): int(row.locator("td").first.inner_text().replace(",", ""))
            for row in window.locator("#audience tbody tr").all()
        }
        assert 20 < size < len(cards)
        assert reached["email"] == 0
        assert 0 < reached["mail"] < size
        window.evaluate(axe)
        found = window.evaluate("axe.run()")["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []

        def exported() -> set[str]:
            window.goto("/console/audiences?condition=(weekly_shoppers)%20%26%26%20(recency_days%20%3C%2060.0)")
            window.select_option("#channel", "mail")
            window.select_option("#for", "excel")
            window.get_by_role("button", name="Write the file").click()
            window.wait_for_url("**/console/exports")
            with window.expect_download() as download:
                window.get_by_role("link", name="Download").first.click()
            content = Path(download.value.path()).read_text(encoding="utf-8-sig")
            return {row["external_id"] for row in csv.DictReader(content.splitlines())}

        before = exported()
        assert len(before) == reached["mail"]
        assert {card for card in before if policy.assigned(cards[card]).group == "control"} == set()
        gone, silent = sorted(before)[:2]
        marketer.happens(gone, "consent_update", consent={"purposes": {"personalization": False}})
        marketer.happens(silent, "consent_update", consent={"permissions": {"mail": False}})
        after = exported()
        assert after == before - {gone, silent}
        audit = Audit(home, identities.vault)
        lines = {card: [(line["key"], line["action"]) for line in audit.lines(cards[card])] for card in (gone, min(after))}
        assert lines[gone] == [("marketer", EXPORTED), ("marketer", DOWNLOADED)]
        assert lines[min(after)] == [("marketer", EXPORTED), ("marketer", DOWNLOADED)] * 2

    def test_a_condition_that_is_wrong_is_refused_whole_and_the_nearest_name_told(self, marketer: Marketer) -> None:
        before = (marketer.home.root / SEGMENTS).read_bytes()
        for path in ("/audiences", "/audiences/export"):
            answer = marketer.send(path, condition="recency_dayz < 9.0", channel="mail", **{"for": "excel"})
            assert answer.status_code == 422
            assert "recency_days" in answer.text
        answer = marketer.send("/audiences/save", "keeper", condition="recency_days", name="no_truth")
        assert answer.status_code == 422
        assert "neither true nor false" in answer.text
        assert (marketer.home.root / SEGMENTS).read_bytes() == before

    def test_saved_under_a_name_it_is_a_segment_and_the_rest_of_the_file_stays(self, marketer: Marketer) -> None:
        path = marketer.home.root / SEGMENTS
        before = path.read_text()
        condition = "gone_quiet && cart_minor > 5000.0 && last_channel != 'gone_quiet'"
        assert marketer.send("/audiences/save", "keeper", condition=condition, name="left_much").status_code == 303
        assert path.read_text().startswith(before.rstrip("\n"))
        known = Vocabulary.load(marketer.home, Shop.load(marketer.home).domain)
        quiet = known.segments["gone_quiet"].text
        assert known.segments["left_much"].text == f"({quiet}) && cart_minor > 5000.0 && last_channel != 'gone_quiet'"
        again = marketer.send("/audiences/save", "keeper", condition="recency_days > 3.0", name="left_much")
        assert again.status_code == 422
        assert "already" in again.text
        assert "left_much" in marketer.page("/audiences")

    def test_a_key_does_what_its_scopes_allow_and_no_more(self, marketer: Marketer) -> None:
        file = {"condition": "weekly_shoppers", "channel": "mail", "for": "excel"}
        assert marketer.send("/audiences/export", "looker", **file).status_code == 403
        assert marketer.send("/audiences/save", "marketer", condition="recency_days > 9.0", name="mine").status_code == 403
        with marketer.client("looker") as looker:
            assert looker.get("/console/exports/any.csv").status_code == 403
            assert "Write the file" not in looker.get("/console/audiences?condition=weekly_shoppers").text

    def test_the_sizes_of_all_segments_are_those_of_the_audiences(self, marketer: Marketer) -> None:
        assert marketer.send("/audiences", job="segments").status_code == 303
        text = marketer.counted("/audiences", "Counted on")
        found = re.search(r"coupon_share_182 &gt; 0.05</code></td><td class=\"num\">([\d,]+)<", text)
        assert found is not None
        marketer.send("/audiences", condition="coupon_fans")
        alone = marketer.counted("/audiences?condition=coupon_fans", 'class="big"')
        assert f"<strong>{found[1]}</strong>" in alone


class TestFiles:
    def test_they_are_listed_handed_out_and_deleted_with_what_tells_whose_they_are(self, marketer: Marketer) -> None:
        marketer.send("/audiences/export", condition="big_baskets", channel="ads", **{"for": "braze"})
        eventually(lambda: any("big_baskets" in path.name for path in files_of(marketer.home)))
        path = next(path for path in files_of(marketer.home) if "big_baskets" in path.name)
        assert path.name in marketer.page("/exports")
        with marketer.client() as client:
            answer = client.get(f"/console/exports/{path.name}")
            assert answer.content == path.read_bytes()
            assert "attachment" in answer.headers["content-disposition"]
            for other in ("../policy.yaml", "..%2Fpolicy.yaml", "nothing.csv", f"{path.name}.customers"):
                assert client.get(f"/console/exports/{other}").status_code == 404
        assert marketer.send(f"/exports/{path.name}/delete", sure="yes").status_code == 303
        assert [each.name for each in path.parent.iterdir() if path.name in each.name] == []

    def test_what_waits_for_a_sink_is_told_with_the_command_that_writes_it(self, marketer: Marketer) -> None:
        assert "python -m serving outbox export letters --out letters.csv" in marketer.page("/exports")


class TestJourneys:
    def test_the_flow_tells_how_many_stand_at_each_step(self, marketer: Marketer) -> None:
        def on_the_way() -> int:
            return number_beside(marketer.page("/journeys/win-back"), "on the way now")

        runs = Runs(marketer.home)
        eventually(lambda: runs.last_day("win-back") is not None and all(at == 1 for j, _, at, *_ in runs.standing() if j == "win-back"))
        standing = sum(n for journey, _, _, n, _ in runs.standing() if journey == "win-back")
        waiting = {status: n for journey, status, n in runs.messages() if journey == "win-back"}
        text = marketer.page("/journeys/win-back")
        assert standing > 5
        assert on_the_way() == standing
        here = re.findall(r'class="step (\w+)"><strong>([^<]+)</strong>.*?here[^"]*">([\d,]+) here', text, re.DOTALL)
        assert [(kind, int(n)) for kind, _, n in here if n != "0"] == [("wait", standing)]
        # the control group gets no letter
        assert 0 < waiting["waiting"] < standing
        assert f'<td class="num">{waiting["waiting"]}</td>' in marketer.page("/journeys")
        assert "otherwise" in text
        runs.close()

    def test_whoever_does_what_it_is_for_is_converted_and_their_letter_taken_back(self, marketer: Marketer) -> None:
        runs = Runs(marketer.home)
        eventually(lambda: bool(runs.outgoing.of_sink("letters", ("waiting",))))
        customer = runs.outgoing.of_sink("letters", ("waiting",))[0].customer_id
        identities = Identities(marketer.home)
        card = next(
            card for card in loyalty_cards(marketer.home) if identities.owner_of([identities.vault.key("loyalty_card", card)]) == customer
        )
        marketer.happens(
            card, "purchase", channel="store", items=[{"item_id": "1082185", "quantity": 1, "amount_minor": 199}], currency="USD"
        )
        eventually(lambda: number_beside(marketer.page("/journeys/win-back"), "converted") == 1)
        assert "1 converted" in marketer.page("/journeys/win-back")
        assert runs.outgoing.of_sink("letters", ("dropped",))[0].customer_id == customer
        runs.close()

    def test_there_is_no_page_of_a_journey_that_is_none(self, marketer: Marketer) -> None:
        with marketer.client() as client:
            assert client.get("/console/journeys/none").status_code == 404

    def test_every_step_is_drawn_where_whoever_is_at_it_stands(self) -> None:
        plan = _plans(BRANCHED).plans["cart-left"]
        kinds = dict(_placed(plan.steps + plan.after))
        for at, step in kinds.items():
            wanted = "offer" if step.step.offer else "wait" if step.step.wait else "unless"
            assert plan.operations[at].kind == wanted
        assert sorted(at for at, step in kinds.items() if not step.ways) == [
            at for at, operation in enumerate(plan.operations) if operation.kind in ("offer", "wait")
        ]

    def test_whoever_waits_to_begin_stands_at_the_start_and_not_at_the_first_step(self) -> None:
        plan = _plans(BRANCHED).plans["cart-left"]
        flow = flow_of(plan, {0: 7, 2: 3}, 5, ENGLISH)
        assert (flow.yet_to_begin, flow.nodes[0].standing) == (5, 2)
        assert [node.title for node in _leaves(flow.nodes) if node.standing == 3] == ["Wait 2 days"]
        assert [node.title for node in flow.after] == ["Wait 3 days", "Offer by email"]
        assert [node.title for node in _leaves(flow.nodes) if node.kind == "wait"] == [
            "Wait 2 days",
            "Wait 3 hours",
            "Wait 90 minutes",
            "Wait 1 day",
        ]


def _plans(text: str) -> Plans:
    path = Path(JOURNEYS)
    vocabulary = Vocabulary.parse(b"", SEGMENTS, "")
    given = SimpleNamespace(exists=lambda: True, read_bytes=lambda: text.encode(), name=path.name)
    return Plans.read(cast(Path, given), vocabulary, frozenset(EVENT_NAMES))


def _placed(steps: tuple[PlacedStep, ...]) -> Iterator[tuple[int, PlacedStep]]:
    for step in steps:
        yield step.position, step
        for _, inner in step.ways:
            yield from _placed(inner)


def _leaves(nodes: Any) -> Iterator[FlowNode]:
    for node in nodes:
        if node.ways:
            for way in node.ways:
                yield from _leaves(way.nodes)
        else:
            yield node


class TestOffers:
    def test_a_table_tells_what_is_in_force_and_why_the_others_are_not(self, tiny: TinyShop) -> None:
        day = timedelta(days=1)
        rows = {
            "now": {}, "later": {"valid_from": NEW_YEAR + day}, "over": {"valid_until": NEW_YEAR - day}, "spent": {"budget": 1}, "some": {"budget": 2},
            "sold": {"stock": 1}, "called": {"channels": ["call_centre"]},
        }  # fmt: skip
        common = {"campaign_id": "c", "campaign_type": "A", "valid_from": NEW_YEAR - 2 * day, "valid_until": NEW_YEAR + 9 * day}
        table = pa.Table.from_pylist(
            [{"offer_id": name, "item_ids": ["i1", "i2"], **common, **more} for name, more in rows.items()], OFFERS
        )
        Catalogue(tiny.home).save("offers", table, OFFERS)
        (tiny.home.root / "policy.yaml").write_text("contact: {caps: [{most: 0, per: day, each: offer, channels: [call_centre]}]}")
        ledger, limits = Ledger(tiny.home), {"spent": 1, "some": 2}
        hour = timedelta(hours=1)
        assert ledger.reserve(Promise([], "d1", None, ["spent", "some"], NEW_YEAR, hour, limits, hour))
        ledger.reached(["d1"], [("e1", "sold")])
        runtime = cast(Runtime, SimpleNamespace(home=tiny.home, engine=SimpleNamespace(governor=Governor(tiny.home))))
        found = table_of(runtime, OfferWish(shown="all"), NEW_YEAR, ENGLISH)
        assert {line.offer.offer_id: line.why_not for line in found.lines} == {
            "now": None, "some": None, "later": "begins on Jan 2, 2018", "over": "ended on Dec 31, 2017", "spent": "given out as often as its budget allows",
            "sold": "all are redeemed", "called": "no offer may go out by its channels (policy.yaml)",
        }  # fmt: skip
        left = {line.offer.offer_id: (line.given, line.redeemed, line.items) for line in found.lines}
        assert (left["some"], left["sold"], left["now"]) == ((1, None, 2), (None, 1, 2), (None, None, 2))
        assert (found.in_force, found.all) == (2, 7)
        assert [line.offer.offer_id for line in table_of(runtime, OfferWish("SPE", "not"), NEW_YEAR, ENGLISH).lines] == ["spent"]

    def test_the_page_shows_those_in_force_and_the_commands_for_the_rest(self, marketer: Marketer) -> None:
        rows = Catalogue(marketer.home).read("offers").to_pylist()
        in_force = [row for row in rows if row["valid_from"] <= NEW_YEAR + timedelta(minutes=1) < row["valid_until"]]
        text = marketer.page("/offers")
        assert f"{len(in_force):,} of {len(rows):,} are in force now." in text
        assert "python -m features catalogue offers --rollback" in text
        assert in_force[0]["offer_id"] in marketer.page(f"/offers?q={in_force[0]['offer_id']}")
        assert "ended on" in marketer.page("/offers?shown=not")
        assert "No offer is like that." in marketer.page("/offers?q=no-such-thing")
        assert "Not counted yet" in text
        assert marketer.send("/offers/count", sure="yes").status_code == 303
        counts = marketer.counted("/offers?shown=all&q=1-", "Counted on")
        redeemed = re.findall(r'<td class="num">([\d,]+)</td>\s*</tr>', counts)
        assert sum(int(n.replace(",", "")) for n in redeemed) > 0, "customers of the data redeemed coupons"

    def test_what_was_shown_and_taken_counts_for_the_offer_that_it_names_and_not_without_consent(self, tiny: TinyShop) -> None:
        at = NEW_YEAR - timedelta(days=2)
        told = [
            ("offer_view", "1"),
            ("offer_view", "2"),
            ("offer_accept", "1"),
            ("offer_decline", "2"),
            ("offer_redeem", "1"),
            ("offer_view", "3"),
        ]
        rows = [event(f"e{k}", name, at, card, offer_id="c0-1") for k, (name, card) in enumerate(told)]
        refused = event("no", "consent_update", at - timedelta(days=1), "3", consent={"purposes": {"analytics": False}})
        tiny.add(refused, *rows, event("bare", "offer_view", at, "1", offer_id="c1-0"))
        found = offers_of(tiny.home, NEW_YEAR).offers
        assert found == {"c0-1": OfferCount(shown=2, accepted=1, declined=1, redeemed=1), "c1-0": OfferCount(shown=1)}


class TestCoverage:
    def test_the_last_count_is_told_with_its_reasons_and_before_there_is_one_how_it_is_begun(self, marketer: Marketer) -> None:
        address = "/coverage?model=churn&channel=email"
        assert "python -m serving coverage churn --channel email" in marketer.page(address)
        kept = CoverageCount(
            model="churn", channel="email", as_of=NEW_YEAR, customers=400, own=100, general={"too new": 60}, nothing={"no permission": 240}
        )
        jobs = Jobs(marketer.home.root / "console", lambda: NEW_YEAR)
        jobs.start("coverage-churn-email", lambda advance: kept)
        eventually(lambda: jobs.running("coverage-churn-email") is None)
        text = marketer.page(address)
        assert "240 of 400 customers would end with nothing; 25.0% get an answer of their own." in text
        for told in ("too new", "15.0%", "no permission", "60.0%", "Count now"):
            assert told in text
        assert 'channel=email">churn</a>' in marketer.page("/coverage?model=churn")
        assert marketer.send("/coverage", model="none").status_code == 404
        assert marketer.send("/coverage", model="churn", channel="smoke").status_code == 422

    def test_a_count_that_cannot_be_made_says_why(self, tiny: TinyShop) -> None:
        asked = Asked(home=str(tiny.home.root), what="offers", at=NEW_YEAR)
        with pytest.raises(RuntimeError, match="import"):
            counted(asked, OfferCounts, lambda done, of: None)


class TestExperiments:
    def test_the_page_tells_lift_interval_and_ratio_and_names_the_command_where_nothing_was_analysed(self, marketer: Marketer) -> None:
        assert "python -m training experiment subject-line" in marketer.page("/experiments")
        self._analysed(marketer.home, mismatched=False)
        text = marketer.page("/experiments")
        assert "+$4.12" in text
        assert "+$1.20 to +$7.04" in text
        assert "+7.9%" in text
        assert "as meant" in text
        places = [float(x) for x in re.findall(r'<line x1="([\d.]+)" y1="12"', text)]
        zero = [float(x) for x in re.findall(r'class="zero" x1="([\d.]+)"', text)]
        assert places[0] > zero[0], "an interval that leaves out 0 stands beside the line of 0"
        self._analysed(marketer.home, mismatched=True)
        assert "believe no effect" in marketer.page("/experiments")

    @staticmethod
    def _analysed(home: Home, mismatched: bool) -> None:
        effect = VariantEffect(
            metric="revenue_minor", variant="discount", customers=601, baseline_mean=5230.0, mean=5642.0, lift=Measured(412.0, 120.0, 704.0),
            relative=Measured(412 / 5230, 120 / 5230, 704 / 5230), p_value=0.006,
        )  # fmt: skip
        report = ExperimentReport(
            name="subject-line", computed_at=NEW_YEAR, until=NEW_YEAR, days=14, adjusted=True, decisions_of=None, baseline="plain",
            effects=[effect], entered={"plain": 599, "discount": 601}, shares={"plain": 0.5, "discount": 0.5},
            ratio_p_values={"discount": 0.0001 if mismatched else 0.97}, mismatched=mismatched, remarks=["as it is"],
        )  # fmt: skip
        path = experiment_path(home.root, "subject-line")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(report))


class Counted(msgspec.Struct, frozen=True):
    number: int


class TestWhatAPageBegins:
    def jobs(self, folder: Path) -> Jobs:
        return Jobs(folder, lambda: datetime(2018, 1, 1, tzinfo=UTC))

    def test_its_answer_is_kept_with_its_moment_and_outlives_a_restart(self, tmp_path: Path) -> None:
        jobs = self.jobs(tmp_path)
        jobs.start("a", lambda advance: Counted(7))
        eventually(lambda: jobs.found("a", Counted) is not None)
        kept = self.jobs(tmp_path).found("a", Counted)
        assert kept is not None
        assert (kept.value, kept.at) == (Counted(7), datetime(2018, 1, 1, tzinfo=UTC))
        (tmp_path / "a.json").write_text("{half")
        assert self.jobs(tmp_path).found("a", Counted) is None

    def test_one_that_fails_says_why_and_the_next_has_its_turn(self, tmp_path: Path) -> None:
        jobs = self.jobs(tmp_path)

        def fails(advance: Callable[[int, int], None]) -> Counted:
            raise ValueError("nobody is there")

        jobs.start("a", fails)
        jobs.start("b", lambda advance: Counted(1))
        eventually(lambda: jobs.found("b", Counted) is not None)
        assert jobs.failed("a") == "nobody is there"
        assert jobs.found("a", Counted) is None

    def test_the_same_is_begun_once_and_no_more_wait_than_have_a_place(self, tmp_path: Path) -> None:
        jobs, go, times = self.jobs(tmp_path), threading.Event(), list[int]()

        def slow(advance: Callable[[int, int], None]) -> Counted:
            advance(1, 2)
            times.append(1)
            go.wait(30)
            return Counted(len(times))

        jobs.start("a", slow)
        jobs.start("a", slow)
        eventually(lambda: bool(times))
        running = jobs.running("a")
        assert running is not None
        assert (running.done, running.of) == (1, 2)
        for number in range(MOST_WAITING):
            jobs.start(f"b{number}", slow)
        with pytest.raises(RefusedError, match="wait for their turn"):
            jobs.start("c", slow)
        go.set()
        eventually(lambda: jobs.found(f"b{MOST_WAITING - 1}", Counted) is not None)
        assert len(times) == 1 + MOST_WAITING


class TestTheSegmentsFile:
    @pytest.mark.parametrize(
        "before",
        [
            "",
            "# ours\nsegments:\n  a: recency_days > 1.0 # a remark\n# the end\ncontext:\n  weather: text\n",
            "segments: {a: recency_days > 1.0}\n",
            "segments: {}\ncontext: {weather: text}",
            "context:\n  weather: text",
            "segments:\n    a: >\n      recency_days >\n      1.0\n",
        ],
    )
    def test_a_segment_is_added_and_all_else_stays(self, tiny: TinyShop, before: str) -> None:
        path = tiny.home.root / SEGMENTS
        if before:
            path.write_text(before)
        known = Vocabulary.load(tiny.home, "")
        add_segment(tiny.home, "quiet_ones", 'recency_days > 40.0 && timezone != "it\'s"')
        now = Vocabulary.load(tiny.home, "")
        assert now.segments["quiet_ones"].text == 'recency_days > 40.0 && timezone != "it\'s"'
        assert {name: each.text for name, each in now.segments.items() if name != "quiet_ones"} == {
            name: each.text for name, each in known.segments.items()
        }
        assert now.context == known.context
        assert all(line in path.read_text() for line in before.splitlines() if line.startswith("#") or "remark" in line)

    @pytest.mark.parametrize("name", ["", "Big", "a-b", "1st", "x" * 65, "recency_days", "champions"])
    def test_a_name_that_is_none_or_taken_is_refused(self, tiny: TinyShop, name: str) -> None:
        with pytest.raises(ValueError, match="name"):
            add_segment(tiny.home, name, "recency_days > 40.0")
        assert not (tiny.home.root / SEGMENTS).exists()

    def test_names_in_texts_and_fields_are_left_alone(self) -> None:
        told = spelled_out("a && b == 'a' && c.a && \"a\" != x", {"a": "y > 1.0 || z"})
        assert told == "(y > 1.0 || z) && b == 'a' && c.a && \"a\" != x"


class TestSamples:
    def test_they_are_in_order_and_stand_in_no_home_that_has_its_own(self, tiny: TinyShop) -> None:
        assert sorted(path.name for path in copy_samples(tiny.home)) == [JOURNEYS, SEGMENTS]
        assert copy_samples(tiny.home) == []
        plans = Plans.read(tiny.home.root / JOURNEYS, Vocabulary.load(tiny.home, ""), frozenset(EVENT_NAMES))
        assert {"cart-left", "win-back"} <= plans.plans.keys()
        assert all(isinstance(plan, JourneyPlan) and plan.operations for plan in plans.plans.values())
        assert all(sink.url is None for sink in plans.said.sinks), "the demo sends nothing to anybody"
        (tiny.home.root / JOURNEYS).unlink()
        assert [path.name for path in copy_samples(tiny.home)] == [JOURNEYS]
        (tiny.home.root / SEGMENTS).write_text("segments: {}\n")
        (tiny.home.root / JOURNEYS).unlink()
        assert copy_samples(tiny.home) == []
        assert {path.suffix for path in SAMPLES.iterdir()} == {".yaml"}
