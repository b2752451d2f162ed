"""Segment's own libraries and Google's protocol, pointed at ubiquo: what they send arrives, and what is wrong is explained."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import shutil
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene import NEW_YEAR, Service, command, eventually

from features.events.event import Event, RejectedEvent, parse_event
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.sources import ga4, segment
from features.state.home import Home
from features.state.ports import DECISIONS
from features.store.event_log import EventLog, connect
from serving.http.access import scope_of
from training.decisions import joined

ZONE = "America/New_York"
PYTHON_CLIENT = """
import sys, segment.analytics as analytics
from datetime import datetime, timedelta, timezone
analytics.write_key, analytics.host = sys.argv[1], sys.argv[2]
analytics.gzip = sys.argv[3] == "gzip"
failed = []
analytics.on_error = lambda error, items: failed.append(str(error))
tag = sys.argv[4]
analytics.identify(f"user-{tag}", {"email": f"Ada.{tag}@Example.org", "firstName": "Ada", "plan": "gold"}, anonymous_id=f"anon-{tag}")
analytics.track(f"user-{tag}", "Order Completed", {"order_id": f"order-{tag}", "currency": "USD", "products": [
    {"product_id": "1082185", "price": 1.25, "quantity": 2}, {"sku": "1029743", "price": "3.5"}]},
    timestamp=datetime.now(timezone.utc) - timedelta(hours=2))
analytics.track(f"user-{tag}", "Products Searched", {"query": "bananas"})
analytics.page(f"user-{tag}", "Docs", "Home", {"url": "https://shop.example/?email=ada@example.org"})
analytics.screen(f"user-{tag}", "Start")
analytics.group(f"user-{tag}", f"firm-{tag}", {"name": "Firm"})
analytics.alias(f"anon-{tag}", f"user-{tag}")
analytics.track(f"user-{tag}", "Loyalty Level Reached", {"level": 3})
analytics.track(f"user-{tag}", "Product Viewed", {"price": "free of charge", "product_id": "1082185", "quantity": "many"})
analytics.flush()
analytics.shutdown()
print(failed)
"""
NODE_CLIENT = """
const { Analytics } = require('@segment/analytics-node');
const [key, host, tag] = process.argv.slice(2);
const analytics = new Analytics({ writeKey: key, host, flushAt: 5, maxRetries: 1 });
const failed = [];
analytics.on('error', (e) => failed.push(String(e.code) + ' ' + String(e.reason)));
const hour = 3600 * 1000;
analytics.identify({ userId: `user-${tag}`, anonymousId: `anon-${tag}`, traits: { email: `Ada.${tag}@Example.org`, firstName: 'Ada' } });
analytics.track({ userId: `user-${tag}`, event: 'Order Completed', timestamp: new Date(Date.now() - 2 * hour), properties: {
  order_id: `order-${tag}`, currency: 'USD', products: [{ product_id: '1082185', price: 1.25, quantity: 2 }, { sku: '1029743', price: 3.5 }] } });
analytics.track({ userId: `user-${tag}`, event: 'Products Searched', properties: { query: 'bananas' } });
analytics.page({ userId: `user-${tag}`, name: 'Home', properties: { url: 'https://shop.example/?email=ada@example.org' } });
analytics.screen({ userId: `user-${tag}`, name: 'Start' });
analytics.group({ userId: `user-${tag}`, groupId: `firm-${tag}`, traits: { name: 'Firm' } });
analytics.alias({ previousId: `anon-${tag}`, userId: `user-${tag}` });
analytics.track({ userId: `user-${tag}`, event: 'Loyalty Level Reached', properties: { level: 3 } });
analytics.track({ userId: `user-${tag}`, event: 'Product Viewed', properties: { product_id: '1082185', quantity: 'many' } });
analytics.closeAndFlush().then(() => console.log(JSON.stringify(failed)));
"""


@pytest.fixture
def keyed(keyed_service: tuple[Service, dict[str, str]]) -> tuple[Service, str]:
    """A service that asks for keys, and a key that may only send events."""
    service, tokens = keyed_service
    return service, tokens["ingest"]


@pytest.fixture(scope="module")
def python_client(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Segment's library in an environment of its own, as it asks for another dateutil than ubiquo has."""
    folder = tmp_path_factory.mktemp("segment-python")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", *quiet, "segment-analytics-python"], check=True)
    (folder / "client.py").write_text(PYTHON_CLIENT)
    return [str(folder / "bin" / "python"), str(folder / "client.py")]


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed (apt-get install nodejs npm)")
    folder = tmp_path_factory.mktemp("segment-node")
    (folder / "package.json").write_text('{"name": "client", "private": true}')
    done = subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "@segment/analytics-node"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "client.js").write_text(NODE_CLIENT)
    return [node, str(folder / "client.js")]


