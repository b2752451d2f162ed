"""Who may ask what: keys with scopes, hashed at rest; an audit log of customers read and erased; no identifier where it does not belong."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from scene import NEW_YEAR, SECRET, Pages, Service, command, customer, headers_of, loyalty_cards

from features.people.vault import Vault
from features.state.home import Home
from features.state.settings import SettingError
from serving.http.access import AccessControl
from serving.http.asgi import Parted, application
from serving.http.browser import cors_origins
from serving.http.service import Ubiquo
from serving.privacy.keys import Audit, Keys

BY_SCOPE: dict[str, list[tuple[str, str]]] = {
    "ingest": [("POST", "/v1/events"), ("POST", "/v1/batch"), ("POST", "/v1/identify"), ("POST", "/mp/collect"), ("POST", "/bento/events")],
    "decide": [("POST", "/v1/recommendations"), ("POST", "/v1/similar-items"), ("POST", "/v1/next-best-offer"), ("POST", "/v1/churn"),
               ("POST", "/bento/churn"), ("GET", "/metrics")],
    "read_customer": [("POST", "/v1/profile"), ("GET", "/v1/customers/nobody"), ("GET", "/v1/customers/nobody/export")],
    "manage": [("GET", "/v1/rules"), ("POST", "/v1/rules"), ("DELETE", "/v1/rules/none")],
    "admin": [("DELETE", "/v1/customers/nobody"), ("GET", "/v1/erasures/none")],
}  # fmt: skip
OF_PAGES = ("/v1/events", "/v1/batch", "/v1/identify", "/v1/recommendations", "/v1/similar-items")


@pytest.fixture
def keyed(keyed_service: tuple[Service, dict[str, str]]) -> tuple[Service, dict[str, str]]:
    return keyed_service


def call(service: Service, method: str, path: str, token: str, **headers: str) -> int:
    headers = {"authorization": f"Bearer {token}"} if token and not headers else headers
    if method == "POST":
        return service.post(path, {"request": {}} if path.startswith("/bento") else {}, **headers)[0]
    return service.get(path, method, **headers)[0]


@pytest.mark.parametrize("scope", list(BY_SCOPE))
def test_a_key_opens_what_its_scope_says_and_nothing_else(keyed: tuple[Service, dict[str, str]], scope: str) -> None:
    service, tokens = keyed
    for method, path in BY_SCOPE[scope]:
        assert call(service, method, path, "") == 401, path
        assert call(service, method, path, "ubq_wrong") == 401, path
        for held, token in tokens.items():
            status = call(service, method, path, token)
            # what a page's key opens of these is a part only: test_web.py
            allowed = held in (scope, "admin") or (held == "browser" and path in OF_PAGES)
            assert (status == 403) != allowed, (held, path, status)
            assert status != 401


def test_a_key_comes_as_bearer_as_a_write_key_or_in_googles_query(keyed: tuple[Service, dict[str, str]]) -> None:
    service, tokens = keyed
    basic = base64.b64encode(f"{tokens['ingest']}:".encode()).decode()
    assert call(service, "POST", "/v1/batch", "", authorization=f"Basic {basic}") == 400
    assert service.post(f"/mp/collect?api_secret={tokens['ingest']}", {})[0] == 400
    assert service.post(f"/v1/churn?api_secret={tokens['decide']}", {})[0] == 401, "a key in an address is in every log between"
    assert call(service, "POST", "/v1/batch", "", authorization="Basic not-base64") == 401


def test_a_key_is_nowhere_in_clear_and_a_revoked_one_opens_nothing(keyed: tuple[Service, dict[str, str]]) -> None:
    service, tokens = keyed
    for path in (service.home.root / "access.db", service.home.root / "access.db-wal"):
        if path.exists():
            assert not any(token.encode() in path.read_bytes() for token in tokens.values())
    home = service.home.root
    made = command("serving", "keys", "create", "short-lived", "--scope", "decide", home=home)
    token = made.stdout.strip()
    assert Keys(service.home).check(token) is not None
    assert "short-lived" in command("serving", "keys", "list", home=home).stdout
    assert command("serving", "keys", "create", "short-lived", "--scope", "decide", home=home).returncode == 1
    assert command("serving", "keys", "create", "other", "--scope", "everything", home=home).returncode == 1
    assert "revoked" in command("serving", "keys", "revoke", "short-lived", home=home).stdout
    assert Keys(service.home).check(token) is None
    assert command("serving", "keys", "revoke", "short-lived", home=home).returncode == 1


def test_a_shop_that_revokes_its_last_key_has_not_opened_its_doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UBIQUO_API_KEY", raising=False)
    monkeypatch.setenv("UBIQUO_LOOPBACK", "1")
    home = Home(tmp_path)
    assert Keys(home).check("") is not None, "on loopback, before the first key"
    token = Keys(home).create("only", ["decide"], NEW_YEAR)
    Keys(home).revoke("only", NEW_YEAR)
    assert Keys(home).check("") is None
    assert Keys(home).check(token) is None
    home.access.write_bytes(b"")
    assert Keys(home).check("") is None, "an emptied file opens no doors"
    monkeypatch.setenv("UBIQUO_LOOPBACK", "0")
    assert Keys(Home(tmp_path / "new")).check("") is None


def test_customers_read_and_erased_are_written_down_as_keyed_hashes(keyed: tuple[Service, dict[str, str]]) -> None:
    service, tokens = keyed
    admin = {"authorization": f"Bearer {tokens['admin']}"}
    name = uuid.uuid4().hex
    at = (NEW_YEAR - timedelta(hours=1)).isoformat()
    event = {"event_id": name, "name": "login", "occurred_at": at, "identifiers": {"loyalty_card": name}}
    assert service.post("/v1/events", event, **admin)[1]["accepted"] == 1
    status, view = service.post("/v1/profile", {"identifiers": {"loyalty_card": name}}, authorization=f"Bearer {tokens['read_customer']}")
    assert status == 200
    her = view["customer_id"]
    assert service.get(f"/v1/customers/{her}/export", **admin)[0] == 200
    assert service.get(f"/v1/customers/{her}", "DELETE", **admin)[0] in (200, 202)
    lines = Audit(service.home, Vault(SECRET.encode())).lines(her)
    assert [line["action"] for line in lines] == ["read", "export", "erase"]
    assert lines[0]["key"] == "read_customer-key"
    assert {line["outcome"] for line in lines} == {"done"}
    assert her.encode() not in (service.home.root / "access.db").read_bytes()
    assert call(service, "GET", f"/v1/customers/{'c_0123456789abcdef'}", tokens["admin"]) == 404
    assert Audit(service.home, Vault(SECRET.encode())).lines("c_0123456789abcdef")[-1]["outcome"] == "unknown"


def test_rules_made_listed_and_ended_are_written_down_with_the_key_and_the_outcome(keyed: tuple[Service, dict[str, str]]) -> None:
    service, tokens = keyed
    manage = {"authorization": f"Bearer {tokens['manage']}"}
    before = len(Audit(service.home, Vault(SECRET.encode())).lines())
    [item] = service.post("/v1/recommendations", {"limit": 1}, authorization=f"Bearer {tokens['decide']}")[1]["items"]
    status, made = service.post("/v1/rules", {"action": "block", "item_ids": [item["item_id"]]}, **manage)
    assert (status, made["made_by"]) == (200, "manage-key")
    assert service.post("/v1/rules", {"action": "block", "item_ids": ["nothing"]}, **manage)[0] == 400
    assert service.get("/v1/rules", **manage)[0] == 200
    assert service.get(f"/v1/rules/{made['rule_id']}", "DELETE", **manage)[0] == 200
    assert service.get("/v1/rules/ada@example.org", "DELETE", **manage)[0] == 404
    lines = Audit(service.home, Vault(SECRET.encode())).lines()[before:]
    assert [(line["action"], line["subject"], line["outcome"]) for line in lines] == [
        ("add rule", made["rule_id"], "done"), ("add rule", "", "refused"), ("list rules", "", "done"),
        ("end rule", made["rule_id"], "done"), ("end rule", "", "refused"),
    ]  # fmt: skip
    assert {line["key"] for line in lines} == {"manage-key"}


MARK = "zz-marked"
BAD: list[tuple[str, Any]] = [
    ("/v1/events", {"event_id": "x", "name": "login", "identifiers": {"email": f"{MARK} at home"}, "occurred_at": "2018-01-01T00:00:00Z"}),
    ("/v1/events", {"event_id": "x", "name": "login", "identifiers": {"phone": MARK}, "occurred_at": "2018-01-01T00:00:00Z"}),
    ("/v1/events", {"event_id": "x", "name": "login", "identifiers": {MARK: "x"}, "occurred_at": "2018-01-01T00:00:00Z"}),
    ("/v1/events", {"event_id": "x", "name": "login", "identifiers": [MARK], "occurred_at": "2018-01-01T00:00:00Z"}),
    ("/v1/events", {"event_id": "x", "name": "identify", "identifiers": {"cookie": "c"}, "traits": {"name": [MARK]}, "occurred_at": "2018-01-01"}),
    ("/v1/recommendations", {"identifiers": {"email": MARK}}),
    ("/v1/recommendations", {"customer_id": MARK, "identifiers": {"email": "a@shop.org"}}),
    ("/v1/profile", {"customer_id": MARK}),
    ("/v1/profile", {"identifiers": {"phone": MARK}}),
    (f"/v1/customers/{MARK}", {}),
    (f"/v1/{MARK}", {}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), BAD)
def test_no_mistake_is_answered_with_an_identifier(keyed: tuple[Service, dict[str, str]], path: str, body: Any) -> None:
    service, tokens = keyed
    status, problem = service.post(path, body, authorization=f"Bearer {tokens['admin']}")
    assert 400 <= status < 500, problem
    assert MARK not in json.dumps(problem)


def test_the_decision_log_repeats_nothing_that_names_a_customer(keyed: tuple[Service, dict[str, str]]) -> None:
    service, tokens = keyed
    decide = {"authorization": f"Bearer {tokens['decide']}"}
    status, answer = service.post("/v1/recommendations", {"customer_id": f"{MARK}@shop.org"}, **decide)
    assert (status, answer["field"]) == (400, "customer_id"), "an address is no id"
    assert MARK not in str(answer)
    status, answer = service.post("/v1/recommendations", {"identifiers": {"email": f"{MARK}@shop.org"}}, **decide)
    assert (status, answer["customer_id"]) == (200, None)
    time.sleep(2.5)
    for path in (service.home.root / "decisions").rglob("*"):
        if path.is_file():
            text = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.read_bytes().decode("latin-1")
            assert MARK not in text, path


def test_neither_logs_nor_metrics_name_a_customer(keyed: tuple[Service, dict[str, str]]) -> None:
    service, tokens = keyed
    admin = {"authorization": f"Bearer {tokens['admin']}"}
    card = loyalty_cards(service.home)[11]
    service.get(f"/v1/customers/{customer(card)}", **admin)
    service.post("/v1/profile", {"identifiers": {"email": f"{MARK}@shop.org"}}, **admin)
    metrics = service.get("/metrics", **admin)[1]
    log = (service.home.root / f"service-{service.port}.log").read_text()
    for text in (metrics, log):
        assert customer(card) not in text
        assert MARK not in text
    assert 'route="customers"' in metrics


def test_beyond_loopback_a_key_is_asked_for(trained: Home, tmp_path: Path) -> None:
    done = command("serving", "--host", "0.0.0.0", home=tmp_path)
    assert done.returncode == 1
    assert "python -m serving keys create" in done.stdout


class TestGates:
    """BentoML's own server stands behind the inner gate alone, ``python -m serving`` behind both: each request is checked, and once."""

    @pytest.mark.parametrize("path", ["/v1/churn", "/bento/churn", "//v1/churn", "/metrics", "/", "/docs.json", "/mp/collect", "/V1/churn"])
    @pytest.mark.parametrize("outer", [True, False])
    def test_nothing_is_reached_without_a_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, outer: bool) -> None:
        application = self.application(tmp_path, monkeypatch, outer)
        assert asked(application, path)[0] == 401
        assert asked(application, path, "Bearer wrong")[0] == 401
        assert asked(application, path, f"Bearer {SECRET}")[0] not in (401, 403)

    @pytest.mark.parametrize("outer", [True, False])
    def test_a_request_counts_once_whatever_stands_before_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: bool) -> None:
        monkeypatch.setenv("UBIQUO_RATE_LIMIT", "3/hour")
        application = self.application(tmp_path, monkeypatch, outer)
        told = [asked(application, path, f"Bearer {SECRET}")[0] for path in ("/v1/churn", "/bento/churn", "/v1/churn", "/v1/churn")]
        assert 429 not in told[:3]
        assert told[3] == 429

    def test_our_own_surface_does_not_pass_through_bentoml(self) -> None:
        reached = []

        async def bento(scope: Any, receive: Any, send: Any) -> None:
            reached.append(scope["path"])

        for path in ("/v1/churn", "/openapi.json", "/mp/collect", "/metrics"):
            assert asked(Parted(bento), path)[0] == 503, "it is starting"
        assert not reached
        for path in ("/bento/churn", "/", "/v1", "//v1/churn", "/docs.json"):
            asked(Parted(bento), path)
        assert reached == ["/bento/churn", "/", "/v1", "//v1/churn", "/docs.json"]

    @staticmethod
    def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: bool) -> Any:
        monkeypatch.setenv("UBIQUO_HOME", str(tmp_path))
        monkeypatch.setenv("UBIQUO_API_KEY", SECRET)
        bento = Ubiquo.to_asgi()  # type: ignore[attr-defined]
        return AccessControl(Parted(bento)) if outer else bento


