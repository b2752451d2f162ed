"""The outbox: what was decided leaves as signed webhooks, tried until they are taken, or as files that other systems load."""

from __future__ import annotations

import base64
import csv
import hashlib
import hmac
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import urllib3

from features.state.clock import microseconds
from features.state.disk import write_atomically
from features.state.home import Home
from features.store.outputs import remember_output
from serving.journeys.plan import Plans, Sink, seconds_of
from serving.journeys.runs import Outgoing, Runs

logger = logging.getLogger("ubiquo")
AT_ONCE = 100
"""How many messages are sent before anything else has its turn."""
FIRST_RETRY_SECONDS = 5
LONGEST_RETRY_SECONDS = 3_600
TRY_AGAIN = frozenset({408, 425, 429})
"""What a receiver answers that wants the same again later, beside everything from 500 on."""
PATIENCE = urllib3.Timeout(connect=3, read=10)
Format = Literal["plain", "braze", "klaviyo", "audience"]
WITHDRAWN = "the customer does not permit contact by this channel any more"
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

    def __init__(self, runs: Runs, people: People, key_of: Callable[[str], bytes], plans: Callable[[], Plans]) -> None:
        self._runs, self._people, self._key_of, self._plans = runs, people, key_of, plans
        self._http = urllib3.PoolManager(retries=False, timeout=PATIENCE, maxsize=2)
        self.stuck: dict[str, str] = {}
        """The sinks that took nothing at the last try, and why."""

    def send_due(self, now: datetime) -> int:
        """Send what is due; returns how many messages have left. A sink that does not take one is left alone until the next time."""
        # each sink by itself: what waits for one that is down holds up no other
        return sum(self._send(sink, now) for sink in self._plans().said.sinks if sink.url is not None)

    def _send(self, sink: Sink, now: datetime) -> int:
        left = 0
        for message in self._runs.to_send(sink.name, microseconds(now), AT_ONCE):
            if (why := self._people.may_reach(message.customer_id, message.channel)) is not None:
                self._drop(message, "dropped", why, now)
                continue
            error = self._post(sink, message, now)
            if error is None:
                self.stuck.pop(sink.name, None)
                left += 1
            elif self._put_off(sink, message, error, now):
                self.stuck[sink.name] = error.reason
                break
        return left

    def note_exported(self, now: datetime) -> int:
        """Take in as sent what was written into files; returns how much."""
        noted = 0
        for sink in self._plans().said.sinks:
            for message in self._runs.of_sink(sink.name, ("exported",)):
                if sink.counts_as_sent:
                    self._people.sent(message, now)
                noted += self._runs.settle(message, "sent", microseconds(now), message.reason, was="exported")
        return noted

    def _post(self, sink: Sink, message: Outgoing, now: datetime) -> NotTaken | None:
        """Send one message: None once it was taken."""
        body = msgspec.json.encode(payload(message, self._people.contact(message.customer_id) if sink.with_contact else {}))
        assert sink.url is not None
        try:
            answer = self._http.request("POST", sink.url, body=body, headers=self._headers(sink, message, body, now), redirect=False)
        except urllib3.exceptions.HTTPError as failure:
            return NotTaken(type(failure).__name__, again=True)
        if not 200 <= answer.status < 300:
            again = answer.status in TRY_AGAIN or answer.status >= 500
            wait = answer.headers.get("Retry-After", "")
            return NotTaken(f"answered {answer.status}", again, int(wait) if wait.isdigit() else 0)
        if sink.counts_as_sent:
            # before it is settled: told again after a crash it is taken in once
            self._people.sent(message, now)
        self._runs.settle(message, "sent", microseconds(now))
        return None

    def _put_off(self, sink: Sink, message: Outgoing, error: NotTaken, now: datetime) -> bool:
        """Try again later, or give up; returns whether it is tried again."""
        age = (microseconds(now) - message.created_at) // 1_000_000
        if not error.again or age > seconds_of(sink.give_up_after):
            logger.error("%s did not take a message: %s", sink.name, error.reason)
            self._drop(message, "failed", error.reason, now)
            return False
        wait = min(LONGEST_RETRY_SECONDS, max(error.wait_seconds, FIRST_RETRY_SECONDS * 2 ** min(message.attempts, 20)))
        self._runs.settle(message, "waiting", microseconds(now), error.reason, again=microseconds(now) + wait * 1_000_000)
        return True

    def _drop(self, message: Outgoing, status: str, why: str, now: datetime) -> None:
        if self._runs.settle(message, status, microseconds(now), why):
            self._people.release(message.decision_id)

    def _headers(self, sink: Sink, message: Outgoing, body: bytes, now: datetime) -> dict[str, str]:
        """Those of the Standard Webhooks specification, and the key by which a receiver knows a repetition."""
        at = str(int(now.timestamp()))
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


