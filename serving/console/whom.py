"""Whom a page is about: found by whatever was typed of them."""

from __future__ import annotations

from features.events.identifiers import KINDS, IdentifierError
from serving.runtime import Runtime


def known_by(runtime: Runtime, asked: str) -> dict[str, list[str]]:
    """Each customer that *asked* leads to, with the kinds of identifier by which it does."""
    found: dict[str, list[str]] = {}
    current = runtime.identities.current(asked)
    if runtime.identities.members(current):
        found[current] = ["customer_id"]
    for kind in KINDS:
        try:
            customer = runtime.identities.resolve({kind: asked}, runtime.phone_region)
        except IdentifierError:
            continue
        if customer is not None:
            found.setdefault(customer, []).append(kind)
    return found
