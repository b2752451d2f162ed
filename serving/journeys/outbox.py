"""The outbox: what was decided leaves as signed webhooks, tried until they are taken, or as files that other systems load."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import urllib3

from features.state.clock import Clock, microseconds
from features.state.disk import write_atomically
from features.state.home import Home
from features.store.outputs import owners_of, remember_output
from serving.decide.formats import FORMATS, FormatName, encoded, header
from serving.journeys.outgoing import Outgoing, Outgoings
from serving.journeys.plan import Plans, Sink, seconds_of

logger = logging.getLogger("ubiquo")
SECOND = 1_000_000
SINK_SECONDS = 10.0
"""How long one sink is sent to before the others have their turn."""
AT_ONCE = 100
"""How many messages are sent before anything else has its turn."""
FIRST_RETRY_SECONDS = 5
LONGEST_RETRY_SECONDS = 3_600
TRY_AGAIN = frozenset({408, 425, 429})
"""What a receiver answers that wants the same again later, beside everything from 500 on."""
PATIENCE = urllib3.Timeout(connect=3, read=10)
WITHDRAWN = "the customer does not permit contact by this channel any more"
EXPIRED = "it waited until its place under the caps, or in a budget, went to others"
GONE = "nobody is known by that id any more"


class NotTaken(NamedTuple):
    """Why a sink did not take a message, whether the same may be sent again, and how much later at least."""

    reason: str
    again: bool
    wait_seconds: int = 0


class People(Protocol):
    """What the outbox asks about customers, at the moment at which something leaves."""

    def may_reach(self, customer_id: str, channel: str) -> str | None:
        """Why a customer may not be contacted by that channel; None where they may."""

    def contact(self, customer_id: str) -> Mapping[str, str]:
        """Their ``external_id``, ``email`` and ``phone``, in clear, as far as they are known."""

    def sent(self, message: Outgoing, now: datetime) -> None:
        """Take in that a message was sent, once however often it is told."""

    def release(self, decision_id: str) -> None:
        """Nothing will come of that decision."""


class Sender:
    """Sends what waits for webhooks. A message is sent again until it is taken, always under one key: its decision's id.

    Args:
        key_of: the secret of a sink.
        plans: the sinks in force.
    """

    def __init__(
        self, outgoing: Outgoings, people: People, key_of: Callable[[str], bytes], plans: Callable[[], Plans], clock: Clock
    ) -> None:
        self._outgoing, self._people, self._key_of, self._plans, self._clock = outgoing, people, key_of, plans, clock
        self._http = urllib3.PoolManager(retries=False, timeout=PATIENCE, maxsize=2)
        self._stuck: dict[str, str] = {}

    @property
    def stuck(self) -> dict[str, str]:
        """The sinks that took nothing at the last try, and why."""
        known = self._plans().sinks
        return {name: why for name, why in dict(self._stuck).items() if name in known}

    def send_due(self) -> int:
        """Send what is due; returns how many messages have left. A sink that does not take one is left alone until the next time, and none
        keeps the others waiting for long.
        """
        self._expire()
        return sum(self._send(sink) for sink in self._plans().said.sinks if sink.url is not None)

    def note_left(self) -> int:
        """Take in as sent what has left; returns how much."""
        noted, sinks = 0, self._plans().sinks
        for message in self._outgoing.left(AT_ONCE):
            sink = sinks.get(message.sink)
            if sink is None or sink.counts_as_sent:
                self._people.sent(message, self._clock())
            noted += self._outgoing.become(message, "sent", message.status, message.reason, microseconds(self._clock()))
        return noted

    def _send(self, sink: Sink) -> int:
        left, until = 0, time.monotonic() + SINK_SECONDS
        for message in self._outgoing.to_send(sink.name, microseconds(self._clock()), AT_ONCE):
            if time.monotonic() > until:
                break
            if (why := self._people.may_reach(message.customer_id, message.channel)) is not None:
                self._drop(message, message.status, "dropped", why)
                continue
            if not self._outgoing.claim(message):
                # it was called off this moment
                continue
            error = self._post(sink, message)
            if error is None:
                # in the log of events once it is noted as sent
                self._outgoing.become(message, "taken", "sending")
                self._stuck.pop(sink.name, None)
                left += 1
            elif self._put_off(sink, message, error):
                self._stuck[sink.name] = error.reason
                break
        return left

    def _post(self, sink: Sink, message: Outgoing) -> NotTaken | None:
        """Send one message: None once it was taken."""
        body = msgspec.json.encode(payload(message, self._people.contact(message.customer_id) if sink.with_contact else {}))
        assert sink.url is not None
        try:
            # what it answers beside its status is not read: it may have no end
            answer = self._http.request(
                "POST", sink.url, body=body, headers=self._headers(sink, message, body), redirect=False, preload_content=False
            )
            answer.close()
        except urllib3.exceptions.HTTPError as failure:
            return NotTaken(type(failure).__name__, again=True)
        if 200 <= answer.status < 300:
            return None
        wait = answer.headers.get("Retry-After", "")
        again = answer.status in TRY_AGAIN or answer.status >= 500
        return NotTaken(f"answered {answer.status}", again, int(wait) if wait.isdigit() else 0)

    def _put_off(self, sink: Sink, message: Outgoing, error: NotTaken) -> bool:
        """Try again later, or give up; returns whether the sink is to be left alone for now."""
        now = microseconds(self._clock())
        if not error.again or now - message.created_at > seconds_of(sink.give_up_after) * SECOND:
            logger.error("%s did not take a message: %s", sink.name, error.reason)
            self._drop(message, "sending", "failed", error.reason)
            return error.again
        wait = min(LONGEST_RETRY_SECONDS, max(error.wait_seconds, FIRST_RETRY_SECONDS * 2 ** min(message.attempts, 20)))
        if not self._outgoing.put_off(message, error.reason, now + wait * SECOND, now):
            self._people.release(message.decision_id)
        return True

    def _expire(self) -> None:
        """Drop what waited so long that its place went to others."""
        for message in self._outgoing.expired(microseconds(self._clock()), AT_ONCE):
            self._drop(message, "waiting", "dropped", EXPIRED)

    def _drop(self, message: Outgoing, was: str, status: str, why: str) -> None:
        if self._outgoing.become(message, status, was, why, microseconds(self._clock())):
            self._people.release(message.decision_id)

    def _headers(self, sink: Sink, message: Outgoing, body: bytes) -> dict[str, str]:
        """Those of the Standard Webhooks specification, and the key by which a receiver knows a repetition."""
        at = str(int(self._clock().timestamp()))
        return {
            "Content-Type": "application/json",
            "Idempotency-Key": message.decision_id,
            "webhook-id": message.decision_id,
            "webhook-timestamp": at,
            "webhook-signature": f"v1,{signature(self._key_of(sink.name), message.decision_id, at, body)}",
        }


def signature(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    """The signature of a webhook by the Standard Webhooks specification: HMAC-SHA256 over id, time and body."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def payload(message: Outgoing, contact: Mapping[str, str]) -> dict[str, Any]:
    """What a webhook carries."""
    said = msgspec.json.decode(message.body)
    decided_at = datetime.fromtimestamp(message.created_at / 1e6, UTC)
    told = {"type": "message.decided", "customer_id": message.customer_id, "channel": message.channel, "decided_at": decided_at}
    return {**told, **said, "contact": dict(contact)}


