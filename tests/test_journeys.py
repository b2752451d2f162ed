"""Journeys: what starts, hastens and ends them, what leaves, and that neither a crash nor a slow receiver loses or repeats anything."""

from __future__ import annotations

import base64
import csv
import hashlib
import hmac
import itertools
import json
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scene import NEW_YEAR, TinyShop, Webhook, event

from features.catalogue.yaml_file import WrittenError
from features.definitions.segments import Vocabulary
from features.events.event import EVENT_NAMES, Item, SealedEvent
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.sources.catalogue_file import load
from features.state.home import Home
from serving.decide.questions import NextBestOfferRequest, OfferChoice, OffersAnswer
from serving.intake.draining import Followed
from serving.journeys.outbox import WITHDRAWN, Sender, export
from serving.journeys.outgoing import Outgoing, Outgoings
from serving.journeys.plan import Plans
from serving.journeys.replay import Replay
from serving.journeys.runner import CALLED_OFF, CONVERTED, DONE, Runner
from serving.journeys.runs import DAYS, PLANS, Changes, Runs
from serving.journeys.today import Today, due_items
from serving.privacy.held_files import BatchFiles
from serving.privacy.holdings import Subject

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
WORDS = Vocabulary.parse(b"", "segments.yaml", "")
EVENTS = frozenset(EVENT_NAMES)
CART = """
sinks:
  - {name: esp, channels: [email, push], url: "URL", with_contact: true, give_up_after: 3d}
  - {name: files, channels: [ads, sms]}
journeys:
  - name: cart-left
    start: {on: [add_to_cart], after: 1h, unless: [remove_from_cart], when: "recency_days < 90"}
    again_after: 7d
    stop_on: [purchase]
    steps:
      - offer: {channels: [push], stages: [retain]}
      - wait: 1d
        until: [message_click]
      - branch:
          - when: answered
            steps: [{wait: 2d}]
          - steps:
              - offer: {channels: [email]}
              - wait: 2d
              - offer: {channels: [ads]}
    after_conversion:
      - wait: 3d
      - offer: {channels: [email], stages: [thank]}
"""


def offer(offer_id: str = "o", channel: str = "push") -> OfferChoice:
    return OfferChoice(
        offer_id=offer_id, campaign_id="k", kind="coupon", stage=None, title="Ten percent", text=None, channel=channel, benefit_percent=10.0,
        benefit_minor=None, score=1.0, source="priority", reason="", propensity=1.0, probability=0.5, margin_minor=2, cost_minor=0,
        sending_minor=0.0, lever=1.0, factors={}, affinity=0.0, reasons=[],
    )  # fmt: skip


class Shop:
    """Everything that journeys ask of the service, by hand: who there is, what they allow, and what is decided."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any] | None] = {}
        self.shut: dict[str, str] = {}
        """By channel why nothing goes out."""
        self.forbidden: set[tuple[str, str]] = set()
        self.now_called: dict[str, str] = {}
        self.decided: list[tuple[str, str, NextBestOfferRequest]] = []
        self.released: list[str] = []
        self.told_sent: list[str] = []
        self.promised: timedelta | None = None
        """How long a decision's place is held."""

    def present(self, customer_id: str) -> tuple[str, tuple[str, ...]] | None:
        current = self.now_called.get(customer_id, customer_id)
        return None if current == "gone" else (current, (current, *(k for k, v in self.now_called.items() if v == current)))

    def row(self, customer_id: str, now: datetime) -> dict[str, Any] | None:
        return self.rows.get(customer_id, {"recency_days": 3.0})

    def offer(self, customer_id: str, request: NextBestOfferRequest, decision_id: str, now: datetime) -> OffersAnswer:
        self.decided.append((customer_id, decision_id, request))
        channel = request.channels[0]
        common: dict[str, Any] = {"decision_id": decision_id, "as_of": now, "customer_id": customer_id, "model": "m", "feature_at": None}
        common |= {"feature_age_seconds": None, "removed": {}, "channel": channel}
        common["promised_until"] = None if self.promised is None else now + self.promised
        if why := self.shut.get(channel):
            return OffersAnswer(**common, fallback=why, offers=[])
        return OffersAnswer(**common, fallback=None, offers=[offer(channel=channel)])

    def release(self, decision_id: str) -> None:
        self.released.append(decision_id)

    def everybody(self) -> list[str]:
        return list(self.rows)

    def facts_of_day(self, day: date) -> Callable[[str, Any, datetime], dict[str, Any]]:
        return lambda customer_id, row, at: {"birthday": row.get("born") == (day.month, day.day), "due_items": due_items(row, at)}

    def may_reach(self, customer_id: str, channel: str) -> str | None:
        return WITHDRAWN if (customer_id, channel) in self.forbidden else None

    def contact(self, customer_id: str) -> dict[str, str]:
        return {"email": f" {customer_id}@Example.org", "phone": "+15550100"}

    def sent(self, message: Outgoing, now: datetime) -> None:
        self.told_sent.append(message.decision_id)