def stored(home: Home, tag: str) -> list[dict[str, Any]]:
    """What the log holds of the client's user, by name."""
    log, identities = EventLog(home, ZONE), Identities(home)
    key = identities.vault.key("user_id", f"user-{tag}")
    rows = connect().execute(
        """SELECT name, occurred_at, received_at, items, query, to_json(traits)::VARCHAR, channel FROM read_parquet(?)
           WHERE list_contains(list_transform(identifiers, lambda i: i.key || ':' || i.value), ?) ORDER BY received_at""",
        [log.files(), key],
    )
    names = ["name", "occurred_at", "received_at", "items", "query", "traits", "channel"]
    return [dict(zip(names, row, strict=True)) for row in rows.fetchall()]


class LibraryContract:
    """What any of Segment's libraries must see arrive."""

    def check(self, service: Service, tag: str) -> None:
        home = service.home
        eventually(lambda: len(stored(home, tag)) == 8)
        events = {row["name"]: row for row in stored(home, tag)}
        assert set(events) == {"identify", "purchase", "search", "page_view", "screen_view", "alias", "custom"}
        [apples, bread] = events["purchase"]["items"]
        assert (apples["item_id"], apples["quantity"], apples["amount_minor"]) == ("1082185", 2, 250)
        assert (bread["item_id"], bread["quantity"], bread["amount_minor"]) == ("1029743", 1, 350)
        ago = events["purchase"]["received_at"] - events["purchase"]["occurred_at"]
        assert timedelta(hours=2) <= ago < timedelta(hours=2, minutes=1), "the client's clock, eight years ahead, is corrected"
        assert events["search"]["query"] == "bananas"
        assert "Loyalty Level Reached" in events["custom"]["traits"]
        assert "ada@example.org" not in str(events)
        identities = Identities(home)
        known = [{"user_id": f"user-{tag}"}, {"cookie": f"anon-{tag}"}, {"email": f"ada.{tag}@example.org"}, {"receipt": f"order-{tag}"}]
        assert len({identities.resolve(each) for each in known}) == 1  # type: ignore[arg-type]
        customer = identities.resolve({"user_id": f"user-{tag}"})
        assert customer is not None
        held = {c.field: c.value for c in Contacts(home, identities.vault).of(identities.members(customer))}
        assert held["first_name"] == "Ada"
        assert held["group_id"] == f"firm-{tag}"
        letters = [x for x in EventLog(home, ZONE).letters.read() if f"user-{tag}" in x["raw"]]
        assert [(x["source"], x["field"]) for x in letters] == [("segment", "properties.products[0].quantity")]


