"""The description of the HTTP surface: its examples are sent and answered as it says, and the page that shows it needs nobody else."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from playwright.sync_api import Browser
from scene import NEW_YEAR, Service, eventually, headers_of

from features.events.event import EVENT_NAMES
from features.state.home import Home
from features.store.event_log import EventLog
from serving.bootstrap import model_settings
from serving.http.access import OPEN_PATHS
from serving.http.openapi import document


@pytest.fixture(scope="module")
def described(keyed_service: tuple[Service, dict[str, str]]) -> dict[str, Any]:
    return dict(json.loads(keyed_service[0].get("/openapi.json")[1]))


@pytest.fixture(scope="module")
def admin(keyed_service: tuple[Service, dict[str, str]]) -> dict[str, str]:
    return {"authorization": f"Bearer {keyed_service[1]['admin']}"}


def check(described: dict[str, Any], schema: Any, value: Any) -> None:
    """That a value is of a shape of the description."""
    validator = Draft202012Validator({**schema, "components": described["components"]}, format_checker=Draft202012Validator.FORMAT_CHECKER)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)] == []


def test_what_is_of_another_shape_is_told(described: dict[str, Any]) -> None:
    asked = {"$ref": "#/components/schemas/RecommendationsRequest"}
    for wrong in ({"colour": "red"}, {"limit": 101}, {"identifiers": {"e-mail": "a@b.c"}}, {"item_ids": "1"}):
        with pytest.raises(AssertionError):
            check(described, asked, wrong)
    answer = described["paths"]["/v1/churn"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
    with pytest.raises(AssertionError):
        check(described, {"$ref": "#/components/schemas/ScoreAnswer"}, {**answer, "as_of": "yesterday"})


def operations(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, found in described["paths"].items():
        yield from ((path, method, operation) for method, operation in found.items() if method != "parameters")


def answers(operation: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each answer with its status and kind."""
    for status, answer in operation["responses"].items():
        yield from ((status, kind, content) for kind, content in answer.get("content", {}).items())


def test_every_example_is_of_the_shape_that_is_described(described: dict[str, Any]) -> None:
    Draft202012Validator.check_schema({"$defs": described["components"]["schemas"]})
    for path, method, operation in operations(described):
        if method == "post":
            said = operation["requestBody"]["content"]["application/json"]
            assert said["examples"], path
            for example in said["examples"].values():
                assert example["summary"]
                check(described, said["schema"], example["value"])
        for status, _, content in answers(operation):
            assert "example" in content, (method, path, status)
            check(described, content["schema"], content["example"])


def test_the_examples_are_answered_as_described(
    described: dict[str, Any], keyed_service: tuple[Service, dict[str, str]], admin: dict[str, str]
) -> None:
    service, tokens = keyed_service
    for path, method, operation in operations(described):
        if method != "post":
            continue
        good = {status: content for status, _, content in answers(operation) if status < "202"}
        for name, example in operation["requestBody"]["content"]["application/json"]["examples"].items():
            # the measurement protocol has its key in the query
            asked = f"{path}?api_secret={tokens['ingest']}" if path == "/mp/collect" else path
            status, answer = service.post(asked, example["value"], **({} if path == "/mp/collect" else admin))
            assert str(status) in operation["responses"], (path, name, answer)
            assert status < 300, (path, name, answer)
            if str(status) in good:
                check(described, good[str(status)]["schema"], answer)
            if path == "/v1/events":
                assert answer["rejected"] == answer["erased"] == 0, answer


def test_the_examples_of_trackers_mean_something(described: dict[str, Any], keyed_service: tuple[Service, dict[str, str]]) -> None:
    """A body that can be read is answered with success, whatever it holds; what means nothing would be a dead letter."""
    service, _ = keyed_service
    names = {m for m in re.findall(r'"messageId": "(ajs-[0-9])"', json.dumps(described)) if m}
    assert len(names) == 8
    log = EventLog(service.home, "America/New_York")
    eventually(lambda: set(log.hashes_of(sorted(names))) == names)


