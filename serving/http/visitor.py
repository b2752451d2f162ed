"""What may be asked with a key that everybody can read, and told: questions of a page about its own visitor."""

from __future__ import annotations

from typing import Any

import msgspec

from serving.decide.questions import CustomerRequest, DeliveredRequest, RecommendationsRequest
from serving.http.problems import HttpProblem


def check_question(request: Any) -> None:
    """See that a question with a public key asks of its own cookie only.

    Raises:
        HttpProblem: it asks more; the field is named.
    """
    mend = "a page's key cannot ask this: ask from your server, with a key of the scope decide"
    if isinstance(request, CustomerRequest):
        if request.customer_id is not None:
            raise HttpProblem(403, "Not for a page", mend, "customer_id")
        for kind in request.identifiers:
            if kind != "cookie":
                raise HttpProblem(403, "Not for a page", f"a page speaks of its cookie only: {mend}", f"identifiers.{kind}")
    if isinstance(request, DeliveredRequest) and request.channel not in (None, "web"):
        # it would be promised as a message, and counted under the customer's caps
        raise HttpProblem(403, "Not for a page", mend, "channel")
    if isinstance(request, RecommendationsRequest) and request.explain:
        # it names what the customer has bought
        raise HttpProblem(403, "Not for a page", mend, "explain")


def without_ids(answer: Any) -> Any:
    """An answer without ubiquo's own ids of customers."""
    changed: dict[str, Any] = {}
    if getattr(answer, "customer_id", None) is not None:
        changed["customer_id"] = None
    if hasattr(answer, "events"):
        changed["events"] = [msgspec.structs.replace(receipt, customer_id=None) for receipt in answer.events]
    return msgspec.structs.replace(answer, **changed)
