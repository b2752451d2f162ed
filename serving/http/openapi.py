"""The OpenAPI description, made from the very types that are parsed and answered, with examples that tests send."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from features.events.event import Event
from features.events.identifiers import KINDS
from features.sources import ga4
from features.sources.segment import SHORT_CALLS
from models.registry import ModelSettings
from serving.decide.questions import SHAPES, CustomerRequest, ItemsAnswer, SimilarItemsRequest
from serving.decide.rules import NewRule
from serving.http.problems import Problem
from serving.http.rules_desk import RULES, WITH_ENDED, ToldRule, ToldRules
from serving.http.trackers import TRACKERS, TrackersAnswer
from serving.intake.receipts import EventsAnswer
from serving.privacy.orders import Receipt

EXAMPLES = Path(__file__).with_name("examples.json")
_SAME_EXAMPLES = {**{f"/v1/{short}": f"/v1/{call}" for short, call in SHORT_CALLS.items()}, "/v1/b": "/v1/batch", "/v1/import": "/v1/batch"}
"""Addresses that take what another takes."""


def _tracking(path: str, source: str) -> str:
    if path in _SAME_EXAMPLES:
        return f"The same as {_SAME_EXAMPLES[path]}, as some of Segment's libraries call it."
    if source == ga4.SOURCE:
        return "Take events of Google Analytics 4 (measurement protocol); the key stands in the query as api_secret."
    what = "a batch of messages" if path == "/v1/batch" else f"one message of the kind {path.rpartition('/')[2]}"
    return f"Take {what} of Segment's libraries."


ROUTES: dict[str, tuple[str, Any, Any]] = {
    "/v1/similar-items": ("What is like this item?", SimilarItemsRequest, ItemsAnswer),
    "/v1/events": ('Take one event, or a batch in {"events": [...]}.', Event, EventsAnswer),
    "/v1/profile": ("Who is this customer? The reading is audited.", CustomerRequest, dict[str, Any]),
    **{path: (_tracking(path, tracker.source), dict[str, Any], TrackersAnswer) for path, tracker in TRACKERS.items()},
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
PAGE_ROUTES: dict[str, dict[str, tuple[str, Any]]] = {
    "/v1/projects/{key}/settings": {"get": ("What Segment's library for browsers asks for first, by a page's key.", dict[str, Any])}
}
"""What is asked for by pages alone."""


def document(models: Mapping[str, ModelSettings], event_names: Sequence[str]) -> dict[str, Any]:
    """The whole description of a service with these models, for a shop whose events have these names."""
    routes = {**{f"/v1/{name}": (model.kind.question, *SHAPES[model.kind.answers]) for name, model in models.items()}, **ROUTES}
    answers = {f"/v1/{name}": model.kind.answers for name, model in models.items()}
    by_name = {**CUSTOMER_ROUTES, **PAGE_ROUTES}
    kinds: list[Any] = [kind for _, request, answer in routes.values() for kind in (request, answer)]
    kinds += [answer for methods in by_name.values() for _, answer in methods.values()]
    kinds += [NewRule, ToldRule, ToldRules]
    schemas, components = msgspec.json.schema_components([*kinds, Problem], ref_template="#/components/schemas/{name}")
    refs = dict(zip([*kinds, Problem], schemas, strict=True))
    problem = {"content": {"application/problem+json": {"schema": refs[Problem], "example": _examples()["problem"]["response"]}}}
    paths: dict[str, Any] = {}
    for path, (summary, request, answer) in routes.items():
        example = _example("POST", path, answers.get(path))
        asked = refs[request]
        if request is Event:
            asked = {
                "oneOf": [asked, {"type": "object", "required": ["events"], "properties": {"events": {"type": "array", "items": asked}}}]
            }
        good = str(TRACKERS[path].status) if path in TRACKERS else "200"
        answered = {"description": "The answer."} if good == "204" else _json("The answer.", refs[answer], example["response"])
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.strip("/").removeprefix("v1/").replace("-", "_").replace("/", "_"),
                "security": [{"key": []}],
                "requestBody": {"required": True, "content": {"application/json": {"schema": asked, "examples": example["requests"]}}},
                "responses": {good: answered, **({"202": _UNDER_WAY} if path == "/v1/profile" else {}), **_mistakes(problem)},
            }
        }
    for path, methods in by_name.items():
        name = path.partition("{")[2].partition("}")[0]
        paths[path] = {
            "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}],
            **{
                method: {
                    "summary": summary,
                    "operationId": f"{method}_{path.replace('/v1/', '').replace('/', '_').replace('{', '').replace('}', '')}",
                    "security": [] if path in PAGE_ROUTES else [{"key": []}],
                    "responses": {
                        "200": _json(
                            "The answer.",
                            refs[answer],
                            _example(method.upper(), path)["response"],
                            "application/x-ndjson" if path.endswith("/export") else "application/json",
                        ),
                        **({} if path in PAGE_ROUTES else {"202": _UNDER_WAY}),
                        "404": {"description": "Nobody, or nothing, is known by that id.", **problem},
                        **_mistakes(problem),
                    },
                }
                for method, (summary, answer) in methods.items()
            },
        }
    paths |= _rule_paths(refs, problem)
    _tell_fields(components, kinds)
    components["Event"]["properties"]["name"] = {
        "enum": list(event_names),
        "description": components["Event"]["properties"]["name"]["description"],
    }
    for component in components.values():
        for name in ("identifiers", "previous"):
            if name in component.get("properties", {}):
                component["properties"][name]["propertyNames"] = {"enum": list(KINDS)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ubiquo", "version": "1", "description": "Churn, next best offer and recommendations from one stream of events."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _rule_paths(refs: Mapping[Any, Any], problem: dict[str, Any]) -> dict[str, Any]:
    """Merchandising rules, which are neither a model's nor a customer's."""
    unknown = {"404": {"description": "There is no such rule.", **problem}, "409": {"description": "It was ended before.", **problem}}
    every, one = RULE_ROUTES

    def operation(method: str, path: str, summary: str, shape: Any, **more: Any) -> dict[str, Any]:
        answered = {"200": _json("The answer.", refs[shape], _example(method.upper(), path)["response"])}
        return {
            "summary": summary,
            "operationId": f"{method}_{'rule' if path == one else 'rules'}",
            "security": [{"key": []}],
            **more,
            "responses": {**answered, **({} if method == "get" else unknown), **_mistakes(problem)},
        }

    with_ended = {"name": WITH_ENDED, "in": "query", "required": False, "schema": {"type": "boolean", "default": False}}
    rule_id = {"name": "rule_id", "in": "path", "required": True, "schema": {"type": "string"}}
    examples = _example("POST", every)["requests"]
    body = {"required": True, "content": {"application/json": {"schema": refs[NewRule], "examples": examples}}}
    return {
        every: {
            "get": operation("get", every, "Which merchandising rules are there?", ToldRules, parameters=[with_ended]),
            "post": operation("post", every, "Make a merchandising rule.", ToldRule, requestBody=body),
        },
        one: {"parameters": [rule_id], "delete": operation("delete", one, "End a merchandising rule.", ToldRule)},
    }


@cache
def _examples() -> dict[str, Any]:
    return dict(msgspec.json.decode(EXAMPLES.read_bytes()))


def _example(method: str, path: str, answers: str | None = None) -> dict[str, Any]:
    """The example requests and the example answer of an address; of a model's those of its kind of answers."""
    return dict(_examples()[answers or f"{method} {_SAME_EXAMPLES.get(path, path)}"])


