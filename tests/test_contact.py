"""How often a customer may be contacted: whoever asks, however many at once, and whatever breaks in between, no cap is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, ROOT, copy_home, loyalty_cards, start_service, stop_service

from features.catalogue.yaml_file import WrittenError
from features.definitions.folds.fold import Touch
from features.definitions.folds.messages import MessagesFold
from features.state.home import Home
from serving.bootstrap import open_engine
from serving.decide.batch import score
from serving.decide.contact import RESTING, Cap, Contacted, ContactPolicy, QuietHours, beginning, sent_to, together
from serving.decide.coverage import coverage
from serving.decide.governor import COUNTED_ANEW, POLICY, UNCOUNTED
from serving.decide.ledger import Ledger, Promise
from serving.decide.policy import Policy
from serving.decide.questions import NextBestOfferRequest
from serving.decide.who import NOBODY, Who

ROME = ZoneInfo("Europe/Rome")
NOON = datetime(2018, 5, 16, 12, tzinfo=ROME)
"""A Wednesday."""
DAY = timedelta(days=1)
HELD = timedelta(hours=24)
KNOWN = {"contacted_at": None, "contacted_by": None, "contacted_offers": None, "contacted_decisions": None}
"""The row of a customer to whom nothing was sent."""


def contact(ago: timedelta, channel: str = "email", offer: str = "", message: str = "") -> Contacted:
    return Contacted(NOON - ago, channel, offer, message or f"{ago} {channel} {offer}")


def caps(*said: Any) -> ContactPolicy:
    return ContactPolicy(tuple(said))


class TestCaps:
    def test_a_calendar_day_week_and_month_begin_where_the_shop_is(self) -> None:
        assert beginning("day", NOON) == datetime(2018, 5, 16, tzinfo=ROME)
        assert beginning("week", NOON) == datetime(2018, 5, 14, tzinfo=ROME)
        assert beginning("month", NOON) == datetime(2018, 5, 1, tzinfo=ROME)
        # the clocks were put forward that night: the day has 23 hours
        assert NOON.replace(month=3, day=25) - beginning("day", NOON.replace(month=3, day=25)) == timedelta(hours=12)
        assert beginning("day", datetime(2018, 3, 25, 12, tzinfo=ROME)).astimezone(UTC) == datetime(2018, 3, 24, 23, tzinfo=UTC)

    def test_what_was_sent_yesterday_counts_this_week_and_not_today(self) -> None:
        sent = [contact(timedelta(hours=13))]
        assert caps(Cap(1, "day")).why_not(sent, "email", NOON, ROME) is None
        assert "that a week may bring" in str(caps(Cap(1, "week")).why_not(sent, "email", NOON, ROME))
        assert caps(Cap(1, "week")).why_not([contact(3 * DAY)], "email", NOON, ROME) is None

    def test_a_cap_of_channels_counts_and_closes_these_alone(self) -> None:
        policy = caps(Cap(1, "day", ("email", "push")))
        assert policy.why_not([contact(timedelta(hours=1), "push")], "email", NOON, ROME)
        assert policy.why_not([contact(timedelta(hours=1), "push")], "sms", NOON, ROME) is None
        assert policy.why_not([contact(timedelta(hours=1), "sms")], "email", NOON, ROME) is None

    def test_zero_means_none_and_nothing_said_means_no_cap(self) -> None:
        assert caps(Cap(0, "day", ("sms",))).why_not([], "sms", NOON, ROME)
        assert caps().why_not([contact(timedelta(0), message=str(k)) for k in range(99)], "sms", NOON, ROME) is None
        assert not caps()

    def test_one_message_counts_once_whether_promised_or_sent_and_however_many_offers_it_holds(self) -> None:
        twice = [contact(timedelta(hours=1), offer="a", message="d1"), contact(timedelta(hours=2), offer="b", message="d1")]
        assert caps(Cap(2, "day")).why_not(twice, "email", NOON, ROME) is None
        assert caps(Cap(1, "day")).why_not(twice, "email", NOON, ROME)

    def test_what_is_sent_again_for_a_decision_counts_again_and_takes_the_place_of_its_promise(self) -> None:
        sent = [Contacted(NOON - k * timedelta(hours=1), "email", "", f"d1 email {k}", "d1") for k in range(2)]
        promised = [Contacted(NOON - DAY, "email", offer, "d1", "d1") for offer in ("a", "b")] + [
            Contacted(NOON - DAY, "sms", "c", "d2", "d2")
        ]
        both = together(sent, promised, NOON)
        assert len({c.message for c in both}) == 3
        assert caps(Cap(3, "day")).why_not(both, "email", NOON, ROME), "a promise of yesterday may go out today"
        assert caps(Cap(1, "month", each="offer")).resting(both, "email", NOON, ROME) == {"a", "b", "c"}

    def test_a_message_by_no_known_channel_counts_for_each(self) -> None:
        assert caps(Cap(1, "day", ("sms",))).why_not([contact(timedelta(0), "")], "sms", NOON, ROME)

    def test_an_offer_rests_once_it_was_had_as_often_as_it_may(self) -> None:
        policy = caps(Cap(2, "month", each="offer"))
        sent = [contact(k * DAY, offer="a", message=f"a{k}") for k in range(2)] + [contact(DAY, offer="b"), contact(DAY, offer="")]
        assert policy.resting(sent, "email", NOON, ROME) == {"a"}
        assert policy.why_not(sent, "email", NOON, ROME) is None
        assert policy.closed == frozenset()
        assert caps(Cap(0, "month", ("ads",), "offer")).closed == {"ads"}

    @given(
        sent=st.lists(st.tuples(st.integers(0, 40 * 24), st.sampled_from(["email", "sms", "mail"])), max_size=30),
        most=st.integers(0, 5),
        per=st.sampled_from(["day", "week", "month"]),
        through=st.sampled_from([(), ("email",), ("email", "sms")]),
    )
    def test_it_says_what_counting_by_hand_says(
        self, sent: Sequence[tuple[int, str]], most: int, per: Any, through: tuple[Any, ...]
    ) -> None:
        contacts = [contact(timedelta(hours=hours), channel, message=str(k)) for k, (hours, channel) in enumerate(sent)]
        key = {"day": "%Y-%j", "week": "%G-%V", "month": "%Y-%m"}[per]
        here = [c for c in contacts if c.at.astimezone(ROME).strftime(key) == NOON.strftime(key) and (not through or c.channel in through)]
        refused = caps(Cap(most, per, through)).why_not(contacts, "email", NOON, ROME) is not None
        assert refused == (len(here) >= most)

    @pytest.mark.parametrize(("hour", "quiet"), [(20, False), (21, True), (23, True), (0, True), (7, True), (8, False), (12, False)])
    def test_quiet_hours_may_pass_midnight(self, hour: int, quiet: bool) -> None:
        hours = QuietHours("21:00", "08:00", ("sms", "push"))
        assert hours.holds("sms", NOON.replace(hour=hour)) == quiet
        assert not hours.holds("email", NOON.replace(hour=hour))
        assert QuietHours("08:00", "21:00").holds("email", NOON.replace(hour=hour)) != quiet

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("contact:\n  caps:\n    - {most: -1, per: day}\n", "line 3: contact.caps[0].most"),
            ("contact:\n  caps:\n    - {most: 1, per: year}\n", "line 3: contact.caps[0].per"),
            ("contact:\n  quiet_hours: {from: '25:00', to: '08:00'}\n", "line 2: contact.quiet_hours.from"),
            ("contact:\n  caps:\n    - {most: 1, per: day, channels: [fax]}\n", "contact.caps[0].channels[0]"),
        ],
    )
    def test_a_mistake_is_named_with_its_line(self, text: str, told: str) -> None:
        with pytest.raises(WrittenError) as error:
            Policy.parse(text.encode(), "policy.yaml")
        assert told in str(error.value)


class TestLedger:
    def reserve(self, ledger: Ledger, decision: str, most: int = 3, now: datetime = NOON, ids: Sequence[str] = ("c",)) -> bool:
        promise = Promise(ids, decision, "email", ["o"], now, HELD, {}, HELD)
        return ledger.reserve(promise, lambda promised: len({c.message for c in promised}) < most)

    def test_many_threads_get_no_more_than_there_is(self, tmp_path: Path) -> None:
        ledger = Ledger(Home(tmp_path))
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda k: self.reserve(Ledger(Home(tmp_path)), f"d{k}"), range(40)))
        assert sum(got) == 3 == len(ledger.promised(["c"], NOON))

    def test_many_processes_some_of_them_killed_get_no_more_than_there_is(self, tmp_path: Path) -> None:
        Ledger(Home(tmp_path)).reserve(Promise(["other"], "d", "email", [], NOON, HELD, {}, HELD))
        script = (
            "import sys, os; from pathlib import Path; from datetime import *; from features.state.home import Home\n"
            "from serving.decide.ledger import Ledger, Promise\n"
            "now = datetime.fromisoformat(sys.argv[2]); ledger = Ledger(Home(Path(sys.argv[1])))\n"
            "for k in range(30):\n"
            "    promise = Promise(['c'], f'{os.getpid()} {k}', 'email', [], now, timedelta(days=1), {}, timedelta(days=1))\n"
            "    if ledger.reserve(promise, lambda p: len(p) < 20):\n"
            "        print(k, flush=True)\n"
            "    if k == int(sys.argv[3]): os.kill(os.getpid(), 9)\n"
        )
        run = [sys.executable, "-c", script, str(tmp_path), NOON.isoformat()]
        processes = [subprocess.Popen([*run, str(last)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for last in (3, 99, 99)]
        told = [process.communicate(timeout=60)[0].split() for process in processes]
        promised = Ledger(Home(tmp_path)).promised(["c"], NOON)
        assert len(promised) == 20
        assert sum(map(len, told)) in (19, 20), "a promise may outlive whoever was killed before they could tell"

    def test_a_promise_expires_and_counts_for_whoever_was_merged(self, tmp_path: Path) -> None:
        ledger = Ledger(Home(tmp_path))
        assert self.reserve(ledger, "d1", most=1)
        assert not self.reserve(ledger, "d2", most=1, ids=("new", "c"))
        assert self.reserve(ledger, "d1", most=1), "asking for the same decision again takes its own place"
        assert not self.reserve(ledger, "d2", most=1, now=NOON + HELD - timedelta(seconds=1))
        assert ledger.promised(["c"], NOON + HELD) == []
        assert self.reserve(ledger, "d2", most=1, now=NOON + HELD)

    def test_who_is_erased_leaves_nothing(self, tmp_path: Path) -> None:
        ledger = Ledger(Home(tmp_path))
        assert ledger.erase(["c"]) == 0
        assert list(ledger.find(["c"])) == []
        self.reserve(ledger, "d1", ids=("customer-to-forget",))
        self.reserve(ledger, "d2", ids=("another",))
        assert [row["decision_id"] for row in ledger.find(["customer-to-forget"])] == ["d1"]
        assert ledger.erase(["customer-to-forget"]) == 1
        assert list(ledger.find(["customer-to-forget"])) == []
        assert len(list(ledger.find(["another"]))) == 1
        assert not any(b"customer-to-forget" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_the_fold_tells_what_was_sent() -> None:
    fold, state = MessagesFold(), MessagesFold().empty()
    for k, (channel, offer, decision) in enumerate([("email", "o1", "d1"), ("sms", None, None)]):
        at = NEW_YEAR - timedelta(hours=2 - k)
        fold.step(state, Touch(f"e{k}", "message_sent", at, at.date(), channel, offer_id=offer, decision_id=decision))
    told = fold.features(state, None)  # type: ignore[arg-type]
    first = NEW_YEAR - timedelta(hours=2)
    assert sent_to(told) == [
        Contacted(first, "email", "o1", f"d1 email {int(first.timestamp())}", "d1"),
        Contacted(NEW_YEAR - timedelta(hours=1), "sms", "", "sent 1"),
    ]
    assert sent_to(KNOWN) == []
    assert sent_to({}) is None, "not to know is not to know of none"


def test_messages_are_kept_for_a_month_however_many_come_through_another_channel() -> None:
    fold, state = MessagesFold(), MessagesFold().empty()
    for k in range(900):
        at = NEW_YEAR - timedelta(minutes=40 * k)
        fold.step(state, Touch(f"e{k}", "message_sent", at, at.date(), "email" if k >= 895 else "ads"))
    told = sent_to(fold.features(state, None))  # type: ignore[arg-type]
    assert told is not None
    assert sum(message.channel == "email" for message in told) == 5
    old = NEW_YEAR - timedelta(days=40)
    fold.step(state, Touch("old", "message_sent", old, old.date(), "email"))
    assert len(state.sent) == 900


class TestAnswers:
    @pytest.fixture
    def home(self, trained: Home, tmp_path: Path) -> Home:
        return copy_home(trained, tmp_path / "home")

    def allow(self, home: Home, *said: dict[str, Any]) -> None:
        (home.root / POLICY).write_text(json.dumps({"contact": {"caps": said}}))

    def test_two_who_ask_at_the_same_moment_do_not_break_a_cap(self, home: Home) -> None:
        self.allow(home, {"most": 2, "per": "day"})
        engine, ask = open_engine(home), NextBestOfferRequest(channel="mail")
        with ThreadPoolExecutor(8) as pool:
            told = [
                answer for answer, _ in pool.map(
                    lambda _: engine.next_best_offer("next-best-offer", ask, Who("somebody"), KNOWN, NEW_YEAR), range(16)
                )
            ]  # fmt: skip
        assert sum(bool(answer.offers) for answer in told) == 2
        assert {str(answer.fallback) for answer in told if not answer.offers} == {
            "the customer has had the 2 messages that a day may bring"
        }

    def test_no_offer_comes_more_often_than_it_may_and_another_takes_its_place(self, home: Home) -> None:
        self.allow(home, {"most": 1, "per": "month", "each": "offer"})
        engine, shown = open_engine(home), list[str]()
        for _ in range(60):
            ask = NextBestOfferRequest(channel="mail", explain=True)
            answer, _ = engine.next_best_offer("next-best-offer", ask, Who("somebody"), KNOWN, NEW_YEAR)
            assert answer.left_out is not None
            assert sorted(answer.left_out.get(RESTING, [])) == sorted(shown)[:200]
            if not answer.offers:
                break
            shown.append(answer.offers[0].offer_id)
        assert len(shown) == len(set(shown)) > 1

    def test_looking_at_an_answer_promises_nothing(self, home: Home) -> None:
        self.allow(home, {"most": 1, "per": "day"})
        engine = open_engine(home)
        for request in (NextBestOfferRequest(channel="mail", dry_run=True), NextBestOfferRequest(), NextBestOfferRequest(channel="web")):
            for _ in range(3):
                assert engine.next_best_offer("next-best-offer", request, Who("somebody"), KNOWN, NEW_YEAR)[0].offers
        assert engine.next_best_offer("next-best-offer", NextBestOfferRequest(channel="mail"), Who("somebody"), KNOWN, NEW_YEAR)[0].offers
        dry = NextBestOfferRequest(channel="mail", dry_run=True)
        assert not engine.next_best_offer("next-best-offer", dry, Who("somebody"), KNOWN, NEW_YEAR)[0].offers

    def test_while_it_is_not_known_what_was_sent_nothing_goes_out(self, home: Home) -> None:
        self.allow(home, {"most": 1, "per": "day"})
        engine = open_engine(home)
        told, _ = engine.next_best_offer("next-best-offer", NextBestOfferRequest(channel="mail"), Who("somebody"), {}, NEW_YEAR)
        assert (told.offers, told.fallback) == ([], COUNTED_ANEW)
        assert engine.next_best_offer("next-best-offer", NextBestOfferRequest(), Who("somebody"), {}, NEW_YEAR)[0].offers

    def test_a_promise_of_the_evening_counts_the_next_morning(self, home: Home) -> None:
        self.allow(home, {"most": 1, "per": "day"})
        engine, ask = open_engine(home), NextBestOfferRequest(channel="mail")
        evening = NEW_YEAR - timedelta(hours=2)
        assert engine.next_best_offer("next-best-offer", ask, Who("somebody"), KNOWN, evening)[0].offers
        assert not engine.next_best_offer("next-best-offer", ask, Who("somebody"), KNOWN, NEW_YEAR + timedelta(hours=7))[0].offers
        assert engine.next_best_offer("next-best-offer", ask, Who("somebody"), KNOWN, NEW_YEAR + timedelta(hours=23))[0].offers, "expired"

    def test_what_holds_for_everybody_holds_for_nobody_known(self, home: Home) -> None:
        self.allow(home, {"most": 0, "per": "day", "channels": ["mail"]}, {"most": 0, "per": "day", "channels": ["ads"], "each": "offer"})
        engine = open_engine(home)
        for channel in ("mail", "ads"):
            ask = msgspec.convert({"channel": channel}, NextBestOfferRequest)
            assert not engine.next_best_offer("next-best-offer", ask, NOBODY, {}, NEW_YEAR)[0].offers

    def test_who_is_held_out_is_promised_nothing_and_stays_out_when_their_data_may_not_be_used(self, home: Home) -> None:
        control = {"share": 0.5, "salt": "s"}
        (home.root / POLICY).write_text(json.dumps({"control_group": control, "contact": {"caps": [{"most": 9, "per": "day"}]}}))
        engine, ask = open_engine(home), NextBestOfferRequest(channel="mail")
        held = next(f"c{k}" for k in range(99) if engine.governor.policy.assigned(f"c{k}").group == "control")
        free = next(f"c{k}" for k in range(99) if engine.governor.policy.assigned(f"c{k}").group == "treated")
        for who in (Who(held), Who(held, may_be_used=False), Who("new-name", merged_ids=(held, "new-name"))):
            told, record = engine.next_best_offer("next-best-offer", ask, who, KNOWN, NEW_YEAR)
            assert not told.offers
            assert record["assignment"]["held_out"]
        assert not list(Ledger(home).find([held, "new-name"]))
        withdrawn = Who(free, may_be_used=False)
        for after in (timedelta(0), timedelta(days=1)):
            assert engine.next_best_offer("next-best-offer", ask, withdrawn, {}, NEW_YEAR + after)[0].offers
        assert len({row["decision_id"] for row in Ledger(home).find([free])}) == 2, "nothing tells whether it was sent: it counts as if"

    def test_a_ledger_that_is_broken_stops_what_goes_out_and_nothing_else(self, home: Home) -> None:
        self.allow(home, {"most": 1, "per": "day"})
        (home.root / "reservations.db").write_bytes(b"this is no database, " * 500)
        engine = open_engine(home)
        for ask, fallback in ((NextBestOfferRequest(channel="mail"), UNCOUNTED), (NextBestOfferRequest(channel="web"), None)):
            told, _ = engine.next_best_offer("next-best-offer", ask, Who("somebody"), KNOWN, NEW_YEAR)
            assert bool(told.offers) == (fallback is None)
            assert fallback in (None, told.fallback)

    @pytest.mark.evidence
    def test_a_batch_keeps_the_caps_and_may_be_run_again(self, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UBIQUO_CLOCK", f"fixed:{(NEW_YEAR + timedelta(hours=8)).isoformat()}")
        self.allow(home, {"most": 1, "per": "week"})
        before = coverage(home, open_engine, "next-best-offer", NEW_YEAR, 1, "mail")
        for number in range(2):
            score(home, open_engine, "next-best-offer", NEW_YEAR, tmp_path / f"{number}.jsonl", 1, channel="mail")
        first, again = (((tmp_path / f"{number}.jsonl").read_text()) for number in range(2))
        assert first == again
        reached = sum(json.loads(line)["id"] is not None for line in first.splitlines())
        assert reached == before.own + before.general.total() > 0, "counting promised nothing"
        monkeypatch.setenv("UBIQUO_CLOCK", f"fixed:{(NEW_YEAR + timedelta(hours=9)).isoformat()}")
        later = coverage(Home(home.root), open_engine, "next-best-offer", NEW_YEAR, 2, "mail", "email")
        assert later.nothing["the customer has had the 1 messages that a week may bring"] == reached

    def test_a_message_that_was_sent_counts_once_beside_its_promise_and_without_one_too(self, home: Home) -> None:
        self.allow(home, {"most": 2, "per": "day"})
        card, at = loyalty_cards(home)[7], NEW_YEAR + timedelta(minutes=5)
        who = {"identifiers": {"loyalty_card": card}}
        running = start_service(home, UBIQUO_CLOCK=f"fixed:{at.isoformat()}")
        try:
            first = running.ask("next-best-offer", {**who, "channel": "mail"})
            assert first["offers"]
            sent = {
                "event_id": "sent-1", "name": "message_sent", "occurred_at": at.isoformat(), "channel": "mail", **who,
                "offer_id": first["offers"][0]["offer_id"], "campaign_id": first["offers"][0]["campaign_id"], "decision_id": first["decision_id"],
            }  # fmt: skip
            assert running.ask("events", sent)["accepted"] == 1
            assert running.ask("next-best-offer", {**who, "channel": "mail", "dry_run": True})["offers"], "one so far"
            by_another_system = {**sent, "event_id": "sent-2", "decision_id": None, "offer_id": None, "campaign_id": "of-the-agency"}
            assert running.ask("events", {k: v for k, v in by_another_system.items() if v})["accepted"] == 1
            refused = running.ask("next-best-offer", {**who, "channel": "mail"})
            assert not refused["offers"]
            assert "that a day may bring" in refused["fallback"]
            assert running.ask("recommendations", {**who, "channel": "mail"})["items"] == []
            assert running.ask("recommendations", who)["items"], "a page contacts nobody"
        finally:
            stop_service(running)
