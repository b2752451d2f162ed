"""The OpenAPI description, made from the very types that are parsed and answered."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from features.events import Event
from serving.schemas import (
    ChurnAnswer,
    ChurnRequest,
    EventsAnswer,
    ItemsAnswer,
    NextBestOfferRequest,
    OffersAnswer,
    Problem,
    RecommendationsRequest,
    SimilarItemsRequest,
)

ROUTES: dict[str, tuple[str, Any, Any]] = {
    "/v1/recommendations": ("What will this customer like?", RecommendationsRequest, ItemsAnswer),
    "/v1/similar-items": ("What is like this item?", SimilarItemsRequest, ItemsAnswer),
    "/v1/next-best-offer": ("What should this customer be offered next?", NextBestOfferRequest, OffersAnswer),
    "/v1/churn": ("Is this customer about to leave?", ChurnRequest, ChurnAnswer),
    "/v1/events": ('Take one event, or a batch in {"events": [...]}.', Event, EventsAnswer),
}


@cache
def document() -> dict[str, Any]:
    """The whole description."""
    kinds = [kind for _, request, answer in ROUTES.values() for kind in (request, answer)]
    schemas, components = msgspec.json.schema_components([*kinds, Problem], ref_template="#/components/schemas/{name}")
    refs = dict(zip([*kinds, Problem], schemas, strict=True))
    problem = {"content": {"application/problem+json": {"schema": refs[Problem]}}}
    paths: dict[str, Any] = {}
    for path, (summary, request, answer) in ROUTES.items():
        asked = refs[request]
        if request is Event:
            asked = {
                "oneOf": [asked, {"type": "object", "required": ["events"], "properties": {"events": {"type": "array", "items": asked}}}]
            }
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.removeprefix("/v1/").replace("-", "_"),
                "requestBody": {"required": True, "content": {"application/json": {"schema": asked}}},
                "responses": {
                    "200": {"description": "The answer.", "content": {"application/json": {"schema": refs[answer]}}},
                    "400": {"description": "A mistake in the request; field names it.", **problem},
                    "401": {"description": "The API key is missing or wrong.", **problem},
                    "405": {"description": "Only POST is taken.", **problem},
                    "413": {"description": "The body is too large.", **problem},
                    "503": {"description": "The model that would answer has no champion, or the service is starting.", **problem},
                },
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "ubiquo", "version": "1", "description": "Churn, next best offer and recommendations from one stream of events."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
