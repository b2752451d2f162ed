"""What is true of the whole shop: its zone, its currency, the assumed margin and where its data ends."""

from __future__ import annotations

from datetime import datetime

import msgspec

from features.home import Home, MissingStateError, write_atomically


class Shop(msgspec.Struct, frozen=True, kw_only=True):
    """The shop whose events the log holds."""

    name: str
    timezone: str
    currency: str
    data_end: datetime
    """The moment up to which the imported data is complete."""
    margin_rate: float = 0.25
    """Assumed gross margin as a share of an item's price, where the source gives no cost."""

    def save(self, home: Home) -> None:
        """Write the shop's description into *home*."""
        write_atomically(home.shop, msgspec.json.format(msgspec.json.encode(self), indent=2))

    @classmethod
    def load(cls, home: Home) -> Shop:
        """Read the shop's description.

        Raises:
            MissingStateError: nothing has been imported yet.
        """
        if not home.shop.exists():
            raise MissingStateError(
                f"no shop is described in {home.root}: import its events first (python -m features import complete-journey)"
            )
        return msgspec.json.decode(home.shop.read_bytes(), type=cls)
