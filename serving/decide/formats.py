"""How other tools load a CSV: the one table of their columns and encodings, for batches, audiences and the outbox alike."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args
from zoneinfo import ZoneInfo

FormatName = Literal["plain", "excel", "braze", "klaviyo", "audience"]
CONTACT = ("external_id", "email", "phone")
"""What is told of how a customer is reached; the first is the identifier by which other systems know them."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a text begins with that a spreadsheet takes for a formula."""


@dataclass(frozen=True)
class FileFormat:
    """The CSV that one tool loads.

    Attributes:
        about: for what it is.
        contact: their name of each of ``CONTACT`` that they load, in their order.
        prefix: what stands before the names of all other columns.
        by_customer: one row a customer, a list's places side by side; else one row a place, with the id of the customer.
        encoding: of the text.
        keeps_plus: phone numbers stay as they are: the tool reads them, and no spreadsheet does.
        is_hashed: addresses and numbers leave as SHA-256, and nothing else does.
        has_dates: times are written as a spreadsheet reads them, in the shop's zone.
    """

    about: str
    contact: Mapping[str, str]
    prefix: str = ""
    by_customer: bool = False
    encoding: str = "utf-8"
    keeps_plus: bool = True
    is_hashed: bool = False
    has_dates: bool = False

    def row(self, customer_id: str, contact: Mapping[str, str], told: Mapping[str, Any]) -> dict[str, Any]:
        """One row of the file, by their columns, of what is *told* of a customer by ours."""
        if self.is_hashed:
            plain = {"email": contact.get("email", "").strip().lower(), "phone": contact.get("phone", "")}
            return {theirs: _digest(plain[ours]) for ours, theirs in self.contact.items()}
        known = {theirs: contact.get(ours, "") for ours, theirs in self.contact.items()}
        if not self.by_customer:
            return {"customer_id": customer_id, **known, **told}
        if self.contact.get("external_id") == "external_id":
            # it finds its users by this alone
            known["external_id"] = contact.get("external_id", customer_id)
        return {**known, **{f"{self.prefix}{name}": value for name, value in told.items()}}

    def harmless(self, value: Any, zone: ZoneInfo | None = None) -> Any:
        """A value as it may stand in the file: no text that a spreadsheet takes for a formula."""
        if isinstance(value, datetime):
            return f"{value.astimezone(zone):%Y-%m-%d %H:%M:%S}" if self.has_dates and zone is not None else value.isoformat()
        if not isinstance(value, str) or not value.startswith(_FORMULA):
            return value
        is_number = value[1:].replace(" ", "").isdigit()
        return value if is_number and self.keeps_plus and value[0] in "+-" else f"'{value}"


FORMATS: dict[FormatName, FileFormat] = {
    "plain": FileFormat("any program: UTF-8, commas", {name: name for name in CONTACT}),
    "excel": FileFormat(
        "Excel: UTF-8 with a mark, times in the shop's zone", {name: name for name in CONTACT}, encoding="utf-8-sig", keeps_plus=False,
        has_dates=True,
    ),
    "braze": FileFormat("Braze's import of users", {name: name for name in CONTACT}, prefix="ubiquo_", by_customer=True),
    "klaviyo": FileFormat(
        "Klaviyo's import of profiles", {"email": "Email", "phone": "Phone Number", "external_id": "External ID"}, prefix="ubiquo_",
        by_customer=True,
    ),
    "audience": FileFormat(
        "customer match of an ad platform: SHA-256 of addresses and numbers", {"email": "Email", "phone": "Phone"}, by_customer=True,
        is_hashed=True,
    ),
}  # fmt: skip


def format_named(name: str, option: str = "--for") -> FormatName:
    """The format of that name.

    Raises:
        ValueError: there is none; the message names *option* and those that there are.
    """
    found = next((each for each in get_args(FormatName) if each == name), None)
    if found is None:
        raise ValueError(f"{option} {name!r} is not one of {', '.join(get_args(FormatName))}")
    chosen: FormatName = found
    return chosen


def header(columns: Sequence[str], form: FileFormat, delimiter: str = ",") -> bytes:
    """The first line of a file."""
    return _lines([dict(zip(columns, columns, strict=True))], columns, delimiter).encode(form.encoding)


def encoded(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], form: FileFormat, delimiter: str, zone: ZoneInfo | None) -> bytes:
    """Rows as lines of a file that has its header."""
    plain = [{name: form.harmless(value, zone) for name, value in row.items()} for row in rows]
    # the mark stands at the beginning of a file alone
    return _lines(plain, columns, delimiter).encode("utf-8")


def _lines(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), delimiter=delimiter, extrasaction="ignore")
    writer.writerows(rows)
    return text.getvalue()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() if text else ""