class Scene:
    """One home with journeys, and a clock that is moved by hand."""

    def __init__(self, root: Path, text: str = CART, url: str = "http://127.0.0.1:9/") -> None:
        self.home, self.shop, self.now = Home(root), Shop(), NEW_YEAR
        self.plans = self.read(text.replace("URL", url))
        self.numbers = itertools.count()
        self.open()

    def open(self) -> None:
        self.runs = Runs(self.home)
        self.runner = Runner(self.runs, self.plans, WORDS, self.shop, ZoneInfo("America/New_York"))
        self.sender = Sender(self.runs.outgoing, self.shop, lambda sink: sink.encode(), lambda: self.runner.plans, lambda: self.now)

    def read(self, text: str) -> Plans:
        path = self.home.root / "journeys.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return Plans.read(path, WORDS, EVENTS)

    def event(self, name: str, customer: str = "c", event_id: str = "", **more: Any) -> Followed:
        event = SealedEvent(event_id=event_id or f"e{next(self.numbers)}", name=name, occurred_at=self.now, **more)
        return Followed(event, customer, self.now, True)

    def happens(self, name: str, customer: str = "c", **more: Any) -> Followed:
        told = self.event(name, customer, **more)
        self.runner.follow([told])
        self.runner.step_due(self.now)
        return told

    def later(self, by: timedelta, every: timedelta = HOUR / 2) -> None:
        until = self.now + by
        while self.now < until:
            self.now = min(until, self.now + every)
            while self.runner.step_due(self.now) or self.runner.look_daily(self.now):
                pass

    def left(self) -> list[tuple[str, str]]:
        """What waits to leave, or has left: channel and how it stands."""
        statuses = ("waiting", "sending", "writing", "taken", "written", "sent", "dropped", "failed")
        messages = [m for sink in ("esp", "files") for m in self.runs.outgoing.of_sink(sink, statuses)]
        return [(m.channel, m.status) for m in sorted(messages, key=lambda m: (m.created_at, m.decision_id))]

    def ended(self) -> dict[str, int]:
        return {state: number for _, state, number in self.runs.counts()}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "home")


