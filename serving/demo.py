"""The demo: every stage as the command a user would type, then a tour over real HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from features.catalogue.shop import Shop
from features.state.home import Home

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = Path(__file__).resolve().parent / "samples"
"""Files that a shop writes itself, as this one could: segments and journeys."""
START_SECONDS = 120


@dataclass(frozen=True)
class Stage:
    """One command, with what it took."""

    name: str
    seconds: float
    peak_mb: float | None = None


def run(home: Home, households: int | None, port: int, tour_only: bool, console: Console) -> int:
    """Import, compute features, train, serve, score; returns an exit code. A second run re-uses what stands."""
    cut = ["--households", str(households)] if households else []
    commands = {
        "import events": ["features", "import", "complete-journey", *cut],
        "materialize features": ["features", "materialize"],
        "train and judge": ["training", "all"],
        "score a batch": ["serving", "score", "recommendations", "--out", str(home.root / "batch" / "recommendations.parquet")],
    }
    environment = {**os.environ, "UBIQUO_HOME": str(home.root), "PYTHONWARNINGS": "ignore", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    stages: list[Stage] = []
    for number, (name, command) in enumerate(commands.items(), 1):
        console.rule(f"{number}/{len(commands) + 1} {name}: python -m {' '.join(command)}")
        code, stage = _timed(name, [sys.executable, "-W", "ignore", "-m", *command], environment)
        stages.append(stage)
        if code:
            console.print(f"[red]{name} failed[/red] (exit code {code}); what is done stands: fix it and run make demo again")
            return code
    console.rule(f"{len(commands) + 1}/{len(commands) + 1} serve: python -m serving --port {port}")
    copy_samples(home)
    clock = f"from:{Shop.load(home).data_end.isoformat()}"
    service = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "serving", "--port", str(port)],
        env={**environment, "UBIQUO_CLOCK": clock, "UBIQUO_DEMO_SHOP": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    ui: subprocess.Popen[bytes] | None = None
    try:
        started = time.monotonic()
        wait_until_ready(service, port)
        stages.append(Stage("start the service", time.monotonic() - started))
        tour(port, console)
        console.rule("what each stage took")
        for stage in stages:
            memory = "" if stage.peak_mb is None else f"   peak memory {stage.peak_mb:6.0f} MB"
            console.print(f"{stage.name:24} {stage.seconds:6.1f} s{memory}", highlight=False)
        if tour_only:
            return 0
        ui_port = free_port()
        ui = subprocess.Popen(
            _mlflow_ui(home, ui_port), env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        console.print(
            f"\nOpen [bold]http://127.0.0.1:{port}/console/shop[/bold] and click: what ubiquo makes of it stands beside the shop."
        )
        console.print(
            f"Every page: http://127.0.0.1:{port}/console; MLflow's UI: http://127.0.0.1:{ui_port}. Ctrl-C ends both.", highlight=False
        )
        return service.wait()
    except KeyboardInterrupt:
        console.print("\nending")
        return 0
    finally:
        for process in (ui, service):
            if process is not None:
                end(process)


def copy_samples(home: Home) -> list[Path]:
    """Give a home the samples that it lacks, unless it has one that was written anew; returns those that are new."""
    theirs = {path: home.root / path.name for path in sorted(SAMPLES.glob("*.yaml"), reverse=True)}
    if any(own.exists() and own.read_bytes() != path.read_bytes() for path, own in theirs.items()):
        # they name each other: beside one of the shop's own the others would not be in order
        return []
    # segments first: journeys name them
    return [Path(shutil.copyfile(path, own)) for path, own in theirs.items() if not own.exists()]


def _timed(name: str, command: list[str], environment: dict[str, str]) -> tuple[int, Stage]:
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise SystemExit(130) from None
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, Stage(name, time.monotonic() - started, usage.ru_maxrss / 1024)


def wait_until_ready(service: subprocess.Popen[bytes], port: int) -> None:
    """Return once the service answers.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise RuntimeError(f"the service ended with code {service.returncode}; its output above tells why")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the service did not answer on port {port} within {START_SECONDS} s")


def tour(port: int, console: Console) -> None:
    """Ask, post an event, ask again: the answer changes. Every line can be typed."""
    console.rule("a tour over HTTP")
    base = f"http://127.0.0.1:{port}/v1"
    them = {"identifiers": {"loyalty_card": _someone(base)}}

    def show(path: str, body: dict[str, Any]) -> dict[str, Any]:
        console.print(f"\n[bold]curl {base}/{path} --json '{json.dumps(body)}'[/bold]", highlight=False, soft_wrap=True)
        answer = post(f"{base}/{path}", body)
        console.print(json.dumps(_brief(answer), indent=1), highlight=False, soft_wrap=True)
        return answer

    show("churn", them)
    show("days-to-next-order", them)
    show("next-best-offer", them)
    show("recommendations", {**them, "limit": 3})
    before = show("recommendations", {**them, "listing": "also_like", "limit": 3})
    liked = post(f"{base}/recommendations", {**them, "listing": "also_like", "limit": 60})["items"][-1]["item_id"]
    event = {
        "event_id": f"tour-{uuid.uuid4().hex}", "name": "view_item", "occurred_at": before["as_of"], **them, "channel": "web",
        "items": [{"item_id": liked}],
    }  # fmt: skip
    show("events", event)
    after = show("recommendations", {**them, "listing": "also_like", "limit": 3})
    changed = [i["item_id"] for i in before["items"]] != [i["item_id"] for i in after["items"]]
    console.print(
        f"\nThey looked at {liked}, and the next answer {'changed' if changed else 'kept its order, with other scores'}.", highlight=False
    )
    show("similar-items", {"item_id": liked, "limit": 3})
    show("recommendations", {"identifiers": {"cookie": "never-seen-before"}, "limit": 2})


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON, whatever the status of the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))


def _someone(base: str) -> str:
    """A household that the log knows: the first whose answer is their own."""
    for card in ("1029", *map(str, range(1, 2501))):
        answer = post(f"{base}/recommendations", {"identifiers": {"loyalty_card": card}, "limit": 1})
        if answer.get("fallback") is None and answer.get("items"):
            return card
    return "1"


def _brief(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer without its longest parts, for a screen."""
    return {
        k: [_brief(x) for x in v] if isinstance(v, list) and v and isinstance(v[0], dict) else v
        for k, v in answer.items()
        if k != "reasons"
    }


def _mlflow_ui(home: Home, port: int) -> list[str]:
    from serving.bootstrap import model_settings

    uri = model_settings(home).tracking_uri
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, first asking."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
