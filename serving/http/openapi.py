"""The OpenAPI description, made from the very types that are parsed and answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from features.events.event import Event
from models.registry import ModelSettings
from serving.decide.questions import SHAPES, CustomerRequest, ItemsAnswer, SimilarItemsRequest
from serving.decide.rules import NewRule
from serving.http.problems import Problem
from serving.http.rules_desk import RULES, WITH_ENDED, ToldRule, ToldRules
from serving.http.trackers import TRACKERS
from serving.intake.receipts import EventsAnswer
from serving.privacy.erasure import Receipt

ROUTES: dict[str, tuple[str, Any, Any]] = {
    "/v1/similar-items": ("What is like this item?", SimilarItemsRequest, ItemsAnswer),
    "/v1/events": ('Take one event, or a batch in {"events": [...]}.', Event, EventsAnswer),
    "/v1/profile": ("Who is this customer? The reading is audited.", CustomerRequest, dict[str, Any]),
    **{path: (f"Take what {tracker.source} clients send.", dict[str, Any], dict[str, Any]) for path, tracker in TRACKERS.items()},
}
"""What there is beside the models, each at an address of its own name."""
CUSTOMER_ROUTES: dict[str, dict[str, tuple[str, Any]]] = {
    "/v1/customers/{customer_id}": {"get": ("Who is this customer?", dict[str, Any]), "delete": ("Erase this customer.", Receipt)},
    "/v1/customers/{customer_id}/export": {"get": ("Everything held of this customer, as JSON Lines.", dict[str, Any])},
    "/v1/erasures/{receipt_id}": {"get": ("What an erasure did; 202 while it is under way.", Receipt)},
    "/v1/results/{result_id}": {"get": ("The answer that took long; 202 while it is under way. It is given once.", dict[str, Any])},
}
"""What is asked about and done to one customer; each is audited."""
RULE_ROUTES = (RULES, f"{RULES}/{{rule_id}}")
"""Where merchandising rules are shown, made and ended; each is audited."""


def document(models: Mapping[str, ModelSettings], event_names: Sequence[str]) -> dict[str, Any]:
    """The whole description of a service with these models, for a shop whose events have these names."""
    routes = {**{f"/v1/{name}": (model.kind.question, *SHAPES[model.kind.answers]) for name, model in models.items()}, **ROUTES}
    kinds: list[Any] = [kind for _, request, answer in routes.values() for kind in (request, answer)]
    kinds += [answer for methods in CUSTOMER_ROUTES.values() for _, answer in methods.values()]
    kinds += [NewRule, ToldRule, ToldRules]
    schemas, components = msgspec.json.schema_components([*kinds, Problem], ref_template="#/components/schemas/{name}")
    refs = dict(zip([*kinds, Problem], schemas, strict=True))
    problem = {"content": {"application/problem+json": {"schema": refs[Problem]}}}
    paths: dict[str, Any] = {}
    for path, (summary, request, answer) in routes.items():
        asked = refs[request]
        if request is Event:
            asked = {
                "oneOf": [asked, {"type": "object", "required": ["events"], "properties": {"events": {"type": "array", "items": asked}}}]
            }
        good = str(TRACKERS[path].status) if path in TRACKERS else "200"
        answered = {"description": "The answer."} if good == "204" else _json("The answer.", refs[answer])
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.strip("/").removeprefix("v1/").replace("-", "_").replace("/", "_"),
                "requestBody": {"required": True, "content": {"application/json": {"schema": asked}}},
                "responses": {good: answered, **({"202": _UNDER_WAY} if path == "/v1/profile" else {}), **_mistakes(problem)},
            }
        }
    for path, methods in CUSTOMER_ROUTES.items():
        name = path.partition("{")[2].partition("}")[0]
        paths[path] = {
            "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}],
            **{
                method: {
                    "summary": summary,
                    "operationId": f"{method}_{path.replace('/v1/', '').replace('/', '_').replace('{', '').replace('}', '')}",
                    "responses": {
                        "200": _json("The answer.", refs[answer]),
                        "202": _UNDER_WAY,
                        "404": {"description": "Nobody, or nothing, is known by that id.", **problem},
                        **_mistakes(problem),
                    },
                }
                for method, (summary, answer) in methods.items()
            },
        }
    paths |= _rule_paths(refs, problem)
    components["Event"]["properties"]["name"] = {"enum": list(event_names)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ubiquo", "version": "1", "description": "Churn, next best offer and recommendations from one stream of events."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _rule_paths(refs: Mapping[Any, Any], problem: dict[str, Any]) -> dict[str, Any]:
    """Merchandising rules, which are neither a model's nor a customer's."""

    def answers(shape: Any, **more: Any) -> dict[str, Any]:
        return {"200": _json("The answer.", refs[shape]), **more, **_mistakes(problem)}

    unknown = {"404": {"description": "There is no such rule.", **problem}, "409": {"description": "It was ended before.", **problem}}
    with_ended = {"name": WITH_ENDED, "in": "query", "required": False, "schema": {"type": "boolean", "default": False}}
    rule_id = {"name": "rule_id", "in": "path", "required": True, "schema": {"type": "string"}}
    body = {"required": True, "content": {"application/json": {"schema": refs[NewRule]}}}
    return {
        RULE_ROUTES[0]: {
            "get": {
                "summary": "Which merchandising rules are there?",
                "operationId": "get_rules",
                "parameters": [with_ended],
                "responses": answers(ToldRules),
            },
            "post": {
                "summary": "Make a merchandising rule.",
                "operationId": "add_rule",
                "requestBody": body,
                "responses": answers(ToldRule, **unknown),
            },
        },
        RULE_ROUTES[1]: {
            "parameters": [rule_id],
            "delete": {
                "summary": "End a merchandising rule.",
                "operationId": "end_rule",
                "responses": answers(ToldRule, **unknown),
            },
        },
    }


def _json(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_UNDER_WAY = _json("It takes long: ask again at the path that stands in ``ask``.", {"type": "object"})


def _mistakes(problem: dict[str, Any]) -> dict[str, Any]:
    return {
        "400": {"description": "A mistake in the request; field names it.", **problem},
        "401": {"description": "The API key is missing or wrong.", **problem},
        "403": {"description": "The API key does not hold the scope.", **problem},
        "405": {"description": "Another method is taken.", **problem},
        "408": {"description": "The headers or the body came too slowly.", **problem},
        "413": {"description": "The body is too large.", **problem},
        "415": {"description": "The body is not declared as JSON.", **problem},
        "429": {"description": "Too much at once; Retry-After says when to come again.", **problem},
        "503": {"description": "Busy, starting, or no model can answer; Retry-After says when to come again.", **problem},
        "507": {"description": "The disk is full: no event of the request was taken.", **problem},
    }
