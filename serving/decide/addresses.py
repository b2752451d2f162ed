"""How customers are reached, in clear: what only leaves for those who permit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from features.people.contacts import Contacts
from features.people.identity import Identities
from features.people.vault import IDENTIFIER

EXTERNAL = ("loyalty_card", "user_id")
"""The identifiers by which other systems know a customer, the likelier first."""
NEEDED = {"email": ("email", "no e-mail address is known"), "sms": ("phone", "no phone number is known"),
          "call_centre": ("phone", "no phone number is known")}  # fmt: skip
"""By channel what a file must tell of a customer, and what is said where it cannot."""


class Addresses:
    """What the contact table holds of customers, as far as other tools ask for it."""

    def __init__(self, identities: Identities, contacts: Contacts) -> None:
        self._identities, self._contacts = identities, contacts

    def clear(self, customers: Sequence[str]) -> dict[str, dict[str, str]]:
        """By customer their identifiers in clear, by kind, the strongest first; of several of a kind the one told last."""
        keys = {customer: self._identities.members(self._identities.current(customer)) for customer in customers}
        clear: dict[str, str] = {}
        # oldest first: the place of a key tells how new it is
        for contact in self._contacts.of([key for each in keys.values() for key in each]):
            if contact.field == IDENTIFIER:
                clear[contact.identity_key] = contact.value
        place = {key: number for number, key in enumerate(clear)}
        found: dict[str, dict[str, str]] = {}
        for customer, each in keys.items():
            newest: dict[str, str] = {}
            for key in sorted((key for key in each if key in clear), key=place.__getitem__):
                newest[key.partition(":")[0]] = clear[key]
            found[customer] = {kind: newest[kind] for kind in dict.fromkeys(key.partition(":")[0] for key in each) if kind in newest}
        return found

    def of(self, customers: Sequence[str]) -> dict[str, Mapping[str, str]]:
        """By customer ``external_id``, ``email`` and ``phone`` in clear, as far as they are known; of several the one told last."""
        return {customer: contact_of(clear) for customer, clear in self.clear(customers).items()}


def contact_of(clear: Mapping[str, str]) -> Mapping[str, str]:
    """What other tools ask for, of identifiers by kind."""
    external = next((clear[kind] for kind in EXTERNAL if kind in clear), None)
    known = {name: clear[name] for name in ("email", "phone") if name in clear}
    return known if external is None else {"external_id": external, **known}


def missing(contact: Mapping[str, str], channel: str | None) -> str | None:
    """Why a customer with this contact data cannot be reached by a channel through a file; None where they can."""
    needed = NEEDED.get(channel or "")
    return needed[1] if needed is not None and not contact.get(needed[0]) else None