def export(outgoing: Outgoings, people: People, home: Home, sink: str, out: Path, form: FormatName, now: datetime) -> tuple[int, int]:
    """Write what waits for a sink into a file: returns how many rows it has, and how many were dropped.

    Each row leaves once: until the file is whole its rows belong to it, and the same command writes them again after a crash. Contact data
    is in the file; beside it lies whose each row is, so that an erasure finds it.

    Raises:
        ValueError: the file is neither CSV nor JSON Lines, the format is not written so, or another file of this sink was begun and never
            ended.
    """
    if out.suffix not in (".csv", ".jsonl") or (form not in _LINES and out.suffix == ".jsonl"):
        raise ValueError(f"--out {out}: end the name in .csv" + (" or .jsonl" if form in _LINES else f" (the format {form} is a CSV)"))
    name, at, dropped = str(out.resolve()), microseconds(now), 0
    begun = outgoing.of_sink(sink, ("writing",))
    if others := sorted({str(message.reason) for message in begun if message.reason != name}):
        raise ValueError(f"--out {out}: {others[0]} was begun and never ended: export to it once more first")
    kept = []
    for message in [*begun, *outgoing.of_sink(sink, ("waiting",))]:
        expired = message.expires_at is not None and message.expires_at <= at
        why = EXPIRED if expired else people.may_reach(message.customer_id, message.channel)
        if why is not None:
            if outgoing.become(message, "dropped", message.status, why, at):
                people.release(message.decision_id)
                dropped += 1
        elif message.status == "writing" or outgoing.become(message, "writing", "waiting", name):
            kept.append(message)
    owners = owners_of(out)
    remember_output(home, out, owners)
    told = [(payload(message, {}), people.contact(message.customer_id)) for message in kept]
    # whose the rows are stands there before the rows do
    write_atomically(owners, msgspec.json.encode([message.customer_id for message in kept]), mode=0o600)
    write_atomically(out, _written(told, form, out.suffix == ".csv"), mode=0o600)
    for message in kept:
        outgoing.become(message, "written", "writing", name)
    return len(kept), dropped