class TestSteps:
    def test_a_left_cart_brings_one_message_an_hour_after_it_was_touched_last(self, scene: Scene) -> None:
        scene.happens("add_to_cart")
        scene.later(HOUR / 2)
        scene.happens("add_to_cart")
        scene.later(HOUR - timedelta(seconds=1), HOUR)
        assert scene.left() == []
        scene.later(timedelta(seconds=1))
        assert scene.left() == [("push", "waiting")]
        [(_, _, request)] = scene.shop.decided
        assert (request.channels, request.include, request.dry_run) == (["push"], {"stage": ["retain"]}, False)

    @pytest.mark.parametrize("what", ["purchase", "remove_from_cart"])
    def test_what_comes_of_itself_calls_it_off(self, scene: Scene, what: str) -> None:
        scene.happens("add_to_cart")
        scene.later(HOUR / 2)
        scene.happens(what)
        scene.later(5 * DAY)
        assert scene.left() == []
        assert scene.ended() == {CALLED_OFF: 1}

    def test_who_does_not_fit_the_condition_begins_nothing(self, scene: Scene) -> None:
        scene.shop.rows = {"old": {"recency_days": 91.0}, "unknown": {}, "silent": None}
        for who in scene.shop.rows:
            scene.happens("add_to_cart", who)
        scene.later(2 * HOUR)
        assert scene.left() == []
        assert scene.ended() == {"its condition does not hold": 3}

    def test_who_ignores_it_is_reached_by_the_next_channel(self, scene: Scene) -> None:
        scene.happens("add_to_cart")
        scene.later(2 * DAY)
        assert scene.left() == [("push", "waiting"), ("email", "waiting")]
        scene.later(3 * DAY)
        assert scene.left() == [("push", "waiting"), ("email", "waiting"), ("ads", "waiting")]
        assert scene.ended() == {DONE: 1}

    def test_an_answer_hastens_the_next_step_and_chooses_it(self, scene: Scene) -> None:
        scene.happens("add_to_cart")
        scene.later(2 * HOUR)
        scene.happens("message_click", decision_id="another message")
        [run] = scene.runs.active(["c"])
        assert not run.state["answered"], "it was about something else"
        scene.happens("message_click", decision_id=run.state["decision"])
        scene.later(DAY)
        assert scene.left() == [("push", "waiting")]

    def test_it_ends_at_conversion_and_what_waits_does_not_leave(self, scene: Scene) -> None:
        scene.happens("add_to_cart")
        scene.later(2 * HOUR)
        scene.happens("purchase")
        assert scene.left() == [("push", "dropped")]
        assert scene.shop.released == [scene.shop.decided[0][1]], "its place is free again"
        scene.later(2 * DAY)
        assert len(scene.left()) == 1
        scene.later(DAY + HOUR)
        assert scene.left() == [("push", "dropped"), ("email", "waiting")], "then they are thanked"
        assert scene.ended() == {CONVERTED: 1}
        scene.happens("purchase")
        scene.later(9 * DAY)
        assert len(scene.left()) == 2

    def test_it_begins_again_only_after_a_while(self, scene: Scene) -> None:
        scene.happens("add_to_cart")
        scene.later(6 * DAY)
        scene.happens("add_to_cart")
        scene.later(2 * HOUR)
        assert len(scene.left()) == 3
        scene.later(DAY)
        scene.happens("add_to_cart")
        scene.later(2 * HOUR)
        assert len(scene.left()) == 4

    def test_what_may_not_go_out_now_is_tried_for_as_long_as_it_has_patience(self, tmp_path: Path) -> None:
        scene = Scene(tmp_path, CART.replace("stages: [retain]", "stages: [retain], patience: 6h"))
        scene.shop.shut["push"] = "quiet hours"
        scene.happens("add_to_cart")
        scene.later(4 * HOUR)
        tried = len(scene.shop.decided)
        assert scene.left() == []
        assert tried > 5
        assert len({decision for _, decision, _ in scene.shop.decided}) == tried
        scene.shop.shut.clear()
        scene.later(HOUR)
        assert scene.left() == [("push", "waiting")]
        impatient = Scene(tmp_path / "other")
        impatient.shop.shut["push"] = "quiet hours"
        impatient.happens("add_to_cart")
        impatient.later(2 * HOUR)
        assert len(impatient.shop.decided) == 1

    def test_a_day_is_looked_at_once_and_a_break_in_between_begins_nobody_twice(self, tmp_path: Path) -> None:
        text = """
sinks: [{name: files, channels: [email]}]
journeys:
  - name: silence
    start: {every: day, at: "10:00", when: "recency_over_gap_p90 > 1.0"}
    again_after: 30d
    steps: [{offer: {channels: [email]}}]
"""
        scene = Scene(tmp_path, text)
        scene.shop.rows = {
            "a": {"recency_over_gap_p90": 2.0},
            "b": {"recency_over_gap_p90": 0.5},
            "c": None,
            "d": {"recency_over_gap_p90": 3.0},
        }
        # New Year's midnight in New York: it is looked at ten hours later
        scene.later(9.9 * HOUR)
        assert scene.ended() == {}
        scene.now += HOUR / 5
        # one of whom nothing can be told holds up nobody else; whoever began before a break does not begin twice
        row = scene.shop.row

        def broken(customer_id: str, now: datetime) -> Any:
            if customer_id == "a":
                raise OSError("damaged")
            return row(customer_id, now)

        scene.shop.row = broken  # type: ignore[method-assign]
        assert scene.runner.look_daily(scene.now) == 1
        scene.shop.row = row  # type: ignore[method-assign]
        with scene.runs._session.writing() as connection:
            connection.execute(sa.delete(DAYS))
        assert scene.runner.look_daily(scene.now) == 1
        assert scene.runner.look_daily(scene.now) == 0
        scene.later(29 * DAY, 6 * HOUR)
        assert scene.left() == [("email", "waiting")] * 2
        scene.later(3 * DAY, 6 * HOUR)
        assert len(scene.left()) == 4

    def test_whoever_is_merged_goes_on_under_the_new_name(self, scene: Scene) -> None:
        scene.happens("add_to_cart", "visitor")
        scene.shop.now_called = {"visitor": "known"}
        scene.later(2 * HOUR)
        assert [who for who, _, _ in scene.shop.decided] == ["known"]
        scene.happens("purchase", "known")
        assert scene.ended() == {CONVERTED: 1}

    def test_whoever_is_gone_gets_nothing(self, scene: Scene) -> None:
        scene.happens("add_to_cart")
        scene.shop.now_called = {"c": "gone"}
        scene.later(2 * HOUR)
        assert scene.left() == []
        assert list(scene.runs.find(["c"]))
        scene.runs.erase(["c"])
        assert not list(scene.runs.find(["c"]))

    def test_who_is_on_the_way_goes_on_as_it_was_begun(self, scene: Scene) -> None:
        scene.happens("add_to_cart", "before")
        scene.runner.plans = scene.read("journeys: []")
        scene.open()
        scene.runner.plans = scene.read(CART.replace("URL", "http://h/").replace("channels: [push]", "channels: [email]"))
        scene.happens("add_to_cart", "after")
        scene.later(2 * HOUR)
        assert sorted(scene.left()) == [("email", "waiting"), ("push", "waiting")]

    def test_an_earlier_form_of_a_journey_holds_up_nobody(self, scene: Scene) -> None:
        scene.happens("add_to_cart", "before")
        scene.later(2 * HOUR)
        scene.open()
        scene.runner.plans = scene.read(CART.replace("URL", "http://h/").replace("wait: 1d", "wait: 3d"))
        # the clock has not come to the run of the earlier form yet
        scene.runner.follow([scene.event("message_click", "before"), *(scene.event("add_to_cart", f"other-{k}") for k in range(5))])
        assert len(scene.runs.active([f"other-{k}" for k in range(5)])) == 5
        # nor does one that names what is no more
        words = Vocabulary.parse(b"segments: {no_more: recency_days > 1.0}", "segments.yaml", "")
        scene.runner.plans = Plans.read(scene.home.root / "journeys.yaml", words, EVENTS)
        text = scene.plans.plans["cart-left"].text.replace("recency_days < 90", "no_more")
        with scene.runs._session.writing() as connection:
            connection.execute(sa.update(PLANS).values(text=text))
        scene.open()
        scene.runner.follow([scene.event("purchase", "before"), scene.event("add_to_cart", "more")])
        assert len(scene.runs.active(["more"])) == 1
        scene.later(3 * DAY)
        assert scene.ended()["no such journey"] >= 1

    def test_events_count_from_when_a_journey_began(self, scene: Scene) -> None:
        bought = scene.event("purchase")
        scene.now += HOUR / 60
        cart = scene.event("add_to_cart")
        for _ in range(2):
            # handed in again after a kill
            scene.runner.follow([bought, cart])
        assert len(scene.runs.active(["c"])) == 1
        # what happened before the cart was left, and came late
        late = SealedEvent(event_id="late", name="purchase", occurred_at=scene.now - 5 * DAY)
        scene.now += HOUR / 60
        scene.runner.follow([Followed(late, "c", scene.now, True)])
        assert len(scene.runs.active(["c"])) == 1
        own = Scene(scene.home.root / "own", CART.replace("on: [add_to_cart]", "on: [purchase]").replace("after: 1h, ", ""))
        start = own.event("purchase")
        for _ in range(2):
            own.runner.follow([start])
            own.runner.step_due(own.now)
        assert CONVERTED not in own.ended()

    def test_of_two_who_prove_to_be_one_one_run_goes_on(self, scene: Scene) -> None:
        scene.happens("add_to_cart", "visitor")
        scene.now += HOUR / 60
        scene.happens("add_to_cart", "known")
        scene.shop.now_called = {"visitor": "known"}
        scene.later(2 * HOUR)
        assert [who for who, _, _ in scene.shop.decided] == ["known"]

    def test_a_long_pause_outlasts_the_tidying(self, tmp_path: Path) -> None:
        scene = Scene(tmp_path, CART.replace("again_after: 7d", "again_after: 60d"))
        scene.happens("add_to_cart")
        scene.later(8 * DAY, 6 * HOUR)
        scene.now += 45 * DAY
        scene.runs.tidy(int(scene.now.timestamp() * 1e6), 61 * 86_400_000_000)
        scene.happens("add_to_cart")
        assert scene.runs.active(["c"]) == []

    def test_long_ended_runs_are_let_go(self, scene: Scene) -> None:
        scene.happens("add_to_cart")
        scene.later(8 * DAY, 3 * HOUR)
        assert scene.ended() == {DONE: 1}
        later = scene.now + 50 * DAY
        scene.runs.tidy(int(later.timestamp() * 1e6), 40 * 86_400_000_000)
        assert scene.ended() == {}


