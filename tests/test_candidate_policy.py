"""A policy's file beside logged decisions: what counts, what is left out and told, what is refused."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scene import NEW_YEAR, ROOT, SECRET, TinyShop, command, customer, event

from features.store.decision_log import DecisionLog
from models.decision import LastSlotExplorer, Query
from training.candidate_policy import read_candidate, weigh
from training.off_policy import NotJudgeableError

AT = NEW_YEAR - timedelta(days=20)


def place(decision: str, place: int, propensity: float | None, redeemed: bool = False, **more: Any) -> dict[str, Any]:
    row = {"decision_id": decision, "kind": "next-best-offer", "customer_id": f"of {decision}", "held_out": False, "closed": True}
    return row | {"place": place, "propensity": propensity, "redeemed": redeemed} | more


def rows(*places: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(places))


def policy(folder: Path, *named: tuple[Any, ...], columns: str = "decision_id place probability") -> pd.DataFrame:
    path = folder / "policy.csv"
    pd.DataFrame(named, columns=columns.split()).to_csv(path, index=False)
    return read_candidate(path)


def test_chances_multiply_and_outcomes_add_up_over_the_places_of_a_decision(tmp_path: Path) -> None:
    logged = rows(
        place("d1", 1, 0.5, True), place("d1", 2, 0.25, True), place("d1", 3, 1.0, True),
        place("d2", 1, 0.5, customer_id=None), place("d2", 2, 0.5, True, customer_id=None),
    )  # fmt: skip
    named = [("d1", 1, 0.8, 0.1, 0.2), ("d1", 2, 0.5, 0.3, 0.4), ("d2", 1, 0.5, 0.0, 0.5), ("d2", 2, 0.5, 0.25, 0.5)]
    found = weigh(logged, policy(tmp_path, *named, columns="decision_id place probability q_logged q_target"), "redeemed")
    evidence = found.evidence
    assert evidence.customers == ["of d1", "decision:d2"]
    assert evidence.propensities.tolist() == [0.125, 0.25]
    assert evidence.probabilities.tolist() == [0.4, 0.25]
    assert evidence.rewards.tolist() == [3.0, 1.0]
    assert evidence.q_logged is not None
    assert evidence.q_target is not None
    assert evidence.q_logged.tolist() == [0.4, 0.25]
    assert evidence.q_target.tolist() == pytest.approx([0.6, 1.0])
    assert (found.kinds, found.left_out) == (("next-best-offer",), {})


def test_what_does_not_count_is_left_out_once_and_told(tmp_path: Path) -> None:
    logged = rows(
        place("good", 1, 0.5), place("held", 1, 0.5, held_out=True, closed=False), place("open", 1, 0.5, closed=False),
        place("sure", 1, 1.0), place("sure", 2, 1.0), place("old", 1, None), place("silent", 1, 0.5), place("half", 1, 0.5),
        place("half", 2, 0.5), place("another kind", 1, 0.5, kind="recommendations"),
    )  # fmt: skip
    named = [(name, 1, 0.5) for name in ("good", "held", "open", "sure", "old", "half", "unheard of", "unheard of either")]
    found = weigh(logged, policy(tmp_path, *named), "redeemed")
    assert len(found.evidence.customers) == 1
    assert found.left_out == {
        "not in the log": 2, "held out": 1, "not closed: what is redeemed in time may yet come": 1, "logged without a propensity": 1,
        "nothing was drawn": 1, "not in the file, or not every place that was drawn": 2,
    }  # fmt: skip


def test_where_nothing_counts_it_is_said_why(tmp_path: Path) -> None:
    with pytest.raises(NotJudgeableError, match=r"1 nothing was drawn\): ask with explore: true"):
        weigh(rows(place("d1", 1, 1.0)), policy(tmp_path, ("d1", 1, 1.0)), "redeemed")
    with pytest.raises(NotJudgeableError, match="1 not in the log"):
        weigh(rows(place("d1", 1, 0.5)), policy(tmp_path, ("d2", 1, 1.0)), "redeemed")


def test_another_choice_where_there_was_none_is_refused(tmp_path: Path) -> None:
    logged = rows(place("d1", 1, 1.0), place("d1", 2, 0.5))
    with pytest.raises(NotJudgeableError, match=r"row 2: place 1 of decision d1 was not drawn .* probability 0\.3 only"):
        weigh(logged, policy(tmp_path, ("d1", 2, 0.5), ("d1", 1, 0.3)), "redeemed")
    with pytest.raises(ValueError, match="row 2: decision d1 has no place 3"):
        weigh(logged, policy(tmp_path, ("d1", 2, 0.5), ("d1", 3, 0.3)), "redeemed")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("d2", 1, 1.5), r"row 2: probability 1\.5 is not in \[0, 1\]"),
        (("d2", 1, -0.5), r"row 2: probability -0\.5 is not in \[0, 1\]"),
        (("d2", 1, None), "row 2: probability nan is no finite number"),
        (("d2", 1, "much"), "row 2: probability much is no finite number"),
        (("d2", 0, 0.5), "row 2: place 0.0 is no place"),
        (("d2", 1.5, 0.5), "row 2: place 1.5 is no place"),
        ((None, 1, 0.5), "row 2: decision_id nan is empty"),
        (("d1", 1, 0.5), "row 2: place 1.0 was told of this decision before"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(tmp_path, ("d1", 1, 0.5), row)


def test_a_file_without_its_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column probability"):
        policy(tmp_path, ("d1", 1), columns="decision_id place")
    with pytest.raises(ValueError, match="q_logged alone"):
        policy(tmp_path, ("d1", 1, 0.5, 0.1), columns="decision_id place probability q_logged")
    with pytest.raises(ValueError, match=r"\.parquet or a \.csv"):
        read_candidate(tmp_path / "policy.txt")


def test_the_command_tells_what_the_best_alone_would_have_brought(tiny: TinyShop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, explorer, log, count = np.random.default_rng(6), LastSlotExplorer(epsilon=0.4, pool=3), DecisionLog(tiny.home), 400
    query = cast(Query, SimpleNamespace(explore=True, limit=2))
    raw, expected, kept = [], [], 0
    for k in range(1, count + 1):
        picks, chances = explorer.pick(np.arange(5), query, rng)
        bought = rng.random() < (0.6 if picks[-1] == 1 else 0.1)
        raw.append(event(f"before-{k}", "purchase", AT - timedelta(days=1), card=f"{k}", items=[("i7", 1, 100)]))
        if bought:
            raw.append(event(f"after-{k}", "purchase", AT + timedelta(days=1), card=f"{k}", items=[(f"i{picks[-1]}", 1, 100)]))
        kept += picks[-1] == 1
        expected.append(float(bought) / chances[-1] if picks[-1] == 1 else 0.0)
        choices = [{"item_id": f"i{p}", "score": 1.0, "source": "x", "propensity": c} for p, c in zip(picks, chances.tolist(), strict=True)]
        log.append(
            {"decision_id": f"d{k}", "kind": "recommendations", "customer_id": customer(f"{k}"), "as_of": AT, "model": "m/1",
             "feature_at": None, "fallback": None, "request": {}, "features": {}, "choices": choices, "assignment": {}}
        )  # fmt: skip
    log.close()
    tiny.add(*raw)

    def asked(*arguments: str) -> str:
        done = command("training", *arguments, "--as-of", "2018-01-01", home=tiny.home.root, UBIQUO_SECRET=SECRET)
        assert done.returncode == 0, done.stdout + done.stderr
        return " ".join(done.stdout.split())

    asked("decisions", "--out", str(tmp_path / "decisions.parquet"))
    monkeypatch.chdir(tmp_path)
    recipe = (ROOT / "docs" / "judging.md").read_text().split("```python\n")[1].split("```")[0]
    exec(recipe, {})
    told = asked("judge", "--policy", str(tmp_path / "best.csv"), "--reward", "bought")
    assert f"{count} decisions of {count} customers (recommendations)" in told
    assert f"| best.csv | IPS | {np.mean(expected):.4f} |" in told
    # all that were kept weigh the same
    assert f"| {kept} |" in told
    assert "DR and SwitchDR are left out" in told
    assert "doubt" not in told
    refused = command("training", "judge", "--policy", str(tmp_path / "best.csv"), "--reward", "fame", home=tiny.home.root)
    assert refused.returncode == 1
    assert "--reward fame: give one of shown, clicked, accepted, redeemed, bought" in refused.stdout
