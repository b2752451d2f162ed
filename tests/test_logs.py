"""What the operator reads in a bad hour: every kind of line, and never a flood of one."""

from __future__ import annotations

import itertools
import logging

import pytest

from serving.http import logs
from serving.http.logs import Sparing


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def said(sparing: Sparing, text: str = "the disk of %s is full", **more: object) -> logging.LogRecord | None:
    record = logging.LogRecord("ubiquo", logging.ERROR, __file__, 1, text, ("/home",) if "%s" in text else (), None)
    return record if sparing.filter(record) else None


def test_a_line_that_repeats_comes_ever_more_rarely_and_tells_how_many_were_held_back(clock: Clock) -> None:
    sparing, shown = Sparing(), []
    for tick in range(6_000):
        clock.now = tick / 10
        record = said(sparing)
        if record is not None:
            shown.append((clock.now, record.getMessage()))
    assert [at for at, _ in shown[:5]] == [0, 5, 15, 35, 75]
    assert "49 more like it" in shown[1][1]
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(shown[4:])]
    assert all(gap == pytest.approx(60, abs=0.2) for gap in gaps)


def test_another_kind_is_not_held_back_and_after_a_silence_it_is_news(clock: Clock) -> None:
    sparing = Sparing()
    assert said(sparing)
    assert not said(sparing)
    assert said(sparing, "something else")
    clock.now = 300
    assert said(sparing)
    assert not said(sparing)
    clock.now = 306
    assert said(sparing)
