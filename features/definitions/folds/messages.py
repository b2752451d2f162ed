"""What was sent to the customer, what of it they answered, and when they complained last."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from features.definitions.feature import Moment
from features.definitions.folds.fold import Fold, Output, Touch, take_newest

MESSAGE_LIMIT = 1_000
ANSWERS = frozenset({"message_click", "offer_accept", "offer_decline", "offer_redeem", "select_promotion"})
"""What a customer does to a message or an offer that they answer, be it with no."""
COMPLAINT = "complaint"
MESSAGE_DAYS = 32
"""How far back from the newest messages are kept: a calendar month is no longer."""


class Message(NamedTuple):
    """One message: when it was sent (Unix seconds), by which event, and '' for what was not told."""

    at: int
    key: str
    channel: str
    offer_id: str
    decision_id: str


class Messages(msgspec.Struct):
    """The newest messages and answers, oldest first."""

    sent: list[Message] = []
    answered: list[Message] = []
    complained_at: int = 0


class MessagesFold(Fold[Messages]):
    """The messages sent last, and the answers."""

    name = "messages"
    scope = "customer"
    state = Messages
    reads = frozenset({"message_sent", COMPLAINT, *ANSWERS})
    outputs = (
        Output("contacted_at", "integers", "when the shop sent the customer its last messages (Unix seconds), oldest first"),
        Output("contacted_by", "texts", "by which channel"),
        Output("contacted_offers", "texts", "with which offer ('' for none)"),
        Output("contacted_decisions", "texts", "by which decision of ubiquo ('' for none)"),
        Output("answered_at", "integers", "when they answered a message or an offer (Unix seconds), oldest first"),
        Output("answered_offers", "texts", "which offer they answered ('' for none)"),
        Output("answered_decisions", "texts", "which decision of ubiquo they answered ('' for none)"),
        Output("complained_at", "integer", "when they complained last (Unix seconds)"),
    )

    def step(self, state: Messages, touch: Touch) -> None:
        """Take in a message, an answer or a complaint."""
        if touch.name == COMPLAINT:
            state.complained_at = max(state.complained_at, touch.at)
            return
        message = Message(touch.at, touch.key, touch.channel or "", touch.offer_id or "", touch.decision_id or "")
        take_newest(state.answered if touch.name in ANSWERS else state.sent, message, MESSAGE_LIMIT)
        _forget(state)

    def joined(self, one: Messages, other: Messages) -> Messages:
        """The newest of both's."""
        sent, answered = ({*one.sent, *other.sent}, {*one.answered, *other.answered})
        complained_at = max(one.complained_at, other.complained_at)
        both = Messages(sorted(sent)[-MESSAGE_LIMIT:], sorted(answered)[-MESSAGE_LIMIT:], complained_at)
        _forget(both)
        return both

    def features(self, state: Messages, moment: Moment) -> dict[str, Any]:
        """Message by message, the oldest first."""
        return {
            "contacted_at": [message.at for message in state.sent],
            "contacted_by": [message.channel for message in state.sent],
            "contacted_offers": [message.offer_id for message in state.sent],
            "contacted_decisions": [message.decision_id for message in state.sent],
            "answered_at": [answer.at for answer in state.answered],
            "answered_offers": [answer.offer_id for answer in state.answered],
            "answered_decisions": [answer.decision_id for answer in state.answered],
            "complained_at": state.complained_at or None,
        }


def _forget(state: Messages) -> None:
    state.sent, state.answered = _recent(state.sent), _recent(state.answered)


def _recent(messages: list[Message]) -> list[Message]:
    """Those of the last days before the newest; what is within them is the same in whatever order it came."""
    oldest = messages[-1].at - MESSAGE_DAYS * 86_400 if messages else 0
    return messages if not messages or messages[0].at >= oldest else [message for message in messages if message.at >= oldest]