def asked(application: Any, path: str, authorization: str = "") -> tuple[int, bytes]:
    """The status and body that an ASGI application answers POST *path* with; 0 where it says nothing."""
    headers = [(b"host", b"shop"), (b"content-type", b"application/json"), (b"content-length", b"2")]
    headers += [(b"authorization", authorization.encode())] if authorization else []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path, "state": {},
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    sent: list[dict[str, Any]] = []
    body = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> dict[str, Any]:
        return body.pop() if body else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(application(scope, receive, send))
    return (sent[0]["status"], sent[-1].get("body", b"")) if sent else (0, b"")


class TestOrigins:
    def test_a_preflight_is_answered_without_a_key_for_the_shops_own_pages(
        self, keyed: tuple[Service, dict[str, str]], pages: Pages
    ) -> None:
        for path in ("/v1/events", "/v1/t", "/v1/recommendations", "/v1/similar-items"):
            status, headers = preflight(keyed[0], path, pages.origin)
            assert (status, headers["access-control-allow-origin"]) == (200, pages.origin)
            assert "Origin" in headers["vary"]
            assert "access-control-allow-credentials" not in headers
            assert "Authorization" in headers["access-control-allow-headers"]
            for origin in ("https://evil.example", pages.origin + "0", "null"):
                status, headers = preflight(keyed[0], path, origin)
                assert status == 400
                assert "access-control-allow-origin" not in headers

    def test_what_a_page_may_not_call_has_no_preflight(self, keyed: tuple[Service, dict[str, str]], pages: Pages) -> None:
        for path in (
            "/v1/churn",
            "/v1/next-best-offer",
            "/v1/profile",
            "/v1/customers/c_1",
            "/metrics",
            "/mp/collect",
            "/bento/events",
            "/v1/import",
        ):
            status, headers = preflight(keyed[0], path, pages.origin)
            assert status == 401
            assert "access-control-allow-origin" not in headers

    def test_a_refusal_too_can_be_read_by_the_page(self, keyed: tuple[Service, dict[str, str]], pages: Pages) -> None:
        status, headers = headers_of(keyed[0], "POST", "/v1/recommendations", {"origin": pages.origin, "authorization": "Bearer wrong"})
        assert (status, headers["access-control-allow-origin"], headers["vary"]) == (401, pages.origin, "Origin")
        assert (
            "access-control-allow-origin" not in headers_of(keyed[0], "POST", "/v1/recommendations", {"origin": "https://evil.example"})[1]
        )

    @pytest.mark.parametrize(
        "origin", ["*", "https://*.example", "shop.example", "https://shop.example/", "https://Shop.example", "null", "https://a b"]
    )
    def test_what_is_no_exact_origin_is_told_at_the_start(self, origin: str) -> None:
        with pytest.raises(SettingError, match="UBIQUO_CORS_ORIGINS names"):
            cors_origins(f"https://good.example, {origin}")

    def test_exact_origins_are_taken(self) -> None:
        assert cors_origins("https://shop.example, http://localhost:8080,http://[::1]:3000,") == (
            "https://shop.example", "http://localhost:8080", "http://[::1]:3000",
        )  # fmt: skip
        assert cors_origins("") == ()

    def test_a_wrong_setting_is_told_at_the_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UBIQUO_HOME", str(tmp_path))
        for variable, wrong in (("UBIQUO_CORS_ORIGINS", "*"), ("UBIQUO_TRUSTED_PROXIES", "0.0.0.0/0"), ("UBIQUO_TRUSTED_PROXIES", "10.0.0.1/8"),
                                ("UBIQUO_BROWSER_RATE_LIMIT", "often")):  # fmt: skip
            monkeypatch.setenv(variable, wrong)
            with pytest.raises(SettingError, match=variable):
                AccessControl(application)
            monkeypatch.delenv(variable)


