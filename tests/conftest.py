"""Shared fixtures, and the rule that CI skips nothing unforeseen."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import scene
from hypothesis import HealthCheck, settings
from lakes import Lake, await_port, lake_environment
from playwright.sync_api import Browser, sync_playwright
from postgres import PostgresCluster, programs
from scene import NEW_YEAR, ROOT, SECRET, SMALL_CUT, Pages, Service, TinyShop, command, copy_home, free_port, start_service, stop_service
from warm import Forge

from features.catalogue.shop import Shop
from features.catalogue.tables import ITEM_CONTEXT, ITEMS, OFFERS, Catalogue
from features.state.home import Home, configure_process
from features.state.postgres_server import server_at
from features.state.settings import Settings
from serving.privacy.keys import SCOPES, Keys

configure_process()
# how fast a machine draws and checks says nothing of the code
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
os.environ["UBIQUO_SECRET"] = SECRET
# a sandbox may allow no mounts, whoever one is in it
ALLOWED_SKIPS_IN_CI: tuple[str, ...] = ("does not lie beside this checkout", "this machine lets us mount nothing")


LONG = (
    "test_serving", "test_determinism", "test_import", "test_disk", "test_simulator", "test_contact", "test_promotion",
    "test_erasure", "test_console", "test_web", "test_log", "test_training", "test_stories", "test_policy", "test_offer_stories",
    "test_intake", "test_attack", "test_moved", "test_notebooks", "test_journeys", "test_trackers",
)  # fmt: skip
"""What takes long comes first, so that no worker is left with it alone at the end; see ``--durations=0``.

