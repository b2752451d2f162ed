"""What was sent to the customer: when, by which channel, which offer, and by which decision."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from features.definitions.feature import Moment
from features.definitions.folds.fold import Fold, Output, Touch, take_newest

MESSAGE_LIMIT = 1_000
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
    """The newest messages, oldest first."""

    sent: list[Message] = []


class MessagesFold(Fold[Messages]):
    """The messages sent last."""

    name = "messages"
    scope = "customer"
    state = Messages
    reads = frozenset({"message_sent"})
    outputs = (
        Output("contacted_at", "integers", "when the shop sent the customer its last messages (Unix seconds), oldest first"),
        Output("contacted_by", "texts", "by which channel"),
        Output("contacted_offers", "texts", "with which offer ('' for none)"),
        Output("contacted_decisions", "texts", "by which decision of ubiquo ('' for none)"),
    )

    def step(self, state: Messages, touch: Touch) -> None:
        """Take in a message."""
        sent = Message(touch.at, touch.key, touch.channel or "", touch.offer_id or "", touch.decision_id or "")
        take_newest(state.sent, sent, MESSAGE_LIMIT)
        _forget(state)

    def joined(self, one: Messages, other: Messages) -> Messages:
        """The newest of both's."""
        both = Messages(sorted({*one.sent, *other.sent})[-MESSAGE_LIMIT:])
        _forget(both)
        return both

    def features(self, state: Messages, moment: Moment) -> dict[str, Any]:
        """Message by message, the oldest first."""
        return {
            "contacted_at": [message.at for message in state.sent],
            "contacted_by": [message.channel for message in state.sent],
            "contacted_offers": [message.offer_id for message in state.sent],
            "contacted_decisions": [message.decision_id for message in state.sent],
        }


def _forget(state: Messages) -> None:
    oldest = state.sent[-1].at - MESSAGE_DAYS * 86_400 if state.sent else 0
    if state.sent and state.sent[0].at < oldest:
        state.sent = [message for message in state.sent if message.at >= oldest]