def _written(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]], form: FormatName, as_csv: bool) -> bytes:
    if not as_csv:
        return b"".join(msgspec.json.encode(_LINES[form](said, contact)) + b"\n" for said, contact in rows)
    shape = FORMATS[form]

    def told(said: Mapping[str, Any]) -> dict[str, Any]:
        return _properties(said) if shape.by_customer else {**_properties(said), "decided_at": str(said["decided_at"])}

    # a file without rows has its header too
    nobody: dict[str, Any] = dict.fromkeys(("customer_id", "channel", "journey", "decision_id", "decided_at"))
    columns = list(shape.row("", {}, told({**nobody, "offer": {}})))
    lines = [shape.row(said["customer_id"], contact, told(said)) for said, contact in rows]
    return header(columns, shape) + encoded(lines, columns, shape, ",", None)


def _properties(said: Mapping[str, Any]) -> dict[str, Any]:
    offer = said["offer"]
    named = ("offer_id", "campaign_id", "kind", "stage", "title", "text", "benefit_percent", "benefit_minor")
    return {**{name: offer.get(name) for name in named}, **{name: said[name] for name in ("channel", "journey", "decision_id")}}


def _plain(said: Mapping[str, Any], contact: Mapping[str, str]) -> dict[str, Any]:
    known = {name: contact.get(name, "") for name in ("external_id", "email", "phone")}
    return {"customer_id": said["customer_id"], **known, **_properties(said), "decided_at": str(said["decided_at"])}


def _braze(said: Mapping[str, Any], contact: Mapping[str, str]) -> dict[str, Any]:
    """One event object of Braze's ``/users/track``."""
    event = {"external_id": contact.get("external_id", said["customer_id"]), "name": "ubiquo_offer", "time": str(said["decided_at"])}
    return {**event, "properties": {name: value for name, value in _properties(said).items() if value is not None}}


def _klaviyo(said: Mapping[str, Any], contact: Mapping[str, str]) -> dict[str, Any]:
    """One event of Klaviyo's events API (JSON:API)."""
    names = {"email": "email", "phone": "phone_number", "external_id": "external_id"}
    profile = {theirs: contact[ours] for ours, theirs in names.items() if contact.get(ours)} or {"external_id": said["customer_id"]}
    metric = {"data": {"type": "metric", "attributes": {"name": "ubiquo offer"}}}
    who = {"data": {"type": "profile", "attributes": profile}}
    told = {"metric": metric, "profile": who, "time": str(said["decided_at"]), "unique_id": said["decision_id"]}
    return {"data": {"type": "event", "attributes": {"properties": _properties(said), **told}}}


Shape = Callable[[Mapping[str, Any], Mapping[str, str]], dict[str, Any]]
_LINES: Mapping[str, Shape] = {"plain": _plain, "braze": _braze, "klaviyo": _klaviyo}
"""The formats that are written as JSON Lines too."""
