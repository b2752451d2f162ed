"""A home can be copied and moved: the copy answers alike, and what happens in one leaves the other as it was."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from scene import command, copy_home, loyalty_cards, start_service, stop_service

from features.state.home import Home


def contents(home: Home) -> dict[str, str]:
    """Every file that holds something to stay, with a digest of it."""
    return {
        str(path.relative_to(home.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(home.root.rglob("*"))
        if path.is_file() and not path.name.endswith((".lock", "-wal", "-shm"))
    }


@pytest.mark.evidence
def test_an_erasure_in_a_copy_leaves_the_original_as_it_was(trained: Home, tmp_path: Path) -> None:
    original = copy_home(trained, tmp_path / "original")
    card = loyalty_cards(original)[3]
    # opened once where it lies, so that its paths are its own
    assert command("training", "history", "churn", home=original.root).returncode == 0
    before = contents(original)
    copy = copy_home(original, tmp_path / "copy")
    done = command("serving", "erase", f"loyalty_card:{card}", "--yes", home=copy.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(original) == before
    changed = {name for name, digest in contents(copy).items() if before.get(name) != digest}
    assert any(name.startswith("mlartifacts/") for name in changed), "what training logged of them is gone from the copy"
    trained_on = command("training", "churn", home=copy.root)
    assert trained_on.returncode == 0, trained_on.stdout + trained_on.stderr
    assert contents(original) == before


def test_a_moved_home_answers_as_before(trained: Home, tmp_path: Path) -> None:
    here, there = copy_home(trained, tmp_path / "here"), Home(tmp_path / "there")
    card = loyalty_cards(here)[0]
    asked = {"identifiers": {"loyalty_card": card}, "limit": 5}
    answers = []
    for home in (here, there):
        if home is there:
            shutil.move(here.root, there.root)
        service = start_service(home)
        told = (
            service.ask("recommendations", asked),
            service.ask("next-best-offer", asked),
            service.ask("churn", {"identifiers": asked["identifiers"]}),
        )
        # scores fade with the seconds between the two
        chosen = [item["item_id"] for item in told[0]["items"]], [offer["offer_id"] for offer in told[1]["offers"]]
        answers.append((*chosen, told[2]["probability"]))
        assert home is here or not here.root.exists()
        stop_service(service)
    assert answers[0] == answers[1]
