"""The kinds of identifiers, from the strongest to the weakest, and the one form in which each value is compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import phonenumbers
from email_validator import EmailNotValidError, validate_email

IdentifierKind = Literal["loyalty_card", "user_id", "email", "phone", "device", "cookie", "receipt"]
KINDS: tuple[IdentifierKind, ...] = get_args(IdentifierKind)
RANK: dict[str, int] = {kind: rank for rank, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Rule:
    """What a kind of identifier can prove.

    Attributes:
        names_a_person: it belongs to somebody; the others belong to a thing that several people may use.
        most: how many values of the kind one person may have before what joined them is taken for a shared one.
    """

    names_a_person: bool
    most: int


RULES: dict[str, Rule] = {
    # a retailer gives each person one: two of them are two people, unless an alias says otherwise
    "loyalty_card": Rule(names_a_person=True, most=1),
    "user_id": Rule(names_a_person=True, most=1),
    "email": Rule(names_a_person=True, most=3),
    "phone": Rule(names_a_person=True, most=3),
    # cookies are reset all the time, so having had many proves nothing
    "device": Rule(names_a_person=False, most=100),
    "cookie": Rule(names_a_person=False, most=1_000),
    "receipt": Rule(names_a_person=False, most=10_000),
}
_PLACEHOLDERS = frozenset(
    {
        "", "-", "--", "?", "0", "00000000-0000-0000-0000-000000000000", "n/a", "na", "nan", "nil", "none", "null", "undefined", "unknown",
        "anonymous", "guest", "false", "true", "[object object]", "not set", "(not set)",
    }
)  # fmt: skip
"""What broken clients send in place of an identifier."""
_NOBODYS_MAILBOX = re.compile(
    r"^(test|tests|testing|tester|no-?reply|do-?not-?reply|none|na|unknown|anonymous|nobody|guest|asdf+|x+|a|abc|dummy|fake|email|e-mail|mail)"
    r"(\+[^@]*)?@"
)
"""Addresses that tills, forms and testers type when there is none."""
ADDRESS = re.compile(r"[\w.+'-]+(?:@|%40)[\w-]+(?:\.[\w-]+)+")
"""An e-mail address within a text, or within an address of the web."""
NUMBER = re.compile(r"\+\d[\d\s().-]{7,}\d")
"""An international phone number within a text."""
OF_A_PERSON = re.compile(
    r"(?:^|[._ -])(?:(?:first|last|middle|full|given|family|maiden|sur|user|customer|contact)[._ -]?name|birth\w*|dob|street\w*|address\w*|"
    r"\w*_address|phone\w*|mobile\w*|e[._ -]?mail\w*|post(?:al)?[._ -]?code|zip\w*|passport\w*|ssn|iban|national_id|tax_id)",
    re.IGNORECASE,
)
"""The names of what is true of a person, wherever it is said."""


class IdentifierError(ValueError):
    """A value that is no identifier of its kind; the message tells the mend."""


def normalise(kind: IdentifierKind, value: str, region: str | None = None) -> str | None:
    """The form in which *value* is compared, or None where it is a placeholder that identifies nobody.

    E-mail addresses are lower-cased with their domain in ASCII; phone numbers become E.164, read in *region* (ISO 3166) unless
    they carry their country code.

    Raises:
        IdentifierError: no e-mail address, or no phone number.
    """
    text = value.strip()
    if text.lower() in _PLACEHOLDERS:
        return None
    if kind == "email":
        return _email(text)
    if kind == "phone":
        return _phone(text, region)
    return text


def normalise_all(identifiers: Mapping[IdentifierKind, str], region: str | None = None) -> dict[IdentifierKind, str]:
    """Each identifier in its compared form; placeholders are left out.

    Raises:
        IdentifierError: as ``normalise``; ``kind`` of the error names the culprit.
    """
    found = {}
    for kind, value in identifiers.items():
        form = normalise(kind, value, region)
        if form is not None:
            found[kind] = form
    return found


def _email(text: str) -> str | None:
    try:
        address = validate_email(text, check_deliverability=False, test_environment=True)
    except EmailNotValidError:
        raise IdentifierError("email: not an e-mail address") from None
    plain = (address.ascii_email or address.normalized).lower()
    return None if _NOBODYS_MAILBOX.match(plain) else plain


def _phone(text: str, region: str | None) -> str | None:
    digits = re.sub(r"\D", "", text)
    if digits and (len(set(digits)) == 1 or digits in "01234567890123456789"):
        return None
    try:
        number = phonenumbers.parse(text, region)
    except phonenumbers.NumberParseException:
        mend = "write it with its country code, as +44 20 7946 0958" + ("" if region else ", or set phone_region in the shop")
        raise IdentifierError(f"phone: not a phone number: {mend}") from None
    if not phonenumbers.is_possible_number(number):
        raise IdentifierError("phone: too short or too long for a phone number of its country")
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)


def kind_of(key: str) -> str:
    """The kind of an identity key."""
    return key.partition(":")[0]


def names_a_person(key: str) -> bool:
    """Whether the key is of a kind that belongs to somebody, rather than to a thing."""
    return RULES[kind_of(key)].names_a_person
