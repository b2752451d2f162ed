"""What the documents promise: their commands run, their links lead somewhere, and what they name is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fashion_shop import FashionShop
from scene import ROOT, Service, command, free_port, start_service, stop_service
from typer.main import get_command

from features.state.home import Home
from models.registry import model_names

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m (features|training|serving)((?: [a-z][a-z-]*)*)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
PUBLIC = "README.md", "docs/tutorial.md"
"""The pages of which every command is run."""


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lines_of(page: Path) -> Iterator[str]:
    """The commands of a page's shell blocks; one that goes on on the next line is one."""
    for block in SHELL.findall(page.read_text()):
        whole = ""
        for line in block.splitlines():
            whole = f"{whole}\n{line}" if whole else line
            if whole.count("'") % 2 == 0 and not whole.endswith("\\"):
                if said := re.sub(r"\s+#(?!').*$", "", whole).strip():
                    yield said
                whole = ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
class TestEveryPage:
    def test_its_links_lead_somewhere(self, page: Path) -> None:
        broken = []
        for target in LINK.findall(page.read_text()):
            if target.startswith(("http://", "https://")):
                continue
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            if not found.exists() or (anchor and anchor not in anchors(found)):
                broken.append(target)
        assert broken == []

    def test_its_commands_are_there(self, page: Path) -> None:
        unknown = []
        for package, said in COMMAND.findall(page.read_text()):
            module = __import__(f"{package}.__main__", fromlist=["app"])
            group = get_command(module.app)
            for word in said.split():
                if not hasattr(group, "commands"):
                    break
                if word not in group.commands:
                    if package == "training" and word in model_names(None):
                        # a model is an argument
                        break
                    unknown.append(f"{package}{said}")
                    break
                group = group.commands[word]
        assert unknown == []

    def test_it_speaks_of_the_customer_as_they_and_of_errors_as_fixed(self, page: Path) -> None:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        assert re.findall(r"\b(?:she|her|hers|mend\w*)\b", prose, re.IGNORECASE) == []


def test_every_page_stands_in_the_list() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in listed and page.name != "README.md"] == []


def test_every_command_is_told() -> None:
    text = "".join(page.read_text() for page in PAGES)
    untold = []
    for package in ("features", "training", "serving"):
        group = get_command(__import__(f"{package}.__main__", fromlist=["app"]).app)
        untold += [f"{package} {name}" for name in getattr(group, "commands", {}) if f"{package} {name}" not in text and name not in text]
    assert untold == []


def test_the_readme_is_short_and_shows_what_there_is() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    pictures = re.findall(r"!\[[^\]]+\]\((docs/pictures/[^)]+)\)", text)
    assert len(pictures) >= 4
    assert all((ROOT / picture).stat().st_size < 500_000 for picture in pictures)


def test_every_metric_is_told(own_service: Service) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    names = set(re.findall(r"^# TYPE (ubiquo_\w+) \w+$", own_service.get("/metrics")[1], re.MULTILINE))
    assert len(names) > 5
    assert sorted(name for name in names if re.sub(r"_(total|created)$", "", name) not in text) == []


class TestWhatTheReadmeSays:
    def test_the_demo_is_run_as_it_says(self) -> None:
        # by the pipeline itself, whole
        assert "make demo" in (ROOT / ".ci" / "run").read_text()

    def test_the_second_answer_is_about_what_was_looked_at(self, own_service: Service) -> None:
        asked = [line for line in lines_of(ROOT / "README.md") if line.startswith("curl ")]
        assert len(asked) == 3
        known = own_service.ask("recommendations", {"identifiers": {"loyalty_card": "1029"}})["customer_id"]
        answers = []
        for line in asked:
            # the card of the whole data is not in the small cut
            said = line if known else line.replace('"1029"', '"1"')
            done = subprocess.run(["bash", "-c", said.replace(":3000", f":{own_service.port}")], capture_output=True, text=True)
            answers.append(json.loads(done.stdout))
        assert "looked at recently" not in " ".join(item["reason"] for item in answers[0]["items"])
        assert answers[1]["accepted"] == 1, answers[1]
        assert "looked at recently" in " ".join(item["reason"] for item in answers[2]["items"])


class TestTheTutorial:
    """Every command of the tutorial, in its order."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("tutorial")

    def test_it_leads_from_files_to_an_answer(self, folder: Path) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")},
            "UBIQUO_HOME": str(folder / "var"), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        service: Service | None = None
        port = free_port()
        try:
            for line in lines_of(ROOT / "docs" / "tutorial.md"):
                if line == "make install" or line.startswith(". "):
                    # the tests run in what it makes
                    continue
                if line.startswith("python tests/fashion_shop.py"):
                    FashionShop(customers=700, products=120).write(folder / "exports")
                    continue
                if line == "python -m serving":
                    service = start_service(Home(folder / "var"), UBIQUO_CLOCK="from:2024-06-01T00:00:00+02:00")
                    continue
                # of the models one, for the time that all of them take
                said = line.replace(":3000", f":{service.port if service else port}").replace("training all", "training churn")
                done = self.typed(said, folder, environment)
                if line.startswith("curl"):
                    answer = json.loads(done)
                    while answer.get("title") == "Busy":
                        # the first of a loaded machine: come again, as it says
                        answer = json.loads(self.typed(said, folder, environment))
                    if "/v1/churn" in line:
                        assert 0 <= answer["probability"] <= 1, answer
                        assert answer["reasons"], answer
                    else:
                        assert "python -m training recommendations" in answer["detail"], "what has no champion says how to get one"
        finally:
            if service is not None:
                stop_service(service)
        assert service is not None

    @staticmethod
    def typed(said: str, folder: Path, environment: dict[str, str]) -> str:
        done = subprocess.run(["bash", "-ec", said], cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{said}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def test_what_guess_proposes_is_a_mapping_that_says_what_is_missing(self, folder: Path) -> None:
        proposed = yaml.safe_load((folder / "vendite.yaml").read_text())
        assert proposed["event"]["occurred_at"]["columns"] == ["Data", "Ora"]
        assert command("features", "dead-letters", home=folder / "var").returncode == 0