def export(runs: Runs, people: People, home: Home, sink: str, out: Path, form: Format, now: datetime) -> tuple[int, int]:
    """Write what waits for a sink into a file, once: returns how many rows it has, and how many were dropped.

    The same file written again after a crash holds the same rows. Contact data is in it; an erasure finds it.

    Raises:
        ValueError: the file is neither CSV nor JSON Lines, or the format is not written so.
    """
    if out.suffix not in (".csv", ".jsonl") or (form == "audience" and out.suffix == ".jsonl"):
        raise ValueError(f"--out {out}: end the name in .csv or .jsonl" + (" (an audience is a CSV)" if form == "audience" else ""))
    name, dropped = str(out.resolve()), 0
    rows = [
        message for message in runs.of_sink(sink, ("waiting", "exported", "sent")) if message.status == "waiting" or message.reason == name
    ]
    kept = []
    for message in rows:
        if message.status == "waiting" and (why := people.may_reach(message.customer_id, message.channel)) is not None:
            if runs.settle(message, "dropped", microseconds(now), why):
                people.release(message.decision_id)
                dropped += 1
        else:
            kept.append(message)
    remember_output(home, out)
    for message in kept:
        if message.status == "waiting":
            # before the file: a crash in between leaves rows that the same command writes again
            runs.settle(message, "exported", microseconds(now), name)
    told = [(payload(message, {}), people.contact(message.customer_id)) for message in kept]
    write_atomically(out, _written(told, form, out.suffix == ".csv"), mode=0o600)
    return len(kept), dropped


def _written(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]], form: Format, as_csv: bool) -> bytes:
    shape = (_ROWS if as_csv else _LINES)[form]
    lines = [shape(said, contact) for said, contact in rows]
    if not as_csv:
        return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    text = io.StringIO()
    # a file without rows has its header too
    nobody: dict[str, Any] = dict.fromkeys(("customer_id", "channel", "journey", "decision_id", "decided_at"))
    writer = csv.DictWriter(text, list(shape({**nobody, "offer": {}}, {})))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


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


def _braze_row(said: Mapping[str, Any], contact: Mapping[str, str]) -> dict[str, Any]:
    """One user of Braze's CSV import: the offer as custom attributes."""
    known = {
        "external_id": contact.get("external_id", said["customer_id"]),
        "email": contact.get("email", ""),
        "phone": contact.get("phone", ""),
    }
    return {**known, **{f"ubiquo_{name}": value for name, value in _properties(said).items()}}


def _klaviyo(said: Mapping[str, Any], contact: Mapping[str, str]) -> dict[str, Any]:
    """One event of Klaviyo's events API (JSON:API)."""
    names = {"email": "email", "phone": "phone_number", "external_id": "external_id"}
    profile = {theirs: contact[ours] for ours, theirs in names.items() if contact.get(ours)} or {"external_id": said["customer_id"]}
    metric = {"data": {"type": "metric", "attributes": {"name": "ubiquo offer"}}}
    who = {"data": {"type": "profile", "attributes": profile}}
    told = {"metric": metric, "profile": who, "time": str(said["decided_at"]), "unique_id": said["decision_id"]}
    return {"data": {"type": "event", "attributes": {"properties": _properties(said), **told}}}


def _klaviyo_row(said: Mapping[str, Any], contact: Mapping[str, str]) -> dict[str, Any]:
    """One profile of Klaviyo's list import."""
    known = {"Email": contact.get("email", ""), "Phone Number": contact.get("phone", ""), "External ID": contact.get("external_id", "")}
    return {**known, **{f"ubiquo_{name}": value for name, value in _properties(said).items()}}


def _audience(said: Mapping[str, Any], contact: Mapping[str, str]) -> dict[str, Any]:
    """One member of an ad platform's audience: SHA-256 of the normalised address and number, as customer match takes them."""
    told = {"Email": contact.get("email", "").strip().lower(), "Phone": contact.get("phone", "")}
    return {name: hashlib.sha256(value.encode()).hexdigest() if value else "" for name, value in told.items()}


Shape = Callable[[Mapping[str, Any], Mapping[str, str]], dict[str, Any]]
_LINES: dict[str, Shape] = {"plain": _plain, "braze": _braze, "klaviyo": _klaviyo}
_ROWS: dict[str, Shape] = {"plain": _plain, "braze": _braze_row, "klaviyo": _klaviyo_row, "audience": _audience}
