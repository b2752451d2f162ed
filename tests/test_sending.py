"""By which channel and when customers answer: learnt from all, drawn to each as far as they are known, and kept within quiet hours."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import TinyShop, event

from models.sending import HOURS, MOST_STRENGTH, SENDING, SendingRates, log_loss, prior_strength, shrunk
from serving.decide.contact import QuietHours
from serving.decide.timing import best_time, hour_of_week, own_messages, responses
from training.dataset import NothingToLearnError
from training.sending import fit_rates

NEW_YORK = ZoneInfo("America/New_York")
MONDAY = datetime(2018, 5, 14, 9, 30, tzinfo=UTC)
RNG = np.random.default_rng(3)


def evening(low: float = 0.05, high: float = 0.25) -> np.ndarray:
    """A true rate: high from 18 to 22 o'clock."""
    return np.where((np.arange(HOURS) % 24 >= 18) & (np.arange(HOURS) % 24 < 22), high, low)


def fitted(true: np.ndarray, messages: int, seed: int = 0, uses_hours: bool = True, inclination: float = 0.0) -> SendingRates:
    rng = np.random.default_rng(seed)
    hours, who = rng.integers(HOURS, size=messages), rng.integers(400, size=messages)
    factors = rng.gamma(1 / inclination, inclination, 400) if inclination else np.ones(400)
    got = rng.random(messages) < np.clip(true[hours] * factors[who], 0, 1)
    sent = np.bincount(hours, minlength=HOURS).astype(float)
    each = np.bincount(who, weights=got, minlength=400), np.bincount(who, minlength=400).astype(float)
    return SendingRates.fit({"email": sent}, {"email": np.bincount(hours, weights=got, minlength=HOURS)}, {"email": each}, uses_hours)


class TestRates:
    def test_the_hours_that_are_better_are_found(self) -> None:
        true = evening()
        rates = fitted(true, 60_000)
        assert set(np.argsort(-rates.hours["email"])[:28].tolist()) == set(np.flatnonzero(true == true.max()).tolist())
        assert np.abs(rates.hours["email"] - true).mean() < 0.02

    def test_where_hours_do_not_differ_chance_is_not_taken_for_a_pattern(self) -> None:
        flat = np.full(HOURS, 0.1)
        spreads = [np.ptp(fitted(flat, 5_000, seed).hours["email"]) for seed in range(30)]
        raw = 2 * np.sqrt(0.1 * 0.9 / (5_000 / HOURS))
        assert np.median(spreads) < raw / 4

    @given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=HOURS, max_size=HOURS))
    def test_a_rate_lies_between_its_own_and_that_of_all(self, counts: list[tuple[int, int]]) -> None:
        answered = np.array([min(a, b) for a, b in counts], dtype=float)
        sent = np.array([max(a, b) for a, b in counts], dtype=float)
        rate = float(answered.sum() / max(sent.sum(), 1))
        told = shrunk(answered, sent, rate)
        own = np.divide(answered, sent, out=np.full(HOURS, rate), where=sent > 0)
        assert (told >= np.minimum(own, rate) - 1e-9).all()
        assert (told <= np.maximum(own, rate) + 1e-9).all()

    def test_customers_who_differ_count_for_themselves_the_sooner(self) -> None:
        alike, apart = fitted(np.full(HOURS, 0.2), 20_000).strength, fitted(np.full(HOURS, 0.2), 20_000, inclination=0.5).strength
        assert alike > 10 * apart
        # the gamma's own a is 2
        assert 1.0 < apart < 4.0
        assert prior_strength(np.zeros(0), np.zeros(0)) == MOST_STRENGTH

    def test_what_one_customer_did_moves_their_rates_and_little_moves_them_little(self) -> None:
        rates = fitted(evening(), 20_000, inclination=0.5)
        pooled = rates.of("email")
        ignores, answers = rates.of("email", [(10, False)] * 30), rates.of("email", [(10, True)] * 10)
        assert (ignores < pooled).all()
        assert (answers > pooled).all()
        once = rates.of("email", [(10, True)])
        assert once[10] / pooled[10] > once[40] / pooled[40] > 1.0, "most at that time of day"
        assert ((rates.of("email", [(h, True) for h in range(HOURS)]) >= 0) & (rates.of("email", [(1, True)] * 500) <= 1)).all()

    def test_it_is_kept_and_damage_is_told(self, tmp_path: Path) -> None:
        rates = fitted(evening(), 5_000)
        rates.save(tmp_path / SENDING)
        again = SendingRates.load(tmp_path / SENDING)
        assert np.array_equal(again.hours["email"], rates.hours["email"])
        assert (again.strength, again.uses_hours, again.rates) == (rates.strength, True, rates.rates)
        (tmp_path / SENDING).write_text('{"hours": {"email": [1, 2]}, "rates": {}, "strength": 1, "uses_hours": true}')
        with pytest.raises(ValueError, match="fit it again"):
            SendingRates.load(tmp_path / SENDING)

    def test_the_true_rates_lose_least(self) -> None:
        true, rng = evening(), np.random.default_rng(1)
        hours = rng.integers(HOURS, size=40_000)
        got = rng.random(40_000) < true[hours]
        right = log_loss(true[hours], got).mean()
        assert right < log_loss(np.full(40_000, true.mean()), got).mean()
        assert right < log_loss(np.roll(true, 12)[hours], got).mean()