class TestCrashes:
    STORY = ("add_to_cart", "", "message_click", "add_to_cart", "", "purchase", *[""] * 11)

    def live(self, scene: Scene, breaks: Callable[[], bool]) -> list[tuple[str, str]]:
        """The story, each event handed on until that has worked; whenever it breaks everything in memory is lost."""

        def tried(work: Callable[[], Any]) -> None:
            for _ in range(50):
                try:
                    work()
                    return
                except KeyboardInterrupt:
                    scene.open()
            raise AssertionError("it never gets on")

        with pytest.MonkeyPatch.context() as patch:
            for name in ("move", "begin"):
                whole = getattr(Changes, name)

                def breaking(self: Changes, *args: Any, whole: Any = whole, **more: Any) -> Any:
                    if breaks():
                        raise KeyboardInterrupt
                    done = whole(self, *args, **more)
                    if breaks():
                        # written, and not kept
                        raise KeyboardInterrupt
                    return done

                patch.setattr(Changes, name, breaking)
            changing = Runs.changing

            def killed_after(runs: Runs) -> Any:
                import contextlib

                @contextlib.contextmanager
                def around() -> Iterator[Changes]:
                    with changing(runs) as change:
                        yield change
                    if breaks():
                        # kept, and nobody knows
                        raise KeyboardInterrupt

                return around()

            patch.setattr(Runs, "changing", killed_after)
            for number, name in enumerate(self.STORY):
                scene.now = NEW_YEAR + number * 8 * HOUR
                if name:
                    told = scene.event(name, event_id=f"{number}")
                    tried(lambda told=told: scene.runner.follow([told]))  # type: ignore[misc]
                    # a crash hands on once more what it had handed on already
                    tried(lambda told=told: scene.runner.follow([told]))  # type: ignore[misc]
                tried(lambda: scene.runner.step_due(scene.now))
                tried(lambda: scene.runner.step_due(scene.now))
        return scene.left()

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sets(st.integers(0, 60), max_size=12))
    def test_a_kill_anywhere_neither_loses_nor_repeats_a_step(self, tmp_path_factory: pytest.TempPathFactory, kills: set[int]) -> None:
        count = itertools.count()
        left = self.live(Scene(tmp_path_factory.mktemp("broken")), lambda: next(count) in kills)
        assert left == [("push", "dropped"), ("email", "waiting")], "one for the cart, called off at the purchase, and one of thanks"