def _tell_fields(components: dict[str, Any], kinds: Sequence[Any]) -> None:
    """Write under each property what the text below its attribute says in the source."""
    for struct in _structs(kinds):
        properties = components[struct.__name__]["properties"]
        for owner in reversed(struct.__mro__):
            if issubclass(owner, msgspec.Struct) and owner is not msgspec.Struct:
                for name, text in _field_texts(owner).items():
                    if name in properties:
                        properties[name]["description"] = text
        for field in msgspec.structs.fields(struct):
            _tell_time(properties[field.encode_name], msgspec.inspect.type_info(field.type))


def _tell_time(schema: dict[str, Any], info: msgspec.inspect.Type) -> None:
    """Say of a time that it is one: msgspec does so only where a time zone is asked for."""
    if any(isinstance(each, msgspec.inspect.DateTimeType) for each in (info, *_parts(info))):
        for each in schema.get("anyOf", [schema]):
            if each.get("type") == "string":
                each["format"] = "date-time"


def _structs(kinds: Sequence[Any]) -> Iterator[type[msgspec.Struct]]:
    """Every struct that these types are made of."""
    seen: set[Any] = set()
    waiting = [msgspec.inspect.type_info(kind) for kind in kinds]
    while waiting:
        info = waiting.pop()
        if isinstance(info, msgspec.inspect.StructType):
            if info.cls in seen:
                continue
            seen.add(info.cls)
            yield info.cls
        for inner in _parts(info):
            waiting.append(inner)


def _parts(info: msgspec.inspect.Type) -> Iterator[msgspec.inspect.Type]:
    if isinstance(info, msgspec.inspect.StructType):
        yield from (field.type for field in info.fields)
    elif isinstance(info, msgspec.inspect.UnionType):
        yield from info.types
    elif isinstance(info, msgspec.inspect.ListType):
        yield info.item_type
    elif isinstance(info, msgspec.inspect.DictType):
        yield info.value_type
    elif isinstance(info, msgspec.inspect.Metadata):
        yield info.type


@cache
def _field_texts(struct: type) -> dict[str, str]:
    """By attribute the text that stands below it in the class's source."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(struct))).body
    assert isinstance(body, ast.ClassDef)
    told = {}
    for attribute, below in zip(body.body, body.body[1:], strict=False):
        match attribute, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                told[name] = inspect.cleandoc(text)
    return told


def _json(description: str, schema: Any, example: Any = None, kind: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema, **({} if example is None else {"example": example})}}}


_UNDER_WAY = _json(
    "It takes long: ask again at the path that stands in ``ask``.", {"type": "object"}, {"state": "running", "ask": "/v1/results/88ba"}
)


def _mistakes(problem: dict[str, Any]) -> dict[str, Any]:
    return {
        "400": {"description": "A mistake in the request; field names it.", **problem},
        "401": {"description": "The API key is missing or wrong.", **problem},
        "403": {"description": "The API key does not hold the scope, or a page asks what only a server may.", **problem},
        "405": {"description": "Another method is taken.", **problem},
        "408": {"description": "The headers or the body came too slowly.", **problem},
        "413": {"description": "The body is too large.", **problem},
        "415": {"description": "The body is not declared as JSON.", **problem},
        "429": {"description": "Too much at once; Retry-After says when to come again.", **problem},
        "503": {"description": "Busy, starting, or no model can answer; Retry-After says when to come again.", **problem},
        "507": {"description": "The disk is full: no event of the request was taken.", **problem},
    }