The first makes the trained home, which takes two minutes of one worker: the four that follow it need none, and are the other's meanwhile.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if os.environ.get("CI") and not any(allowed in reason for allowed in ALLOWED_SKIPS_IN_CI):
            terminalreporter.write_line(f"a skip that CI does not allow: {report.nodeid}: {reason}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None:
        reasons = [str(r.longrepr) for r in reporter.stats.get("skipped", [])]
        if any(not any(allowed in reason for allowed in ALLOWED_SKIPS_IN_CI) for reason in reasons):
            session.exitstatus = 1


@pytest.fixture(autouse=True, scope="session")
def forge() -> Iterator[None]:
    """Commands and services are forked from one process a worker, which begins to import now."""
    scene.forge = Forge()
    yield
    scene.forge.close()
    scene.forge = None


@pytest.fixture(autouse=True)
def registry_of_the_home() -> Iterator[None]:
    """MLflow leaves in the environment which registry it spoke to last; the next test's home has one of its own."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    if before is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def no_loop_of_the_browser(request: pytest.FixtureRequest) -> Iterator[None]:
    """Playwright marks its event loop as running between its calls; a test that opens no page may start a loop of its own."""
    if "browser" in request.fixturenames:
        yield
        return
    before = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(before)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyShop:
    home = Home(tmp_path / "home")
    shop = Shop(
        name="tiny", timezone="America/New_York", currency="USD", data_end=NEW_YEAR, private_brands=("Private",),
        broad_campaign_types=("A",),
    )  # fmt: skip
    shop.save(home)
    items = [
        {"item_id": f"i{k}", "department": f"D{k % 2}", "category": f"C{k % 3}", "type": f"T{k}", "brand": "Private" if k == 1 else "N",
         "manufacturer": "M", "size": "1", "recommendable": k != 9}
        for k in range(10)
    ]  # fmt: skip
    offers = [
        {"offer_id": f"c{c}-{k}", "campaign_id": f"c{c}", "campaign_type": "AB"[c % 2], "channel": "mail",
         "valid_from": NEW_YEAR - timedelta(days=60), "valid_until": NEW_YEAR + timedelta(days=30), "item_ids": [f"i{k}", f"i{k + 1}"]}
        for c in range(3) for k in range(3)
    ]  # fmt: skip
    catalogue = Catalogue(home)
    catalogue.save("items", pa.Table.from_pylist(items), ITEMS)
    catalogue.save("offers", pa.Table.from_pylist(offers, OFFERS), OFFERS)
    catalogue.save("item_context", ITEM_CONTEXT.empty_table(), ITEM_CONTEXT)
    return TinyShop(home, shop)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The small cut of the real data, imported, materialized and trained by the commands of the README."""
    # one that was made before by these very commands saves two minutes while a test is being written
    given = os.environ.get("UBIQUO_TEST_HOME")
    made = Home(Path(given)) if given else _made_once(tmp_path_factory.getbasetemp())
    return copy_home(made, tmp_path_factory.mktemp("trained") / "home")


def _made_once(folder: Path) -> Home:
    """The home of which each of the workers that share the tests takes a copy."""
    shared = Home(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)
    home = Home(shared.root / "made")
    with shared.lease.hold("made"):
        if not (home.root / "complete").exists():
            for arguments in (
                ("features", "import", "complete-journey", "--households", str(SMALL_CUT)),
                ("features", "materialize"),
                ("training", "all"),
            ):
                done = command(*arguments, home=home.root, fresh=True, timeout=1800)
                assert done.returncode == 0, done.stdout + done.stderr
            (home.root / "complete").touch()
    return home


@pytest.fixture(scope="session")
def service(trained: Home) -> Iterator[Service]:
    running = start_service(trained, fresh=True)
    yield running
    stop_service(running)


@pytest.fixture(scope="session")
def own_service(trained: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service on a copy of the trained home, for tests that change what it holds."""
    home = copy_home(trained, tmp_path_factory.mktemp("own") / "home")
    running = start_service(home, UBIQUO_DEMO_SHOP="1")
    yield running
    stop_service(running)


@pytest.fixture(scope="session")
def far_service(
    trained: Home, postgres: PostgresCluster, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, dict[str, str]]]:
    """As ``own_service``, with its state in PostgreSQL and Redis, and the variables that say so."""
    home = copy_home(trained, tmp_path_factory.mktemp("far") / "home")
    url = postgres.new_database()
    done = command("serving", "migrate", "--to", url, home=home.root)
    assert done.returncode == 0, done.stdout + done.stderr
    servers = {"UBIQUO_DATABASE": url, "UBIQUO_REDIS": redis_url}
    done = command("features", "materialize", home=home.root, **servers)
    assert done.returncode == 0, done.stdout + done.stderr
    home = Home(home.root, Settings(database=url, redis=redis_url, home=str(home.root), secret=SECRET))
    running = start_service(home, UBIQUO_DEMO_SHOP="1", **servers)
    yield running, servers
    stop_service(running)
    server_at.cache_clear()
    postgres.give_back(url)


@pytest.fixture(scope="session")
def pages() -> Iterator[Pages]:
    """The web server of a shop whose pages may call ``keyed_service``."""
    served = Pages()
    yield served
    served.close()


@pytest.fixture(scope="session")
def keyed_service(trained: Home, pages: Pages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, str]]]:
    """A service on a home of its own that asks for keys, and one key a scope."""
    home = copy_home(trained, tmp_path_factory.mktemp("keyed") / "home")
    tokens = {scope: Keys(home).create(f"{scope}-key", [scope], NEW_YEAR) for scope in SCOPES}
    running = start_service(home, UBIQUO_CORS_ORIGINS=pages.origin)
    yield running, tokens
    stop_service(running)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium of the system, driven by Playwright; a test opens a page of its own in it."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core, which finds what keeps people out of a page."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed (apt-get install npm)")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run([npm, "install", "--silent", "--no-audit", "--no-fund", "axe-core@4"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """An S3 server of this machine; ``lake`` gives a test a bucket of its own in it."""
    port = free_port()
    line = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "s3_server.py"), str(port)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def lake(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """An empty bucket, to which this process and the commands that it starts have the keys; ``UBIQUO_LAKE`` is for the test to set."""
    for name, value in lake_environment(s3_url).items():
        monkeypatch.setenv(name, value)
    return Lake.made(s3_url)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    """A server of the worker's own."""
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    cluster = PostgresCluster(folder)
    yield cluster
    cluster.stop()


@pytest.fixture
def postgres_url(postgres: PostgresCluster) -> Iterator[str]:
    """A database of the test's own."""
    url = postgres.new_database()
    yield url
    server_at.cache_clear()
    postgres.give_back(url)