@pytest.fixture
def receiver() -> Iterator[Webhook]:
    receiver = Webhook()
    yield receiver
    receiver.close()


class TestOutbox:
    @pytest.fixture
    def scene(self, tmp_path: Path, receiver: Webhook) -> Scene:
        scene = Scene(tmp_path, url=receiver.url)
        for who in ("a", "b", "c"):
            scene.happens("add_to_cart", who)
        scene.later(2 * HOUR)
        return scene

    def test_a_webhook_is_signed_and_carries_what_its_receiver_needs(self, scene: Scene, receiver: Webhook) -> None:
        assert scene.sender.send_due() == 3
        assert scene.sender.send_due() == 0
        for headers, body in receiver.took:
            signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
            expected = base64.b64encode(hmac.new(b"esp", signed, hashlib.sha256).digest()).decode()
            assert headers["webhook-signature"] == f"v1,{expected}"
            told = json.loads(body)
            assert told["decision_id"] == headers["idempotency-key"] == headers["webhook-id"]
            assert (told["channel"], told["journey"], told["offer"]["offer_id"]) == ("push", "cart-left", "o")
            assert told["contact"]["email"].strip() == f"{told['customer_id']}@Example.org"
        assert scene.left() == [("push", "taken")] * 3
        assert scene.sender.note_left() == 3
        assert sorted(scene.shop.told_sent) == sorted(h["webhook-id"] for h, _ in receiver.took)
        assert scene.left() == [("push", "sent")] * 3

    def test_one_that_fails_for_an_hour_loses_nothing_and_gets_nothing_twice(self, scene: Scene, receiver: Webhook) -> None:
        receiver.answer = 500
        for _ in range(120):
            scene.sender.send_due()
            scene.now += timedelta(seconds=30)
        assert receiver.took == []
        assert receiver.asked < 60, "the pauses grow"
        assert scene.sender.stuck == {"esp": "answered 500"}
        receiver.answer = 204
        for _ in range(240):
            scene.sender.send_due()
            scene.now += timedelta(seconds=30)
        assert sorted(h["idempotency-key"] for h, _ in receiver.took) == sorted(d for _, d, _ in scene.shop.decided)
        assert scene.sender.stuck == {}

    def test_a_crash_before_it_is_noted_sends_it_again_under_the_same_key(
        self, scene: Scene, receiver: Webhook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = Outgoings.become

        def killed(self: Outgoings, message: Outgoing, status: str, *more: Any, **named: Any) -> bool:
            if status == "taken":
                raise KeyboardInterrupt
            return whole(self, message, status, *more, **named)

        monkeypatch.setattr(Outgoings, "become", killed)
        with pytest.raises(KeyboardInterrupt):
            scene.sender.send_due()
        monkeypatch.setattr(Outgoings, "become", whole)
        scene.open()
        scene.sender.send_due()
        keys = [h["idempotency-key"] for h, _ in receiver.took]
        assert len(keys) == 4
        assert len(set(keys)) == 3

    def test_an_unsubscription_between_decision_and_sending_stops_it(self, scene: Scene, receiver: Webhook) -> None:
        scene.shop.forbidden.add(("b", "push"))
        assert scene.sender.send_due() == 2
        assert {json.loads(body)["customer_id"] for _, body in receiver.took} == {"a", "c"}
        [dropped] = scene.runs.outgoing.of_sink("esp", ("dropped",))
        assert dropped.reason == WITHDRAWN
        assert scene.shop.released == [dropped.decision_id]

    def test_what_a_receiver_will_never_take_is_given_up_and_so_is_what_is_old(self, scene: Scene, receiver: Webhook) -> None:
        receiver.answer = 422
        scene.sender.send_due()
        assert scene.left() == [("push", "failed")] * 3
        scene.happens("add_to_cart", "d")
        scene.later(2 * HOUR)
        receiver.answer = 503
        for _ in range(100):
            scene.sender.send_due()
            scene.now += HOUR
        assert [m.reason for m in scene.runs.outgoing.of_sink("esp", ("failed",))] == ["answered 422"] * 3 + ["answered 503"]

    def test_files_are_what_other_systems_load_and_each_row_leaves_once(self, scene: Scene, tmp_path: Path) -> None:
        scene.later(4 * DAY)
        scene.shop.forbidden.add(("b", "ads"))
        out, outgoing = tmp_path / "braze.csv", scene.runs.outgoing
        assert export(outgoing, scene.shop, scene.home, "files", out, "braze", scene.now) == (2, 1)
        rows = list(csv.DictReader(out.open()))
        assert {row["external_id"] for row in rows} == {"a", "c"}
        assert set(rows[0]) > {"external_id", "email", "phone", "ubiquo_offer_id", "ubiquo_decision_id"}
        # the next file of that name has what came since, and nobody who has left already, or said no since
        assert export(outgoing, scene.shop, scene.home, "files", out, "braze", scene.now) == (0, 0)
        assert scene.sender.note_left() == 2
        assert len(scene.shop.told_sent) == 2
        for form, name in (("plain", "p.csv"), ("braze", "b.jsonl"), ("klaviyo", "k.csv"), ("klaviyo", "k.jsonl"), ("audience", "a.csv")):
            empty = tmp_path / name
            assert export(outgoing, scene.shop, scene.home, "files", empty, form, scene.now)[0] == 0  # type: ignore[arg-type]
            assert empty.exists()

    def test_a_file_that_was_broken_off_is_written_again_whole_and_permissions_are_looked_at_again(
        self, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scene.later(4 * DAY)
        out, outgoing = tmp_path / "x.csv", scene.runs.outgoing
        with monkeypatch.context() as patch:
            patch.setattr("serving.journeys.outbox.write_atomically", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                export(outgoing, scene.shop, scene.home, "files", out, "plain", scene.now)
        assert scene.sender.note_left() == 0, "nothing has left"
        with pytest.raises(ValueError, match=r"x\.csv was begun and never ended"):
            export(outgoing, scene.shop, scene.home, "files", tmp_path / "other.csv", "plain", scene.now)
        scene.shop.forbidden.add(("b", "ads"))
        assert export(outgoing, scene.shop, scene.home, "files", out, "plain", scene.now) == (2, 1)

    def test_an_erasure_finds_each_kind_of_file(self, scene: Scene, tmp_path: Path) -> None:
        for number, (form, suffix) in enumerate(
            (("plain", "csv"), ("plain", "jsonl"), ("braze", "csv"), ("klaviyo", "jsonl"), ("klaviyo", "csv"), ("audience", "csv"))
        ):
            for who in ("a", "b", "c"):
                scene.happens("add_to_cart", f"{who}{number}")
            scene.later(5 * DAY, 2 * HOUR)
            out = tmp_path / f"{form}.{suffix}"
            rows, _ = export(scene.runs.outgoing, scene.shop, scene.home, "files", out, form, scene.now)  # type: ignore[arg-type]
            assert rows >= 3
            before = out.read_bytes()
            place, subject = BatchFiles(scene.home), Subject([f"b{number}"], [], [])
            assert len([row for row in place.find(subject) if row["file"] == out.name]) == 1
            assert place.erase(subject) == 1
            assert not list(place.find(subject))
            address = f"b{number}@Example.org"
            hashed = hashlib.sha256(address.lower().encode()).hexdigest().encode()
            assert address.encode() in before or hashed in before or f"b{number}".encode() in before
            after = out.read_bytes()
            assert address.encode() not in after
            assert hashed not in after
            assert out.stat().st_mode & 0o077 == 0
            assert len(after.splitlines()) == len(before.splitlines()) - 1

    def test_what_waits_longer_than_its_place_is_held_goes_to_nobody(self, scene: Scene, receiver: Webhook) -> None:
        receiver.answer = 503
        scene.shop.promised = HOUR * 5
        scene.happens("add_to_cart", "late")
        scene.later(2 * HOUR)
        [mine] = [m for m in scene.runs.outgoing.of_sink("esp", ("waiting",)) if m.customer_id == "late"]
        scene.now += 6 * HOUR
        receiver.answer = 200
        scene.sender.send_due()
        assert mine.decision_id in scene.shop.released
        assert mine.decision_id not in [h["idempotency-key"] for h, _ in receiver.took]
        assert len(receiver.took) == 3

    def test_what_is_called_off_while_a_receiver_has_it_is_neither_given_back_nor_tried_again(
        self, scene: Scene, receiver: Webhook
    ) -> None:
        bought = iter(["a"])

        def meanwhile() -> None:
            for who in bought:
                scene.runner.follow([scene.event("purchase", who)])

        receiver.meanwhile = meanwhile
        waiting = {m.decision_id: m.customer_id for m in scene.runs.outgoing.of_sink("esp", ("waiting",))}
        first = next(iter(m.customer_id for m in scene.runs.outgoing.to_send("esp", int(scene.now.timestamp() * 1e6), 1)))
        bought = iter([first])
        assert scene.sender.send_due() == 3
        assert scene.shop.released == [], "a receiver has it"
        # and one that did not get through is not tried again
        scene.happens("add_to_cart", "d")
        scene.later(2 * HOUR)
        receiver.answer, bought = 503, iter(["d"])
        scene.sender.send_due()
        receiver.answer = 200
        for _ in range(20):
            scene.now += HOUR
            scene.sender.send_due()
        assert sorted(h["idempotency-key"] for h, _ in receiver.took) == sorted(waiting)
        assert len(scene.shop.released) == 1

    def test_each_post_is_signed_at_its_own_time_and_one_that_cannot_be_noted_is_not_sent_again(
        self, scene: Scene, receiver: Webhook
    ) -> None:
        clock = itertools.count()
        scene.sender._clock = lambda: scene.now + timedelta(seconds=next(clock))
        scene.sender.send_due()
        assert len({h["webhook-timestamp"] for h, _ in receiver.took}) == 3

        def full(message: Outgoing, now: datetime) -> None:
            raise RuntimeError("too many events wait")

        scene.shop.sent = full  # type: ignore[method-assign]
        for _ in range(3):
            with pytest.raises(RuntimeError):
                scene.sender.note_left()
            scene.sender.send_due()
        assert len(receiver.took) == 3

    @pytest.mark.parametrize("name", ["k.jsonl", "b.jsonl", "a.csv", "k.csv", "p.jsonl"])
    def test_each_shape(self, scene: Scene, tmp_path: Path, name: str) -> None:
        scene.later(4 * DAY)
        form: Any = {"k": "klaviyo", "b": "braze", "a": "audience", "p": "plain"}[name[0]]
        out = tmp_path / name
        assert export(scene.runs.outgoing, scene.shop, scene.home, "files", out, form, scene.now) == (3, 0)
        text = out.read_text()
        if name == "k.jsonl":
            told = [json.loads(line)["data"]["attributes"] for line in text.splitlines()]
            assert {"email": " a@Example.org", "phone_number": "+15550100"} in [each["profile"]["data"]["attributes"] for each in told]
            assert len({each["unique_id"] for each in told}) == 3
        elif name == "b.jsonl":
            assert [json.loads(line)["properties"]["offer_id"] for line in text.splitlines()] == ["o"] * 3
        elif name == "a.csv":
            assert hashlib.sha256(b"a@example.org").hexdigest() in text
            assert "example.org" not in text.lower()
        elif name == "k.csv":
            assert text.splitlines()[0].startswith("Email,Phone Number,External ID,ubiquo_offer_id")
        else:
            assert {json.loads(line)["customer_id"] for line in text.splitlines()} == {"a", "b", "c"}
        assert out.stat().st_mode & 0o077 == 0, "nobody else may read it"

    def test_an_audience_is_no_json(self, scene: Scene, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="the format audience is a CSV"):
            export(scene.runs.outgoing, scene.shop, scene.home, "files", tmp_path / "a.jsonl", "audience", scene.now)


class TestFile:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("add_to_cart", "add_to_basket"), "line 7: journeys[0].start.on: 'add_to_basket' is no event: use one such as add_to_cart"),
            (("recency_days <", "recency_dayz <"), "line 6: journeys[0]: cart-left: a condition names 'recency_dayz'"),
            (("wait: 1d", "wait: 1w"), "line 12: journeys[0].steps[1].wait"),
            (("when: answered", "when: replied"), "names 'replied'"),
            (("channels: [ads]", "channels: [pigeon]"), "steps[2].branch[1].steps[2].offer.channels[0]"),
            (("- offer: {channels: [push], stages: [retain]}", "- {}"), "journeys[0].steps[0]: say one of offer, wait and branch"),
            (("after: 1h", "after: 1h, every: day"), "journeys[0].start: say either on (events) or every: day"),
            (("stages: [retain]", "sink: post"), "steps[0].offer.sink: 'post' is no sink"),
            (("name: files", "name: esp"), "sinks[1].name: 'esp' is the name of another too"),
            (("stop_on", "stop_at"), "stop_at"),
        ],
    )
    def test_a_mistake_refuses_the_whole_file_with_line_and_field(self, tmp_path: Path, change: tuple[str, str], said: str) -> None:
        path = tmp_path / "journeys.yaml"
        path.write_text(CART.replace("URL", "http://h/").replace(*change))
        with pytest.raises(WrittenError) as error:
            Plans.read(path, WORDS, EVENTS)
        assert said in str(error.value)
        assert "journeys.yaml, line " in str(error.value)

    def test_a_replay_says_what_would_have_been(self, tmp_path: Path) -> None:
        plans = Scene(tmp_path).plans
        hours: list[tuple[str, float, str]] = [
            ("a", 0, "add_to_cart"), ("a", 0.5, "add_to_cart"), ("a", 1.2, "remove_from_cart"),
            ("b", 0, "add_to_cart"), ("b", 20, "purchase"), ("c", 0, "add_to_cart"), ("c", 3, "message_click"), ("d", 1, "purchase"),
        ]  # fmt: skip
        events = sorted(((who, NEW_YEAR + at * HOUR, name) for who, at, name in hours), key=lambda e: e[1])
        assert Replay(plans).run(events)["cart-left"] == {
            "began": 3, CALLED_OFF: 1, CONVERTED: 1, DONE: 1, "0: offer by push: retain": 2, "11: offer by email: thank": 1,
        }  # fmt: skip


