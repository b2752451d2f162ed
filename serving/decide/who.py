"""Whom an answer is about, and what they allow."""

from __future__ import annotations

from dataclasses import dataclass

from features.people.consent import Consents, standing
from features.people.identity import Identities


@dataclass(frozen=True)
class Who:
    """Whom an answer is about, and what they allow."""

    customer_id: str | None
    may_be_used: bool = True
    """Whether their data may be used for personalization."""
    forbidden_channels: frozenset[str] = frozenset()
    merged_ids: tuple[str, ...] = ()
    """The id that they have now and those that were merged into it, where they have had several."""

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids of theirs, the present one first; none of nobody known."""
        return () if self.customer_id is None else tuple(dict.fromkeys((*self.merged_ids, self.customer_id)))

    def not_reached(self, channel: str | None) -> str | None:
        """Why nothing may be decided that is to go out by *channel*; None where it may, or where nothing goes out."""
        return f"the customer has not permitted contact by {channel}" if channel in self.forbidden_channels else None


NOBODY = Who(None)


def who_is(identities: Identities, consents: Consents, customer_id: str | None) -> Who:
    """The customer with what they allow now, under the id that they have now; nobody where nobody is known by that id."""
    current = None if customer_id is None else identities.current(customer_id)
    if current is None or not identities.members(current):
        # whatever text was sent: what nobody is known by is not repeated, nor logged
        return Who(None, True, consents.forbidden_channels(()))
    allowed = standing(consents, identities, current)
    return Who(current, allowed.personalization, allowed.forbidden_channels, (current, *identities.former(current)))
