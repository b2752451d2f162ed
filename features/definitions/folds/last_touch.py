"""Where the customer was last: channel, store and time."""

from __future__ import annotations

from typing import Any

import msgspec

from features.definitions.feature import Moment
from features.definitions.folds.fold import DONE_TO_THEM, Fold, Output, Touch


class LastTouch(msgspec.Struct):
    """By channel ('' where none was told) when the customer was there last (Unix seconds), and in which store ('' for none)."""

    channels: dict[str, tuple[int, str]] = {}
    zone: tuple[int, str] = (0, "")
    """The time zone that was told last, and when."""


class LastTouchFold(Fold[LastTouch]):
    """The last time in each channel."""

    name = "last_touch"
    scope = "customer"
    state = LastTouch
    outputs = (
        Output("last_touch_at", "integer", "when the customer did anything last (Unix seconds)"),
        Output("last_channel", "text", "through which channel"),
        Output("last_store_id", "text", "the store where they were last"),
        Output("channels_used", "texts", "every channel that they used, the last first"),
        Output("channels_used_at", "integers", "when each was used last (Unix seconds)"),
        Output("timezone", "text", "the time zone that their device told last"),
    )

    def step(self, state: LastTouch, touch: Touch) -> None:
        """Take in where the customer was."""
        if touch.name not in DONE_TO_THEM:
            self._take(state, touch.channel or "", (touch.at, touch.store_id or ""))
            if touch.timezone:
                state.zone = max(state.zone, (touch.at, touch.timezone))

    def joined(self, one: LastTouch, other: LastTouch) -> LastTouch:
        """The later of both, channel by channel."""
        both = LastTouch(dict(one.channels), max(one.zone, other.zone))
        for channel, last in other.channels.items():
            self._take(both, channel, last)
        return both

    def features(self, state: LastTouch, moment: Moment) -> dict[str, Any]:
        """The last of all, and of each channel."""
        if not state.channels:
            return dict(self.nothing())
        # of two at the same moment one always comes first
        newest = sorted(((at, channel, store) for channel, (at, store) in state.channels.items()), reverse=True)
        return {
            "last_touch_at": newest[0][0],
            "last_channel": newest[0][1] or None,
            "last_store_id": next((store for _, _, store in newest if store), None),
            "channels_used": [channel for _, channel, _ in newest if channel],
            "channels_used_at": [at for at, channel, _ in newest if channel],
            "timezone": state.zone[1] or None,
        }

    @staticmethod
    def _take(state: LastTouch, channel: str, last: tuple[int, str]) -> None:
        state.channels[channel] = max(state.channels.get(channel, last), last)
