"""What is true of the whole shop: its zone, its currency, the assumed margin and where its data ends."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from features.people.consent import ConsentPolicy
from features.state.disk import DamagedStateError, write_atomically
from features.state.home import Home
from features.state.ports import MissingStateError


class Shop(msgspec.Struct, frozen=True, kw_only=True):
    """The shop whose events the log holds."""

    name: str
    timezone: str
    currency: str
    data_end: datetime
    """The moment up to which the imported data is complete."""
    margin_rate: float = 0.25
    """Assumed gross margin as a share of an item's price, where the source gives no cost."""

    domain: str = ""
    """The trade whose features, item attributes and idea of leaving apply: a file of ``features/definitions/domains``; unsaid, grocery."""
    churn_horizon_days: int | None = None
    """Without a purchase for so many days a customer counts as gone; None is what the domain says."""
    phone_region: str | None = None
    """The country (ISO 3166) whose phone numbers may come without their country code."""
    consent: ConsentPolicy = msgspec.field(default_factory=ConsentPolicy)
    """What may be done with the data of customers who have said nothing."""
    private_brands: tuple[str, ...] = ()
    """The brands that are the shop's own."""
    broad_campaign_types: tuple[str, ...] = ()
    """The types of campaigns that go to customers at large; all others are aimed at a few."""

    @classmethod
    def described(cls, standing: Shop | None, **said: Any) -> Shop:
        """The shop as a source describes it, added to what *standing* already holds.

        What the source says wins, what it does not say stays, and the data ends with the later of the two.

        Raises:
            ValueError: they are two shops.
        """
        described = cls(**said)
        if standing is None:
            return described
        for field in ("name", "timezone", "currency", *(["domain"] if "domain" in said and standing.domain else [])):
            mine, theirs = getattr(described, field), getattr(standing, field)
            if mine != theirs:
                raise ValueError(
                    f"shop.{field}: this home holds the shop {standing.name!r} with {field} {theirs!r}, not {mine!r}: "
                    "say the same, or give another UBIQUO_HOME"
                )
        return msgspec.structs.replace(standing, **said | {"data_end": max(described.data_end, standing.data_end)})

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
            raise MissingStateError(f"no shop is described in {home.root}: import its events first (python -m features import)")
        try:
            return msgspec.json.decode(home.shop.read_bytes(), type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DamagedStateError(f"{home.shop} is damaged ({error}): put it back from a backup, or import again") from None
