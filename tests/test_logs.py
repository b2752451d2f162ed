"""What the operator reads in a bad hour: every kind of line, and never a flood of one."""

from __future__ import annotations

import itertools
import json
import logging
import sys

import pytest

from features.state.settings import SettingError
from serving.http import logs
from serving.http.logs import JsonLines, Sparing, configure_logging


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


class TestJson:
    def test_each_line_is_one_object(self) -> None:
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            failed = logging.LogRecord("ubiquo", logging.ERROR, __file__, 1, "moving %d events failed", (3,), sys.exc_info())
        failed.created = 0.25
        line = JsonLines().format(failed)
        assert "\n" not in line
        told = json.loads(line)
        assert told["error"].pop("traceback").startswith("Traceback")
        assert told == {
            "time": "1970-01-01T00:00:00.250+00:00", "level": "ERROR", "logger": "ubiquo", "message": "moving 3 events failed",
            "error": {"type": "ZeroDivisionError", "message": "division by zero"},
        }  # fmt: skip

    def test_it_is_chosen_by_a_setting(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        handlers, levels = logging.root.handlers[:], [logging.root.level, logging.getLogger("ubiquo").level]
        try:
            for said in ("text", "json"):
                monkeypatch.setenv("UBIQUO_LOG", said)
                configure_logging()
                logging.getLogger("ubiquo").warning("the disk is %s", said)
        finally:
            logging.root.handlers[:] = handlers
            logging.root.setLevel(levels[0])
            logging.getLogger("ubiquo").setLevel(levels[1])
        text, as_json = capsys.readouterr().err.splitlines()
        assert text.endswith("WARNING ubiquo: the disk is text")
        assert json.loads(as_json)["message"] == "the disk is json"
        monkeypatch.setenv("UBIQUO_LOG", "xml")
        with pytest.raises(SettingError, match="UBIQUO_LOG='xml'"):
            configure_logging()
