"""Some hundred crashes, cut connections and lost leases on a simulated clock; ``make simulate-crashes`` takes ten thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from scene import ROOT, surroundings

KILLS = 300


def simulated(*words: str) -> dict[str, Any]:
    """What a run in a process of its own has counted: it puts simulated threads in the place of the machine's."""
    line = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "simulate_crashes.py"), "--json", *words]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(line, env={**surroundings(), "PYTHONPATH": path, "PYTHONHASHSEED": "0"}, capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    counted: dict[str, Any] = json.loads(done.stdout)
    return counted


class TestCrashesOfManyProcesses:
    @pytest.fixture(scope="class")
    def counted(self) -> dict[str, Any]:
        return simulated("--crashes", f"{KILLS}", "--rate", "0.02")

    def test_nothing_that_was_acknowledged_is_lost_or_stored_twice_and_all_agree(self, counted: dict[str, Any]) -> None:
        assert counted["failed"] == {}, counted["failed"]
        assert counted["kills"] >= KILLS
        assert counted["acknowledged"] > 500
        assert (counted["lost"], counted["twice"], counted["alien"]) == (0, 0, 0)

    def test_every_kind_of_fault_has_struck(self, counted: dict[str, Any]) -> None:
        kinds = (
            "killed before it",
            "killed after it",
            "cut before it",
            "answer lost",
            "stalled",
            "lease lost, goes on",
            "jumps",
            "last writes lost",
        )
        assert [kind for kind in kinds if not counted["faults"].get(kind)] == []

    def test_a_seed_takes_the_same_course_again(self) -> None:
        one, other = (simulated("--seed", "3", "--rate", "0.02") for _ in range(2))
        assert one["digest"] == other["digest"]
        assert one == other