def test_events_know_what_was_in_the_cart(tmp_path: Path) -> None:
    scene = Scene(tmp_path, CART.replace("recency_days < 90", "event_value_minor >= 500 && 'i1' in event_items"))
    for who, items in (("a", [Item("i1", 2, 600)]), ("b", [Item("i1", 2, 400)]), ("c", [Item("i2", 2, 600)])):
        scene.happens("add_to_cart", who, items=items)
    scene.later(2 * HOUR)
    assert [who for who, _, _ in scene.shop.decided] == ["a"]


class TestToday:
    """What is true of a day."""

    def test_a_birthday_begins_a_journey_on_its_day(self, tmp_path: Path) -> None:
        text = """
sinks: [{name: files, channels: [email]}]
journeys:
  - name: birthday
    start: {every: day, at: "09:00", when: birthday}
    steps: [{offer: {channels: [email]}}]
"""
        scene = Scene(tmp_path, text)
        scene.shop.rows = {"a": {"born": (1, 3)}, "b": {"born": (2, 3)}, "c": {}}
        scene.later(5 * DAY, HOUR)
        assert [who for who, _, _ in scene.shop.decided] == ["a"]
        with pytest.raises(WrittenError, match="names 'birthday'"):
            scene.read(text.replace('every: day, at: "09:00"', "on: [purchase]"))

    def test_birthdays_prices_and_stock_are_read_from_what_the_shop_holds(self, tiny: TinyShop, tmp_path: Path) -> None:
        def items(*lines: str) -> None:
            path = tmp_path / "i.csv"
            path.write_text("\n".join(["item_id,price_minor,in_stock", *lines]) + "\n")
            load(tiny.home, "items", path, own=["price_minor:number", "in_stock:text"]).save()

        born = {"ada": "1990-02-28", "leap": "1992-02-29", "other": "1990-03-01", "odd": "yesterday"}
        for name, day in born.items():
            tiny.add(event(name, "identify", NEW_YEAR - DAY, f"card-{name}", traits={"birthday": day}))
        identities = Identities(tiny.home)
        contacts = Contacts(tiny.home, identities.vault)
        who = {name: str(identities.resolve({"loyalty_card": f"card-{name}"}, None)) for name in born}

        def today(day: date) -> dict[str, dict[str, Any]]:
            at, found = datetime(day.year, day.month, day.day, 12, tzinfo=UTC), Today(tiny.home, identities, contacts, day)
            row = {"cart_item_ids": ["i1"], "recent_item_ids": ["i2", "i3"]}
            return {name: found.of(customer, row, at) for name, customer in who.items()}

        items("i1,500,yes", "i2,300,no", "i3,200,no", "i4,100,no")
        first = today(date(2018, 2, 27))
        assert first["ada"] == {"birthday": False, "cheaper_items": [], "restocked_items": [], "due_items": []}
        items("i1,400,yes", "i2,300,yes", "i3,300,no", "i4,50,yes")
        for _ in range(2):
            # the same day looked at again is the same
            second = today(date(2018, 2, 28))
            assert [name for name, told in second.items() if told["birthday"]] == ["ada", "leap"]
            assert (second["ada"]["cheaper_items"], second["ada"]["restocked_items"]) == (["i1"], ["i2"])
        assert today(date(2018, 3, 1))["other"] == {"birthday": True, "cheaper_items": [], "restocked_items": [], "due_items": []}
        assert [name for name, told in today(date(2020, 2, 28)).items() if told["birthday"]] == ["ada"]
        assert [name for name, told in today(date(2020, 2, 29)).items() if told["birthday"]] == ["leap"]

    @pytest.mark.parametrize(("days", "due"), [(9.9, []), (10.0, ["milk"]), (19.9, ["milk"]), (20.1, [])])
    def test_what_is_bought_every_ten_days_is_due_after_ten(self, days: float, due: list[str]) -> None:
        last = int((NEW_YEAR - days * DAY).timestamp())
        row = {
            "bought_item_ids": ["milk", "once"], "bought_counts": [4, 2], "bought_first_at": [last - 30 * 86_400, last - 864_000],
            "bought_last_at": [last, last],
        }  # fmt: skip
        assert due_items(row, NEW_YEAR) == due
        assert due_items({}, NEW_YEAR) == []
