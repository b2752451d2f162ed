"""What journeys and the outbox ask of the rest of the service: who a customer is, what is known of them, an offer, and that it was sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from typing import Any

from features.definitions.folds.registered import NAMES
from features.people.consent import Consents
from features.people.contacts import Contacts
from features.people.identity import Identities
from features.state.home import Home
from features.state.ports import MissingStateError
from features.store.decision_log import DecisionLog
from serving.decide.addresses import Addresses, contact_of
from serving.decide.engine import Engine
from serving.decide.questions import NextBestOfferRequest, OffersAnswer
from serving.decide.reader import OnlineReader
from serving.decide.who import who_is
from serving.journeys.outbox import GONE, WITHDRAWN
from serving.journeys.outgoing import Outgoing
from serving.journeys.today import Today

Take = Callable[[list[dict[str, Any]]], Any]
"""Takes events in, as clients send them.

Raises:
    RuntimeError: they cannot be stored for now.
"""


class JourneyDesk:
    """The service, as seen by journeys (``Decider``) and the outbox (``People``).

    Args:
        take: takes events in; None where no service runs.
        forget: gives back what a decision held.
    """

    def __init__(
        self,
        home: Home,
        engine: Engine | None,
        reader: OnlineReader | None,
        decisions: DecisionLog | None,
        identities: Identities,
        consents: Consents,
        contacts: Contacts,
        take: Take | None,
        forget: Callable[[str], None],
    ) -> None:
        self._forget = forget
        self._home, self._engine, self._reader, self._decisions, self._take = home, engine, reader, decisions, take
        self._identities, self._consents, self._contacts = identities, consents, contacts
        self._addresses = Addresses(identities, contacts)

    # --- for journeys

    def present(self, customer_id: str) -> tuple[str, tuple[str, ...]] | None:
        """The id that a customer has now, and all of theirs; None where nobody is known by it any more."""
        who = who_is(self._identities, self._consents, customer_id)
        return None if who.customer_id is None else (who.customer_id, who.ids)

    def row(self, customer_id: str, now: datetime) -> Mapping[str, Any] | None:
        """Their features; None where their data may not be used."""
        engine, reader = self._parts()
        who = who_is(self._identities, self._consents, customer_id)
        if not who.may_be_used or who.customer_id is None:
            return None
        return reader.row(engine.models[self._model(engine)], who.customer_id, now, NAMES)

    def offer(self, customer_id: str, request: NextBestOfferRequest, decision_id: str, now: datetime) -> OffersAnswer:
        """Decide an offer, as for any other question, and log it."""
        engine, reader = self._parts()
        name, who = self._model(engine), who_is(self._identities, self._consents, customer_id)
        row = reader.row(engine.models[name], who.customer_id, now, engine.reads(name, request.reached_by)) if who.may_be_used else {}
        answer, record = engine.next_best_offer(name, request, who, row, now, decision_id)
        assert self._decisions is not None
        self._decisions.append(record)
        return answer

    def release(self, decision_id: str) -> None:
        """Nothing will come of that decision."""
        self._forget(decision_id)

    def everybody(self) -> Iterable[str]:
        """The ids of all customers."""
        return self._identities.customers()

    def facts_of_day(self, day: date) -> Callable[[str, Mapping[str, Any], datetime], Mapping[str, Any]]:
        """What tells the facts of that day about a customer with these features."""
        return Today(self._home, self._identities, self._contacts, day).of

    # --- for the outbox

    def may_reach(self, customer_id: str, channel: str) -> str | None:
        """Why a customer may not be contacted by that channel; None where they may."""
        who = who_is(self._identities, self._consents, customer_id)
        if who.customer_id is None:
            return GONE
        return WITHDRAWN if channel in who.forbidden_channels else None

    def contact(self, customer_id: str) -> Mapping[str, str]:
        """Their ``external_id``, ``email`` and ``phone``, in clear, as far as they are known; of several the one told last."""
        return contact_of(self._clear(customer_id))

    def sent(self, message: Outgoing, now: datetime) -> None:
        """Take in that a message was sent, once however often it is told."""
        told = self._clear(message.customer_id)
        if self._take is None or not told:
            return
        said = message.offer()
        kind = next(iter(told))
        self._take(
            [
                {
                    "event_id": f"sent-{message.decision_id}", "name": "message_sent", "occurred_at": now.isoformat(),
                    "channel": message.channel, "identifiers": {kind: told[kind]}, "campaign_id": said["campaign_id"],
                    "offer_id": said["offer_id"], "decision_id": message.decision_id,
                }
            ]
        )  # fmt: skip

    def _clear(self, customer_id: str) -> dict[str, str]:
        """The identifiers of a customer in clear, by kind, the strongest first; of several of a kind the one told last."""
        return self._addresses.clear([customer_id])[customer_id]

    def _parts(self) -> tuple[Engine, OnlineReader]:
        assert self._engine is not None
        assert self._reader is not None
        return self._engine, self._reader

    @staticmethod
    def _model(engine: Engine) -> str:
        name = next((name for name, model in engine.models.items() if model.kind.answers == "offers"), None)
        if name is None:
            raise MissingStateError("no model that mlflow.yaml names answers with offers: name one (kind: next-best-offer)")
        return name