def test_what_is_done_to_one_customer_is_answered_as_described(
    described: dict[str, Any], keyed_service: tuple[Service, dict[str, str]], admin: dict[str, str]
) -> None:
    service, tokens = keyed_service
    event = {
        "event_id": uuid.uuid4().hex,
        "name": "login",
        "occurred_at": NEW_YEAR.isoformat(),
        "identifiers": {"cookie": uuid.uuid4().hex},
    }
    customer = service.post("/v1/events", event, **admin)[1]["events"][0]["customer_id"]
    receipt = ""
    for path, method in (
        ("/v1/customers/{customer_id}", "get"), ("/v1/customers/{customer_id}/export", "get"), ("/v1/customers/{customer_id}", "delete"),
        ("/v1/erasures/{receipt_id}", "get"), ("/v1/results/{result_id}", "get"), ("/v1/projects/{key}/settings", "get"),
    ):  # fmt: skip
        told = {"customer_id": customer, "receipt_id": receipt, "result_id": "none", "key": tokens["browser"]}
        status, text = service.get(path.format(**told), method.upper(), **admin)
        [(kind, content)] = described["paths"][path][method]["responses"][str(status)]["content"].items()
        for line in text.splitlines() if kind == "application/x-ndjson" else [text]:
            check(described, content["schema"], json.loads(line))
        assert status == (404 if "result_id" in path else status if method == "delete" or "receipt_id" in path else 200)
        receipt = json.loads(text).get("receipt_id", receipt) if method == "delete" else receipt
    assert receipt


def test_mistakes_are_answered_as_described(
    described: dict[str, Any], keyed_service: tuple[Service, dict[str, str]], admin: dict[str, str]
) -> None:
    service, _ = keyed_service
    for status, path, body, headers in (
        (400, "/v1/recommendations", {"limit": 101}, admin), (401, "/v1/recommendations", {}, {}), (413, "/v1/events", b" " * 1_000_001, admin),
        (415, "/v1/recommendations", {}, {**admin, "content-type": "text/plain"}),
    ):  # fmt: skip
        found, problem = service.post(path, body, **headers)
        assert found == status
        check(
            described, described["paths"][path]["post"]["responses"][str(status)]["content"]["application/problem+json"]["schema"], problem
        )


def test_every_field_that_needs_a_word_has_one(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    assert "nearest store" in schemas["RecommendationsRequest"]["properties"]["position"]["description"]
    assert "dry_run" in schemas["NextBestOfferRequest"]["properties"], "what is said of all questions stands with each"
    assert "no message is promised" in schemas["NextBestOfferRequest"]["properties"]["dry_run"]["description"]
    assert schemas["Event"]["properties"]["identifiers"]["propertyNames"]["enum"][0] == "loyalty_card"
    assert set(EVENT_NAMES) <= set(schemas["Event"]["properties"]["name"]["enum"])


class TestThePage:
    def test_it_shows_every_address_and_shape_and_asks_no_other_host(
        self, described: dict[str, Any], keyed_service: tuple[Service, dict[str, str]], browser: Browser
    ) -> None:
        service, _ = keyed_service
        context = browser.new_context()
        page, asked, said = context.new_page(), list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        url = f"http://127.0.0.1:{service.port}/v1/docs"
        page.goto(url)
        assert [each for each in asked if not each.endswith("/favicon.ico")] == [url]
        assert said == [], "its own policy lets a browser show it"
        assert page.evaluate("getComputedStyle(document.querySelector('pre')).overflowX") == "auto", "with its style"
        shown = page.inner_text("main")
        for path, method, operation in operations(described):
            assert f"{method.upper()} {path}" in shown
            assert operation["summary"] in shown
        for name, schema in described["components"]["schemas"].items():
            told = page.inner_text(f"[id='{name}']")
            assert all(field in told for field in schema["properties"])
        assert "integer, at least 1, at most 100" in page.inner_text("#RecommendationsRequest")
        assert page.evaluate(
            "[...document.querySelectorAll('a')].every((a) => a.pathname === '/openapi.json' || document.getElementById(a.hash.slice(1)))"
        )
        context.close()

    def test_it_is_small_and_open_and_strict(self, keyed_service: tuple[Service, dict[str, str]]) -> None:
        service, _ = keyed_service
        status, text = service.get("/v1/docs")
        assert status == 200
        assert len(text) < 300_000
        assert "/v1/docs" in OPEN_PATHS
        assert "<script" not in text
        status, headers = headers_of(service, "GET", "/v1/docs", {})
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert service.get("/v1/docs", "DELETE")[0] == 405


def test_a_model_that_is_only_named_is_described_with_examples(trained: Home) -> None:
    models = model_settings(trained).models
    churn = document({"stays": models["churn"]}, EVENT_NAMES)["paths"]["/v1/stays"]["post"]
    assert churn["requestBody"]["content"]["application/json"]["examples"]["known"]["value"]["identifiers"]
