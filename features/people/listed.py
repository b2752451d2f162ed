"""A list of customers in a file: their ids, or identifiers in clear, as other systems export them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from features.events.identifiers import KINDS, IdentifierError, IdentifierKind
from features.people.identity import Identities

CUSTOMER = "customer_id"
_THEIRS: dict[str, str] = {
    "external_id": "loyalty_card", "e-mail": "email", "email address": "email", "phone number": "phone", "phone_number": "phone",
    "identifier": "identifier",
}  # fmt: skip
"""What other systems call a column."""


class NamedCustomers(NamedTuple):
    """Who stands in a file.

    Attributes:
        customers: the ids that they have now, each once.
        unknown: how many rows name nobody who is known.
    """

    customers: list[str]
    unknown: int


class ListError(ValueError):
    """A list that cannot be read; the message names the file, the line and the fix."""


def read_list(path: Path, identities: Identities, region: str | None) -> NamedCustomers:
    """Read a list: a CSV with a column ``customer_id``, ``email``, ``phone`` or another kind of identifier, or a text file of one
    customer a line, as an id or as KIND:VALUE. Phone numbers without a country code are read in *region*.

    Raises:
        ListError: there is no such file, it is not UTF-8, has no such column, or a line is no identifier.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"{path} cannot be read ({error}): give a UTF-8 file") from None
    lines = text.splitlines()
    if not any(line.strip() for line in lines):
        raise ListError(f"{path} is empty: give one customer a line")
    columns = _columns(lines[0])
    rows = _from_csv(text, columns) if columns is not None else [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    found: dict[str, None] = {}
    unknown = 0
    for number, said in rows:
        try:
            customer = _customer(said, identities, region)
        except IdentifierError as error:
            raise ListError(f"{path}, line {number}: {error}") from None
        if customer is None:
            unknown += 1
        else:
            found[customer] = None
    return NamedCustomers(list(found), unknown)


def _columns(first: str) -> tuple[str, dict[str, str]] | None:
    """What divides the columns, and their name of each kind; None where the first line is a customer already."""
    for delimiter in ",;\t":
        names = [name.strip().strip('"') for name in first.split(delimiter)]
        known = {_kind(name): name for name in reversed(names) if _kind(name)}
        if known:
            return delimiter, known
    return None


def _kind(name: str) -> str:
    plain = _THEIRS.get(name.lower(), name.lower())
    return plain if plain in (CUSTOMER, "identifier", *KINDS) else ""


def _from_csv(text: str, columns: tuple[str, dict[str, str]]) -> list[tuple[int, str]]:
    delimiter, names = columns
    order: Sequence[str] = [kind for kind in (CUSTOMER, "identifier", *KINDS) if kind in names]
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    found = []
    for row in reader:
        told = next(((kind, value.strip()) for kind in order if (value := row.get(names[kind]) or "").strip()), None)
        if told is not None:
            kind, value = told
            found.append((reader.line_num, value if kind in (CUSTOMER, "identifier") else f"{kind}:{value.removeprefix(chr(39))}"))
    return found


def _customer(said: str, identities: Identities, region: str | None) -> str | None:
    kind, colon, value = said.partition(":")
    chosen: IdentifierKind | None = next((each for each in KINDS if each == kind), None)
    if colon and chosen is not None:
        return identities.resolve({chosen: value}, region)
    current = identities.current(said)
    return current if identities.members(current) else None
