"""What is asked about and done to one customer over HTTP: their profile, export and erasure. Each is audited."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from urllib.parse import unquote

import msgspec

from features.events.event import explain
from features.events.identifiers import IdentifierError
from features.store.profile import UnknownCustomerError, profile
from serving.decide.questions import CustomerRequest
from serving.http.problems import HttpProblem
from serving.runtime import Runtime

Reply = tuple[int, bytes, bytes]
ERASURES = "/v1/erasures/"
PATIENCE_SECONDS = 2.0
"""How long an erasure is waited for before the caller is told where to ask for its receipt."""
JSON, LINES = b"application/json", b"application/x-ndjson"


class CustomerDesk:
    """Answers ``POST /v1/profile``, ``GET`` and ``DELETE /v1/customers/{id}``, ``GET /v1/customers/{id}/export`` and
    ``GET /v1/erasures/{receipt}``.
    """

    def work(self, runtime: Runtime, method: str, path: str, body: bytes, key: str) -> Callable[[], Reply]:
        """What answers one request of the caller whose key is named *key*; it may take long, and raises ``HttpProblem`` for nobody.

        Raises:
            HttpProblem: the request is mistaken.
        """
        if path.startswith(ERASURES):
            if method != "GET":
                raise HttpProblem(405, "Method not allowed", "this takes GET")
            return partial(self._erasure, runtime, path.removeprefix(ERASURES))
        action, customer_id = self._asked(runtime, method, path, body)
        return partial(self._answer, runtime, action, customer_id, key)

    def _answer(self, runtime: Runtime, action: str, customer_id: str, key: str) -> Reply:
        at = runtime.clock()
        try:
            reply = {"read": self._read, "export": self._export, "erase": self._erase}[action](runtime, customer_id)
        except UnknownCustomerError as error:
            runtime.audit.note(at, key, action, customer_id, "unknown")
            raise HttpProblem(404, "Not found", str(error)) from None
        except BaseException:
            runtime.audit.note(at, key, action, customer_id, "failed")
            raise
        # before the answer leaves: what was read is in the audit log whoever hangs up
        runtime.audit.note(at, key, action, customer_id, "done")
        return reply

    @staticmethod
    def _asked(runtime: Runtime, method: str, path: str, body: bytes) -> tuple[str, str]:
        if path == "/v1/profile":
            if method != "POST":
                raise HttpProblem(405, "Method not allowed", "/v1/profile takes POST")
            try:
                request = msgspec.json.decode(body, type=CustomerRequest)
                found = request.customer_id or runtime.identities.resolve(request.identifiers, runtime.phone_region)
            except msgspec.ValidationError as error:
                field, reason = explain(error, CustomerRequest)
                raise HttpProblem(400, "Bad request", reason, field) from None
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise HttpProblem(400, "Bad request", f"the body is not valid JSON: {error}", "$") from None
            except IdentifierError as error:
                kind, _, mend = str(error).partition(": ")
                raise HttpProblem(400, "Bad request", mend, f"identifiers.{kind}") from None
            return "read", found or "nobody"
        name, _, more = path.removeprefix("/v1/customers/").partition("/")
        actions = {("GET", ""): "read", ("GET", "export"): "export", ("DELETE", ""): "erase"}
        if (method, more) not in actions:
            if more in ("", "export"):
                raise HttpProblem(405, "Method not allowed", "this takes GET" + ("" if more else " and DELETE"))
            raise HttpProblem(404, "Not found", "there is nothing here: /openapi.json lists what there is")
        return actions[method, more], unquote(name)

    @staticmethod
    def _read(runtime: Runtime, customer_id: str) -> Reply:
        # what was just acknowledged belongs on the page
        runtime.intake.drain()
        told = profile(runtime.home, runtime.identities, runtime.consents, runtime.contacts, customer_id)
        who = runtime.who(customer_id)
        # what they are at right now, as far as it may be used
        told["now"] = dict(runtime.reader.present(who.customer_id, runtime.clock())) if who.may_be_used else None
        return 200, msgspec.json.encode(told), JSON

    @staticmethod
    def _export(runtime: Runtime, customer_id: str) -> Reply:
        return 200, b"".join(runtime.office.export(customer_id)), LINES

    @staticmethod
    def _erase(runtime: Runtime, customer_id: str) -> Reply:
        return _receipt(runtime, runtime.office.begin(customer_id), PATIENCE_SECONDS)

    @staticmethod
    def _erasure(runtime: Runtime, receipt_id: str) -> Reply:
        try:
            return _receipt(runtime, receipt_id, 0.0)
        except LookupError as error:
            raise HttpProblem(404, "Not found", str(error)) from None


def _receipt(runtime: Runtime, receipt_id: str, patience: float) -> Reply:
    try:
        return 200, msgspec.json.encode(runtime.office.receipt(receipt_id, patience)), JSON
    except TimeoutError:
        # a failed one is logged, and tried again
        return 202, msgspec.json.encode({"receipt_id": receipt_id, "state": "running", "ask": f"{ERASURES}{receipt_id}"}), JSON