class TestSegmentForPython(LibraryContract):
    @pytest.mark.parametrize("packing", ["plain", "gzip"])
    def test_the_library_works_unchanged(self, keyed: tuple[Service, str], python_client: list[str], packing: str) -> None:
        service, key = keyed
        tag = uuid.uuid4().hex[:8]
        done = subprocess.run(
            [*python_client, key, f"http://127.0.0.1:{service.port}", packing, tag], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
        self.check(service, tag)

    def test_a_wrong_write_key_is_told_to_the_library(self, keyed: tuple[Service, str], python_client: list[str]) -> None:
        service, _ = keyed
        done = subprocess.run(
            [*python_client, "wrong", f"http://127.0.0.1:{service.port}", "plain", "x"], capture_output=True, text=True, timeout=120
        )
        assert "401" in done.stdout + done.stderr


class TestSegmentForNode(LibraryContract):
    def test_the_library_works_unchanged(self, keyed: tuple[Service, str], node_client: list[str]) -> None:
        service, key = keyed
        tag = uuid.uuid4().hex[:8]
        done = subprocess.run([*node_client, key, f"http://127.0.0.1:{service.port}", tag], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
        self.check(service, tag)


def post(service: Service, key: str, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    basic = base64.b64encode(f"{key}:".encode()).decode()
    return service.post(path, body, authorization=f"Basic {basic}", **headers)


def message(**fields: Any) -> dict[str, Any]:
    at = datetime.now(UTC).isoformat()
    return {"type": "track", "event": "Signed In", "messageId": uuid.uuid4().hex, "userId": "u1", "timestamp": at, "sentAt": at, **fields}


@pytest.mark.parametrize("call", ["identify", "track", "page", "screen", "alias", "group"])
def test_each_call_has_an_endpoint_of_its_own(keyed: tuple[Service, str], call: str) -> None:
    service, key = keyed
    one = message(**({"previousId": "before"} if call == "alias" else {}))
    assert post(service, key, f"/v1/{call}", one) == (200, {"success": True})
    eventually(lambda: one["messageId"] in EventLog(service.home, ZONE).hashes_of([one["messageId"]]))


def test_a_batch_that_can_be_read_is_taken_and_its_bad_messages_become_dead_letters(keyed: tuple[Service, str]) -> None:
    service, key = keyed
    good, nobody, odd = message(), message(userId=None), message(type="tracked")
    body = {"batch": [good, nobody, odd, "text", message(event=None), message(timestamp="yesterday")], "sentAt": good["sentAt"]}
    assert post(service, key, "/v1/batch", body) == (200, {"success": True})
    eventually(lambda: len(letters_of(service, [nobody, odd])) == 2)
    assert letters_of(service, [nobody, odd]) == ["type", "userId"]
    assert post(service, key, "/v1/batch", body)[0] == 200
    eventually(lambda: good["messageId"] in EventLog(service.home, ZONE).hashes_of([good["messageId"]]))


def letters_of(service: Service, messages: list[dict[str, Any]]) -> list[str]:
    names = [m["messageId"] for m in messages]
    return sorted({x["field"] for x in EventLog(service.home, ZONE).letters.read() if any(n in x["raw"] for n in names)})


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/v1/batch", b"{not json", {}),
        ("/v1/batch", {"messages": []}, {}),
        ("/v1/batch", {"batch": [{}] * 2501}, {}),
        ("/v1/batch", b"no gzip at all", {"content-encoding": "gzip"}),
        ("/v1/batch", gzip.compress(b" " * 2_000_000), {"content-encoding": "gzip"}),
        ("/v1/track", b"[]", {}),
        ("/mp/collect", {"events": []}, {}),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(keyed: tuple[Service, str], path: str, body: Any, headers: dict[str, str]) -> None:
    service, key = keyed
    status, problem = post(service, key, path, body, **headers)
    assert status == 400, problem
    assert problem["detail"]


def test_a_message_of_more_than_32_kilobytes_is_a_dead_letter(keyed: tuple[Service, str]) -> None:
    service, key = keyed
    long = message(properties={"text": "x" * 33_000})
    assert post(service, key, "/v1/batch", {"batch": [long]})[0] == 200
    eventually(lambda: letters_of(service, [long]) == ["$"])


def test_googles_measurement_protocol_arrives(keyed: tuple[Service, str]) -> None:
    service, key = keyed
    client = f"client-{uuid.uuid4().hex[:8]}"
    at = int((NEW_YEAR - timedelta(hours=1)).timestamp() * 1e6)
    body = {
        "client_id": client, "timestamp_micros": at, "consent": {"ad_user_data": "DENIED"},
        "events": [
            {"name": "purchase", "params": {"transaction_id": f"r-{client}", "currency": "USD", "value": 3.5,
                                            "items": [{"item_id": "1082185", "price": 1.75, "quantity": 2}]}},
            {"name": "level_up", "params": {"level": 3}},
        ],
    }  # fmt: skip
    for _ in range(2):  # a request that is sent again is the same request
        assert service.post(f"/mp/collect?measurement_id=G-1&api_secret={key}", body)[0] == 204
    identities = Identities(service.home)
    eventually(lambda: (identities.refresh(), identities.resolve({"cookie": client}))[1] is not None)
    log = EventLog(service.home, ZONE)
    cookie = identities.vault.key("cookie", client)
    rows = connect().execute(
        "SELECT name, items, occurred_at FROM read_parquet(?) WHERE source = 'ga4' AND list_contains("
        "list_transform(identifiers, lambda i: i.key || ':' || i.value), ?) ORDER BY name",
        [log.files(), cookie],
    )
    [(custom, _, _), (purchase, [item], occurred_at)] = rows.fetchall()
    assert (custom, purchase) == ("custom", "purchase")
    assert (item["item_id"], item["quantity"], item["amount_minor"]) == ("1082185", 2, 350)
    assert occurred_at == NEW_YEAR - timedelta(hours=1)
    assert service.post("/mp/collect?measurement_id=G-1&api_secret=wrong", body)[0] == 401


def test_what_became_of_a_decision_is_told_by_either_protocol(keyed_service: tuple[Service, dict[str, str]]) -> None:
    """``decision_id`` among the properties of a message, or the params of an event, joins what was chosen to what came of it."""
    service, tokens = keyed_service
    cookie = uuid.uuid4().hex
    asked = {"listing": "similar", "item_ids": ["1082185"], "limit": 4}
    answer = service.post("/v1/recommendations", asked, authorization=f"Bearer {tokens['decide']}")[1]
    decision, items = answer["decision_id"], [item["item_id"] for item in answer["items"]]
    for name, clicked_here, clicked_there in (("decision_id", *items[:2]), ("decisionId", *items[2:])):
        one = message(event="Product Clicked", userId=None, anonymousId=cookie, properties={"product_id": clicked_here, name: decision})
        assert post(service, tokens["ingest"], "/v1/track", one)[0] == 200
        params = {name: decision, "items": [{"item_id": clicked_there}]}
        body = {"client_id": cookie, "events": [{"name": "select_item", "params": params}]}
        assert service.post(f"/mp/collect?measurement_id=G-1&api_secret={tokens['ingest']}", body)[0] == 204
    until = NEW_YEAR + timedelta(days=1)

    def clicked() -> list[str]:
        if not service.home.tables[DECISIONS].files():
            return []
        found = [row for row in joined(service.home, until).rows.to_pylist() if row["decision_id"] == decision]
        return [row["id"] for row in found if row["clicked"]]

    eventually(lambda: clicked() == items)


class TestDeadLetters:
    """What an operator does about them, by command."""

    def test_listed_explained_mended_and_replayed(self, keyed: tuple[Service, str], tmp_path: Path) -> None:
        service, key = keyed
        bad = message(event="Product Viewed", properties={"product_id": "1082185", "price": "dear"})
        post(service, key, "/v1/batch", {"batch": [bad]})
        eventually(lambda: letters_of(service, [bad]) == ["properties.products[0].price"])
        [letter] = [x for x in EventLog(service.home, ZONE).letters.read() if bad["messageId"] in x["raw"]]
        short = letter["letter_id"][:12]
        home = service.home.root
        assert "must be an amount" in command("features", "dead-letters", home=home).stdout
        assert bad["messageId"] in command("features", "dead-letters", "explain", short, home=home).stdout
        again = command("features", "dead-letters", "replay", short, home=home).stdout
        assert "rejected" in again
        mended = json.loads(letter["raw"])
        mended["properties"]["price"] = 1.5
        (tmp_path / "mended.json").write_text(json.dumps(mended))
        clock = {"UBIQUO_CLOCK": f"fixed:{(NEW_YEAR + timedelta(days=1)).isoformat()}"}
        done = command("features", "dead-letters", "replay", short, "--with", str(tmp_path / "mended.json"), home=home, **clock)
        assert "stored" in done.stdout, done.stdout + done.stderr
        log = EventLog(service.home, ZONE)
        assert bad["messageId"] in log.hashes_of([bad["messageId"]])
        assert letters_of(service, [bad]) == []
        assert "0 dead letters begin" in command("features", "dead-letters", "explain", short, home=home).stdout

    def test_they_lie_encrypted(self, keyed: tuple[Service, str]) -> None:
        service, key = keyed
        marked = f"nobody-else-{uuid.uuid4().hex}@example.org"
        bad = message(event="Product Viewed", userId=marked, properties={"product_id": "1", "price": "dear"})
        post(service, key, "/v1/batch", {"batch": [bad]})
        eventually(lambda: letters_of(service, [bad]) != [])
        for path in service.home.root.rglob("*"):
            if path.is_file():
                assert marked.encode() not in path.read_bytes(), path


JSONISH: Any = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    "type",
    "event",
    "userId",
    "anonymousId",
    "messageId",
    "timestamp",
    "sentAt",
    "properties",
    "traits",
    "context",
    "previousId",
    "name",
]


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSONISH)), st.sampled_from(segment.CALLS))
def test_whatever_a_message_holds_it_becomes_an_event_or_is_rejected(drawn: dict[str, Any], call: str) -> None:
    for said in (drawn, {**drawn, "type": call, "userId": "u"}):
        with contextlib.suppress(RejectedEvent):
            event = segment.to_event(said, NEW_YEAR, "USD")
            assert isinstance(parse_event(event, NEW_YEAR, "USD"), Event)


@given(st.fixed_dictionaries({"event": JSONISH}, optional=dict.fromkeys(("client_id", "user_id", "timestamp_micros", "consent"), JSONISH)))
def test_whatever_google_sends_likewise(drawn: dict[str, Any]) -> None:
    for said in (drawn, {**drawn, "client_id": "c", "event": {"name": "purchase", "params": drawn["event"]}}):
        with contextlib.suppress(RejectedEvent):
            assert isinstance(parse_event(ga4.to_event(said, NEW_YEAR, "USD"), NEW_YEAR, "USD"), Event)


@given(st.timedeltas(timedelta(days=-4000), timedelta(days=4000)), st.timedeltas(timedelta(0), timedelta(days=300)))
def test_a_clients_clock_may_stand_anywhere(skew: timedelta, ago: timedelta) -> None:
    sent = NEW_YEAR + skew
    said = {"timestamp": (sent - ago).isoformat(), "sentAt": sent.isoformat()}
    assert segment.occurred_at(said, NEW_YEAR) == NEW_YEAR - ago


def test_sending_events_opens_nothing_else() -> None:
    assert {scope_of(path, "POST") for path in ("/v1/batch", "/v1/identify", "/mp/collect", "/v1/events", "/bento/events")} == {"ingest"}
