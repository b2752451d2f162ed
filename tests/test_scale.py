"""The page about scale says what the script reckons."""

from __future__ import annotations

import re

from reckon_scale import Measured, Prices, Shop, limits, main_table, need
from scene import ROOT

PAGE = (ROOT / "docs" / "scale.md").read_text()


def test_its_tables_are_those_of_the_script() -> None:
    assert [line for line in (*main_table(), *limits()) if line not in PAGE.splitlines()] == []


def test_what_it_reckons_with_is_what_it_says_was_measured() -> None:
    told = {float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", PAGE.partition("## What was measured")[2])}
    m = Measured()
    bytes_told = (m.index_bytes, m.queue_bytes, m.graph_bytes, m.consent_bytes, m.online_bytes)
    seconds_told = (m.accepted * 1e6, m.followed * 1e6, m.moved * 1e6, m.windowed * 1e6, m.answer * 1e3, m.started * 1e6, m.turns)
    assert [each for each in (*bytes_told, *seconds_told, m.process_bytes / 1e6) if round(each, 6) not in told] == []
    assert f"memory of each process = {m.process_bytes / 1e9:.2f} GB + customers" in PAGE


def test_more_customers_need_more_of_everything() -> None:
    small, large = (need(customers, Measured(), Shop(), Prices()) for customers in (1_000_000, 20_000_000))
    assert all(a < b for a, b in zip(small, large, strict=True))
