"""The endpoints that other vendors' clients already speak: Segment's tracking API and Google's measurement protocol."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from features.events.event import RejectedEvent, bounded
from features.sources import ga4, segment
from serving.http.access import MAX_BODY_BYTES
from serving.http.problems import HttpProblem

MAX_CONTEXT_BYTES = 4_096
"""What a batch may say of all its messages; it is kept with each."""
MAX_BATCH = 2_500
"""How many messages Segment takes in one batch."""


@dataclass(frozen=True)
class Tracker:
    """One endpoint: how a body becomes messages, a message becomes an event, and what is answered when all are stored.

    A body that can be read is answered with success, as its senders drop whatever they are refused; messages that mean
    nothing become dead letters.
    """

    source: str
    messages: Callable[[Mapping[bytes, bytes], bytes], list[Any]]
    to_event: Callable[[Any, datetime, str | None], dict[str, Any]]
    status: int
    answer: bytes


def _unpacked(headers: Mapping[bytes, bytes], body: bytes) -> bytes:
    if headers.get(b"content-encoding", b"").lower() != b"gzip":
        return body
    try:
        reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        plain = reader.decompress(body, MAX_BODY_BYTES)
        if reader.unconsumed_tail:
            raise HttpProblem(400, "Too large", f"a body may hold {MAX_BODY_BYTES} bytes once unpacked: send fewer messages at once")
        return plain
    except zlib.error:
        raise HttpProblem(400, "Bad request", "the body is not gzip, as its content-encoding says", "$") from None


def _decoded(headers: Mapping[bytes, bytes], body: bytes) -> Any:
    try:
        return msgspec.json.decode(_unpacked(headers, body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpProblem(400, "Bad request", f"the body is not valid JSON: {error}", "$") from None


def _one(call: str) -> Callable[[Mapping[bytes, bytes], bytes], list[Any]]:
    def messages(headers: Mapping[bytes, bytes], body: bytes) -> list[Any]:
        message = _decoded(headers, body)
        if not isinstance(message, dict):
            raise HttpProblem(400, "Bad request", "a message must be a JSON object", "$")
        return [{**message, "type": call}]

    return messages


def _batch(headers: Mapping[bytes, bytes], body: bytes) -> list[Any]:
    said = _decoded(headers, body)
    if not isinstance(said, dict) or not isinstance(said.get("batch"), list):
        raise HttpProblem(400, "Bad request", 'a batch is {"batch": [...]}', "batch")
    if len(said["batch"]) > MAX_BATCH:
        raise HttpProblem(400, "Too large", f"a batch may hold {MAX_BATCH} messages", "batch")
    # what the batch says once holds for each message, and a dead letter must be able to stand alone
    common = {key: said[key] for key in ("sentAt",) if said.get(key) is not None}
    context = said.get("context")
    if isinstance(context, dict) and _small(context):
        common["context"] = context
    return [{**common, **each} if isinstance(each, dict) else each for each in said["batch"]]


def _small(context: dict[str, Any]) -> bool:
    try:
        bounded(context)
    except RejectedEvent:
        return False
    return len(msgspec.json.encode(context)) <= MAX_CONTEXT_BYTES


def _ga4_messages(headers: Mapping[bytes, bytes], body: bytes) -> list[Any]:
    plain = _unpacked(headers, body)
    if len(plain) > ga4.MAX_BYTES:
        raise HttpProblem(400, "Too large", f"a request may hold {ga4.MAX_BYTES} bytes: send fewer events at once")
    try:
        return list(ga4.messages(_decoded({}, plain)))
    except RejectedEvent as error:
        raise HttpProblem(400, "Bad request", error.reason, error.field) from None


class TrackersAnswer(msgspec.Struct, omit_defaults=True):
    """That a message, or a batch of them, was taken; what means nothing became dead letters."""

    success: bool
    left_out: list[str] = []
    """Which fields were left out of what a page sent, as only a server may tell them."""


_SUCCESS = b'{"success":true}'
TRACKERS: dict[str, Tracker] = {
    **{f"/v1/{call}": Tracker(segment.SOURCE, _one(call), segment.to_event, 200, _SUCCESS) for call in segment.CALLS},
    **{f"/v1/{short}": Tracker(segment.SOURCE, _one(call), segment.to_event, 200, _SUCCESS) for short, call in segment.SHORT_CALLS.items()},
    "/v1/b": Tracker(segment.SOURCE, _batch, segment.to_event, 200, _SUCCESS),
    "/v1/batch": Tracker(segment.SOURCE, _batch, segment.to_event, 200, _SUCCESS),
    "/v1/import": Tracker(segment.SOURCE, _batch, segment.to_event, 200, _SUCCESS),
    "/mp/collect": Tracker(ga4.SOURCE, _ga4_messages, ga4.to_event, 204, b""),
}