def preflight(service: Service, path: str, origin: str) -> tuple[int, dict[str, str]]:
    asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return headers_of(service, "OPTIONS", path, asked)


class TestRates:
    """At the gate alone, in front of a service that is still starting."""

    @pytest.fixture
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
        monkeypatch.setenv("UBIQUO_HOME", str(tmp_path))
        monkeypatch.setenv("UBIQUO_BROWSER_RATE_LIMIT", "3/hour")
        monkeypatch.delenv("UBIQUO_API_KEY", raising=False)
        return Home(tmp_path)

    def test_one_address_asks_so_often_and_is_told_when_to_come_again(self, home: Home) -> None:
        gate, key = AccessControl(application), Keys(home).create("page", ["browser"], NEW_YEAR)
        other = Keys(home).create("shop", ["decide"], NEW_YEAR)
        told = [called(gate, key, "198.51.100.7") for _ in range(4)]
        assert [status for status, _ in told] == [503, 503, 503, 429], "it is starting"
        assert 3_000 < int(told[-1][1]["retry-after"]) <= 3_600
        assert called(gate, key, "198.51.100.8")[0] == 503, "another address is not held up"
        assert called(gate, other, "198.51.100.7")[0] == 503, "nor is a server"
        assert called(gate, key, "198.51.100.8", b" " * 9_000)[0] == 429, "large bodies count for several"

    def test_a_provider_gives_one_customer_many_addresses(self, home: Home) -> None:
        gate, key = AccessControl(application), Keys(home).create("page", ["browser"], NEW_YEAR)
        assert [called(gate, key, f"2001:db8:1:2::{n}")[0] for n in range(4)] == [503, 503, 503, 429]
        assert called(gate, key, "2001:db8:1:3::1")[0] == 503

    @pytest.mark.parametrize(("trusted", "held_up"), [("", True), ("10.0.0.0/8", False), ("192.0.2.1", True)])
    def test_who_asks_behind_a_proxy_is_believed_of_a_trusted_one_only(
        self, home: Home, monkeypatch: pytest.MonkeyPatch, trusted: str, held_up: bool
    ) -> None:
        monkeypatch.setenv("UBIQUO_TRUSTED_PROXIES", trusted)
        gate, key = AccessControl(application), Keys(home).create("page", ["browser"], NEW_YEAR)
        told = [called(gate, key, "10.0.0.7", forwarded=f"203.0.113.{n}")[0] for n in range(6)]
        assert (429 in told) == held_up
        # who stands behind the proxy may claim to be anybody, and is known by what the proxy adds
        lies = [called(gate, key, "10.0.0.7", forwarded=f"198.51.100.{n}, 203.0.113.99")[0] for n in range(6)]
        assert 429 in lies

    def test_the_key_as_a_whole_has_its_own_rate(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UBIQUO_RATE_LIMIT", "2/hour")
        gate, key = AccessControl(application), Keys(home).create("page", ["browser"], NEW_YEAR)
        assert [called(gate, key, f"198.51.100.{n}")[0] for n in range(3)] == [503, 503, 429]


def called(gate: AccessControl, key: str, address: str, body: bytes = b"{}", forwarded: str = "") -> tuple[int, dict[str, str]]:
    """What the gate answers to a question of a page from this address."""
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())]
    headers += [(b"x-forwarded-for", forwarded.encode())] if forwarded else []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/similar-items",
        "query_string": b"",
        "headers": headers,
        "client": (address, 1),
        "scheme": "http",
    }
    told: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        told.append(message)

    asyncio.run(gate(scope, receive, send))
    return told[0]["status"], {name.decode(): value.decode() for name, value in told[0]["headers"]}
