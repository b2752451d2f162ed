"""Erasures that were asked for, as they lie on the disk until they are done, and their receipts."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from features.people.tombstones import Tombstones
from features.people.vault import Vault
from features.state.disk import write_atomically
from serving.privacy.holdings import Subject
from serving.privacy.proof import Proof

PENDING = ".pending"


class Order(msgspec.Struct):
    """An erasure that was asked for and is not done."""

    receipt_id: str
    subject: bytes
    """All that the customer is known by, encrypted: the stores lose it one after the other."""
    at: datetime
    at_once: dict[str, int] = {}
    """Place to how many rows were taken out as soon as it was asked for."""


class Receipt(msgspec.Struct):
    """What an erasure did; it names nobody."""

    receipt_id: str
    erased_at: datetime
    places: dict[str, int]
    """Place to how many rows were taken out, of all the erasures that were carried out together."""
    tombstones: int
    proof: Proof
    together: int = 1
    """How many erasures were carried out in this run."""


class Orders:
    """The folder of erasures; an order is there from when an erasure is asked for until it is done, and then its receipt is.

    Args:
        folder: where they lie.
        vault: what keeps whom an order is about.
        tombstones: what stands while one is not done.
    """

    def __init__(self, folder: Path, vault: Vault, tombstones: Tombstones) -> None:
        self._folder, self._vault, self._tombstones = folder, vault, tombstones

    def path(self, receipt_id: str) -> Path:
        """Where an order lies."""
        return self._folder / f"{receipt_id}{PENDING}"

    def _receipt_path(self, receipt_id: str) -> Path:
        return self._folder / f"{receipt_id}.json"

    def is_pending(self, receipt_id: str) -> bool:
        """Whether an erasure was asked for and is not done."""
        return self.path(receipt_id).exists()

    def write(self, receipt_id: str, subject: Subject, at: datetime, at_once: dict[str, int] | None = None) -> None:
        """Write an order down for good."""
        order = Order(receipt_id, self._vault.encrypt(msgspec.json.encode(subject)), at, at_once or {})
        write_atomically(self.path(receipt_id), msgspec.json.encode(order))

    def pending(self) -> Iterator[tuple[Order, Subject]]:
        """What was asked for and is not done."""
        for path in sorted(self._folder.glob(f"*{PENDING}")):
            order = msgspec.json.decode(path.read_bytes(), type=Order)
            subject = msgspec.json.decode(self._vault.decrypt(order.subject), type=Subject)
            if self._receipt_path(order.receipt_id).exists():
                # carried out, and broken off before it was put away: again it would take what began anew since
                self._put_away(order, subject)
            else:
                yield order, subject

    def end(self, order: Order, subject: Subject, receipt: Receipt) -> None:
        """Write the receipt, and end the erasure."""
        write_atomically(self._receipt_path(order.receipt_id), msgspec.json.encode(receipt))
        self._put_away(order, subject)

    def _put_away(self, order: Order, subject: Subject) -> None:
        self._tombstones.settle(subject.keys, order.at)
        self.path(order.receipt_id).unlink()

    def receipt(self, receipt_id: str) -> Receipt | None:
        """The receipt of an erasure that is done."""
        path = self._receipt_path(receipt_id)
        return msgspec.json.decode(path.read_bytes(), type=Receipt) if path.exists() else None
