"""What the parts of a ``mapping.yaml`` may say, each a type of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from features.catalogue.tables import AttributeKind

UNSAID = "TO BE FILLED IN"
"""What a proposed mapping says where only its owner can."""
EPOCHS = {"epoch_seconds": 1, "epoch_milliseconds": 1000}
"""Formats of times that are numbers since 1970, with how many of them make a second."""
NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]


class MappingError(ValueError):
    """A mapping that cannot be used; the message names the file, the key and the fix."""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a mapping; a key that it does not know is refused."""


class TextPart(Strict, frozen=True):
    """A text from columns (joined by ``-``) or one fixed value; ``values`` translates, and what it lacks is rejected."""

    column: NonEmpty | None = None
    columns: list[NonEmpty] = []
    value: NonEmpty | None = None
    values: dict[str, NonEmpty] = {}
    is_integer: bool = False
    """The column holds whole numbers, perhaps written 17850.0: take 17850."""

    @property
    def used(self) -> list[str]:
        """The columns that it reads."""
        return [self.column] if self.column else list(self.columns)


class AttributePart(TextPart, frozen=True):
    """An attribute of items: a text, a number written as ``files`` says, or a list of texts divided by ``split``."""

    holds: AttributeKind = "text"
    split: Annotated[str, msgspec.Meta(min_length=1, max_length=1)] = "|"


class TimePart(Strict, frozen=True):
    """A time from a column, or a date and a time of day from two: ISO 8601 unless ``format`` says otherwise.

    ``columns`` are joined by a blank before they are read; ``format`` is that of strptime, ``epoch_seconds`` or ``epoch_milliseconds``.
    """

    column: NonEmpty | None = None
    columns: Annotated[list[NonEmpty], msgspec.Meta(max_length=2)] = []
    format: NonEmpty | None = None
    timezone: NonEmpty | None = None
    """The zone of times that do not carry their own."""

    @property
    def used(self) -> list[str]:
        """The columns that it reads."""
        return [self.column] if self.column else list(self.columns)


class KnownPart(Strict, frozen=True):
    """From when on a row may be used: a time of its own, or so many hours after it occurred."""

    time: TimePart | None = None
    after_hours: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class NumberPart(Strict, frozen=True):
    """A whole number from a column; ``fractions: round_up`` takes 0.53 (of a kilogram) as 1."""

    column: NonEmpty
    fractions: Literal["reject", "round_up"] = "reject"


class MoneyPart(Strict, frozen=True):
    """An amount from a column, for the whole line or a single unit, in major (pounds) or minor (pence) units."""

    column: NonEmpty
    per: Literal["line", "unit"] = "line"
    unit: Literal["major", "minor"] = "major"


class Condition(Strict, frozen=True):
    """What must hold of a column's value; with several tests all must hold, and ``negate`` turns the whole round."""

    column: NonEmpty
    matches: NonEmpty | None = None
    one_of: list[str] = []
    below: float | None = None
    above: float | None = None
    empty: bool | None = None
    negate: bool = False


class Skip(Strict, frozen=True):
    """Rows that are no customer's doing: left out, and counted under their reason."""

    when: Annotated[list[Condition], msgspec.Meta(min_length=1)]
    because: NonEmpty


class Refunds(Strict, frozen=True):
    """Rows that take a purchase back: they become ``refund`` events with positive quantities, tied to no purchase."""

    when: Annotated[list[Condition], msgspec.Meta(min_length=1)]


class ShopPart(Strict, frozen=True):
    """The shop that the events belong to; several sources may share it, so what one does not name is not reset by it."""

    name: NonEmpty
    timezone: NonEmpty
    currency: NonEmpty
    margin_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] | msgspec.UnsetType = msgspec.UNSET
    phone_region: Annotated[str, msgspec.Meta(pattern="^[A-Z]{2}$")] | msgspec.UnsetType | None = msgspec.UNSET
    domain: NonEmpty | msgspec.UnsetType = msgspec.UNSET
    churn_horizon_days: Annotated[int, msgspec.Meta(ge=7, le=365)] | msgspec.UnsetType | None = msgspec.UNSET
    private_brands: tuple[NonEmpty, ...] | msgspec.UnsetType = msgspec.UNSET
    broad_campaign_types: tuple[NonEmpty, ...] | msgspec.UnsetType = msgspec.UNSET

    def named(self) -> dict[str, Any]:
        """What the mapping names, and nothing else."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not msgspec.UNSET}


class Files(Strict, frozen=True):
    """How the files are written. The kind follows from the name's ending unless told: .csv .tsv .txt, .jsonl .ndjson, .parquet."""

    kind: Literal["csv", "jsonl", "parquet"] | None = None
    encoding: NonEmpty = "utf-8"
    delimiter: Annotated[str, msgspec.Meta(min_length=1, max_length=1)] | None = None
    decimal: Literal[".", ","] = "."
    thousands: Literal["", ",", ".", " ", "'"] = ""
    """What divides thousands; a blank stands for those that do not break a line too."""
    empty: tuple[str, ...] = ("", "NULL", "null", "NaN", "nan", "\\N")
    """What stands for no value."""


class ConsentPart(Strict, frozen=True):
    """On what basis the rows were collected, and for which purposes they may be used."""

    basis: NonEmpty
    purposes: list[NonEmpty]


class EventPart(Strict, frozen=True):
    """The fields of the event itself; rows with the same ``id`` are the lines of one event."""

    name: str | TextPart
    occurred_at: TimePart
    id: str | TextPart | None = None
    """Absent: a digest of the row, so that equal rows are one event."""
    known_at: KnownPart = KnownPart()
    currency: str | TextPart | None = None
    channel: str | TextPart | None = None
    identifiers: dict[str, str | TextPart] = {}
    store_id: str | TextPart | None = None
    session_id: str | TextPart | None = None
    offer_id: str | TextPart | None = None
    campaign_id: str | TextPart | None = None
    query: str | TextPart | None = None
    traits: dict[NonEmpty, str | TextPart] = {}
    across_files: Literal["same", "join"] = "same"
    """An event found in two files must be the same in both (overlapping exports), or is to be joined (an export cut into parts)."""


class ItemPart(Strict, frozen=True):
    """The item of each row."""

    id: str | TextPart
    quantity: NumberPart | None = None
    amount: MoneyPart | None = None
    discount: MoneyPart | None = None
    coupon: MoneyPart | None = None
    leave_out: list[Condition] = []
    """Lines that are no items (postage, fees): any of these conditions leaves the line out of its event."""
    attributes: dict[str, str | AttributePart] = {}
    """Attributes for the catalogue, where it does not know the item yet; of several the most frequent. One that the domain does not
    know is the shop's own, and says what it ``holds``. ``name``, ``price_minor``, ``image_url`` and ``url`` are shown in answers."""