class TestTiming:
    def test_the_best_hour_of_the_next_day_is_that_of_where_the_customer_is(self) -> None:
        rates = SendingRates({"email": evening()}, {"email": 0.1}, 5.0, True)
        for zone in (NEW_YORK, ZoneInfo("Asia/Kolkata"), UTC):
            told = Counter(best_time(rates, "email", {}, MONDAY, zone, None, RNG) for _ in range(60))  # type: ignore[arg-type]
            (at, chance), _ = told.most_common(1)[0]
            assert 18 <= at.astimezone(zone).hour < 22
            assert MONDAY <= at < MONDAY + timedelta(hours=24)
            assert chance == pytest.approx(0.95 + 0.05 / 24)

    def test_quiet_hours_are_kept_also_by_what_is_drawn(self) -> None:
        rates = SendingRates({"email": evening()}, {"email": 0.1}, 5.0, True)
        quiet = QuietHours("17:00", "08:00")
        for _ in range(300):
            at, _ = best_time(rates, "email", {}, MONDAY, NEW_YORK, quiet, RNG)
            assert 8 <= at.astimezone(NEW_YORK).hour < 17

    def test_one_in_twenty_is_drawn_and_its_chance_is_told(self) -> None:
        rates = SendingRates({"email": evening()}, {"email": 0.1}, 5.0, True)
        chances = [best_time(rates, "email", {}, MONDAY, NEW_YORK, None, RNG)[1] for _ in range(4_000)]
        others = sum(chance < 0.5 for chance in chances)
        expected = 4_000 * 0.05 * 23 / 24
        assert abs(others - expected) < 5 * np.sqrt(expected)
        assert set(np.round(chances, 9)) == {round(0.05 / 24, 9), round(0.95 + 0.05 / 24, 9)}

    def test_without_rates_it_is_now(self) -> None:
        assert best_time(None, "email", {}, MONDAY, NEW_YORK, None, RNG) == (MONDAY, 1.0)

    def test_what_a_row_tells_of_messages(self) -> None:
        at = int(MONDAY.timestamp())
        row = {
            "contacted_at": [at, at + 3600, at], "contacted_by": ["email", "email", "sms"], "contacted_decisions": ["d1", "d2", "d3"],
            "answered_decisions": ["d2", ""],
        }  # fmt: skip
        first = hour_of_week(MONDAY.astimezone(NEW_YORK))
        assert own_messages(row, "email", NEW_YORK) == [(first, False), (first + 1, True)]
        assert own_messages({}, "email", NEW_YORK) == []
        rates = SendingRates({"email": evening(), "sms": evening()}, {"email": 0.1, "sms": 0.1}, 1.0, True)
        told = responses(rates, ["email", "sms"], row, NEW_YORK)
        assert told["email"] > told["sms"]


class TestJob:
    def test_it_learns_from_what_was_sent_and_answered(self, tiny: TinyShop) -> None:
        rng, true, raw = np.random.default_rng(5), evening(0.1, 0.6), []
        for k in range(1_500):
            # spread over half a year before the data ends
            at = tiny.shop.data_end - timedelta(days=8, hours=int(rng.integers(24 * 180)))
            raw.append(event(f"s{k}", "message_sent", at, f"card-{k % 60}", campaign_id=f"c{k}", channel="email"))
            if rng.random() < true[hour_of_week(at.astimezone(ZoneInfo(tiny.shop.timezone)))]:
                raw.append(event(f"a{k}", "message_click", at + timedelta(hours=3), f"card-{k % 60}", campaign_id=f"c{k}", channel="email"))
            if k % 10 == 0:
                # an answer that comes too late, and one to something else
                raw.append(
                    event(f"l{k}", "message_click", at + timedelta(days=7, hours=1), f"card-{k % 60}", campaign_id=f"c{k}", channel="email")
                )
                raw.append(event(f"o{k}", "message_click", at + timedelta(hours=1), f"card-{k % 60}", campaign_id="other", channel="email"))
        tiny.add(*raw)
        found = fit_rates(tiny.home, tiny.shop.data_end)
        answered = sum(each["event_id"].startswith("a") for each in raw)
        assert found.messages == {"email": 1_500}
        assert found.answered == {"email": answered}
        assert found.gain is not None
        assert found.gain[1] > 0
        assert found.rates.uses_hours
        best = int(found.rates.hours["email"].argmax()) % 24
        assert 18 <= best < 22
        assert SendingRates.load(tiny.home.root / SENDING).rates == found.rates.rates

    def test_too_few_messages_are_told(self, tiny: TinyShop) -> None:
        tiny.add(event("e", "view_item", tiny.shop.data_end - timedelta(days=3), items=["i1"]))
        with pytest.raises(NothingToLearnError, match="0 messages were sent"):
            fit_rates(tiny.home, tiny.shop.data_end)
        assert not (tiny.home.root / SENDING).exists()
